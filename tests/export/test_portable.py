"""Portable packages: standard operators alone, a cache that grows, and the results of ordinary packages everywhere."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from expe_edge.divergence import divergence
from expe_edge.errors import ExportError, GenerationError
from expe_edge.export import portable
from expe_edge.export.exporter import export
from expe_edge.export.fold import extract_weights
from expe_edge.export.kernels import require_kernels
from expe_edge.export.portable import reference_evaluator, require_portable, require_standard_operators
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import LINEAR_FORMATS, Float32, FormatOptions, make_format
from expe_edge.graph.nodes import GraphBuilder
from expe_edge.graph.run import check_contract, graph_feeds, run_graph
from expe_edge.package.contract import TensorSpec
from expe_edge.package.directory import read_package
from expe_edge.package.manifest import release
from expe_edge.quant.formats import Formats
from expe_edge.quant.recipe import BLOCKWISE, Recipe
from expe_edge.quant.solvers import WeightQuantizer
from expe_edge.runtime import Generator, PackageSession, Sampling
from expe_edge.runtime.session import Step
from tests.conftest import PORTABLE_PRECISIONS, PRECISIONS
from tests.export.test_clients import genai_tokens, optimum_model, optimum_tokens, our_tokens
from tests.export.test_parity import TOLERANCES, every_variant, parts, subject
from tests.graphs import normal, open_session, operators_of
from tests.manifests import edit_manifest, read_manifest
from tests.strategies import random_model, random_tokens, small_config

#: Largest difference of float32 logits: the sums are the same, their order differs.
LOGITS_TOLERANCE = TOLERANCES["onnx"].limit
#: Mean nats per token between two ways of computing one int8 graph. A value in the middle between two levels goes
#: either way with the last bit of float32, and MatMulNBits rounds activations that the standard does not; random
#: weights feel that most, a trained model ten times less.
ROUNDED_KL = 0.01
PROMPTS = ["The old tree grows", "a", "Document 3.\nthe river runs under the bright stone and the tree grows over it."]
#: Models that differ in what the graph is made of.
KINDS = [
    "expe-default",
    "expe-paper",
    "exqpe-default",
    "exqpe-query_key_value-override",
    "relative",
    "tied-head",
    "gelu",
    "one-shared-head",
]
ROUNDING = [name for name, kind in LINEAR_FORMATS.items() if kind.kernel != Float32.kernel]
#: The first onnxruntime that makes a kernel of 4 bits of a head that is the embedding too.
HEAD_FUSED_SINCE = "1.25"
UNKNOWN = f"onnxruntime {ort.__version__} makes no one kernel of its operators"
every_precision = pytest.mark.parametrize(
    "precision",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in PORTABLE_PRECISIONS, reason=UNKNOWN))
        for name in PRECISIONS
    ],
)
every_kind = pytest.mark.parametrize("name", KINDS)


@functools.cache
def portable_graph(name: str, precision: str = "float32", *, reduce_range: bool = False) -> onnx.ModelProto:
    """The portable graph of a model of the matrix, as the exporter asks for it."""
    evidence = subject(name).evidence(folded=True)
    formats = Formats(dict.fromkeys(evidence.linears, precision), LINEAR_FORMATS[precision].embedding)
    return evidence.build(Recipe(precision, reduce_range=reduce_range, portable=True), formats).model


@pytest.fixture(scope="module")
def portables(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The checkpoint's portable packages, each in a directory called like its precision."""
    out = tmp_path_factory.mktemp("portable")
    for package in export(checkpoint, out, [Recipe(name, portable=True) for name in PORTABLE_PRECISIONS]):
        package.path.rename(out / package.precision.removesuffix("-portable"))
    return out


@pytest.fixture(scope="module")
def generators(packages: Path, portables: Path) -> list[Generator]:
    """Of the ordinary and of the portable float32 package; neither ends a text early."""
    found = [Generator.load(folder / "float32") for folder in (packages, portables)]
    for generator in found:
        generator.end_of_text = None
    return found


