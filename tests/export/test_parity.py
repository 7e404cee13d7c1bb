"""The parity ladder: one model, computed in ever more ways, each compared with the one before.

    float64 NumPy reference → torch → torch with a cache → ONNX float32 → fewer bits → the runtime over a package

Every encoding and every linear format climbs it. A rung's tolerance stands in one table, with its reason.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.t5.modeling_t5 import T5Attention

from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.observations import Calibration, sample_windows
from expe_edge.divergence import divergence
from expe_edge.errors import ExportError
from expe_edge.export.fold import extract_weights
from expe_edge.export.parity import Parity, measure_parity, require_parity
from expe_edge.graph.build import BuiltGraph, build_graph, graph_contract
from expe_edge.graph.encodings import POSITION_NODES
from expe_edge.graph.linears import LINEAR_FORMATS, Float16, Float32
from expe_edge.graph.run import check_contract, graph_feeds, open_graph, parts_of
from expe_edge.model.encodings import POSITIONAL_ENCODINGS
from expe_edge.positions.expe import HOW, WHERE
from expe_edge.positions.parameters import POSITIONAL_PARAMETERS
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime.session import PackageSession, Step
from expe_edge.text.tokenization import encode_documents
from expe_edge.training.checkpoint import load_checkpoint
from tests import reference
from tests.strategies import random_model, random_tokens, small_config


class Tolerance(NamedTuple):
    """limit: the most, and why. least: less would be float32 under another name."""

    limit: float
    why: str
    least: float = 0.0


#: Largest absolute difference of logits of standard deviation 1.5, or mean nats per token for the rounded rungs.
TOLERANCES = {
    "torch": Tolerance(1e-4, "float32 keeps 2^-24 of scores of about 100 through two layers of softmax"),
    "cached": Tolerance(1e-4, "the same float32 sums in blocks of other sizes"),
    "onnx": Tolerance(2e-4, "float32 in other kernels, which differ from machine to machine: two roundings apart"),
    "inline": Tolerance(1e-3, "positions inside the products: float32 itself rounds the content beside them"),
    "half": Tolerance(0.001, "11 or 8 bits of weights", 1e-8),
    "int8": Tolerance(0.02, "8 bits of weights and activations; ranges of one training length hold at 16", 1e-5),
    "int4": Tolerance(
        0.5,
        "a block of 32 to 64 Gaussian weights reaches 2.4σ, so a step is 0.3σ and each product off by 0.3/√12 = 9 %; "
        "two layers make that up to 0.6 of the logits' spread of 1.5, and the divergence half its square: 0.4 nats. "
        "Predictions that have nothing in common are 1.5² = 2.2 nats apart",
        1e-5,
    ),
    "trained half": Tolerance(1e-5, "11 or 8 bits of weights", 1e-10),
    "trained int8": Tolerance(0.001, "docs/design.md measures 0.0003 to 0.0006 with folded positions", 1e-9),
    "trained int4": Tolerance(0.02, "the issue of quantization: what the best solver must reach", 1e-9),
}
#: The most that 4 bits may multiply the divergence of 8 by: a step of an eighth of the largest weight instead of a
#: 127th multiplies errors, and divergence goes with their square.
FOUR_BITS_OVER_EIGHT = (127 / 8) ** 2

N = 16
#: Crosses a block of queries (256), and is 16 training lengths and more.
LENGTH = 280


def expe(**parameters: Any) -> dict[str, Any]:
    return {"positional": "expe", "positional_parameters": {"dims": 8, "step": 2.0**-5, **parameters}}


def exqpe(**parameters: Any) -> dict[str, Any]:
    """Two bits a limb, so that short sequences carry into the last one."""
    values = {"dims": 12, "limb_bits": 2, **parameters}
    return {"positional": "exqpe", "positional_parameters": values, "max_position_embeddings": 2048}


#: Name to what makes it differ from `small_config`. The ablations of ExPE are every `where` with every `how`.
MATRIX: dict[str, dict[str, Any]] = {
    **{f"expe-{where}-{how}": expe(where=where, how=how) for where in WHERE for how in HOW},
    **{f"exqpe-{where}-{how}": exqpe(where=where, how=how) for where in WHERE for how in HOW},
    "expe-default": {"positional": "expe"},
    "expe-paper": expe(where="query_key"),
    "expe-random-slopes": expe(slopes="random"),
    "expe-own-slopes": expe(slopes=(0.5, 0.0, -0.125, 0.03125)),
    "expe-odd-dimensions": expe(dims=7),
    "expe-recipe": expe(slopes="alibi", softplus=True, content_heads=1, temperature=0.36) | {"output_gate": True},
    "expe-content-heads": expe(content_heads=3, temperature=0.1),
    "expe-softplus": expe(slopes=(0.5, 0.25, 0.125, 0.03125), softplus=True, how="add"),
    "exqpe-content-heads": exqpe(slopes="alibi", content_heads=2, temperature=0.36) | {"output_gate": True},
    "exqpe-default": {"positional": "exqpe", "max_position_embeddings": 2048},
    "expe-each-dimension": {
        **expe(dims=4, start=(0.5, -1.0, 0.0, 2.0), step=(0.125, -0.0625, 0.25, 0.0078125)),
        "max_position_embeddings": 4096,
    },
    "expe-all-dimensions": expe(dims=32, start=-1.0) | {"max_position_embeddings": 4096},
    "exqpe-one-limb": exqpe(limbs=1, limb_bits=7, step=2.0**-5) | {"max_position_embeddings": 128},
    "rotary": {"positional": "rotary"},
    "rotary-theta": {"positional": "rotary", "positional_parameters": {"theta": 100.0}},
    "sinusoidal": {"positional": "sinusoidal"},
    "relative": {"positional": "relative"},
    "relative-short": {"positional": "relative", "positional_parameters": {"buckets": 6, "max_distance": 20}},
    "alibi": {"positional": "alibi"},
    "alibi-six-heads": {
        "positional": "alibi", "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3,
    },
    "none": {"positional": "none"},
    "gate": {"output_gate": True},
    "alibi-gate": {"positional": "alibi", "output_gate": True},
    "gelu": {"hidden_act": "gelu"},
    "tied-head": {"tie_word_embeddings": True},
    "ungrouped-heads": {"num_key_value_heads": 4},
    "one-shared-head": {"num_key_value_heads": 1},
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", MATRIX)


class Subject:
    """A model of the matrix with its text, and what is worth computing once."""

    def __init__(self, name: str) -> None:
        self.config = small_config(training_length=N, **MATRIX[name])
        self.model = random_model(self.config)
        self.contract = graph_contract(self.config)
        self.length = min(LENGTH, self.config.max_position_embeddings)
        self.tokens = random_tokens(self.config, self.length)
        self.logits = self.forward(self.tokens)[0]
        #: Whether positions can be folded out of the products.
        where = self.config.positional_parameters.get("where")
        self.foldable = where in ("key", "query_key", "query_key_value")

    def forward(self, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
        with torch.inference_mode():
            logits: torch.Tensor = self.model(input_ids=torch.from_numpy(tokens), use_cache=False, **inputs).logits
        return logits.numpy()

    @functools.cache  # noqa: B019  # subjects live as long as the tests
    def session(self, precision: str = "float32", *, folded: bool = True) -> ort.InferenceSession:
        evidence = self.evidence(folded=folded)
        formats = evidence.formats(Recipe(precision), dict.fromkeys(evidence.linears, precision))
        return open_session(build_graph(evidence.weights, formats).model)

    @functools.cache  # noqa: B019
    def evidence(self, *, folded: bool) -> Evidence:
        """What windows of one training length show, as the exporter measures it."""
        calibration, stream = Calibration(windows=8), random_tokens(self.config, 2000, seed=1)[0].astype(np.int32)
        weights = extract_weights(self.model, folded=folded)
        return Evidence(weights, calibration, lambda: sample_windows(stream, N, calibration))

    @functools.cache  # noqa: B019
    def gpu_session(self, element: str) -> ort.InferenceSession:
        linears = Float16() if element == "float16" else Float32()
        return open_session(build_graph(extract_weights(self.model, folded=True), linears, gpu=element).model)

    def run(self, session: ort.InferenceSession, parts: Sequence[int], gpu: str | None = None) -> np.ndarray:
        """Logits (T, V) of the text in consecutive parts, the cache handed on. gpu: what the graph is for."""
        cache, logits = None, []
        contract = graph_contract(self.config, gpu=gpu)
        for part in np.split(self.tokens, np.cumsum(parts)[:-1], axis=1):
            outputs = session.run(None, graph_feeds(contract, part, cache))
            logits.append(outputs[0][0])
            cache = outputs[1:]
        return np.concatenate(logits)


@functools.cache
def subject(name: str) -> Subject:
    return Subject(name)


def open_session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def parts(length: int) -> list[int]:
    """A long prefill, a chunk, and single steps: together `length`, the query block crossed while decoding."""
    return [length - 30, 17, *[1] * 13]


def assert_close(found: np.ndarray, expected: np.ndarray, rung: str) -> None:
    assert found.shape == expected.shape
    assert float(np.abs(found - expected).max()) <= TOLERANCES[rung].limit, TOLERANCES[rung].why


# The matrix is complete, and its models are worth comparing.


def test_every_positional_encoding_is_in_the_matrix() -> None:
    covered = {changes.get("positional", "expe") for changes in MATRIX.values()}
    assert covered == set(POSITIONAL_PARAMETERS)
    assert covered == set(POSITIONAL_ENCODINGS)
    assert covered == set(POSITION_NODES)


def test_every_linear_format_is_on_the_ladder() -> None:
    assert {"float32", *ROUNDED} == set(LINEAR_FORMATS)


@every_variant
def test_the_models_of_the_matrix_predict_something_that_depends_on_the_order_of_tokens(name: str) -> None:
    case = subject(name)
    before, last = case.tokens[:, :-1], case.tokens[:, -1:]
    reordered = case.forward(np.concatenate([np.roll(before, 5, axis=1), last], axis=1))
    assert case.logits.std() > 1
    assert np.abs(reordered[0, -1] - case.logits[-1]).max() > 100 * TOLERANCES["torch"].limit


# The reference itself, against other people's code.


@pytest.mark.parametrize(("buckets", "farthest"), [(32, 128), (6, 20), (2, 3), (8, 100)])
def test_the_references_buckets_are_those_of_t5(buckets: int, farthest: int) -> None:
    back = torch.arange(300)
    theirs = T5Attention._relative_position_bucket(-back, False, buckets, farthest)
    assert [reference.t5_bucket(int(n), buckets, farthest) for n in back] == theirs.tolist()


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12])
def test_the_references_slopes_are_those_of_alibi_in_bloom(heads: int) -> None:
    theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(reference.press_slopes(heads), theirs.numpy(), rtol=1e-6)


# The ladder.


@every_variant
def test_torch_equals_the_plain_reference(name: str) -> None:
    case = subject(name)
    expected = reference.reference_logits(case.config, reference.model_weights(case.model), case.tokens[0])
    assert_close(case.logits, expected, "torch")


@every_variant
def test_a_cache_filled_in_chunks_and_single_steps_equals_one_pass(name: str) -> None:
    case = subject(name)
    cache, logits = DynamicCache(), []
    for part in np.split(case.tokens, np.cumsum(parts(case.length))[:-1], axis=1):
        with torch.inference_mode():
            output = case.model(input_ids=torch.from_numpy(part), past_key_values=cache, use_cache=True)
        logits.append(output.logits[0].numpy())
    assert cache.get_seq_length() == case.length
    assert_close(np.concatenate(logits), case.logits, "cached")


def left_padded(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, T) of rows of several lengths, padding first."""
    longest = max(len(row) for row in rows)
    ids, mask = np.zeros((2, len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :], mask[index, longest - len(row) :] = row, 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


@every_variant
def test_left_padded_rows_equal_rows_alone_with_and_without_a_cache(name: str) -> None:
    case = subject(name)
    lengths, new = (40, 9, 26), 5
    rows = [case.tokens[0, start : start + length] for start, length in zip((0, 7, 50), lengths, strict=True)]
    expected = [case.forward(row[None])[0] for row in rows]
    ids, mask = left_padded(rows)
    with torch.inference_mode():
        whole = case.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.numpy()
        cache = DynamicCache()
        output = case.model(input_ids=ids[:, :-new], attention_mask=mask[:, :-new], past_key_values=cache)
        steps = [output.logits[:, -1:]]
        for end in range(ids.shape[1] - new + 1, ids.shape[1] + 1):
            output = case.model(ids[:, end - 1 : end], mask[:, :end], past_key_values=cache)
            steps.append(output.logits)
    decoded = torch.cat(steps, dim=1).numpy()
    for index, row in enumerate(expected):
        assert_close(whole[index, -len(row) :], row, "cached")
        assert_close(decoded[index], row[-new - 1 :], "cached")


@every_variant
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "inline"])
def test_the_float32_graph_equals_torch_in_one_pass_and_in_chunks_and_single_steps(name: str, folded: bool) -> None:
    case = subject(name)
    if not folded and case.config.needs_folding is not None:
        with pytest.raises(ExportError, match="`positions` folded"):
            case.session(folded=False)
        return
    session = case.session(folded=folded)
    check_contract(session, case.contract)
    rung = "onnx" if folded or not case.foldable else "inline"
    assert_close(case.run(session, [case.length]), case.logits, rung)
    assert_close(case.run(session, parts(case.length)), case.logits, rung)


