"""Optimum and onnxruntime's own tools, as their users call them: exports of an ExPE checkpoint, and quantizers.

Exports are functions of a model and a directory, quantizers of a float32 graph and a directory; both return the file
they wrote. `benchmarks.off_the_shelf` runs and compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from datasets import Dataset
from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationMethod
from onnxruntime.quantization.shape_inference import quant_pre_process
from optimum.exporters.onnx import onnx_export_from_model
from optimum.exporters.onnx.model_configs import LlamaOnnxConfig
from optimum.onnxruntime import AutoCalibrationConfig, AutoQuantizationConfig, ORTQuantizer
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from expe_edge.calibration.observations import FeedsReader
from expe_edge.export.fold import extract_weights
from expe_edge.graph.build import build_graph
from expe_edge.graph.linears import Float32
from expe_edge.graph.run import graph_feeds
from expe_edge.model.attention import Attention
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.model.encoding import Heads
from expe_edge.model.expe import ExPE
from expe_edge.package.contract import GraphContract
from expe_edge.positions.expe import ExPEParameters
from expe_edge.quant.blocks import BLOCK_SIZE

Feeds = dict[str, np.ndarray]
#: What transformers calls the modules of code that came with a model.
REMOTE_CODE = "transformers_modules.expe"


class Shared(NamedTuple):
    """What every layer of `PlainOverride` needs: p_n (B, T, l), who sees whom (B, 1, T, S), and the cache."""

    spec: ExPEParameters
    vectors: Tensor
    visible: Tensor
    cache: Cache | None


class PlainAttention(nn.Module):
    """Attention as the paper writes it: positions override the first l dimensions of the queries' and keys' input."""

    def __init__(self, attention: Attention, heads: Heads) -> None:
        super().__init__()
        self.layer, self.heads = attention.layer, heads
        rows = [heads.query_rows, heads.key_rows, heads.key_rows]
        self.query, self.key, self.value = map(_linear, torch.split(attention.qkv.weight, rows))
        self.out = attention.out

    def forward(self, hidden: Tensor, shared: Shared) -> Tensor:
        spec, dims = shared.spec, shared.spec.dims
        base = 0.0 if spec.how == "override" else hidden[..., :dims]
        positioned = torch.cat([base + shared.vectors, hidden[..., dims:]], dim=-1)
        query_vectors = (
            shared.vectors.new_tensor(spec.starts).expand_as(shared.vectors) if spec.relative else shared.vectors
        )
        query_input = torch.cat([base + query_vectors, hidden[..., dims:]], dim=-1)
        query, key = self._split(self.query(query_input)), self._split(self.key(positioned))
        value = self._split(self.value(positioned if spec.where == "query_key_value" else hidden))
        if shared.cache is not None:
            key, value = shared.cache.update(key, value, self.layer)
        groups = self.heads.queries // self.heads.keys
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=shared.visible)
        written: Tensor = self.out(states.transpose(1, 2).flatten(2))
        return written

    def _split(self, states: Tensor) -> Tensor:
        """(B, T, heads·D) to (B, heads, T, D)."""
        return torch.unflatten(states, -1, (-1, self.heads.size)).transpose(1, 2)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    return linear


class PlainOverride(ExPEForCausalLM):
    """The same model without this project's rewrites, as one would write it from the paper."""

    def forward(  # type: ignore[override]  # what Optimum traces, and no more
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, T, V) for tokens and positions (B, T) and a mask (B, S), cached tokens included."""
        length, total = input_ids.shape[1], attention_mask.shape[1]
        causal = torch.arange(total) <= torch.arange(total - length, total)[:, None]
        visible = causal & attention_mask[:, None, None, :].bool()
        assert isinstance(self.positional, ExPE)
        spec = self.positional.spec
        vectors = torch.tensor(spec.starts)
        for limb, step in zip(spec.code.split(position_ids), spec.limb_steps, strict=True):
            vectors = vectors + limb[..., None].float() * torch.tensor(step)
        shared = Shared(spec, vectors, visible, past_key_values)
        hidden = self.embedding(input_ids)
        for block in self.blocks:
            hidden = block(hidden, shared)
        return CausalLMOutputWithPast(logits=self.head(self.norm(hidden)), past_key_values=past_key_values)


def as_remote_code(model: ExPEForCausalLM, kind: type = ExPEForCausalLM) -> ExPEForCausalLM:
    """Let Optimum think that the class came with the model: it refuses classes of any other package."""
    model.__class__ = type(kind.__name__, (kind,), {"__module__": REMOTE_CODE})
    return model


def export_by_optimum(model: ExPEForCausalLM, directory: Path, *, cache: bool = True) -> Path:
    """Export by Optimum, with the config that it has for Llama."""
    kept = {"use_past": cache, "use_past_in_inputs": cache}
    onnx_export_from_model(
        model,
        output=directory,
        task="text-generation-with-past" if cache else "text-generation",
        custom_onnx_configs={"model": LlamaOnnxConfig(model.config, task="text-generation", **kept)},
        do_validation=False,  # it is validated here, at more than one length
    )
    return directory / "model.onnx"


def export_as_it_is(model: ExPEForCausalLM, directory: Path) -> Path:
    """Export the class with this project's own rewrites in its forward."""
    return export_by_optimum(as_remote_code(model), directory)