@pytest.fixture(scope="module")
def tokens(generators: list[Generator], text_folder: Path) -> np.ndarray:
    """A text of several prefill chunks, (T,) int64."""
    return generators[0].encode((text_folder / "07.txt").read_text(encoding="utf-8"))[:300]


# The graph.


@every_variant
def test_the_portable_graph_gives_the_logits_of_pytorch_in_one_pass_and_in_chunks_and_single_steps(name: str) -> None:
    case, model = subject(name), portable_graph(name)
    session = open_session(model)
    require_standard_operators(model)
    check_contract(session, graph_contract(case.config, portable=True))
    for split in ([case.length], parts(case.length)):
        np.testing.assert_allclose(case.run(session, split), case.logits, rtol=0, atol=LOGITS_TOLERANCE)


@every_variant
def test_the_portable_graph_gives_the_logits_of_the_ordinary_one(name: str) -> None:
    case = subject(name)
    ordinary, portable = (
        case.run(session, parts(case.length)) for session in (case.session(), open_session(portable_graph(name)))
    )
    np.testing.assert_allclose(portable, ordinary, rtol=0, atol=LOGITS_TOLERANCE)


@every_kind
@every_precision
def test_a_portable_graph_has_the_standard_domain_alone_and_runs_the_promised_kernels(
    name: str, precision: str
) -> None:
    if (name, precision) == ("tied-head", "int4-weight") and release(ort.__version__) < release(HEAD_FUSED_SINCE):
        pytest.skip(UNKNOWN)
    model = portable_graph(name, precision)
    require_standard_operators(model)
    assert [opset.domain for opset in model.opset_import] == [""]
    linears = dict.fromkeys(subject(name).evidence(folded=True).linears, precision)
    require_kernels(operators_of(model), linears)


@every_kind
@pytest.mark.parametrize("precision", ROUNDING)
def test_a_portable_graph_predicts_what_the_ordinary_one_of_its_precision_does(name: str, precision: str) -> None:
    case = subject(name)
    ordinary, portable = (
        case.run(session, [case.length])
        for session in (case.session(precision), open_session(portable_graph(name, precision)))
    )
    assert divergence(ordinary, portable).mean() < ROUNDED_KL


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_weights_of_seven_bits_are_portable_too(precision: str) -> None:
    model = portable_graph("expe-default", precision, reduce_range=True)
    require_standard_operators(model)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "head.weight")
    assert weight.data_type == onnx.TensorProto.INT8


