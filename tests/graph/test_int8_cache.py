"""The int8 cache: what is stored, attention over it, and generation with it here and in onnxruntime-genai."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expe_edge.calibration.observations import Calibration, cache_scales, observe, sample_windows, watch
from expe_edge.divergence import divergence
from expe_edge.export.exporter import export
from expe_edge.graph.attention import GroupedAttention
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.encoding import Projection, bias_of
from expe_edge.graph.linears import Float32
from expe_edge.graph.nodes import GraphBuilder
from expe_edge.graph.padding import TokensFirst
from expe_edge.graph.run import graph_feeds
from expe_edge.graph.windows import Keys
from expe_edge.package.contract import FLOAT_HEADS, MANY_TOKENS, TensorSpec
from expe_edge.package.directory import read_package
from expe_edge.quant.channels import CacheScales
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession, Sampling
from expe_edge.runtime.session import Step
from expe_edge.runtime.shared import SharedStorage
from tests.conftest import needs_int8_cache
from tests.export.test_clients import genai_tokens, optimum_model, our_tokens
from tests.graph.test_padding import CONFIGS
from tests.graphs import CONFIG, normal, open_session, plain_graph, random_weights, run_text, token_stream
from tests.reference import softmax
from tests.strategies import random_tokens, seeds, small_config

pytestmark = needs_int8_cache
NAMES = ("float32-int8-cache", "int8-static-int8-cache", "int4-weight-int8-cache")


# One attention, against NumPy.

ONE_LAYER = small_config(num_hidden_layers=1)
HEADS, SHARED, SIZE = 4, 2, 8
#: Tokens of a run, and those before.
LENGTHS = [(5, 0), (1, 7), (3, 7), (1, 0), (40, 0), (MANY_TOKENS, 7)]


def stored(states: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Keys or values (T, Hkv·D) as the cache holds them, (Hkv, T, D) int8."""
    headed = states.reshape(-1, SHARED, SIZE).swapaxes(0, 1)
    inverse = np.float32(1) / scale[:, None]
    return np.clip(np.rint(headed * inverse), -128, 127).astype(np.int8)