def export_plainly(model: ExPEForCausalLM, directory: Path) -> Path:
    """Export a `PlainOverride` with the same weights."""
    for block in model.blocks:
        block.add_module("attention", PlainAttention(block.attention, model.positional.heads))
    return export_by_optimum(as_remote_code(model, PlainOverride), directory)


def export_without_cache(model: ExPEForCausalLM, directory: Path) -> Path:
    """Export without a cache, and run the graph at a length other than that of the trace.

    Raises:
        onnxruntime's error, where the graph cannot.
    """
    path = export_by_optimum(as_remote_code(model), directory, cache=False)
    tokens = np.zeros((1, model.config.training_length), dtype=np.int64)
    feeds = {"input_ids": tokens, "attention_mask": tokens + 1, "position_ids": np.arange(tokens.size)[None]}
    session = open_session(path)
    session.run(["logits"], {node.name: feeds[node.name] for node in session.get_inputs()})
    return path


def export_folded(model: ExPEForCausalLM, directory: Path) -> Path:
    """Write this project's float32 graph, positions folded."""
    path = directory / "model.onnx"
    onnx.save(build_graph(extract_weights(model, folded=True), Float32()).model, path)
    return path


def prepare(graph: Path, directory: Path) -> Path:
    """Prepare a graph as onnxruntime's quantizers ask for; products of constants become weights by it.

    Symbolic shape inference is left out: it fails with an AssertionError on what Optimum exports.
    """
    quant_pre_process(graph, directory / "model.onnx", skip_symbolic_shape=True)
    return directory / "model.onnx"


def open_session(path: Path) -> ort.InferenceSession:
    """Open a graph on the CPU, quietly."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def calibration_feeds(path: Path, contract: GraphContract, windows: Sequence[np.ndarray]) -> list[Feeds]:
    """Return what the graph is calibrated on: every window (N,) with its first token in the cache.

    An empty cache is more natural, but a dataset of nested lists cannot hold one, and ORTQuantizer takes a dataset.
    """
    session, found = open_session(path), []
    for window in windows:
        cache = session.run(list(contract.present_names), graph_feeds(contract, window[None, :1]))
        found.append(graph_feeds(contract, window[None, 1:], cache))
    return found


def linears(path: Path) -> list[str]:
    """Return the names of the products of activations with a weight; attention's own products are none of them."""
    return [node.name for node, _ in _weight_products(path)]


def position_products(path: Path) -> list[str]:
    """Return those linears of this project's graph that compute positions and slopes."""
    return [node.name for node, weight in _weight_products(path) if ".slope." in weight or weight.endswith(".limbs")]


