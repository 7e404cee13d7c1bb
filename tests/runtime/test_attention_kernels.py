"""Attention that is built here: it is onnxruntime's own, over caches of float32 and int8."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expe_edge.export.exporter import export
from expe_edge.package.contract import FLOATS_FROM
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession
from expe_edge.runtime.kernels import Kernels
from expe_edge.speed.operators import profiled
from tests.attentions import Attention, Feeds, run
from tests.conftest import needs_int8_cache

pytestmark = needs_int8_cache
#: Largest difference over the largest value. Over int8 queries and weights are rounded to 16 bits.
SAME = {"float32": 2e-6, "int8": 2e-4}

PLAIN = [
    Attention(4, 4, 64),
    Attention(6, 2, 64, bias=("rows", "heads"), packed=True),
    Attention(4, 2, 40, window=33, bias=("one", "heads"), sink=True),
    Attention(3, 1, 8, bias=("rows", "one"), sink=True),
    Attention(2, 2, 96, window=1, packed=True),
    Attention(2, 1, 136, window=100, bias=("one", "one")),
    Attention(16, 1, 32),
]
ATTENTIONS = [
    *PLAIN,
    *(replace(each, dtype="int8") for each in PLAIN),
    *(replace(each, dtype="int8", by_channel=False) for each in PLAIN[1:3]),
]
#: Tokens of a run, those before, the cache's room and whether one buffer is past and present.
RUNS = [
    *((1, 0, 0, False), (1, 1, None, False), (1, 100, 128, True), (1, 700, 701, True), (2, 63, 200, True)),
    *((7, 30, None, False), (8, 120, 128, True), (9, 300, 400, True), (13, 600, None, False), (17, 0, 17, True)),
    *((31, 33, 64, True), (64, 64, 300, True), (65, 0, 0, False), (129, 5, 140, True), (100, 500, 1000, True)),
]


def identity(attention: Attention) -> str:
    bias = "-".join(attention.bias) if attention.bias else "no"
    kind = attention.dtype if attention.by_channel else f"{attention.dtype} by tensor"
    heads = f"{attention.heads} over {attention.key_heads} of {attention.size}"
    return f"{heads}, window {attention.window}, {bias} bias, {kind}"


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest value."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    return float(np.abs(found - expected).max(initial=0) / np.abs(expected).max(initial=1e-30))


@pytest.mark.parametrize("attention", ATTENTIONS, ids=identity)
def test_it_is_that_of_onnxruntime(library: Path, attention: Attention) -> None:
    """To what float64 says, and the cache to the bit."""
    ours, theirs = attention.session(library=library), attention.session()
    for tokens, past, capacity, shared in RUNS:
        feeds = attention.feeds(tokens, [past], capacity)
        expected = attention.reference(feeds)
        mixed, *cache = run(ours, feeds, shared=shared)
        by_onnxruntime, *their_cache = run(theirs, feeds, shared=shared)
        assert error(mixed, expected) < SAME[attention.dtype], (tokens, past)
        assert error(by_onnxruntime, expected) < SAME["float32"], (tokens, past)
        for found, those, wanted in zip(cache, their_cache, attention.present(feeds), strict=True):
            np.testing.assert_array_equal(found, wanted)
            np.testing.assert_array_equal(found, those)


@pytest.mark.parametrize("attention", ATTENTIONS[::2], ids=identity)
def test_rows_of_different_lengths(library: Path, attention: Attention) -> None:
    """One token each is onnxruntime's, too; with more behind a past onnxruntime takes one row alone."""
    ours, theirs = attention.session(library=library), attention.session()
    past = [5, 90, 0, 33]
    for tokens in (1, 3, 20, 70):
        feeds = attention.feeds(tokens, past, 200)
        mixed, *cache = run(ours, feeds, shared=True)
        assert error(mixed, attention.reference(feeds)) < SAME[attention.dtype], tokens
        if tokens == 1:
            assert error(mixed, run(theirs, feeds, shared=True)[0]) < SAME[attention.dtype]
        for found, wanted in zip(cache, attention.present(feeds), strict=True):
            np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("attention", ATTENTIONS[::2], ids=identity)
