"""What goes into an exported graph and what comes out of it, by name, dtype and axes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from expe_edge.package.checks import BOOLEAN, Check, list_of, one_of, whole

#: Bytes of a number in the cache, by dtype.
CACHE_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}
#: The widest tensor, vocabulary included, and the longest text: positions beyond it are not exact in float32.
WIDEST, LONGEST = 2**20, 2**24
#: Bounds of a contract, far above the models of this project: a package that asks for more is not opened.
BOUNDS: dict[str, Check] = {
    "layers": whole(1, 1024),
    "key_value_heads": whole(1, 1024),
    "head_size": whole(1, 4096),
    "vocab_size": whole(1, WIDEST),
    "cache_dtype": one_of(*CACHE_ITEM_BYTES),
    "growing_cache": BOOLEAN,
    "whole_buffer": BOOLEAN,
    "windows": list_of(whole(0, LONGEST)),
}
#: The most bytes of one token's keys and values: several times what the largest published models take.
LARGEST_TOKEN = 2**26
#: Dtypes as NumPy names them, and as onnxruntime does.
ORT_TYPES = {"int64": "tensor(int64)", "float32": "tensor(float)", "float16": "tensor(float16)", "int8": "tensor(int8)"}

#: What onnxruntime's CUDA provider is opened with: products of float32 in float32, where its default rounds what they
#: multiply to 10 bits, slopes among it.
CUDA_OPTIONS = {"use_tf32": "0"}

#: Key/value heads of an int8 cache that a run of many tokens holds as floats at once; all of a group with a window.
FLOAT_HEADS = 4

#: The axis of the rows, as transformers.js expects it, and as earlier releases called it.
BATCH, EARLIER_BATCH = "batch_size", "batch"

#: A dimension is a number, or the name of a symbolic axis.
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as NumPy names it) and shape of a graph's input or output."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class HeadGroup:
    """Neighbouring key/value heads [begin, end) whose keys and values are one tensor of the cache.

    window: how many tokens each query sees, its own included; 0 for all.
    """

    begin: int
    end: int
    window: int = 0

    @property
    def heads(self) -> int:
        """How many they are."""
        return self.end - self.begin

    def seen(self, tokens: int, spare: int = 0) -> int:
        """How many of a row's `tokens` its last query sees, and up to `spare` more where there is a window."""
        return min(tokens, self.window + spare) if self.window else tokens


class Node(Protocol):
    """An input or output as onnxruntime describes it; its shape has numbers, names, or None."""

    name: str
    type: str
    shape: Sequence[Any]


#: Positions at the end of a run that logits are wanted of, 0 for all: an input that a client may leave away. The name
#: is the one that Optimum and transformers.js look for.
LOGITS_TO_KEEP = TensorSpec("num_logits_to_keep", "int64", ())
#: The fewest tokens of a run that reads an int8 cache as floats: an input that a client may leave away. The default is
#: what restoring floats costs, won back with as many tokens (docs/log.md); attention that needs none is given `NEVER`.
FLOATS_FROM, MANY_TOKENS, NEVER = TensorSpec("read_as_floats_from", "int64", ()), 12, 2**62