def padded(rows: Sequence[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask (B, T) of rows of several lengths."""
    longest = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        begin = longest - len(row) if side == "left" else 0
        ids[index, begin : begin + len(row)], mask[index, begin : begin + len(row)] = row, 1
    return ids, mask


@every_variant
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_prefilled_and_decoded_together_equal_rows_alone(name: str, side: str) -> None:
    case, session, new = subject(name), open_session(portable_graph(name)), 4
    rows = [case.tokens[0, begin : begin + length] for begin, length in ((0, 40), (7, 9), (50, 26))]
    ids, mask = padded([row[:-new] for row in rows], side)
    ids = np.concatenate([ids, [row[-new:] for row in rows]], axis=1)
    mask = np.concatenate([mask, np.ones((3, new), dtype=np.int64)], axis=1)
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    cache, logits, prefilled = None, [], ids.shape[1] - new
    for begin, end in [(0, prefilled), *((at, at + 1) for at in range(prefilled, ids.shape[1]))]:
        feeds = graph_feeds(case.contract, ids[:, begin:end], cache)
        feeds |= {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
        found, *cache = session.run(None, feeds)
        logits.append(found)
    together = np.concatenate(logits, axis=1)
    assert np.isfinite(together).all()  # of padding too: what it leaves in the cache is multiplied by 0
    for index, row in enumerate(rows):
        alone = case.forward(row[None])[0]
        np.testing.assert_allclose(together[index][mask[index] == 1], alone, rtol=0, atol=LOGITS_TOLERANCE)


def test_heads_of_any_size_are_portable() -> None:
    config = small_config(hidden_size=24)
    model, tokens = random_model(config), random_tokens(config, 20)
    weights = extract_weights(model, folded=True)
    with pytest.raises(ExportError, match=r"^head size 6 .*; export with `portable`, or train with another "):
        build_graph(weights, Float32())
    session = open_session(build_graph(weights, Float32(), portable=True).model)
    with torch.inference_mode():
        expected = model(input_ids=torch.from_numpy(tokens), use_cache=False).logits.numpy()
    (found,) = session.run(["logits"], graph_feeds(graph_contract(config, portable=True), tokens))
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_TOLERANCE)


# Weights in blocks.


@pytest.mark.parametrize("precision", BLOCKWISE)
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("shape", [(64, 48), (33, 47), (20, 8)], ids=str)
def test_the_standard_operators_restore_the_matrix_that_the_blocks_stand_for(
    precision: str, tied: bool, shape: tuple[int, int]
) -> None:
    linear = make_format(precision, FormatOptions(portable=True, quantizer=WeightQuantizer("rtn", 32)))
    weight, graph = normal(0, *shape), GraphBuilder()
    columns, rows = shape
    specs = [TensorSpec("ids", "int64", (1, rows)), TensorSpec("hidden", "float32", (columns, columns))]
    stored = linear.store("head", weight)
    outputs: dict[str, tuple[int, ...]] = {"table": (1, rows, columns)} if tied else {}
    if tied:
        graph.emit("Identity", [stored.lookup(graph, "ids")], ["table"], name="table")
    graph.emit("Identity", [linear.emit(graph, "head", "hidden", stored)], ["matrix"], name="matrix")
    outputs["matrix"] = shape
    model = graph.model(specs, [TensorSpec(name, "float32", size) for name, size in outputs.items()], "test")
    require_standard_operators(model)
    feeds = {"ids": np.arange(rows)[None], "hidden": np.eye(columns, dtype=np.float32)}
    *looked_up, matrix = reference_evaluator(model).run(None, feeds)
    np.testing.assert_array_equal(matrix, stored.restored())
    for found in looked_up:
        np.testing.assert_array_equal(found[0], stored.restored().T)
    np.testing.assert_allclose(open_session(model).run(["matrix"], feeds)[0], matrix, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("precision", [*BLOCKWISE, "int8-dynamic", "float32"])
def test_a_tied_embedding_is_stored_once(precision: str) -> None:
    held = {tensor.name for tensor in portable_graph("tied-head", precision).graph.initializer}
    assert "embedding.weight" in held
    assert not held & {"head.weight", "head.scale"}


# The reference evaluator.


@every_variant
def test_the_reference_evaluator_gives_the_logits_of_onnxruntime(name: str) -> None:
    case, model = subject(name), portable_graph(name)
    expected, found = (
        run_graph(runner, case.contract, case.tokens[0, :26], 2)
        for runner in (reference_evaluator(model), open_session(model))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGITS_TOLERANCE)


@every_kind
@every_precision
def test_the_export_check_agrees_with_every_precision(name: str, precision: str) -> None:
    case, model = subject(name), portable_graph(name, precision)
    linears = dict.fromkeys(case.evidence(folded=True).linears, precision)
    require_portable(model, case.contract, case.tokens[0], linears, folded=True)


def test_a_row_of_padding_alone_sees_no_key_and_is_finite() -> None:
    case, model = subject("expe-default"), portable_graph("expe-default")
    ids, mask = padded([case.tokens[0, :20], case.tokens[0, :0]], "left")
    outputs = reference_evaluator(model).run(None, graph_feeds(case.contract, ids) | {"attention_mask": mask})
    assert all(np.isfinite(output).all() for output in outputs)


def test_an_operator_of_another_domain_is_refused() -> None:
    model = subject("expe-default").evidence(folded=True).float_graph().model
    with pytest.raises(ExportError) as raised:
        require_standard_operators(model)
    assert str(raised.value) == (
        "`portable` has standard operators alone, but this graph has com.microsoft::GroupQueryAttention, "
        "com.microsoft::SkipSimplifiedLayerNormalization, expe_edge::SlopeBias, expe_edge::SwiGLU"
    )


@pytest.mark.parametrize("precision", ["float32", "int8-weight"])
def test_a_graph_that_onnxruntime_computes_otherwise_is_refused(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is made to run the graph with one gain doubled."""
    case, model = subject("expe-default"), portable_graph("expe-default", precision)

    def misled(graph: onnx.ModelProto) -> ReferenceEvaluator:
        copy = onnx.ModelProto()
        copy.CopyFrom(graph)
        for tensor in copy.graph.initializer:
            if tensor.name == "norm.gain":
                tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), tensor.name))
        return reference_evaluator(copy)

    monkeypatch.setattr(portable, "reference_evaluator", misled)
    linears = dict.fromkeys(case.evidence(folded=True).linears, precision)
    with pytest.raises(ExportError) as raised:
        require_portable(model, case.contract, case.tokens[0], linears, folded=True)
    beginning = f"onnxruntime {ort.__version__} does not compute this portable graph as the ONNX reference does: "
    assert str(raised.value).startswith(beginning)
    assert str(raised.value).endswith("; use another onnxruntime, or drop `portable`")


