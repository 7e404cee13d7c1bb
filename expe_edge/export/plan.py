"""A recipe made concrete for one model: a format for every weight, and what that asks of onnxruntime."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from expe_edge.calibration.auto import Choice
from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.observations import cache_scales
from expe_edge.calibration.windows import Windows
from expe_edge.graph.attention import SINCE_BIAS, SINCE_INT8_CACHE, SINCE_WINDOWS
from expe_edge.graph.build import HEAD, BuiltGraph, graph_contract
from expe_edge.graph.linears import LINEAR_FORMATS
from expe_edge.package.contract import GraphContract
from expe_edge.package.manifest import release
from expe_edge.quant.formats import FLOAT32, Formats
from expe_edge.quant.recipe import DEFAULT_SOLVER, Recipe


@dataclass(frozen=True)
class Plan:
    """The formats of one package.

    evidence: the model, smoothed or not, and what calibration shows of it. strengths: of smoothing, by linear.
    choice: what `auto` chose by. windows: of the heads that look near, where that was asked for.
    """

    recipe: Recipe
    evidence: Evidence
    formats: Formats
    strengths: dict[str, float] = field(default_factory=dict)
    choice: Choice | None = None
    windows: Windows | None = None

    @property
    def linears(self) -> dict[str, str]:
        """The format of every linear."""
        return {name: self.formats.linears[name] for name in self.evidence.linears}

    @property
    def embedding(self) -> str:
        """The format of the embedding: the head's, where it is the same matrix."""
        tied = self.evidence.weights.config.tie_word_embeddings
        return self.formats.linears[HEAD] if tied else self.formats.embedding

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded or left away."""
        return self.windows is None and {*self.linears.values(), self.embedding, self.formats.cache} == {FLOAT32}

    @property
    def contract(self) -> GraphContract:
        """The graph's inputs and outputs."""
        recipe = self.recipe
        return graph_contract(
            self.evidence.weights.config,
            int8_cache=recipe.cache == "int8",
            portable=recipe.portable,
            windows=self.head_windows,
            gpu=recipe.gpu,
        )

    @property
    def head_windows(self) -> tuple[int, ...]:
        """The window of every key/value head; empty where all see all tokens."""
        return self.windows.windows if self.windows else ()

    def build(self) -> BuiltGraph:
        """Build the graph."""
        return self.evidence.build(self.recipe, self.formats, self.head_windows)

    @property
    def requires_onnxruntime(self) -> str:
        """The oldest onnxruntime with all kernels of the graph."""
        return oldest_onnxruntime(self.recipe, set(self.linears.values()))

    def measured(self) -> dict[str, Any] | None:
        """Return what was measured on calibration text for this package; None where nothing was."""
        record: dict[str, Any] = {}
        if any(LINEAR_FORMATS[name].calibrated for name in self.linears.values()):
            record["ranges"] = {name: list(bounds) for name, bounds in self.evidence.ranges.items()}
        if self.evidence.needs_moments(self.recipe, set(self.linears.values())):
            record["solver"] = self.recipe.solver or DEFAULT_SOLVER
        if self.recipe.cache == "int8":
            record["cache_scales"] = [  # the extremes; all of them are in the graph
                {part: [float(scale.min()), float(scale.max())] for part, scale in layer._asdict().items()}
                for layer in cache_scales(self.evidence.observations.cache)
            ]
        if self.strengths:
            record["smoothing"] = self.strengths
        if self.choice:
            record["choice"] = self.choice.to_dict()
        if self.windows:
            record["head_windows"] = self.windows.to_dict()
        return {"weights": self.evidence.fingerprint, **record} if record else None


def oldest_to_export(recipe: Recipe, linears: set[str]) -> str:
    """Return the oldest onnxruntime that shows the kernels of `recipe`, as an export verifies them."""
    fused = [LINEAR_FORMATS[name].fused_since for name in linears] if recipe.portable else []
    return max([oldest_onnxruntime(recipe, linears), *fused], key=release)


def oldest_onnxruntime(recipe: Recipe, linears: set[str]) -> str:
    """Return the oldest onnxruntime with the kernels of `recipe` for linears of these formats."""
    kinds = [LINEAR_FORMATS[name] for name in linears]
    if recipe.portable:
        needed = [kind.portable_since for kind in kinds]
    else:
        needed = [SINCE_BIAS, *(kind.since_half if recipe.gpu == "float16" else kind.since for kind in kinds)]
        if recipe.head_window is not None and recipe.gpu is None:
            needed.append(SINCE_WINDOWS)
        if recipe.cache == "int8":
            needed.append(SINCE_INT8_CACHE)
    return max(needed, key=release)