def test_prompts_that_are_padded(library: Path, attention: Attention) -> None:
    """Behind a row's tokens; what is made of padding is nobody's."""
    tokens, lengths = 40, [40, 7, 1, 23]
    feeds = attention.feeds(tokens, [0] * len(lengths), 64) | {"last": np.array(lengths, dtype=np.int32) - 1}
    found, theirs = (run(attention.session(library=of), feeds, shared=True) for of in (library, None))
    for row, length in enumerate(lengths):
        assert error(found[0][row, :length], theirs[0][row, :length]) < SAME[attention.dtype]
        for ours, those in zip(found[1:], theirs[1:], strict=True):
            np.testing.assert_array_equal(ours[row, :, :length], those[row, :, :length])


@settings(max_examples=40, deadline=None)
@given(
    attention=st.sampled_from(ATTENTIONS),
    past=st.integers(0, 300),
    tokens=st.integers(1, 200),
    room=st.integers(0, 100),
    cuts=st.lists(st.integers(1, 199), max_size=5, unique=True),
)
def test_chunks_that_start_anywhere(
    library: Path, attention: Attention, past: int, tokens: int, room: int, cuts: list[int]
) -> None:
    """Give what one run gives, and the same cache."""
    session, feeds = attention.session(library=library), attention.feeds(tokens, [past], past + tokens + room)
    whole, *cache = run(session, feeds, shared=True)
    parts, held = [], dict(feeds)
    begins = [0, *sorted(cut for cut in cuts if cut < tokens)]
    for begin, end in zip(begins, [*begins[1:], tokens], strict=True):
        mixed, held["past_keys"], held["past_values"] = run(
            session, held | part_of(feeds, past, begin, end), shared=True
        )
        parts.append(mixed)
    assert error(np.concatenate(parts, axis=1), whole) < SAME[attention.dtype]
    for found, expected in zip((held["past_keys"], held["past_values"]), cache, strict=True):
        np.testing.assert_array_equal(found, expected)


def part_of(feeds: Feeds, past: int, begin: int, end: int) -> Feeds:
    """Inputs of the tokens [begin, end) of a run."""
    part: Feeds = {
        name: np.ascontiguousarray(feeds[name][:, begin:end]) for name in ("query", "key", "value") if name in feeds
    }
    if "bias" in feeds:
        part["bias"] = np.ascontiguousarray(feeds["bias"][:, :, begin:end, : past + end])
    return part | {"last": np.array([past + end - 1], dtype=np.int32), "total": np.array([past + end], dtype=np.int32)}


