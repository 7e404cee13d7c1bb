"""A float model with all that quantization may ask of it, each measured when it is first needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import numpy_helper

from expe_edge.calibration.observations import (
    HISTOGRAM_METHODS,
    OUTPUT_ERROR,
    Calibration,
    Observations,
    cache_scales,
    fit_ranges,
    measure_ranges,
    observe,
    require_enough,
    watch,
)
from expe_edge.calibration.smoothing import smooth
from expe_edge.graph.build import BuiltGraph, Linear, build_graph, graph_contract, linears_of
from expe_edge.graph.linears import (
    LINEAR_FORMATS,
    Float32,
    FormatOptions,
    LinearFormat,
    StaticInt8,
    make_format,
    needs_moments,
)
from expe_edge.graph.matrices import EMBEDDING_FORMATS
from expe_edge.graph.weights import ModelWeights
from expe_edge.package.contract import GraphContract
from expe_edge.quant.blocks import Double
from expe_edge.quant.channels import Range
from expe_edge.quant.formats import FLOAT32, Formats
from expe_edge.quant.recipe import Recipe, WeightRounding
from expe_edge.quant.solvers import WeightQuantizer

Ids = npt.NDArray[np.int64]


@dataclass
class Evidence:
    """A model's weights, and what calibration text shows of them.

    windows: called for the text when something must be measured. given_ranges: measured before, taken as they are.
    rounding: what the weights were trained for, if anything. progress: called with a line before long work.
    """

    weights: ModelWeights
    calibration: Calibration
    windows: Callable[[], Sequence[Ids]]
    given_ranges: Mapping[str, Range] | None = None
    rounding: WeightRounding | None = None
    progress: Callable[[str], None] = lambda _: None
    _quantizers: dict[tuple[str, int | None], WeightQuantizer] = field(default_factory=dict, init=False, repr=False)

    @property
    def portable_only(self) -> bool:
        """Whether only portable graphs can be made of the model."""
        return self.weights.config.needs_portable is not None

    @cached_property
    def contract(self) -> GraphContract:
        """Of the float32 graph."""
        return graph_contract(self.weights.config, portable=self.portable_only)

    def float_graph(self) -> BuiltGraph:
        """Build the float32 graph: an ordinary one, where one can be made of the model. It is large, so not kept."""
        return build_graph(self.weights, Float32(), portable=self.portable_only)

    @cached_property
    def linears(self) -> dict[str, Linear]:
        """The products of the float32 graph by name."""
        return linears_of(self.weights, portable=self.portable_only)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all weights: whose ranges these are."""
        digest = hashlib.sha256()
        for tensor in sorted(self.float_graph().model.graph.initializer, key=lambda tensor: str(tensor.name)):
            digest.update(tensor.name.encode())
            digest.update(numpy_helper.to_array(tensor).tobytes())
        return digest.hexdigest()

    @cached_property
    def observations(self) -> Observations:
        """What the linears and the cache see."""
        windows = self.windows()
        self.progress(f"observing {len(windows)} windows of {len(windows[0])} tokens")
        return observe(watch(self.float_graph()), self.contract, windows)

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        """The ranges of static formats."""
        if self.given_ranges is not None:
            return self.given_ranges
        if self.calibration.method == OUTPUT_ERROR:
            return fit_ranges(self.linears, self.observations, lambda ranges: StaticInt8(FormatOptions(ranges=ranges)))
        self.require_ranges()
        windows = self.windows()
        self.progress(f"calibrating {len(windows)} windows of {len(windows[0])} tokens")
        return measure_ranges(self.float_graph(), self.contract, windows, self.calibration)

    @cached_property
    def moments(self) -> Mapping[str, Double]:
        """The second moments of every linear's input."""
        self.require_moments()
        return {name: observed.moments for name, observed in self.observations.inputs.items()}

    def require_ranges(self) -> None:
        """Raise `ExportError` where calibration has too little text for its method."""
        histograms = self.calibration.method in HISTOGRAM_METHODS
        require_enough(self.calibration, self.weights.config.training_length, histograms=histograms, widest=None)

    def require_moments(self) -> None:
        """Raise `ExportError` where it has too little for second moments that can be inverted."""
        widest = max(len(linear.weight) for linear in self.linears.values())
        require_enough(self.calibration, self.weights.config.training_length, histograms=False, widest=widest)

    def formats(self, recipe: Recipe, names: Mapping[str, str]) -> dict[str, LinearFormat[Any]]:
        """Return the format of each linear, given their names, ready to build a graph."""
        made = {name: self._format(recipe, name) for name in set(names.values())}
        return {linear: made[name] for linear, name in names.items()}

    def _format(self, recipe: Recipe, name: str) -> LinearFormat[Any]:
        solver, block_size = recipe.solver_for(name, self.rounding)
        quantizer = self._quantizers.setdefault((solver, block_size), WeightQuantizer(solver, block_size))
        if needs_moments(name, solver):
            quantizer.moments = self.moments
        ranges = self.ranges if LINEAR_FORMATS[name].calibrated else {}
        return make_format(name, FormatOptions(recipe.reduce_range, recipe.portable, ranges, quantizer))

    def needs_moments(self, recipe: Recipe, names: Iterable[str]) -> bool:
        """Tell whether any of the formats `names` is solved with the inputs' moments."""
        return any(needs_moments(name, recipe.solver_for(name, self.rounding)[0]) for name in names)

    def build(self, recipe: Recipe, formats: Formats, windows: Sequence[int] = ()) -> BuiltGraph:
        """Return the graph in `formats`. recipe: solver, block size and the like. windows: of the key/value heads."""
        names = {linear: formats.linears.get(linear, FLOAT32) for linear in self.linears}
        embedding = EMBEDDING_FORMATS[formats.embedding](self.weights.embedding, recipe.block_size)
        graph = build_graph(
            self.weights,
            self.formats(recipe, names),
            embedding=embedding,
            cache=cache_scales(self.observations.cache) if formats.cache == "int8" else None,
            portable=recipe.portable,
            windows=windows,
            gpu=recipe.gpu,
        )
        del graph.model.graph.value_info[:]  # calibration's; a tenth of a small package's overhead
        return graph

    def smoothed(self, recipe: Recipe, names: Mapping[str, str]) -> tuple[Evidence, dict[str, float]]:
        """Return the same model with outliers moved into its weights, and the strength chosen for each linear."""

        def make(linear: str, bounds: Range) -> LinearFormat[Any]:
            fresh = WeightQuantizer("rtn", recipe.block_size)
            return make_format(names[linear], FormatOptions(recipe.reduce_range, False, {linear: bounds}, fresh))

        observations = self.observations
        self.progress("searching smoothing strengths")
        weights, strengths = smooth(self.weights, observations, make)
        return Evidence(weights, self.calibration, self.windows, self.given_ranges, progress=self.progress), strengths
