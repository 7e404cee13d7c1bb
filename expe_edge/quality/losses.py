"""Losses of chosen tokens of a text, by one model or by several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from expe_edge.divergence import Double
from expe_edge.quality.comparison import unique_names
from expe_edge.quality.scoring import Ids, Predictions, Scorer


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
        """Return what every model says of `tokens[begin:]`; see `Scorer.predictions`."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(lambda scorer: scorer.predictions(tokens, begin), self.scorers))


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
