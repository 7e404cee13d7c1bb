"""The weights of a model as plain arrays, in the shape the graph holds them; and reading them back from a graph.

Names of stored tensors are given here, by the graph's builder, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from expe_edge.errors import PackageError
from expe_edge.model.config import ExPEConfig

Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class FoldedPositions:
    """What positions add beside the content product of one layer, all float32.

    query_start: (H·D,), query_limbs: (G, H·D) — the queries' own positions, over the limbs of the stored code. The
    limbs are None, here and of the slope, where positions enter the keys alone: then nothing grows with the query's.
    value_start, value_limbs: the same for values, (Hkv·D,) and (G, Hkv·D); None unless positions enter them.
    slope_weight: (C, H·Gk), slope_start: (H·Gk,), slope_limbs: (G, H·Gk) — the slope q_i·β_k/√D of each head and
    limb of the keys' code, straight from the layer's float input, so that no int8 product is ever scaled by a distance.
    Where slopes are kept above 0 by a softplus, what enters that, times its sharpness. 0 in content heads.
    """

    query_start: Float
    query_limbs: Float | None
    value_start: Float | None
    value_limbs: Float | None
    slope_weight: Float
    slope_start: Float
    slope_limbs: Float | None

    @property
    def grows(self) -> bool:
        """Whether anything but scores grows with the position."""
        return self.query_limbs is not None or self.value_start is not None

    def start(self, keys: int) -> Float:
        """What is added to queries, keys and values at every position, (H·D + 2·keys,); `keys` is Hkv·D."""
        zeros = np.zeros(keys, dtype=np.float32)
        return np.concatenate([self.query_start, zeros, zeros if self.value_start is None else self.value_start])

    def limbs(self, keys: int) -> Float | None:
        """What grows with their position, (G, H·D + 2·keys); None where nothing does."""
        if self.query_limbs is None:
            return None
        zeros = np.zeros((len(self.query_limbs), keys), dtype=np.float32)
        values = zeros if self.value_limbs is None else self.value_limbs
        return np.concatenate([self.query_limbs, zeros, values], axis=1)


@dataclass(frozen=True)
class LayerWeights:
    """One block. Matrices are (C_in, C_out); `qkv` is the content product where `positions` is given.

    gate: (C, H), of the heads' results; None where there is none. It stays in float32.
    """

    attention_norm: Float
    qkv: Float
    positions: FoldedPositions | None
    gate: Float | None
    out: Float
    feed_forward_norm: Float
    up: Float
    down: Float


@dataclass(frozen=True)
class ModelWeights:
    """The whole model. embedding: (V, C) · norm: (C,) · head: (C, V).

    folded: whether positions are taken out of the products, where the encoding has any there.
    relative_table: the bias of every head at each distance, (distances, H), for that encoding alone.
    """

    config: ExPEConfig
    folded: bool
    embedding: Float
    layers: tuple[LayerWeights, ...]
    norm: Float
    head: Float
    relative_table: Float | None = None

    @property
    def positioned_values(self) -> bool:
        """Whether positions are added to the values, beside the products."""
        return any(layer.positions is not None and layer.positions.value_start is not None for layer in self.layers)


def read_weights(model: onnx.ModelProto, config: ExPEConfig, *, folded: bool) -> ModelWeights:
    """Return the weights of a float32 graph that `graph.build` made.

    Raises:
        PackageError: a weight is missing, or of another shape or dtype than the config's.
    """
    try:
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        embedding = tensors["embedding.weight"]
        weights = ModelWeights(
            config=config,
            folded=folded,
            embedding=embedding,
            layers=tuple(_read_layer(tensors, f"layers.{index}", config) for index in range(config.num_hidden_layers)),
            norm=tensors["norm.gain"],
            head=embedding.T if config.tie_word_embeddings else tensors["head.weight"],
            relative_table=tensors.get("relative.table"),
        )
    except KeyError as error:
        raise PackageError(f"the graph has no weight {error}; quantize the checkpoint, or export it again") from error
    except (ValueError, TypeError) as error:  # of onnx and of NumPy, by what is wrong with a tensor
        raise PackageError(f"the graph has a damaged weight ({error}); export the package again") from error
    _require_shapes(weights)
    return weights


def _require_shapes(weights: ModelWeights) -> None:
    """Raise `PackageError` unless every matrix and gain is float32 and as large as the config says."""
    config = weights.config
    size, heads, shared = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    width, inner = config.hidden_size, config.intermediate_size
    shapes = {
        "attention_norm": (width,),
        "qkv": (width, (heads + 2 * shared) * size),
        **({"gate": (width, heads)} if config.output_gate else {}),
        "out": (heads * size, width),
        "feed_forward_norm": (width,),
        "up": (width, inner * (2 if config.hidden_act == "swiglu" else 1)),
        "down": (inner, width),
    }
    outer = {"embedding": (config.vocab_size, width), "norm": (width,), "head": (width, config.vocab_size)}
    for owner, expected in ((weights, outer), *((layer, shapes) for layer in weights.layers)):
        for name, shape in expected.items():
            value = getattr(owner, name)
            if value.dtype != np.float32 or value.shape != shape:
                raise PackageError(
                    f"the graph's {name} is {value.dtype} {value.shape}, but float32 {shape} by its manifest; export "
                    "the package again"
                )


def _read_layer(tensors: Mapping[str, Float], layer: str, config: ExPEConfig) -> LayerWeights:
    attention = f"{layer}.attention"
    qkv = tensors.get(f"{attention}.qkv.weight")
    if qkv is None:  # positions inline: one product for each input
        parts = ("qk", "v") if f"{attention}.qk.weight" in tensors else ("q", "k", "v")
        qkv = np.concatenate([tensors[f"{attention}.{part}.weight"] for part in parts], axis=1)
    return LayerWeights(
        attention_norm=tensors[f"{attention}.norm.gain"],
        qkv=qkv,
        positions=_read_positions(tensors, attention, config) if f"{attention}.slope.weight" in tensors else None,
        gate=tensors[f"{attention}.gate.weight"].T if config.output_gate else None,
        out=tensors[f"{attention}.out.weight"],
        feed_forward_norm=tensors[f"{layer}.feed_forward.norm.gain"],
        up=tensors[f"{layer}.feed_forward.up.weight"],
        down=tensors[f"{layer}.feed_forward.down.weight"],
    )


def _read_positions(tensors: Mapping[str, Float], attention: str, config: ExPEConfig) -> FoldedPositions:
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    start, limbs = tensors[f"{attention}.qkv.bias"], tensors.get(f"{attention}.qkv.limbs")
    slope_limbs = tensors.get(f"{attention}.slope.limbs")
    in_values = limbs is not None and config.positional_parameters["where"] == "query_key_value"
    return FoldedPositions(
        query_start=start[:queries],
        query_limbs=None if limbs is None else limbs[:, :queries],
        value_start=start[queries + keys :] if in_values else None,
        value_limbs=limbs[:, queries + keys :] if in_values and limbs is not None else None,
        slope_weight=tensors[f"{attention}.slope.weight"].T,
        slope_start=tensors[f"{attention}.slope.start"][:, 0],
        slope_limbs=None if slope_limbs is None else slope_limbs.T,
    )
