"""What goes into an exported graph and what comes out of it, by name, dtype and axes."""

from __future__ import annotations

from dataclasses import dataclass

#: Bytes of a number in the cache, by dtype.
CACHE_ITEM_BYTES = {"float32": 4, "int8": 1}

#: A dimension is a number, or the name of a symbolic axis.
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype (as NumPy names it) and shape of a graph's input or output."""

    name: str
    dtype: str
    shape: Shape


@dataclass(frozen=True)
class GraphContract:
    """The inputs and outputs of an exported graph, in order.

    Position n of a row is the n-th token of that row: `position_ids` count from 0. `attention_mask` has 1 for every
    token up to and including the new ones.

    growing_cache: false where past and present are one buffer, written in place: cached keys stand at 0, 1, 2, …, and
        rows of a batch are padded on the right. True where present is past with all new keys appended, those of
        padding too: the mask says which are tokens, and padding may stand anywhere.
    """

    layers: int
    key_value_heads: int
    head_size: int
    vocab_size: int
    cache_dtype: str = "float32"
    growing_cache: bool = False

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Token inputs, then the cache."""
        return (
            TensorSpec("input_ids", "int64", ("batch", "sequence")),
            TensorSpec("attention_mask", "int64", ("batch", "total_sequence")),
            TensorSpec("position_ids", "int64", ("batch", "sequence")),
            *self._cache("past_key_values", "past"),
        )

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Logits, then the cache with the new tokens appended."""
        logits = TensorSpec("logits", "float32", ("batch", "sequence", self.vocab_size))
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
    def cache_bytes(self) -> int:
        """Bytes of one token's keys and values, in all layers."""
        return 2 * self.layers * self.key_value_heads * self.head_size * CACHE_ITEM_BYTES[self.cache_dtype]

    def _cache(self, prefix: str, axis: str) -> tuple[TensorSpec, ...]:
        shape: Shape = ("batch", self.key_value_heads, axis, self.head_size)
        return tuple(
            TensorSpec(f"{prefix}.{layer}.{part}", self.cache_dtype, shape)
            for layer in range(self.layers)
            for part in ("key", "value")
        )
