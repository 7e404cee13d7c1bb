"""Losses of chosen tokens of a text, by one model or by several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from expe_edge.divergence import log_softmax
from expe_edge.quality.comparison import Double, unique_names
from expe_edge.quality.scoring import Bools, CheckpointScorer, Ids, Scorer


@dataclass(frozen=True)
class Predictions:
    """What a model says of consecutive tokens of a text, each predicted from all tokens before it.

    nll: the loss of each token in nats, (t,). likeliest: whether it is the model's likeliest prediction, (t,).
    """

    nll: Double
    likeliest: Bools


def predictions(scorer: Scorer, tokens: Ids, begin: int) -> Predictions:
    """Return what a model says of `tokens[begin:]`, teacher-forced over tokens (T,). `begin` is at least 1."""
    if isinstance(scorer, CheckpointScorer):
        return Predictions(*scorer.losses(tokens, begin))
    losses: list[Double] = []
    likeliest: list[Bools] = []
    row = 0
    for logits in scorer.logits(tokens[:-1]):  # row p of the logits predicts token p + 1
        first = max(begin - 1 - row, 0)
        if first < len(logits):
            predicted = log_softmax(logits[first:])
            targets = tokens[row + first + 1 : row + len(logits) + 1]
            losses.append(-predicted[np.arange(len(targets)), targets])
            likeliest.append(predicted.argmax(axis=-1) == targets)
        row += len(logits)
    return Predictions(np.concatenate(losses), np.concatenate(likeliest))


class Panel:
    """Models of one vocabulary that read the same texts, `at_once` of them at a time.

    Attributes:
        names: what tells the models apart, in their order. training_length: N of the first model.

    Raises:
        ConfigError: the same model is given twice.
    """

    def __init__(self, scorers: Sequence[Scorer], at_once: int = 1) -> None:
        self.scorers, self.at_once = tuple(scorers), at_once
        self.names = unique_names([scorer.path for scorer in scorers])
        self.training_length: int = scorers[0].training_length

    def score(self, tokens: Ids, begin: int) -> list[Predictions]:
        """Return what every model says of `tokens[begin:]`; see `predictions`."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(lambda scorer: predictions(scorer, tokens, begin), self.scorers))


def document_losses(
    panel: Panel, documents: Sequence[Ids], tokens: int, advance: Callable[[int], None] = lambda _: None
) -> Double:
    """Return the losses of every model over the beginnings of documents, in nats, (models, documents, tokens).

    Loss p of a document is that of its token p + 1, predicted from its first p + 1 tokens.

    Args:
        documents: token ids (T,), each at least `tokens` + 1 long.
        advance: called with the number of tokens that every model has just scored.
    """
    losses = np.zeros((len(panel.scorers), len(documents), tokens))
    for index, document in enumerate(documents):
        for model, predicted in enumerate(panel.score(document[: tokens + 1], 1)):
            losses[model, index] = predicted.nll
        advance(tokens)
    return losses
