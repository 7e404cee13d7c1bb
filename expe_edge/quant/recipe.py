"""What a package is asked to be: the format of its linears, its embedding and its cache. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from expe_edge.errors import ConfigError, ExportError, unknown_name

PRECISIONS = ("float32", "float16", "bfloat16", "int8-dynamic", "int8-static", "int8-weight", "int4-weight", "auto")
EMBEDDINGS = ("float32", "float16", "bfloat16", "int8", "int4")
CACHES = ("float32", "int8")
DEVICES = ("cpu", "cuda")
SOLVERS = ("rtn", "gptq")
DEFAULT_SOLVER = "gptq"
BLOCK_SIZES = (16, 32, 64, 128, 256)
#: Texts of one training length each that calibration runs on (GPTQ's paper takes as many).
CALIBRATION_WINDOWS = 128
#: Precisions whose weights have a scale for each output channel; `reduce_range` changes them.
PER_CHANNEL = ("int8-dynamic", "int8-static")
#: Bits of the weights of the precisions that store integers, and those of them that have a scale for each block.
WEIGHT_BITS = {"int8-dynamic": 8, "int8-static": 8, "int8-weight": 8, "int4-weight": 4}
BLOCKWISE = ("int8-weight", "int4-weight")
#: Precisions of packages for GPUs: what onnxruntime's CUDA provider has products for.
GPU_PRECISIONS = ("float32", "float16", "int8-weight", "int4-weight")
#: Blocks that its kernels of single rows take; with others a step fails there.
GPU_BLOCK_SIZES = (16, 32, 64, 128)
#: Nats per token that windows of heads may cost.
HEAD_WINDOW_COST = 0.002


@dataclass(frozen=True)
class WeightRounding:
    """How quantization-aware training rounds weights: as `precision` does, to the nearest.

    block_size: columns that share a scale; None for the precision's own, and where a whole row shares one.

    Raises:
        ConfigError: a precision without integer weights, or a block size that it does not take.
    """

    precision: str
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in WEIGHT_BITS:
            unknown = unknown_name("quantization-aware precision", self.precision, WEIGHT_BITS)
            has_none = (
                f"{self.precision} has no integer weights to train for; available: {', '.join(sorted(WEIGHT_BITS))}"
            )
            raise ConfigError(f"{has_none if self.precision in PRECISIONS else unknown}; change `quantization_aware`")
        if self.block_size is not None and self.precision not in BLOCKWISE:
            raise ConfigError(
                f"`block_size` is for {' and '.join(BLOCKWISE)}; {self.precision} has a scale for each row"
            )
        require_block_size(self.block_size)

    @property
    def bits(self) -> int:
        """Bits of a weight."""
        return WEIGHT_BITS[self.precision]


@dataclass(frozen=True)
class Recipe:
    """One package's formats, as the command line's options of the same names.

    Attributes:
        precision: format of the linears; `auto` chooses one for each.
        embedding: format of the embedding; None for the precision's own.
        cache: float32 or int8.
        solver, block_size: how integer weights are rounded; None for gptq and the precision's own size, or for what the
            weights were trained for, see `solver_for`.
        smoothing: move outliers of activations into weights, as far as that lowers the output error.
        reduce_range: 7-bit weights in the int8 formats.
        portable: standard ONNX operators alone.
        ort_format: the graph in ORT format too, and a list of its operators, for reduced builds of onnxruntime.
        target: the place that it is for, `chosen` the options that were left to that; see `chosen_for`.
        device: what it is for. On a GPU (`cuda`) float32 computes in float32, every other precision in float16.
        head_window: tokens that heads with slopes see and keep; None for all. head_window_cost: the most nats per token
            that this may add to the loss.
        budget_kl: for `auto`, the most KL divergence to float32, nats per token; the loss on text may rise by
            half of it. max_size: the most bytes of the graph.
    """

    precision: str = "float32"
    embedding: str | None = None
    cache: str = "float32"
    solver: str | None = None
    block_size: int | None = None
    smoothing: bool = False
    reduce_range: bool = False
    portable: bool = False
    device: str = "cpu"
    ort_format: bool = False
    target: str | None = None
    chosen: Sequence[str] = ()
    head_window: int | None = None
    head_window_cost: float = HEAD_WINDOW_COST
    budget_kl: float | None = None
    max_size: int | None = None

    def __post_init__(self) -> None:
        require_known("precision", self.precision, PRECISIONS)
        require_known("embedding", self.embedding or "float32", EMBEDDINGS)
        require_known("cache", self.cache, CACHES)
        require_known("device", self.device, DEVICES)
        require_known("solver", self.solver or DEFAULT_SOLVER, SOLVERS)
        require_block_size(self.block_size)
        if self.reduce_range and self.precision not in PER_CHANNEL:
            raise ExportError(
                f"`reduce_range` has no meaning for {self.precision}; it is for {' and '.join(PER_CHANNEL)}"
            )
        if self.portable and self.cache != "float32":
            raise ExportError(
                f"`portable` has a float32 cache: no standard operator appends to one of {self.cache}; drop `cache` "
                f"{self.cache}, or `portable`"
            )
        self._check_device()
        self._check_head_window()
        self._check_budget()

    @property
    def gpu(self) -> str | None:
        """The type that a graph for GPUs computes in; None for one for CPUs."""
        if self.device == "cpu":
            return None
        return "float32" if self.precision == "float32" else "float16"

    def _check_device(self) -> None:
        if self.device == "cpu":
            return
        if self.precision not in GPU_PRECISIONS:
            raise ExportError(
                f"`precision` {self.precision} is for CPUs: `device` {self.device} has {', '.join(GPU_PRECISIONS)}; "
                "change one of them"
            )
        if self.block_size not in (None, *GPU_BLOCK_SIZES):
            raise ExportError(
                f"`block_size` is {self.block_size}; on `device` {self.device} onnxruntime takes "
                f"{', '.join(map(str, GPU_BLOCK_SIZES))}"
            )
        if self.portable:
            raise ExportError(f"`portable` is for any device, `device` {self.device} for one; drop one of them")
        if self.ort_format:
            raise ExportError("`ort_format` is for builds of onnxruntime without GPUs; drop it, or `device`")

    def _check_head_window(self) -> None:
        if self.head_window is None:
            return
        if self.head_window < 1:
            raise ExportError(f"`head_window` is {self.head_window}; at least 1")
        if math.isnan(self.head_window_cost):
            raise ExportError("`head_window_cost` is no number")
        if self.portable:
            raise ExportError(
                "`portable` has no windows: its cache grows with the text; drop `head_window`, or `portable`"
            )

    def _check_budget(self) -> None:
        given = [name for name in ("budget_kl", "max_size") if getattr(self, name) is not None]
        if self.precision == "auto" and len(given) != 1:
            raise ExportError("`precision` auto needs `budget_kl` or `max_size`, one of them")
        if self.precision == "auto" and (self.smoothing or self.embedding):
            name = "smoothing" if self.smoothing else "embedding"
            raise ExportError(f"`{name}` does not go with `precision` auto, which chooses for itself; drop it")
        if self.precision != "auto" and given:
            raise ExportError(f"`{given[0]}` is for `precision` auto, not {self.precision}")
        for name in given:
            if not getattr(self, name) > 0:  # NaN neither
                raise ExportError(f"`{name}` is {getattr(self, name)}; it must be above 0")

    @property
    def name(self) -> str:
        """The package's directory: the precision, and whatever else changes what a client must be able to do."""
        marks = {
            "7bit": self.reduce_range,
            "int8-cache": self.cache == "int8",
            "windowed": self.head_window is not None,
            "portable": self.portable,
            self.device: self.device != "cpu",
        }
        return "-".join([self.precision, *(mark for mark, given in marks.items() if given)])

    def solver_for(self, precision: str, trained: WeightRounding | None) -> tuple[str, int | None]:
        """Return solver and block size for weights of `precision`, given what they were `trained` for, if anything.

        Weights that have learned to be rounded to the nearest are, in the blocks they know, unless it asks for others.
        """
        if trained is None or not self._leaves_to(trained, precision):
            return self.solver or DEFAULT_SOLVER, self.block_size
        return self.solver or "rtn", trained.block_size

    def resolved(self, trained: WeightRounding | None) -> Recipe:
        """Return the recipe with what it leaves open filled in for weights that were `trained` for its precision."""
        if trained is None or not self._leaves_to(trained, self.precision):
            return self
        solver, block_size = self.solver_for(self.precision, trained)
        return replace(self, solver=solver, block_size=block_size)

    def _leaves_to(self, trained: WeightRounding, precision: str) -> bool:
        same_weights = trained.precision == precision or {trained.precision, precision} == set(PER_CHANNEL)
        if not same_weights or self.smoothing or self.reduce_range:  # 7 bits are a grid that they never saw
            return False
        return self.block_size in (None, trained.block_size)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return dict(vars(self))