@every_variant
def test_the_graph_for_gpus_equals_torch_in_one_pass_and_in_chunks_and_single_steps(name: str) -> None:
    case = subject(name)
    session = case.gpu_session("float32")
    check_contract(session, graph_contract(case.config, gpu="float32"))
    assert_close(case.run(session, [case.length], "float32"), case.logits, "onnx")
    assert_close(case.run(session, parts(case.length), "float32"), case.logits, "onnx")


@every_variant
def test_the_graph_for_gpus_in_half_precision_stays_close_or_is_refused(name: str) -> None:
    case, tolerance = subject(name), TOLERANCES["half"]
    where = case.config.positional_parameters.get("where")
    if where not in ("key", None):
        with pytest.raises(ExportError, match="half precision would round the positions"):
            case.gpu_session("float16")
        return
    for split in ([case.length], parts(case.length)):
        distance = divergence(case.logits, case.run(case.gpu_session("float16"), split, "float16")).mean()
        assert tolerance.least < distance < tolerance.limit, tolerance.why


@pytest.mark.parametrize("positional", ["expe", "exqpe"])
def test_the_folded_float32_graph_keeps_its_accuracy_at_position_8000(positional: str) -> None:
    config = small_config(
        training_length=128,  # 64 of which are 8192 tokens
        positional=positional,
        hidden_size=24,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model, contract = random_model(config), graph_contract(config)
    session = open_session(build_graph(extract_weights(model, folded=True), Float32()).model)
    tokens, cache = random_tokens(config, 8192), None
    for part in np.split(tokens, 32, axis=1):
        logits, *cache = session.run(None, graph_feeds(contract, part, cache))
    with torch.inference_mode():
        expected = model.double()(torch.from_numpy(tokens), logits_to_keep=part.shape[1], use_cache=False).logits
    assert_close(logits, expected.numpy(), "onnx")


@every_variant
def test_right_padded_rows_of_the_graph_equal_rows_alone(name: str) -> None:
    case = subject(name)
    lengths = (40, 9, 26)
    rows = [case.tokens[0, start : start + length] for start, length in zip((0, 7, 50), lengths, strict=True)]
    ids = np.zeros((3, 40), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    feeds = graph_feeds(case.contract, ids)
    feeds["attention_mask"] = (np.arange(40) < np.array(lengths)[:, None]).astype(np.int64)
    logits = case.session().run(["logits"], feeds)[0]
    for index, row in enumerate(rows):
        assert_close(logits[index, : len(row)], case.forward(row[None])[0], "onnx")


#: Every format but float32, to the rung of the tolerance of its divergence.
ROUNDED = {
    "float16": "half",
    "bfloat16": "half",
    "int8-dynamic": "int8",
    "int8-static": "int8",
    "int8-weight": "int8",
    "int4-weight": "int4",
}


@every_variant
@pytest.mark.parametrize("precision", ROUNDED)
def test_predictions_stay_close_to_float32_over_16_training_lengths(name: str, precision: str) -> None:
    case, tolerance = subject(name), TOLERANCES[ROUNDED[precision]]
    distance = divergence(case.logits, case.run(case.session(precision), [case.length])).mean()
    assert tolerance.least < distance < tolerance.limit, tolerance.why


@every_variant
def test_four_bits_diverge_from_float32_no_more_than_their_wider_steps_explain(name: str) -> None:
    case = subject(name)
    four, eight = (
        divergence(case.logits, case.run(case.session(precision), [case.length])).mean()
        for precision in ("int4-weight", "int8-weight")
    )
    assert eight < four < FOUR_BITS_OVER_EIGHT * eight


@every_variant
@pytest.mark.parametrize("precision", ROUNDED)
def test_decoding_predicts_what_prefill_does(name: str, precision: str) -> None:
    case = subject(name)
    prefilled, decoded = (case.run(case.session(precision), split) for split in ([case.length], parts(case.length)))
    if precision != "int8-dynamic":  # fixed ranges: a token is rounded alike whoever stands beside it
        limit, reason = 1e-4, "float32 sums in another order can tip single values over a rounding boundary"
    else:
        limit, reason, _ = TOLERANCES["int8"]
    assert divergence(prefilled, decoded).mean() < limit, reason


def test_folding_keeps_static_int8_accurate_beyond_calibration_where_inline_positions_lose_it() -> None:
    case = subject("expe-query_key-override")
    folded, inline = (
        divergence(case.logits, case.run(case.session("int8-static", folded=folded), [case.length]))
        for folded in (True, False)
    )
    assert folded[-N:].mean() < 3 * folded[:N].mean()
    assert inline[-N:].mean() > 20 * folded[-N:].mean()


@pytest.mark.parametrize("precision", LINEAR_FORMATS)
def test_the_runtime_over_a_package_predicts_what_the_trained_checkpoint_does(
    packages: Path, checkpoint: Path, precision: str
) -> None:
    trained = load_checkpoint(checkpoint)
    stream = np.concatenate(encode_documents(trained.tokenizer, trained.corpus().held_out))
    tokens = stream[: 16 * trained.config.training_length].astype(np.int64)
    with torch.inference_mode():
        expected = trained.model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    runtime = PackageSession.load(packages / precision, threads=1)
    cache, decoded = runtime.new_cache(1, len(tokens)), 8
    found = [logits.copy() for logits in runtime.prefill(cache, tokens[:-decoded])]
    step = Step(runtime, cache, 1)
    found += [step.run(token[None, None])[0].copy() for token in tokens[-decoded:]]
    if precision == "float32":
        assert_close(np.concatenate(found), expected, "onnx")
    else:
        tolerance = TOLERANCES[f"trained {ROUNDED[precision]}"]
        distance = divergence(expected, np.concatenate(found)).mean()
        assert tolerance.least < distance < tolerance.limit, tolerance.why


# Generation by transformers.


@every_variant
def test_generate_gives_the_greedy_tokens_of_full_forward_passes(name: str) -> None:
    case, new = subject(name), 8
    rows = [case.tokens[0, :11], case.tokens[0, 20:26]]
    ids, mask = left_padded(rows)
    greedy = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    generated = case.model.generate(ids, attention_mask=mask, generation_config=greedy)
    for index, row in enumerate(rows):
        expected = row
        for _ in range(new):
            expected = np.append(expected, case.forward(expected[None])[0, -1].argmax())
        assert generated[index, -len(expected) :].tolist() == expected.tolist()


# The exporter's own validation of every package.


def parity(
    *, prefill_max: float = 1e-5, decode_max: float = 1e-5, largest_logit: float = 12.0, mean_kl: float = 1e-12
) -> Parity:
    """That of a graph which agrees, but for what is given."""
    return Parity(2048, prefill_max, decode_max, largest_logit, mean_kl)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefill_max": 2e-3}, "float32: logits differ from the reference at worst by 0.002, more than 0.001"),
        ({"decode_max": 2e-3}, "float32: logits differ from the reference at worst by 0.002, more than 0.001"),
        ({"mean_kl": 2e-8}, "float32: logits differ from the reference typically by 0.0002, more than 0.0001"),
        (
            {"decode_max": np.nan},
            "float32: the graph gives NaN or infinite logits; export float32 and compare by layer",
        ),
    ],
)
def test_a_float_graph_that_is_off_is_refused(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ExportError, match=f"^{re.escape(message)}$"):
        require_parity(parity(**changes), "float32", folded=True, exact=True)


