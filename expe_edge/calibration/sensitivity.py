"""Where quality goes: the KL divergence to float32 with one weight quantized and all others left alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from expe_edge.calibration.evidence import Evidence
from expe_edge.divergence import log_divergence, log_softmax
from expe_edge.graph.attention import SINCE_INT8_CACHE
from expe_edge.graph.build import BuiltGraph, graph_contract
from expe_edge.graph.linears import LINEAR_FORMATS
from expe_edge.graph.run import logits_of, open_graph
from expe_edge.graph.sizes import measure_parts
from expe_edge.package.manifest import release
from expe_edge.quant.formats import CACHE, EMBEDDING, Formats
from expe_edge.quant.recipe import Recipe
from expe_edge.spool import Spool

Ids = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Sensitivity:
    """What one weight costs in one format.

    kl: mean KL divergence to float32, nats per token, with its standard error over texts. bytes: of the weight as
    stored; of the cache, for one token.
    """

    weight: str
    format: str
    kl: float
    kl_stderr: float
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


class Loss(NamedTuple):
    """What a graph loses against float32, nats per token: means over texts with their standard errors.

    kl: KL divergence of its predictions. rise: of the loss on the text itself; below 0 where it predicts that better.
    """

    kl: float
    kl_stderr: float
    rise: float
    rise_stderr: float


@dataclass
class Divergence:
    """Measures graphs of one model against its float32 graph on fixed texts.

    texts: token ids (T,), all of one length.
    """

    evidence: Evidence
    texts: Sequence[Ids]

    @cached_property
    def expected(self) -> Spool:
        """The float32 logits (t, V) of every part of every text."""
        runs = self._runs(self.evidence.float_graph().model, int8_cache=False)
        return Spool(logits for run in runs for logits in run)

    def of(self, model: onnx.ModelProto, *, int8_cache: bool = False) -> Loss:
        """Return what `model` loses."""
        expected, runs = iter(self.expected), self._runs(model, int8_cache=int8_cache)
        lost = [_lost(expected, actual, tokens) for actual, tokens in zip(runs, self.texts, strict=True)]
        divergences, rises = zip(*lost, strict=True)
        return Loss(*_mean(divergences), *_mean(rises))

    def _runs(self, model: onnx.ModelProto, *, int8_cache: bool) -> Iterator[Iterator[Float]]:
        contract = graph_contract(self.evidence.weights.config, int8_cache=int8_cache)
        session = open_graph(model)
        return (logits_of(session, contract, tokens) for tokens in self.texts)


def _lost(before: Iterator[Float], after: Iterable[Float], tokens: Ids) -> tuple[float, float]:
    """Return the divergence and the rise of the loss on `tokens` (T,), nats per token.

    Args:
        before, after: logits (t, V) of consecutive parts of the tokens; of `before`, no more than that is read.
    """
    divergences, rises, begin = [], [], 0
    for logits in after:
        expected, predicted = log_softmax(next(before)), log_softmax(logits)
        divergences.append(log_divergence(expected, predicted))
        following = tokens[begin + 1 : begin + 1 + len(logits)]
        rises.append((expected - predicted)[range(len(following)), following])
        begin += len(logits)
    rise = np.concatenate(rises)
    return np.concatenate(divergences).mean(), rise.sum() / max(len(rise), 1)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error; NaN for that of one value."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return float(np.mean(values)), float(spread)


def weights_of(evidence: Evidence) -> list[str]:
    """Return the weights that can be quantized one by one: all linears, and the embedding unless it is the head."""
    tied = evidence.weights.config.tie_word_embeddings
    return [*([] if tied else [EMBEDDING]), *evidence.linears]


def measure_sensitivity(
    evidence: Evidence,
    recipe: Recipe,
    candidates: Mapping[str, Sequence[str]],
    texts: Sequence[Ids],
    advance: Callable[[], None] = lambda: None,
) -> list[Sensitivity]:
    """Return the cost of every weight in each of its candidate formats.

    Args:
        recipe: solver, block size and the like.
        candidates: weight to names of formats, as for `Formats.by_weight`.
        advance: called after each.
    """
    measure, results = Divergence(evidence, texts), []
    for weight, formats in candidates.items():
        for name in formats:
            graph = evidence.build(recipe, Formats.by_weight({weight: name}))
            loss = measure.of(graph.model, int8_cache=weight == CACHE)
            size = stored_bytes(evidence, graph, weight, name)
            results.append(Sensitivity(weight, name, loss.kl, loss.kl_stderr, size))
            advance()
    return results


def stored_bytes(evidence: Evidence, graph: BuiltGraph, weight: str, name: str) -> int:
    """Return the bytes of `weight` in `graph`."""
    if weight == CACHE:
        return graph_contract(evidence.weights.config, int8_cache=True).cache_bytes
    parts = measure_parts(graph.model, dict.fromkeys(graph.linears, name), name)
    return sum(part["bytes"] for part in parts if part["part"] == weight)


def default_candidates(evidence: Evidence, precisions: Sequence[str]) -> dict[str, list[str]]:
    """Return the formats of each weight as packages of `precisions` have them, and an int8 cache where there is one."""
    embeddings = list(dict.fromkeys(LINEAR_FORMATS[precision].embedding for precision in precisions))
    candidates = {weight: embeddings if weight == EMBEDDING else [*precisions] for weight in weights_of(evidence)}
    has_cache = not evidence.portable_only and release(ort.__version__) >= release(SINCE_INT8_CACHE)
    return {**candidates, CACHE: ["int8"]} if has_cache else candidates