def require_used(recipes: Sequence[Recipe], *, ranges_from: bool = False) -> None:
    """Raise `ExportError` for an option that none of `recipes`, all made with the same options, has a use for."""
    precisions = {recipe.precision for recipe in recipes}
    if "auto" in precisions:
        precisions.update(BLOCKWISE)  # among which it chooses
    users = {
        "solver": (any(recipe.solver for recipe in recipes), tuple(WEIGHT_BITS)),
        "block_size": (any(recipe.block_size and recipe.embedding != "int4" for recipe in recipes), BLOCKWISE),
        "smoothing": (any(recipe.smoothing for recipe in recipes), tuple(WEIGHT_BITS)),
        "ranges_from": (ranges_from, ("int8-static",)),
    }
    for name, (given, served) in users.items():
        if given and precisions.isdisjoint(served):
            purpose = f"`{name}` is for `precision` {' and '.join(served)}"
            raise ExportError(f"{purpose}; add such a precision, or drop the option")


def require_block_size(size: int | None) -> None:
    """Raise `ConfigError` unless `size` is None or one that the kernel takes."""
    if size not in (None, *BLOCK_SIZES):
        raise ConfigError(f"`block_size` is {size}; onnxruntime takes {', '.join(map(str, BLOCK_SIZES))}")


def require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise `ExportError` unless `value` is one of `known`."""
    if value not in known:
        raise ExportError(unknown_name(name, value, known) + f"; change `{name}`")