def _weight_products(path: Path) -> list[tuple[onnx.NodeProto, str]]:
    graph = onnx.load(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    return [(n, n.input[1]) for n in graph.node if n.op_type == "MatMul" and n.input[1] in weights]


#: Writes what it makes of a float32 graph, given what to calibrate on, into a directory.
Quantizer = Callable[[Path, list[Feeds], Path], Path]


def optimum_dynamic(graph: Path, feeds: list[Feeds], directory: Path, *, target: str) -> Path:
    """ORTQuantizer with the configuration of a CPU; a scale for each output channel is its default."""
    del feeds
    configuration = getattr(AutoQuantizationConfig, target)(is_static=False, per_channel=True)
    ORTQuantizer(graph).quantize(configuration, directory)
    return directory / "model_quantized.onnx"


def optimum_static(graph: Path, feeds: list[Feeds], directory: Path, *, method: str, linears_alone: bool) -> Path:
    """ORTQuantizer, calibrated by its own `fit`; all operators of its default, or linears alone."""
    chosen = {"operators_to_quantize": ["MatMul"], "nodes_to_quantize": linears(graph)}
    configuration = AutoQuantizationConfig.avx2(is_static=True, per_channel=True, **(chosen if linears_alone else {}))
    quantizer = ORTQuantizer(graph)
    dataset = Dataset.from_list([{name: value[0] for name, value in feed.items()} for feed in feeds])
    ranges = quantizer.fit(
        dataset,
        getattr(AutoCalibrationConfig, method)(dataset),
        onnx_augmented_model_name=directory / "augmented.onnx",
        operators_to_quantize=configuration.operators_to_quantize,
    )
    quantizer.quantize(configuration, directory, calibration_tensors_range=ranges)
    return directory / "model_quantized.onnx"


#: Names the nodes of a graph that are to stay in float32.
Exclude = Callable[[Path], list[str]]


def nothing(path: Path) -> list[str]:
    """Exclude nothing."""
    del path
    return []


def ort_dynamic(
    graph: Path, feeds: list[Feeds], directory: Path, *, weights: QuantType, exclude: Exclude = nothing
) -> Path:
    """onnxruntime's `quantize_dynamic`."""
    del feeds
    quantize_dynamic(
        graph, directory / "model.onnx", per_channel=True, weight_type=weights, nodes_to_exclude=exclude(graph)
    )
    return directory / "model.onnx"


def ort_static(
    graph: Path,
    feeds: list[Feeds],
    directory: Path,
    *,
    method: CalibrationMethod,
    linears_alone: bool,
    exclude: Exclude = nothing,
) -> Path:
    """onnxruntime's `quantize_static`, with all its defaults but one, or for linears alone, in uint8."""
    chosen = {
        "op_types_to_quantize": ["MatMul"],
        "nodes_to_quantize": linears(graph),
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QUInt8,
    }
    quantize_static(
        graph,
        directory / "model.onnx",
        FeedsReader(iter(feeds)),
        per_channel=True,
        calibrate_method=method,
        nodes_to_exclude=exclude(graph),
        **(chosen if linears_alone else {}),
    )
    return directory / "model.onnx"


def ort_blocks(
    graph: Path,
    feeds: list[Feeds],
    directory: Path,
    *,
    bits: int,
    hqq: bool = False,
    accuracy_level: int | None = None,
    exclude: Exclude = nothing,
) -> Path:
    """onnxruntime's quantizer to MatMulNBits, with this project's block sizes; it needs the package onnx-ir.

    Args:
        accuracy_level: what the products are computed in; float32 by default, int8 at level 4.
    """
    del feeds
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    size = BLOCK_SIZE[bits]
    configuration = (
        nbits.HQQWeightOnlyQuantConfig(block_size=size, bits=bits)
        if hqq
        else nbits.DefaultWeightOnlyQuantConfig(block_size=size, bits=bits, accuracy_level=accuracy_level)
    )
    quantizer = nbits.MatMulNBitsQuantizer(onnx.load(graph), nodes_to_exclude=exclude(graph), algo_config=configuration)
    quantizer.process()
    onnx.save(quantizer.model.model, directory / "model.onnx")
    return directory / "model.onnx"


OPTIMUM: dict[str, Quantizer] = {
    "Optimum dynamic, avx2": partial(optimum_dynamic, target="avx2"),
    "Optimum dynamic, avx512_vnni": partial(optimum_dynamic, target="avx512_vnni"),
    "Optimum static, minmax": partial(optimum_static, method="minmax", linears_alone=False),
    "Optimum static, percentiles": partial(optimum_static, method="percentiles", linears_alone=False),
    "Optimum static, minmax, linears alone": partial(optimum_static, method="minmax", linears_alone=True),
    "Optimum static, percentiles, linears alone": partial(optimum_static, method="percentiles", linears_alone=True),
    "Optimum static, entropy, linears alone": partial(optimum_static, method="entropy", linears_alone=True),
}
ONNXRUNTIME: dict[str, partial[Path]] = {
    "quantize_dynamic": partial(ort_dynamic, weights=QuantType.QInt8),
    "quantize_dynamic, uint8": partial(ort_dynamic, weights=QuantType.QUInt8),
    "quantize_static, minmax": partial(ort_static, method=CalibrationMethod.MinMax, linears_alone=False),
    "quantize_static, minmax, linears alone, uint8": partial(
        ort_static, method=CalibrationMethod.MinMax, linears_alone=True
    ),
    "quantize_static, percentile, linears alone, uint8": partial(
        ort_static, method=CalibrationMethod.Percentile, linears_alone=True
    ),
    "MatMulNBits int8": partial(ort_blocks, bits=8),
    "MatMulNBits int8, accuracy level 4": partial(ort_blocks, bits=8, accuracy_level=4),
    "MatMulNBits int8, HQQ": partial(ort_blocks, bits=8, hqq=True),
    "MatMulNBits int4": partial(ort_blocks, bits=4),
    "MatMulNBits int4, accuracy level 4": partial(ort_blocks, bits=4, accuracy_level=4),
    "MatMulNBits int4, HQQ": partial(ort_blocks, bits=4, hqq=True),
}
#: The same, told to leave alone what computes positions in this project's graph.
POSITIONS_KEPT: dict[str, Quantizer] = {
    f"{name}, not positions": partial(ONNXRUNTIME[name], exclude=position_products)
    for name in (
        "quantize_dynamic, uint8",
        "quantize_static, minmax, linears alone, uint8",
        "MatMulNBits int8",
        "MatMulNBits int4",
    )
}
