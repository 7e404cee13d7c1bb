"""Moving outliers from activations into weights, exactly (the idea of SmoothQuant, Xiao et al., arXiv 2211.10438).

A linear's input x becomes x/s and its weight s·W, channel by channel. The division is folded into what makes x: a
norm's gain, the values behind attention, or the half of SwiGLU's product that is linear in x. The float model stays the
same; what quantization rounds does not. How far to go is searched for every linear on calibration text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from expe_edge.calibration.observations import Observations, Observed
from expe_edge.graph.build import HEAD
from expe_edge.graph.linears import LinearFormat
from expe_edge.graph.weights import Float, FoldedPositions, LayerWeights, ModelWeights
from expe_edge.model.config import ExPEConfig
from expe_edge.quant.channels import Range

#: Exponents tried; 0 leaves all as it is.
STRENGTHS = (0.0, 0.25, 0.5, 0.75)
#: Magnitudes below this share of the largest are not blown up further.
SMALLEST_SHARE = 1e-3

#: Makes the format of a linear, given the range of its input, fresh: nothing quantized before is reused.
MakeFormat = Callable[[str, Range], LinearFormat[Any]]


class Smoothed(NamedTuple):
    """The changed weights, and the strength chosen for each linear."""

    weights: ModelWeights
    strengths: dict[str, float]


def smooth(weights: ModelWeights, observations: Observations, make: MakeFormat) -> Smoothed:
    """Fold a searched scale into every linear whose producer can take it; return weights of the same float model."""
    search = _Search(weights.config, observations, make)
    layers = tuple(_smooth_layer(search, f"layers.{i}", weights) for i, weights in enumerate(weights.layers))
    smoothed = dataclasses.replace(weights, layers=layers)
    if not weights.config.tie_word_embeddings:
        scale = search.scale(HEAD, weights.head)
        smoothed = dataclasses.replace(smoothed, norm=weights.norm / scale, head=weights.head * scale[:, None])
    return Smoothed(smoothed, search.strengths)


def _smooth_layer(search: _Search, name: str, layer: LayerWeights) -> LayerWeights:
    if layer.positions is not None or not search.positions_inside:
        layer = _smooth_projection(layer, search.scale(f"{name}.attention.qkv", layer.qkv))
    positioned = layer.positions is not None and layer.positions.value_start is not None
    layer = _smooth_values(layer, *search.value_scale(f"{name}.attention.out", layer.out, peaked=positioned))
    scale = search.scale(f"{name}.feed_forward.up", layer.up)
    layer = dataclasses.replace(layer, feed_forward_norm=layer.feed_forward_norm / scale, up=layer.up * scale[:, None])
    if search.config.hidden_act != "swiglu":
        return layer
    scale = search.scale(f"{name}.feed_forward.down", layer.down, peaked=True)
    gate, up = np.split(layer.up, 2, axis=1)
    return dataclasses.replace(layer, up=np.concatenate([gate, up / scale], axis=1), down=layer.down * scale[:, None])


def _smooth_projection(layer: LayerWeights, scale: Float) -> LayerWeights:
    """Divide what enters the fused product, the slopes and the gate by `scale` (C,)."""
    positions = layer.positions
    if positions is not None:
        positions = dataclasses.replace(positions, slope_weight=positions.slope_weight * scale[:, None])
    return dataclasses.replace(
        layer,
        attention_norm=layer.attention_norm / scale,
        qkv=layer.qkv * scale[:, None],
        positions=positions,
        gate=None if layer.gate is None else layer.gate * scale[:, None],
    )


def _smooth_values(layer: LayerWeights, scale: Float, value_scale: Float) -> LayerWeights:
    """Divide the values by `value_scale` (Hkv·D,), so that what enters `out` is divided by `scale` (H·D,)."""
    begin = layer.qkv.shape[1] - len(value_scale)
    qkv = np.concatenate([layer.qkv[:, :begin], layer.qkv[:, begin:] / value_scale], axis=1)
    return dataclasses.replace(
        layer, qkv=qkv, out=layer.out * scale[:, None], positions=_divide_values(layer.positions, value_scale)
    )


def _divide_values(positions: FoldedPositions | None, scale: Float) -> FoldedPositions | None:
    if positions is None or positions.value_start is None or positions.value_limbs is None:
        return positions
    return dataclasses.replace(
        positions, value_start=positions.value_start / scale, value_limbs=positions.value_limbs / scale
    )


class _Search:
    """Finds the scale of each linear's input, and remembers the strengths."""

    def __init__(self, config: ExPEConfig, observations: Observations, make: MakeFormat) -> None:
        self.config, self.observations, self.make = config, observations, make
        self.strengths: dict[str, float] = {}
        #: Whether positions enter between a norm and its product, unless they are folded out.
        self.positions_inside = config.encoding_parameters.foldable

    def scale(self, name: str, weight: Float, *, peaked: bool = False) -> Float:
        """Return the best scale of the inputs (C_in,)."""
        observed = self.observations.inputs[name]
        return self._best(name, weight, observed, _sizes(observed), np.abs(weight).max(axis=1), peaked=peaked)

    def value_scale(self, name: str, weight: Float, *, peaked: bool) -> tuple[Float, Float]:
        """The same for what attention mixes from values, (H·D,), with the scale of the values, (Hkv·D,)."""
        config, observed = self.config, self.observations.inputs[name]
        shape = (config.num_key_value_heads, -1, config.head_dim)

        def shared(sizes: Float) -> Float:
            """The largest of the channels that come from one channel of the values, for all of them."""
            largest = sizes.reshape(shape).max(axis=1, keepdims=True)
            return np.broadcast_to(largest, sizes.reshape(shape).shape).reshape(-1)

        inputs, weights = shared(_sizes(observed)), shared(np.abs(weight).max(axis=1))
        scale = self._best(name, weight, observed, inputs, weights, peaked=peaked)
        return scale, np.ascontiguousarray(scale.reshape(shape)[:, 0].reshape(-1))

    def _best(
        self, name: str, weight: Float, observed: Observed, inputs: Float, weights: Float, *, peaked: bool = False
    ) -> Float:
        """Search (inputs/weights)^strength for the least squared error of the output."""
        seen = observed.rows
        expected = seen @ weight
        ratio = _floored(inputs) / _floored(weights)
        scales = {strength: _normalized(ratio**strength) for strength in STRENGTHS}

        def error(strength: float) -> float:
            scale = scales[strength]
            rows, scaled = seen / scale, weight * scale[:, None]
            format_ = self.make(name, (float(rows.min()), float(rows.max())))
            actual = format_.round_inputs(name, rows, peaked=peaked) @ format_.store(name, scaled).restored()
            return float(((actual - expected) ** 2).sum())

        self.strengths[name] = min(STRENGTHS, key=error)
        return scales[self.strengths[name]]


def _sizes(observed: Observed) -> Float:
    return np.maximum(np.abs(observed.low), np.abs(observed.high))


def _floored(sizes: Float) -> Float:
    return np.maximum(sizes, max(float(sizes.max()), 1e-20) * SMALLEST_SHARE)


def _normalized(scale: Float) -> Float:
    """Divide by the geometric mean, so that no tensor grows or shrinks as a whole."""
    centred: Float = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
    return centred