# The package.


def test_a_portable_package_has_no_int8_cache() -> None:
    with pytest.raises(ExportError) as raised:
        Recipe("int4-weight", cache="int8", portable=True)
    assert str(raised.value) == (
        "`portable` has a float32 cache: no standard operator appends to one of int8; drop `cache` int8, or `portable`"
    )


@every_precision
def test_the_package_says_how_its_cache_grows(packages: Path, portables: Path, precision: str) -> None:
    for folder, growing in ((packages, False), (portables, True)):
        package = read_package(folder / precision)
        genai = json.loads((package.path / "genai_config.json").read_text(encoding="utf-8"))
        assert package.manifest.contract.growing_cache is growing
        assert genai["search"]["past_present_share_buffer"] is not growing


def test_a_manifest_that_does_not_speak_of_growing_has_a_shared_cache(packages: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(packages / "float32", tmp_path / "package"))
    contract = read_manifest(package)["contract"]
    contract.pop("growing_cache")
    edit_manifest(package, contract=contract)
    assert read_package(package).manifest.contract == read_package(packages / "float32").manifest.contract


def test_a_portable_float32_package_is_a_source_of_others(portables: Path, tmp_path: Path) -> None:
    (package,) = export(portables / "float32", tmp_path, [Recipe("int8-dynamic", portable=True)])
    expected = read_package(portables / "int8-dynamic").model_path.read_bytes()
    assert read_package(package.path).model_path.read_bytes() == expected


# The runtime.


def prefill(session: PackageSession, tokens: np.ndarray, chunk: int) -> np.ndarray:
    """Logits (T, V) of all tokens, in chunks."""
    return np.concatenate([part.copy() for part in session.prefill(session.new_cache(1, len(tokens)), tokens, chunk)])


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_prefill_in_chunks_gives_the_logits_of_the_ordinary_package(
    generators: list[Generator], tokens: np.ndarray, chunk: int
) -> None:
    ordinary, portable = (generator.session for generator in generators)
    expected = prefill(ordinary, tokens, 1000)
    np.testing.assert_allclose(prefill(portable, tokens, chunk), expected, rtol=0, atol=LOGITS_TOLERANCE)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.0, top_k=20, seed=4)], ids=["greedy", "sampled"]
)
def test_generated_tokens_are_those_of_the_ordinary_package_alone_and_in_a_batch(
    generators: list[Generator], sampling: Sampling
) -> None:
    for prompts in ([PROMPTS[0]], PROMPTS):
        ordinary, portable = (
            [found.tokens for found in generator.generate(prompts, max_new_tokens=200, sampling=sampling)]
            for generator in generators
        )
        assert portable == ordinary


