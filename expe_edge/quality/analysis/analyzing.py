"""Does the embedding survive, and where does attention reach? Checkpoints of any encoding, over held-out documents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from expe_edge.divergence import Double, Float
from expe_edge.errors import CheckpointError, ConfigError, CorpusError
from expe_edge.progress import counted
from expe_edge.quality.analysis.embedding import Moments, Neighbours, Spread, neighbours
from expe_edge.quality.analysis.observing import AttentionView, observe
from expe_edge.quality.analysis.position_probe import FEWEST_FOLDS, PositionProbe, PositionSums
from expe_edge.quality.analysis.reach import SINKS, HeadReach, Reached, first_query, head_reaches, reached
from expe_edge.quality.analysis.slopes import HeadSlopes, head_slopes
from expe_edge.quality.comparison import long_documents, require_same_vocabulary, unique_names
from expe_edge.quality.scoring import CheckpointScorer, Ids
from expe_edge.results import Result
from expe_edge.text.tokenization import load_tokenizer
from expe_edge.training.checkpoint import load_checkpoint


@dataclass(frozen=True)
class AnalysisSettings:
    """What is read. length: of texts, in units of N. documents: most to read. seed: of examples and drawn dimensions.

    Raises:
        ConfigError: a value that is out of range.
    """

    length: int = 4
    documents: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("documents", FEWEST_FOLDS), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; at least {least}")


@dataclass(frozen=True)
class ModelAnalysis(Result):
    """Results of one model. dims: l; where it is 0, no dimensions hold positions, and `neighbours` is None.

    spreads: of the embedding, then by layer of the residual stream and of the same behind the norm. positions: from the
    embeddings to behind the last layer. slopes: by layer and head, none where the encoding has none. reaches: the same.
    """

    model: str
    dims: int
    spreads: tuple[Spread, ...]
    neighbours: Neighbours | None
    positions: tuple[PositionProbe, ...]
    slopes: tuple[HeadSlopes, ...]
    reaches: tuple[HeadReach, ...]


@dataclass(frozen=True)
class AnalysisReport(Result):
    """Results of every model over the same texts. training_length: N of the first. length: of texts, in tokens."""

    training_length: int
    length: int
    documents: int
    seed: int
    models: tuple[ModelAnalysis, ...]


def analyze(
    checkpoints: Sequence[Path],
    settings: AnalysisSettings,
    *,
    sources: Sequence[str] = (),
    text_field: str = "text",
) -> AnalysisReport:
    """Analyze checkpoints over a sample of the first one's held-out documents, or of `sources`, with a progress bar.

    Args:
        checkpoints: of one vocabulary. Lengths are in units of the first one's N.
        sources, text_field: as for `corpus.load_corpus`.

    Raises:
        ConfigError: a model given twice, models of different tokenizers, texts that are too short to look back in.
        CheckpointError: as `load_checkpoint`, or states that are not finite.
        CorpusError: fewer than three documents of that length.
    """
    names = unique_names(checkpoints)
    scorers = [CheckpointScorer(load_checkpoint(path)) for path in checkpoints]
    n = scorers[0].training_length
    require_same_vocabulary(scorers)
    length = settings.length * n
    if length <= 2 * SINKS:
        raise ConfigError(
            f"`length` {settings.length} is {length} tokens, as N is {n}, but reach is measured in more than "
            f"{2 * SINKS}; raise `length`"
        )
    documents, _ = long_documents(scorers[0], sources, text_field, length, settings.documents)
    if len(documents) < FEWEST_FOLDS:
        raise CorpusError(
            f"{len(documents)} documents of {length} tokens, but the position probe fits, chooses and tests on "
            f"{FEWEST_FOLDS} at least; lower `length`, or give more text with `sources`"
        )
    texts = np.stack([tokens[:length] for tokens in documents])
    used, tokenizer = np.unique(texts), load_tokenizer(scorers[0].path)
    words = [tokenizer.decode([token], skip_special_tokens=False) for token in used.tolist()]
    models = []
    with counted("observing tokens", len(scorers) * texts.size) as advance:
        for name, scorer in zip(names, scorers, strict=True):
            observations = _Observations(scorer, len(texts), n)
            for tokens in texts:
                observations.read(tokens)
                advance(length)
            models.append(observations.analysis(name, used, words, settings.seed))
    return AnalysisReport(n, length, len(texts), settings.seed, tuple(models))


class _Observations:
    """What is kept of one model's reading, as sums where these are enough."""

    def __init__(self, scorer: CheckpointScorer, documents: int, training_length: int) -> None:
        self.model, self.path, self.document = scorer.model, scorer.path, -1
        layers, width = self.model.config.num_hidden_layers, self.model.config.hidden_size
        self.layers, self.width = layers, width
        self.positions = PositionSums(layers, documents, width, training_length)
        self.residuals = [Moments(width) for _ in range(layers)]
        self.normed = [Moments(width) for _ in range(layers)]
        self.slopes: list[list[Float]] = [[] for _ in range(layers)]
        self.reached: list[list[Reached]] = [[] for _ in range(layers)]

    def read(self, tokens: Ids) -> None:
        """Let the model read the next document, (T,)."""
        self.document += 1
        observe(self.model, tokens, self)

    def residual(self, layer: int, hidden: Tensor) -> None:
        states = _double(hidden)
        if not np.isfinite(states).all():
            behind = f"layer {layer}" if layer else "the embeddings"
            raise CheckpointError(f"{self.path}: states behind {behind} are not finite; its weights are damaged")
        self.positions.add(layer, self.document, states)
        if layer < self.layers:
            self.residuals[layer].add(states)

    def attention(self, layer: int, view: AttentionView) -> None:
        self.normed[layer - 1].add(_double(view.normed))
        self.reached[layer - 1].append(reached(view.weights(first_query(len(view.normed)))))
        if view.slopes is not None:
            self.slopes[layer - 1].append(view.slopes.float().cpu().numpy())

    def analysis(self, name: str, used: Ids, words: Sequence[str], seed: int) -> ModelAnalysis:
        """Reduce all documents to the model's results. used: tokens that occur, (V,). words: their texts."""
        dims = self.model.config.encoding_parameters.position_dims
        table = self.model.embedding.weight.detach().float().cpu().numpy()[used]
        layers = range(1, self.layers + 1)
        return ModelAnalysis(
            model=name,
            dims=dims,
            spreads=tuple(self._spreads(table, dims)),
            neighbours=neighbours(table, dims, words, seed) if dims else None,
            positions=tuple(self.positions.result(layer) for layer in (0, *layers)),
            slopes=tuple(each for layer in layers for each in head_slopes(layer, self.slopes[layer - 1])),
            reaches=tuple(each for layer in layers for each in head_reaches(layer, self.reached[layer - 1])),
        )

    def _spreads(self, table: Float, dims: int) -> Iterator[Spread]:
        embedding = Moments(self.width)
        embedding.add(table.astype(np.float64))
        yield embedding.spread("embedding", 0, dims)
        for place, moments in (("residual", self.residuals), ("normed", self.normed)):
            yield from (of_layer.spread(place, layer, dims) for layer, of_layer in enumerate(moments, 1))


def _double(states: Tensor) -> Double:
    values: Double = states.double().cpu().numpy()
    return values
