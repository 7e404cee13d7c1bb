"""Groups of heads with windows: the graph against float64 and against itself, however a text is cut into runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expe_edge.export.fold import extract_weights
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32
from expe_edge.graph.run import graph_feeds, open_graph
from expe_edge.package.contract import GraphContract, HeadGroup
from expe_edge.quant.channels import CacheScales
from tests import reference
from tests.conftest import needs_windows
from tests.strategies import random_model, random_tokens, small_config

pytestmark = needs_windows
RECIPE = {"slopes": "alibi", "softplus": True, "content_heads": 1, "temperature": 0.36}
CONFIG = small_config(
    training_length=16, num_key_value_heads=4, positional_parameters=RECIPE, output_gate=True, hidden_size=32
)
LENGTH = 120
#: Of the four key/value heads: neighbours that share one, heads of several lengths, a head of all between two.
WINDOWS = [(12, 12, 12, 0), (5, 5, 20, 0), (7, 0, 30, 30), (1, 0, 0, 0)]
every_choice = pytest.mark.parametrize("windows", WINDOWS, ids=str)


class Subject(NamedTuple):
    session: ort.InferenceSession
    contract: GraphContract


@functools.cache
def model() -> Any:
    return random_model(CONFIG)


@functools.cache
def subject(windows: Sequence[int], *, int8_cache: bool = False) -> Subject:
    size = (CONFIG.num_key_value_heads, CONFIG.head_dim)
    scales = [CacheScales(*(np.full(size, 0.05, dtype=np.float32) for _ in range(2)))] * CONFIG.num_hidden_layers
    weights = extract_weights(model(), folded=True)
    graph = build_graph(weights, Float32(), windows=windows, cache=scales if int8_cache else None).model
    return Subject(open_graph(graph), graph_contract(CONFIG, windows=windows, int8_cache=int8_cache))


def run(found: Subject, tokens: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Logits (T, V) of runs of so many tokens."""
    cache, logits, begin = None, [], 0
    for length in parts:
        feeds = graph_feeds(found.contract, tokens[None, begin : begin + length], cache)
        one, *cache = found.session.run(None, feeds)
        logits.append(one[0])
        begin += length
    return np.concatenate(logits)


@every_choice
def test_the_graph_sees_what_the_windows_hold(windows: Sequence[int]) -> None:
    tokens = random_tokens(CONFIG, LENGTH)[0]
    expected = reference.reference_logits(CONFIG, reference.model_weights(model()), tokens, windows=windows)
    np.testing.assert_allclose(run(subject(windows), tokens, [LENGTH]), expected, rtol=0, atol=2e-4)


def test_windows_change_what_is_beyond_them_alone() -> None:
    tokens, window = random_tokens(CONFIG, LENGTH)[0], 12
    whole, windowed = (run(subject(windows), tokens, [LENGTH]) for windows in ((), (window,) * 3 + (0,)))
    np.testing.assert_allclose(windowed[:window], whole[:window], rtol=0, atol=1e-5)
    assert np.abs(windowed[window:] - whole[window:]).max(axis=1).min() > 1e-5


@every_choice
@given(cuts=st.lists(st.integers(1, LENGTH - 1), unique=True, max_size=12))
def test_however_a_text_is_cut_into_runs(windows: Sequence[int], cuts: list[int]) -> None:
    """The cache that each run gets has lost what no window needs."""
    tokens = random_tokens(CONFIG, LENGTH)[0]
    parts = np.diff([0, *sorted(cuts), LENGTH]).tolist()
    at_once = run(subject(windows), tokens, [LENGTH])
    np.testing.assert_allclose(run(subject(windows), tokens, parts), at_once, rtol=0, atol=1e-4)


@every_choice
def test_a_cache_of_int8_has_windows_too(windows: Sequence[int]) -> None:
    """In runs of few tokens, which the operator computes, and of many, which read the cache as floats."""
    tokens = random_tokens(CONFIG, LENGTH)[0]
    floats, integers = (subject(windows, int8_cache=int8_cache) for int8_cache in (False, True))
    expected = run(floats, tokens, [LENGTH])
    few, *many = (run(integers, tokens, parts) for parts in ([*[10] * 5, *[1] * 70], [LENGTH], [30, 50, 40]))
    assert 0 < np.abs(few - expected).mean() < 0.1
    for found in many:
        assert np.abs(few - found).mean() < 1e-4


def test_rows_of_several_lengths() -> None:
    """Each row has kept as much as it has read, up to its window, and is padded to the longest in memory."""
    windows = (12, 12, 12, 0)
    found, rows = subject(windows), random_tokens(CONFIG, 40, batch=2)
    lengths = (9, 31)
    expected = [run(found, row, [length, 1])[-1] for row, length in zip(rows, lengths, strict=True)]
    caches = []
    for row, length in zip(rows, lengths, strict=True):
        caches.append(found.session.run(None, graph_feeds(found.contract, row[None, :length]))[1:])
    feeds: dict[str, np.ndarray] = {
        "input_ids": np.array([[row[length]] for row, length in zip(rows, lengths, strict=True)]),
        "attention_mask": (np.arange(32) < np.array(lengths)[:, None] + 1).astype(np.int64),
        "position_ids": np.array(lengths)[:, None],
        "window_lengths.0": np.array([min(length, 11) for length in lengths]),
    }
    for index, (name, group) in enumerate(zip(found.contract.past_names, found.contract.cache_groups, strict=True)):
        kept = [cache[index][:, :, -11:] if group.window else cache[index] for cache in caches]
        longest = max(part.shape[2] for part in kept)
        padding = [(0, 0), (0, 0), (0, 0), (0, 0)]
        padded = [np.pad(part, [*padding[:2], (0, longest - part.shape[2]), padding[3]]) for part in kept]
        feeds[name] = np.concatenate(padded)
    logits = found.session.run(["logits"], feeds)[0][:, -1]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_a_contract_names_what_a_client_must_keep() -> None:
    contract = subject((5, 5, 20, 0)).contract
    assert contract.groups == (HeadGroup(0, 2, 5), HeadGroup(2, 3, 20), HeadGroup(3, 4))
    assert contract.window_lengths == ("window_lengths.0", "window_lengths.1", "")
    layer = 2 * CONFIG.head_dim * 4
    assert contract.cache_bytes == CONFIG.num_hidden_layers * layer
    assert contract.row_bytes(100) == CONFIG.num_hidden_layers * layer * (2 * 5 + 20 + 100)
    assert contract.row_bytes(10, spare=1) == CONFIG.num_hidden_layers * layer * (2 * 6 + 10 + 10)


@pytest.mark.parametrize("windows", [(5, 5), (5, 5, 5, -1), (5, 5, 5, 2**24 + 1), (5, 5, 5, True)], ids=str)
def test_windows_that_are_none(windows: Sequence[int]) -> None:
    with pytest.raises(ValueError, match="windows"):
        GraphContract(layers=1, key_value_heads=4, head_size=8, vocab_size=10, windows=windows)


def test_no_window_in_a_cache_that_grows() -> None:
    with pytest.raises(ValueError, match="windows"):
        GraphContract(2, 4, 8, 10, growing_cache=True, windows=(1, 1, 1, 0))
