"""The graph: one builder for every encoding and every linear format.

com.microsoft::GroupQueryAttention does attention and the cache:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import NamedTuple

import onnx

from expe_edge import __version__
from expe_edge.config import ExPEConfig
from expe_edge.errors import ExportError
from expe_edge.export.fold import LayerWeights, ModelWeights, extract_weights
from expe_edge.export.nodes import MICROSOFT, GraphBuilder
from expe_edge.export.positions import POSITION_NODES, PositionNodes, Projection
from expe_edge.modeling import ExPEForCausalLM
from expe_edge.package import GraphContract
from expe_edge.quant.formats import Float, LinearFormat, Range

#: The name of the head among the linears.
HEAD = "head"
#: GroupQueryAttention takes head sizes in these units.
HEAD_SIZE_UNIT = 8


def graph_contract(config: ExPEConfig) -> GraphContract:
    """Return the contract of the graph of a model with `config`."""
    return GraphContract(
        layers=config.num_hidden_layers,
        key_value_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocab_size=config.vocab_size,
    )


class BuiltGraph(NamedTuple):
    """The graph, and for every linear the name of the tensor that enters it."""

    model: onnx.ModelProto
    linear_inputs: dict[str, str]


def build_graph(model: ExPEForCausalLM, linear: LinearFormat, *, folded: bool = True) -> BuiltGraph:
    """Return the model as an ONNX graph with the tensors of `graph_contract`.

    Args:
        linear: the format of every linear, the head's included.
        folded: positions folded out of the products; False leaves them inside, as an exporter would that knows
            nothing of the encoding.

    Raises:
        ExportError: a head size that the attention operator does not take, or weights that are not finite.
    """
    if model.config.head_dim % HEAD_SIZE_UNIT:
        raise ExportError(
            f"head size {model.config.head_dim} is not a multiple of {HEAD_SIZE_UNIT}, which onnxruntime's attention "
            "needs; train with another --num-attention-heads or --hidden-size"
        )
    return _Decoder(model, linear, folded=folded).build()


class _Decoder:
    def __init__(self, model: ExPEForCausalLM, linear: LinearFormat, *, folded: bool) -> None:
        self.config: ExPEConfig = model.config
        self.graph = GraphBuilder()
        self.linear = _DescribedLinear(linear)
        self.weights: ModelWeights = extract_weights(model, folded=folded)
        self.positions: PositionNodes = POSITION_NODES[self.config.positional](
            self.graph, self.config, model, self.linear
        )

    def build(self) -> BuiltGraph:
        graph, contract = self.graph, graph_contract(self.config)
        self._lengths()
        self.positions.begin()
        hidden = graph.op(
            "Gather", graph.weight("embedding.weight", self.weights.embedding), "input_ids", name="embedding"
        )
        hidden = self.positions.embed(hidden)
        for index, weights in enumerate(self.weights.layers):
            hidden = self._block(f"layers.{index}", index, hidden, weights)
        hidden = self._norm("norm", hidden, self.weights.norm)
        graph.emit("Identity", [self.linear.emit(graph, HEAD, hidden, self.weights.head)], ["logits"], name="logits")
        proto = graph.model(contract.inputs, contract.outputs, f"expe-edge {__version__}")
        return BuiltGraph(proto, self.linear.inputs)

    def _lengths(self) -> None:
        """The operator's two lengths: last position of each row (B,), and of the longest row plus one, int32."""
        graph = self.graph
        tokens = graph.op("ReduceSum", "attention_mask", graph.ints(1), name="lengths.tokens", keepdims=0)
        last = graph.op("Sub", tokens, graph.ints(1), name="lengths.last")
        self.last = graph.op("Cast", last, name="lengths.last", to=int(onnx.TensorProto.INT32))
        total = graph.op("Shape", "attention_mask", name="lengths.total", start=1, end=2)
        self.total = graph.op("Cast", total, name="lengths.total", to=int(onnx.TensorProto.INT32))

    def _block(self, name: str, index: int, hidden: str, weights: LayerWeights) -> str:
        graph, linear = self.graph, self.linear
        normed = self._norm(f"{name}.attention.norm", hidden, weights.attention_norm)
        projection = self.positions.project(f"{name}.attention", normed, weights)
        mixed = self._attention(f"{name}.attention.mix", index, projection)
        peaked = projection.positioned_values
        written = linear.emit(graph, f"{name}.attention.out", mixed, weights.out, peaked=peaked)
        hidden = graph.op("Add", hidden, written, name=f"{name}.attention.residual")
        normed = self._norm(f"{name}.feed_forward.norm", hidden, weights.feed_forward_norm)
        written = self._feed_forward(f"{name}.feed_forward", normed, weights)
        return graph.op("Add", hidden, written, name=f"{name}.feed_forward.residual")

    def _attention(self, name: str, index: int, projection: Projection) -> str:
        past = [f"past_key_values.{index}.{part}" for part in ("key", "value")]
        inputs = [projection.query, projection.key, projection.value, *past, self.last, self.total]
        if projection.bias:
            inputs += ["", "", "", projection.bias]
        outputs = [name, f"present.{index}.key", f"present.{index}.value"]
        self.graph.emit(
            "GroupQueryAttention",
            inputs,
            outputs,
            name=name,
            domain=MICROSOFT,
            num_heads=self.config.num_attention_heads,
            kv_num_heads=self.config.num_key_value_heads,
            do_rotary=0,
        )
        return name

    def _feed_forward(self, name: str, hidden: str, weights: LayerWeights) -> str:
        graph = self.graph
        wide = self.linear.emit(graph, f"{name}.up", hidden, weights.up)
        if self.config.hidden_act == "gelu":
            active = graph.op("Gelu", wide, name=f"{name}.gelu")
        else:
            gate, up = graph.multi("Split", [wide], 2, name=f"{name}.halves", axis=-1, num_outputs=2)
            sigmoid = graph.op("Sigmoid", gate, name=f"{name}.sigmoid")
            active = graph.op("Mul", graph.op("Mul", gate, sigmoid, name=f"{name}.silu"), up, name=f"{name}.active")
        return self.linear.emit(graph, f"{name}.down", active, weights.down, peaked=True)

    def _norm(self, name: str, hidden: str, gain: Float) -> str:
        """RMSNorm in the form that onnxruntime fuses into one kernel."""
        graph = self.graph
        squares = graph.op("Pow", hidden, graph.scalar(2.0), name=f"{name}.square")
        mean = graph.op("ReduceMean", squares, graph.ints(-1), name=f"{name}.mean", keepdims=1)
        shifted = graph.op("Add", mean, graph.scalar(self.config.rms_norm_eps), name=f"{name}.shifted")
        root = graph.op("Sqrt", shifted, name=f"{name}.root")
        scaled = graph.op("Div", hidden, root, name=f"{name}.scaled")
        return graph.op("Mul", scaled, graph.weight(f"{name}.gain", gain), name=name)


class _DescribedLinear(LinearFormat):
    """A format that also records its input's type in the graph, for calibration to find."""

    def __init__(self, inner: LinearFormat) -> None:
        self.inner = inner
        self.inputs: dict[str, str] = {}

    @property
    def rounds_activations(self) -> bool:  # type: ignore[override]  # the inner format's
        return self.inner.rounds_activations

    def product(self, graph: GraphBuilder, linear: str, hidden: str, weight: Float, within: Range | None = None) -> str:
        if hidden not in self.inputs.values():
            graph.describe(hidden, weight.shape[0])
        self.inputs[linear] = hidden
        return self.inner.product(graph, linear, hidden, weight, within)