def test_a_float_graph_may_be_off_by_rounding_and_more_where_logits_are_large_or_positions_inside() -> None:
    require_parity(parity(prefill_max=5e-4, mean_kl=1e-9), "float32", folded=True, exact=True)
    require_parity(parity(prefill_max=2e-3, largest_logit=64.0), "float32", folded=True, exact=True)
    require_parity(parity(prefill_max=0.5, mean_kl=1e-4), "float32", folded=False, exact=True)


def test_a_rounded_graph_may_differ_as_much_as_its_format_does_but_not_be_nan() -> None:
    require_parity(parity(prefill_max=3.0, mean_kl=0.5), "int4-weight", folded=True, exact=False)
    with pytest.raises(ExportError, match="NaN or infinite logits"):
        require_parity(parity(mean_kl=np.inf), "int4-weight", folded=True, exact=False)


def test_a_graph_with_one_wrong_weight_is_refused() -> None:
    def parity_of(graph: BuiltGraph) -> Parity:
        return measure_parity(expected, open_graph(graph.model), contract, tokens)[0]

    config = small_config(training_length=N)
    model, tokens = random_model(config), random_tokens(config, 3 * N)[0]
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(tokens)[None], use_cache=False).logits[0].numpy()
    expected = [logits[part] for part in parts_of(len(tokens))]
    weights, contract = extract_weights(model, folded=True), graph_contract(config)
    right = parity_of(build_graph(weights, Float32()))
    require_parity(right, "float32", folded=True, exact=True)
    weights.layers[0].out[0, 0] += 0.5
    wrong = parity_of(build_graph(weights, Float32()))
    with pytest.raises(ExportError, match="logits differ from the reference"):
        require_parity(wrong, "float32", folded=True, exact=True)