@pytest.mark.parametrize("attention", ATTENTIONS[::3], ids=identity)
def test_threads_change_no_bit(library: Path, attention: Attention) -> None:
    for tokens, past in ((1, [300, 20]), (5, [100]), (150, [70])):
        feeds = attention.feeds(tokens, past, 320)
        for one, two in zip(*(run(attention.session(n, library), feeds, shared=True) for n in (1, 2)), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", SAME)
def test_scores_of_any_size(library: Path, dtype: str) -> None:
    """Scores far apart, below and above all that float32 can take powers of; queries of 0; a sink beyond them all."""
    attention = Attention(2, 2, 64, sink=True, dtype=dtype)
    session = attention.session(library=library)
    for scale in (0.0, 1e-20, 30.0, 300.0):
        for tokens in (1, 40):
            feeds = attention.feeds(tokens, [300])
            feeds["query"] = feeds["query"] * np.float32(scale)
            expected, bound = attention.reference(feeds), SAME[dtype] * max(1.0, scale)
            assert error(run(session, feeds)[0], expected) < bound, (scale, tokens)


@pytest.mark.parametrize("dtype", SAME)
def test_levels_do_not_overflow(library: Path, dtype: str) -> None:
    """Of the largest keys, queries, weights and values there are, in the largest heads."""
    for size in (64, 512):
        attention = Attention(1, 1, size, dtype=dtype, by_channel=False)
        for tokens in (1, 40):
            feeds = attention.feeds(tokens, [1000])
            for name in ("past_keys", "past_values"):
                feeds[name][:] = -128 if dtype == "int8" else -2.0
            feeds["query"][:] = -0.5
            expected = attention.reference(feeds)
            assert error(run(attention.session(library=library), feeds)[0], expected) < SAME[dtype], (size, tokens)


REFUSALS = [
    (Attention(2, 2, 16, extra=(("smooth_softmax", 1),)), "rotation or smoothing"),
    (Attention(2, 2, 16, extra=(("softcap", 3.0),)), "capped or given out"),
    (Attention(2, 2, 16, extra=(("qk_output", 1),)), "capped or given out"),
]


@pytest.mark.parametrize(("attention", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
def test_other_attention_is_refused_when_a_session_is_made(library: Path, attention: Attention, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        attention.session(library=library)


def test_what_does_not_agree_is_refused(library: Path) -> None:
    """Nothing is read or written where a tensor has nothing."""
    attention = Attention(2, 1, 16, bias=("rows", "heads"), dtype="int8")
    session, feeds = attention.session(library=library), attention.feeds(3, [5], 20)
    wrong = [
        ({"bias": feeds["bias"][:, :, :, :-1]}, "a bias of another size"),
        ({"bias": feeds["bias"][:, :, :2]}, "a bias of another size"),
        ({"past_keys": feeds["past_keys"][..., :8]}, "a cache of another size"),
        ({"past_values": feeds["past_values"][:, :, :10]}, "a cache of another size"),
        ({"last": np.array([30], dtype=np.int32)}, "more keys than there are"),
        ({"last": np.array([7, 7], dtype=np.int32)[:0]}, "another number"),
        ({"key": feeds["key"][:, :2]}, "do not agree"),
        ({"value": feeds["value"][..., :8]}, "do not agree"),
    ]
    for changed, reason in wrong:
        arrays = {name: np.ascontiguousarray(each) for name, each in (feeds | changed).items()}
        with pytest.raises(Exception, match=reason):
            session.run(None, arrays)


# Packages

NAMES = ("float32", "int8-dynamic", "int4-weight")


@pytest.fixture(scope="module")
def cached(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packages with int8 caches."""
    out = tmp_path_factory.mktemp("cached")
    export(checkpoint, out, [Recipe(precision, cache="int8") for precision in ("float32", "int4-weight")])
    return out


def logits(session: PackageSession, chunk: int) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 300, 48)
    return np.concatenate([each.copy() for each in session.prefill(session.new_cache(1, 60), tokens, chunk)])


@pytest.mark.parametrize("precision", NAMES)
def test_packages_give_the_same_logits(packages: Path, kernels: Kernels, precision: str) -> None:
    theirs, ours = (
        PackageSession.load(packages / precision, threads=1, kernels=of) for of in ("off", kernels.directory)
    )
    assert ours.kernels is not None
    for chunk in (48, 7, 1):
        expected = logits(theirs, chunk)
        bound = 1e-5 if precision == "float32" else 0.005
        assert np.abs(logits(ours, chunk) - expected).mean() < bound * np.abs(expected).mean()


def test_an_int8_cache_is_read_as_it_is(cached: Path, kernels: Kernels) -> None:
    """The branch that restores floats is not taken, and chunks and steps agree."""
    path = cached / "float32-int8-cache"
    theirs, ours = (PackageSession.load(path, threads=1, kernels=of) for of in ("off", kernels.directory))
    assert (theirs.reads_levels, ours.reads_levels) == (False, True)
    whole = logits(ours, 48)
    for chunk in (48, 13, 7, 1):
        assert error(logits(ours, chunk), whole) < 1e-3
        assert error(logits(theirs, chunk), whole) < 1e-3
    for session, floats in ((theirs, True), (ours, False)):
        _, events = profiled(session, 1, lambda watched: logits(watched, 48))
        operators = {event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")}
        assert ("MultiHeadAttention" in operators) is floats


def test_a_package_of_before_still_runs(cached: Path, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot be told so reads many tokens as floats."""
    from expe_edge.runtime import session as module

    expected = logits(PackageSession.load(cached / "float32-int8-cache", kernels=kernels.directory), 48)
    monkeypatch.setattr(module, "FLOATS_FROM", replace(FLOATS_FROM, name="no such input"))
    session = PackageSession.load(cached / "float32-int8-cache", kernels=kernels.directory)
    assert session.kernels is not None
    assert not session.reads_levels
    assert error(logits(session, 48), expected) < 1e-3


@pytest.mark.parametrize("name", ["float32", "float32-int8-cache"])
def test_batches_give_what_rows_give_alone(packages: Path, cached: Path, kernels: Kernels, name: str) -> None:
    folder = cached if name.endswith("cache") else packages
    generator = Generator.load(folder / name, kernels=kernels.directory)
    prompts = ["def main(", "import os\n" * 9, "x"]
    together = generator.generate(prompts, max_new_tokens=20)
    alone = [generator.generate([prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert [each.tokens for each in together] == [each.tokens for each in alone]
    without = Generator.load(folder / name, kernels="off").generate(prompts, max_new_tokens=20)
    assert [each.tokens for each in together] == [each.tokens for each in without]