def attention(query: np.ndarray, key: np.ndarray, value: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Causal attention (T, H·D) of the last T tokens; key, value (Hkv, S, D) · bias (H, T, S)."""
    tokens, total = len(query), key.shape[1]
    hidden = np.triu(np.full((tokens, total), -np.inf), k=total - tokens + 1)
    mixed = []
    for head in range(HEADS):
        own, shared = query[:, head * SIZE : (head + 1) * SIZE], head * SHARED // HEADS
        weights = softmax(own @ key[shared].T / np.sqrt(SIZE) + bias[head] + hidden)
        mixed.append(weights @ value[shared])
    return np.concatenate(mixed, axis=1)


def run_attention(scales: CacheScales, room: int, **inputs: np.ndarray) -> list[np.ndarray]:
    """Output (1, T, H·D) and present of the attention that the exporter emits. room: columns for new keys."""
    for part in ("past_key", "past_value"):
        inputs[part] = np.pad(inputs[part], ((0, 0), (0, 0), (0, room), (0, 0)), constant_values=77)
    builder = GraphBuilder()
    run, contract = TokensFirst(builder), graph_contract(ONE_LAYER, int8_cache=True)
    keys = Keys("lengths", run.last, run.total)
    emitter = GroupedAttention(builder, ONE_LAYER, contract, [keys], run, [scales])
    mixed = emitter.emit("mixed", 0, Projection("query", "key", "value", (bias_of("bias", HEADS),)))
    builder.emit("Identity", [mixed], ["mixed"], name="result")
    names = {"past_key": "past_key_values.0.key", "past_value": "past_key_values.0.value"}
    feeds = {names.get(name, name): value for name, value in inputs.items()}
    feeds |= dict.fromkeys(("input_ids", "position_ids"), np.zeros(inputs["query"].shape[:2], dtype=np.int64))
    specs = [TensorSpec(name, str(value.dtype), value.shape) for name, value in feeds.items()]
    cache = ("batch_size", SHARED, "total", SIZE)
    outputs = [TensorSpec("mixed", "float32", inputs["query"].shape)]
    outputs += [TensorSpec(f"present.0.{part}", "int8", cache) for part in ("key", "value")]
    found: list[np.ndarray] = open_session(builder.model(specs, outputs, "test")).run(None, feeds)
    return found


@settings(max_examples=40)
@given(seeds, st.sampled_from(LENGTHS), st.booleans(), st.integers(0, 9), st.sampled_from([1, FLOAT_HEADS]))
def test_attention_sees_all_keys_and_values_as_the_cache_holds_them(
    seed: int, lengths: tuple[int, int], room: bool, beyond: int, at_once: int
) -> None:
    """Also those of the tokens being added, so that prefill and decode see the same; out of range they are clipped.

    Whether the operator computes it or it is written out, which runs of many tokens choose where the cache has room.
    """
    tokens, past = lengths
    query, key, value = (
        normal(seed + i, past + tokens, heads * SIZE) for i, heads in enumerate((HEADS, SHARED, SHARED))
    )
    bias = normal(seed + 3, HEADS, tokens, past + tokens)
    scales = CacheScales(*(np.abs(normal(seed + i, SHARED, SIZE)) / 100 + np.float32(0.01) for i in (4, 5)))
    keys, values = stored(key, scales.key), stored(value, scales.value)
    new = slice(past, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expe_edge.graph.floats.FLOAT_HEADS", at_once)
        found, present_key, present_value = run_attention(
            scales,
            (tokens + beyond) * room,
            query=query[None, new],
            key=key[None, new],
            value=value[None, new],
            past_key=keys[None, :, :past],
            past_value=values[None, :, :past],
            bias=bias[None],
            attention_mask=np.ones((1, past + tokens), dtype=np.int64),
        )

    for present, held in ((present_key, keys), (present_value, values)):
        np.testing.assert_array_equal(present[0, :, : past + tokens], held)
    expected = attention(query[new], keys * scales.key[:, None], values * scales.value[:, None], bias)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5)


# The whole graph.


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_of_many_tokens_is_what_the_operator_computes(name: str, left: bool) -> None:
    """Of rows of several lengths, with every encoding."""
    config, lengths, longest = small_config(**CONFIGS[name]), (40, 17, 23), 40
    scales = [CacheScales(*(np.full((2, config.head_dim), 0.03, dtype=np.float32) for _ in range(2)))] * 2
    session = open_session(build_graph(random_weights(config), Float32(), cache=scales).model)
    ids, mask = np.zeros((2, len(lengths), longest), dtype=np.int64)
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if left else slice(0, length)
        ids[row, place], mask[row, place] = random_tokens(config, length, seed=row)[0], 1
    feeds = graph_feeds(graph_contract(config, int8_cache=True), ids)
    feeds |= {"attention_mask": mask, "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0)}
    without_room = {key: value[:, :, :0] if key.startswith("past") else value for key, value in feeds.items()}

    many, few = (session.run(None, each) for each in (feeds, without_room))

    for first, second in zip(many[1:3], few[1:3], strict=True):  # before attention
        np.testing.assert_array_equal(first, second)
    seen = mask.astype(bool)
    assert divergence(few[0][seen], many[0][seen]).mean() < 1e-6  # a value halfway between levels may tip over


@functools.cache
def measured_scales() -> tuple[CacheScales, ...]:
    windows = sample_windows(token_stream(300), 32, Calibration(windows=4))
    return tuple(cache_scales(observe(watch(plain_graph()), graph_contract(CONFIG), windows).cache))


@pytest.mark.parametrize("parts", [(100,), (60, 20, *[1] * 20)], ids=["prefill", "in parts"])
def test_the_graph_keeps_what_the_float_graph_keeps_rounded_and_predicts_nearly_the_same(parts: Sequence[int]) -> None:
    model = build_graph(random_weights(), Float32(), cache=measured_scales()).model
    tokens = token_stream(100)
    found, cache = run_text(model, graph_contract(CONFIG, int8_cache=True), tokens, parts)
    expected, float_cache = run_text(plain_graph().model, graph_contract(CONFIG), tokens, parts)

    assert {array.dtype for array in cache} == {np.dtype(np.int8)}
    for array, exact, scale in zip(cache[:2], float_cache[:2], measured_scales()[0], strict=True):  # before attention
        levels = np.clip(np.rint(exact[0] / scale[:, None]), -128, 127)
        assert np.abs(array[0] - levels).max() <= 1
        assert (array[0] != levels).mean() < 0.01  # values halfway between levels
    assert 1e-6 < divergence(expected, found).mean() < 0.002


def test_decoding_predicts_what_prefill_does() -> None:
    model = build_graph(random_weights(), Float32(), cache=measured_scales()).model
    contract = graph_contract(CONFIG, int8_cache=True)
    prefilled, decoded = (run_text(model, contract, token_stream(60), parts)[0] for parts in ((60,), (40, *[1] * 20)))
    assert divergence(prefilled, decoded).max() < 1e-4


# Packages of the trained model.


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The packages of `NAMES`."""
    out = tmp_path_factory.mktemp("cached")
    export(checkpoint, out, [Recipe(name.removesuffix("-int8-cache"), cache="int8") for name in NAMES])
    return out


@pytest.fixture(scope="module")
def tokens(packages: Path, text_folder: Path) -> np.ndarray:
    text = (text_folder / "05.txt").read_text(encoding="utf-8")
    return Generator.load(packages / "float32").encode(text)[:300]


def logits_of(package: Path, tokens: np.ndarray, chunk: int = 256, decoded: int = 20) -> np.ndarray:
    """Logits (T, V) by prefill in chunks and decoding of the last tokens."""
    session = PackageSession.load(package, threads=1)
    cache = session.new_cache(1, len(tokens))
    found = [logits.copy() for logits in session.prefill(cache, tokens[:-decoded], chunk)]
    step = Step(session, cache, 1)
    return np.concatenate([*found, *(step.run(token[None, None])[0].copy() for token in tokens[-decoded:])])


@pytest.mark.parametrize("name", NAMES)
def test_a_package_says_what_its_cache_is(cached: Path, name: str) -> None:
    manifest = read_package(cached / name).manifest
    assert manifest.contract.cache_dtype == "int8"
    assert manifest.requires_onnxruntime == "1.27"
    assert manifest.calibration is not None
    scales = manifest.calibration["cache_scales"]
    assert len(scales) == manifest.contract.layers
    for layer in scales:
        assert layer.keys() == {"key", "value"}
        assert all(0 < low < high for low, high in layer.values())
    storage = PackageSession.load(cached / name).new_cache(1, 8).storage
    assert isinstance(storage, SharedStorage)
    assert storage.arrays[0].dtype == np.int8


@pytest.mark.parametrize("name", NAMES)
def test_predictions_are_nearly_those_of_the_same_weights_with_a_float_cache(
    cached: Path, packages: Path, tokens: np.ndarray, name: str
) -> None:
    expected, found = logits_of(packages / name.removesuffix("-int8-cache"), tokens), logits_of(cached / name, tokens)
    assert 1e-9 < divergence(expected, found).mean() < 1e-4
    assert (expected.argmax(axis=-1) == found.argmax(axis=-1)).mean() > 0.96


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunks_of_prefill_do_not_matter(cached: Path, tokens: np.ndarray, chunk: int) -> None:
    expected, found = (logits_of(cached / NAMES[0], tokens, each) for each in (256, chunk))
    assert divergence(expected, found).max() < 1e-6


PROMPTS = ["The old tree grows", "a", "Document 3.\nthe river runs under the bright stone and the tree grows over it."]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=4)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", NAMES)
def test_batches_streams_and_single_prompts_agree(cached: Path, name: str, sampling: Sampling) -> None:
    generator = Generator.load(cached / name)
    together = generator.generate(PROMPTS, max_new_tokens=40, sampling=sampling)
    for index, prompt in enumerate(PROMPTS):
        seeded = Sampling(temperature=sampling.temperature, seed=sampling.seed and sampling.seed + index)
        stream = generator.stream(prompt, max_new_tokens=40, sampling=seeded)
        pieces = list(stream)
        (alone,) = generator.generate([prompt], max_new_tokens=40, sampling=seeded)
        assert alone.tokens == stream.completion.tokens == together[index].tokens
        assert "".join(pieces) == alone.text == together[index].text