@dataclass(frozen=True)
class GraphContract:
    """The inputs and outputs of an exported graph, in order. A `ValueError` says which size is out of `BOUNDS`.

    Position n of a row is the n-th token of that row: `position_ids` count from 0. `attention_mask` has 1 for every
    token up to and including the new ones.

    growing_cache: false where past and present are one buffer, written in place: cached keys stand at 0, 1, 2, …, and
        rows of a batch are padded on the right. True where present is past with all new keys appended, those of
        padding too: the mask says which are tokens, and padding may stand anywhere.
    whole_buffer: whether attention reads all columns of that buffer. It must have room for what is new, and finite
        numbers where it holds nothing yet.
    windows: of every key/value head, as `HeadGroup.window`; empty where all see all. A client keeps of a windowed group
        the last `window` − 1 tokens at least, says in `window_lengths` how many it keeps, and pads no run on the left.
    """

    layers: int
    key_value_heads: int
    head_size: int
    vocab_size: int
    cache_dtype: str = "float32"
    growing_cache: bool = False
    windows: Sequence[int] = ()
    whole_buffer: bool = False

    def __post_init__(self) -> None:
        for name, check in BOUNDS.items():
            check(name, getattr(self, name))
        object.__setattr__(self, "windows", tuple(self.windows))  # JSON has lists
        if self.windows and (len(self.windows) != self.key_value_heads or self.growing_cache):
            raise ValueError(f"windows are given for {len(self.windows)} heads of {self.key_value_heads}")
        if self.whole_buffer and self.growing_cache:
            raise ValueError("a cache that grows is no buffer")
        token = self._bytes(self.key_value_heads)
        if token > LARGEST_TOKEN:
            raise ValueError(f"a token takes {token} bytes of cache, more than {LARGEST_TOKEN}")

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Token inputs, then the cache."""
        return (
            TensorSpec("input_ids", "int64", (BATCH, "sequence")),
            TensorSpec("attention_mask", "int64", (BATCH, "total_sequence")),
            TensorSpec("position_ids", "int64", (BATCH, "sequence")),
            *(TensorSpec(name, "int64", (BATCH,)) for name in self.window_lengths if name),
            *self._cache("past_key_values", "past"),
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Logits, then the cache with the new tokens appended."""
        logits = TensorSpec("logits", "float32", (BATCH, "sequence", self.vocab_size))
        return (logits, *self._cache("present", "total_sequence"))

    @property
    def past_names(self) -> tuple[str, ...]:
        """Names of the cache inputs."""
        return tuple(spec.name for spec in self._cache("past_key_values", "past"))

    @property
    def present_names(self) -> tuple[str, ...]:
        """Names of the cache outputs, in the order of `past_names`."""
        return tuple(spec.name for spec in self._cache("present", "total_sequence"))

    @property
    def groups(self) -> tuple[HeadGroup, ...]:
        """The key/value heads, as few groups as their windows allow."""
        heads, windows = self.key_value_heads, self.windows or [0] * self.key_value_heads
        begins = [head for head in range(heads) if head == 0 or windows[head] != windows[head - 1]]
        ends = [*begins[1:], heads]
        return tuple(HeadGroup(begin, end, windows[begin]) for begin, end in zip(begins, ends, strict=True))

    @property
    def window_lengths(self) -> tuple[str, ...]:
        """For each group, the input that says how many tokens of each row are kept, (B,); empty where all are."""
        return tuple(f"window_lengths.{index}" if group.window else "" for index, group in enumerate(self.groups))

    @property
    def cache_groups(self) -> tuple[HeadGroup, ...]:
        """The group of every tensor of the cache, in the order of `past_names`."""
        return tuple(group for _ in range(self.layers) for group in self.groups for _ in ("key", "value"))

    @property
    def cache_bytes(self) -> int:
        """Bytes that one token more takes in the cache: keys and values of the heads without a window."""
        return self._bytes(sum(group.heads for group in self.groups if not group.window))

    def row_bytes(self, tokens: int, spare: int = 0) -> int:
        """Bytes of the keys and values of a row of so many tokens, where windows have room for `spare` more."""
        return sum(self._bytes(group.heads) * group.seen(tokens, spare) for group in self.groups)

    def _bytes(self, heads: int) -> int:
        return 2 * self.layers * heads * self.head_size * CACHE_ITEM_BYTES[self.cache_dtype]

    def difference(self, inputs: Sequence[Node], outputs: Sequence[Node]) -> str | None:
        """Say how a graph with these inputs and outputs differs: in number, names, dtypes or axes; None where not."""
        return _difference("input", inputs, self.inputs) or _difference("output", outputs, self.outputs)

    def _cache(self, prefix: str, axis: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                f"{prefix}.{layer}.{part}" if not self.windows else f"{prefix}.{layer}.{part}.{index}",
                self.cache_dtype,
                (BATCH, group.heads, f"window_{index}_{axis}" if group.window else axis, self.head_size),
            )
            for layer in range(self.layers)
            for index, group in enumerate(self.groups)
            for part in ("key", "value")
        )


def _difference(kind: str, actual: Sequence[Node], agreed: Sequence[TensorSpec]) -> str | None:
    if len(actual) != len(agreed):
        return f"it has {len(actual)} {kind}s, not {len(agreed)}"
    for node, spec in zip(actual, agreed, strict=True):
        if node.name != spec.name:
            return f"{kind} {node.name!r} stands where {spec.name!r} should"
        if node.type != ORT_TYPES[spec.dtype]:
            return f"{kind} {spec.name!r} is {node.type}, not {ORT_TYPES[spec.dtype]}"
        shape = tuple(BATCH if axis == EARLIER_BATCH else axis for axis in node.shape)
        if shape != spec.shape:
            return f"{kind} {spec.name!r} has axes {list(shape)}, not {list(spec.shape)}"
    return None