@every_precision
def test_a_stream_is_the_generated_text(portables: Path, precision: str) -> None:
    generator = Generator.load(portables / precision)
    (expected,) = generator.generate([PROMPTS[2]], max_new_tokens=40)
    assert "".join(generator.stream(PROMPTS[2], max_new_tokens=40)) == expected.text


def test_rows_of_a_batch_part_and_join_as_often_as_wanted(generators: list[Generator], tokens: np.ndarray) -> None:
    """Filled apart, run together, filled apart again: always what each row alone would give."""
    session = generators[1].session
    texts, fills = [tokens[:60], tokens[60:120]], ((0, 31), (1, 8), (0, 5), (1, 11))
    alone = [prefill(session, text, 60) for text in texts]
    cache = session.new_cache(2, 60)
    step = Step(session, cache, 2)
    for first, second in (fills[:2], fills[2:]):
        for index, count in (first, second):
            begin = int(cache.lengths[index])
            *_, logits = session.prefill(cache.row(index), texts[index][begin : begin + count], 7)
            np.testing.assert_allclose(logits[-1], alone[index][begin + count - 1], rtol=0, atol=LOGITS_TOLERANCE)
        for _ in range(3):
            begins = cache.lengths.tolist()
            logits = step.run(np.stack([text[at : at + 2] for text, at in zip(texts, begins, strict=True)]))
            expected = np.stack([own[at : at + 2] for own, at in zip(alone, begins, strict=True)])
            np.testing.assert_allclose(logits, expected, rtol=0, atol=LOGITS_TOLERANCE)
    assert cache.lengths.tolist() == [31 + 5 + 12, 8 + 11 + 12]


def test_a_step_beyond_the_capacity_is_refused_and_changes_nothing(generators: list[Generator]) -> None:
    session, text = generators[1].session, np.arange(1, 6)
    cache = session.new_cache(1, 5)
    list(session.prefill(cache, text[:4]))
    with pytest.raises(GenerationError, match=r"^the cache holds 5 tokens; 6 are needed$"):
        Step(session, cache, 2).run(text[None, :2])
    logits = Step(session, cache, 1).run(text[None, 4:])
    assert cache.lengths.tolist() == [5]
    np.testing.assert_allclose(logits[0], prefill(session, text, 5)[4:], rtol=0, atol=LOGITS_TOLERANCE)


# Other clients.


@every_precision
@pytest.mark.parametrize("theirs", [optimum_tokens, genai_tokens], ids=["optimum", "genai"])
def test_other_clients_choose_the_tokens_our_generator_chooses(
    portables: Path, precision: str, theirs: Callable[[Path, list[int]], list[int]]
) -> None:
    package = portables / precision
    prompt = [int(token) for token in Generator.load(package).encode(PROMPTS[0])]
    assert theirs(package, prompt) == our_tokens(package, prompt)


def test_optimum_generates_from_rows_padded_on_the_left(portables: Path, generators: list[Generator]) -> None:
    """As transformers pads them; an ordinary package takes no such batch."""
    rows = [generators[1].encode(prompt) for prompt in PROMPTS]
    ids, mask = map(torch.from_numpy, padded(rows, "left"))
    model = optimum_model(portables / "float32")
    model.generation_config.eos_token_id = None
    output = model.generate(ids, attention_mask=mask, max_new_tokens=60, max_length=None, do_sample=False)
    ours = generators[1].generate(PROMPTS, max_new_tokens=60)
    assert output[:, ids.shape[1] :].tolist() == [completion.tokens for completion in ours]