@pytest.mark.parametrize("text", [PROMPTS[0], PROMPTS[-1]], ids=["few tokens", "many"])
@pytest.mark.parametrize("name", NAMES)
def test_genai_chooses_the_tokens_our_generator_chooses(cached: Path, packages: Path, name: str, text: str) -> None:
    prompt = [int(token) for token in Generator.load(packages / "float32").encode(text)]
    assert (len(prompt) >= MANY_TOKENS) is (text == PROMPTS[-1])
    assert genai_tokens(cached / name, prompt) == our_tokens(cached / name, prompt)


def test_greedy_tokens_are_those_of_the_float_cache_for_a_while(cached: Path, packages: Path) -> None:
    """Until two tokens are nearly as likely, after which the texts part."""
    agreed = []
    for prompt in PROMPTS:
        texts = [
            Generator.load(package).generate([prompt], max_new_tokens=60)[0].tokens
            for package in (cached / NAMES[0], packages / "float32")
        ]
        agreed.append(next((i for i, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), len(texts[0])))
    assert np.mean(agreed) > 20


def test_optimum_which_starts_with_a_float_cache_says_at_once_that_it_cannot(cached: Path) -> None:
    with pytest.raises(Exception, match="expe-with-int8-cache-for-expe-edge-or-onnxruntime-genai"):
        optimum_model(cached / NAMES[0])
