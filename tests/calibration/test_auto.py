"""`--precision auto`: what each weight costs, the choice among formats, and the package that keeps its budget."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expe_edge.calibration.auto import (
    UNITS,
    Choice,
    Options,
    best_within,
    candidates_of,
    choose,
    knapsack,
    smallest_within,
)
from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.observations import Calibration, sample_windows
from expe_edge.calibration.sensitivity import Divergence, Loss, Sensitivity, measure_sensitivity, weights_of
from expe_edge.divergence import divergence, log_softmax
from expe_edge.errors import ExportError
from expe_edge.graph.build import graph_contract
from expe_edge.model.config import ExPEConfig
from expe_edge.package.directory import MODEL_FILE, read_package
from expe_edge.quant.formats import CACHE, EMBEDDING, Formats
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator
from tests.command_line import names, refused, succeed
from tests.conftest import HAS_INT8_CACHE, needs_int8_cache
from tests.graphs import CONFIG, LINEARS, plain_graph, random_weights, run_text, token_stream
from tests.strategies import small_config

pytestmark = pytest.mark.usefixtures("elsewhere")

# Knapsack.

costs = st.tuples(st.floats(0, 1), st.integers(1, 1000))
choices = st.lists(st.lists(costs, min_size=1, max_size=3), min_size=1, max_size=4)


def options_of(table: Sequence[Sequence[tuple[float, int]]]) -> Options:
    """Divergence and bytes of each format of each weight as measurements."""
    return [
        [Sensitivity(f"w{i}", f"f{j}", kl, 0.0, size) for j, (kl, size) in enumerate(formats)]
        for i, formats in enumerate(table)
    ]


def cheapest(options: Options, limit: float) -> float:
    """The least divergence within `limit` bytes, by trying everything."""
    tried = [chosen for chosen in itertools.product(*options) if sum(one.bytes for one in chosen) <= limit]
    return min((sum(one.kl for one in chosen) for chosen in tried), default=np.inf)


@settings(max_examples=60)
@given(choices, st.integers(1, 3000))
def test_the_choice_is_the_best_of_all_that_fit_but_for_the_rounding_of_weights(
    table: list[list[tuple[float, int]]], limit: int
) -> None:
    options = options_of(table)
    found = knapsack(options, weight=lambda one: one.bytes, price=lambda one: one.kl, limit=limit)
    certain = cheapest(options, limit * (1 - (len(options) + 1) / UNITS))
    if not found:
        assert certain == np.inf
        return
    assert [one.weight for one in found] == [formats[0].weight for formats in options]
    assert sum(one.bytes for one in found) <= limit * (1 + 1e-9)
    assert cheapest(options, limit) - 1e-9 <= sum(one.kl for one in found) <= certain + 1e-9


# Budgets, with a model whose divergence is more than the sum of its weights'.


def whole(more: float, overhead: int = 100) -> Callable[[Sequence[Sensitivity]], Choice]:
    def measure(chosen: Sequence[Sensitivity]) -> Choice:
        loss = Loss(more * sum(one.kl for one in chosen), 0.0, 0.0, 0.0)
        return Choice(tuple(chosen), loss, overhead + sum(one.bytes for one in chosen))

    return measure


@settings(max_examples=60)
@given(choices, st.floats(0.01, 3), st.floats(1, 1.5))
def test_a_budget_of_divergence_is_kept_by_the_whole_model(
    table: list[list[tuple[float, int]]], budget: float, more: float
) -> None:
    options, measure = options_of(table), whole(more)
    best = measure([min(formats, key=lambda one: one.kl) for formats in options])
    if best.loss.kl > budget:
        with pytest.raises(ExportError, match=r"^`budget_kl` \S+ is out of reach: "):
            smallest_within(budget, options, measure)
        return
    found = smallest_within(budget, options, measure)
    assert found.loss.kl <= budget
    assert found.size <= best.size


@settings(max_examples=60)
@given(choices, st.integers(50, 3000))
def test_a_budget_of_bytes_is_kept_by_the_whole_graph(table: list[list[tuple[float, int]]], size: int) -> None:
    options, measure = options_of(table), whole(1.2)
    smallest = measure([min(formats, key=lambda one: one.bytes) for formats in options])
    if smallest.size > size:
        message = f"`max_size` {size} is out of reach: the smallest choice of formats takes {smallest.size} bytes, at "
        with pytest.raises(ExportError, match=re.escape(message)):
            best_within(size, options, measure)
        return
    found = best_within(size, options, measure)
    assert found.size <= size
    assert found.loss.kl <= max(1.2 * cheapest(options, (size - 100) * (1 - (len(options) + 1) / UNITS)), 0) + 1e-9 or (
        found.loss.kl <= smallest.loss.kl
    )


def test_a_choice_whose_sum_promised_too_much_is_made_again() -> None:
    """0.9 of a budget of 1 would do by itself, but is 1.17 in the whole; half of it is 0.65."""
    (formats,) = options = options_of([[(0.9, 10), (0.5, 20), (0.1, 40)]])
    assert smallest_within(1.0, options, whole(1.3)).chosen == (formats[1],)


@pytest.mark.parametrize(("rise", "spread", "expected"), [(0.1, 0.0, 0), (0.4, 0.0, 1), (0.1, 0.2, 1), (0.8, 0.3, 2)])
def test_what_the_text_loses_for_sure_counts_as_well(rise: float, spread: float, expected: int) -> None:
    """Divergences all keep to the budget of 1; the loss may rise by 0.5, at 95 % confidence."""
    (formats,) = options = options_of([[(0.9, 10), (0.5, 20), (0.1, 40)]])

    def measure(chosen: Sequence[Sensitivity]) -> Choice:
        (one,) = chosen
        scale = one.kl / 0.5
        return Choice(tuple(chosen), Loss(one.kl, 0.0, rise * scale, spread * scale), one.bytes)

    found = smallest_within(1.0, options, measure)
    assert found.chosen == (formats[expected],)
    assert found.loss.rise + 1.645 * found.loss.rise_stderr <= 0.5


def test_a_weight_that_costs_loss_alone_stands_in_no_other_s_way() -> None:
    """The first saves most for its divergence, but makes the loss rise by all of the budget."""
    first, second = options = options_of([[(0.30, 10), (0.01, 30)], [(0.31, 10), (0.01, 20)]])

    def measure(chosen: Sequence[Sensitivity]) -> Choice:
        loss = Loss(sum(one.kl for one in chosen), 0.0, 1.0 * (first[0] in chosen), 0.0)
        return Choice(tuple(chosen), loss, sum(one.bytes for one in chosen))

    assert smallest_within(1.0, options, measure).chosen == (first[1], second[0])


def test_a_loss_that_falls_pays_for_no_divergence() -> None:
    assert Choice((), Loss(0.3, 0.0, -1.0, 0.1), 1).cost == 0.3
    assert Choice((), Loss(0.3, 0.0, 0.1, math.nan), 1).cost == 0.3  # one text tells no spread


def test_a_choice_whose_nodes_take_more_than_others_is_made_again() -> None:
    """200 of 220 bytes would do, but for the 50 that this format's nodes take."""
    (formats,) = options = options_of([[(1.0, 100), (0.1, 200)]])
    nodes = {formats[0]: 100, formats[1]: 150}
    assert best_within(320, options, lambda chosen: whole(1, nodes[chosen[0]])(chosen)).chosen == (formats[0],)
    assert best_within(350, options, lambda chosen: whole(1, nodes[chosen[0]])(chosen)).chosen == (formats[1],)


# A real model.


def evidence_of(config: ExPEConfig) -> Evidence:
    calibration = Calibration(windows=8)
    windows = sample_windows(token_stream(300), config.training_length, calibration)
    return Evidence(random_weights(config), calibration, lambda: windows)


@functools.cache
def evidence() -> Evidence:
    return evidence_of(CONFIG)


@functools.cache
def shallow() -> Evidence:
    """A model of few weights."""
    return evidence_of(small_config(num_hidden_layers=1))


@functools.cache
def texts() -> tuple[np.ndarray, ...]:
    return tuple(sample_windows(token_stream(900).astype(np.int64), 48, Calibration(windows=3, seed=1)))


@needs_int8_cache
def test_a_sensitivity_is_the_divergence_with_one_weight_rounded() -> None:
    candidates = {"layers.1.attention.out": ["int4-weight"], EMBEDDING: ["int4"], CACHE: ["int8"]}
    found = measure_sensitivity(evidence(), Recipe(), candidates, texts())
    assert [(one.weight, one.format) for one in found] == [(name, kind) for name, (kind,) in candidates.items()]
    for one in found:
        model = evidence().build(Recipe(), Formats.by_weight({one.weight: one.format})).model
        contract = graph_contract(CONFIG, int8_cache=one.weight == CACHE)
        means = []
        for text in texts():
            expected, _ = run_text(plain_graph().model, evidence().contract, text)
            means.append(divergence(expected, run_text(model, contract, text)[0]).mean())
        assert one.kl == pytest.approx(np.mean(means), rel=1e-3)
        assert one.kl_stderr == pytest.approx(np.std(means, ddof=1) / np.sqrt(len(means)), rel=1e-2)
    heads, size = CONFIG.num_key_value_heads, CONFIG.head_dim
    assert [one.bytes for one in found] == [32 * 32 // 2 + 32 * 2, 40 * 32 // 2 + 40 * 2, 2 * 2 * heads * size]
    assert all(one.kl > 1e-6 for one in found)


def test_the_rise_of_the_loss_is_that_of_the_text_itself() -> None:
    model = evidence().build(Recipe(), Formats({"head": "int4-weight"})).model
    rises = []
    for text in texts():
        before, after = (
            log_softmax(run_text(proto, evidence().contract, text)[0]) for proto in (plain_graph().model, model)
        )
        rises.append(np.mean([before[at, text[at + 1]] - after[at, text[at + 1]] for at in range(len(text) - 1)]))
    found = Divergence(evidence(), texts()).of(model)
    assert found.rise == pytest.approx(np.mean(rises), rel=1e-3, abs=1e-6)
    assert found.rise_stderr == pytest.approx(np.std(rises, ddof=1) / np.sqrt(len(rises)), rel=1e-2)
    assert abs(found.rise) > 1e-5


@pytest.mark.parametrize("length", [1, 7, 16, 17])
def test_texts_as_short_as_what_is_decoded_are_measured_token_by_token(length: int) -> None:
    text = token_stream(length).astype(np.int64)
    found = np.concatenate([*Divergence(evidence(), [text]).expected])
    np.testing.assert_allclose(found, run_text(plain_graph().model, evidence().contract, text)[0], atol=1e-4)


def test_what_is_chosen_among_is_every_linear_and_an_embedding_of_its_own() -> None:
    assert set(weights_of(evidence())) == {*LINEARS, EMBEDDING} == candidates_of(evidence()).keys()
    tied = Evidence(random_weights(small_config(tie_word_embeddings=True)), Calibration(), list)
    assert set(weights_of(tied)) == LINEARS


@needs_int8_cache
def test_a_choice_is_measured_whole_and_kept() -> None:
    small, few = shallow(), sample_windows(token_stream(900).astype(np.int64), 48, Calibration(windows=40, seed=1))
    measured = measure_sensitivity(small, Recipe(), candidates_of(small), few)
    loose, tight = (
        choose(small, Recipe("auto", cache="int8", budget_kl=budget), measured, few) for budget in (0.05, 0.008)
    )
    assert loose.loss.kl <= 0.05
    assert tight.loss.kl <= 0.008
    assert loose.size < tight.size
    assert len(set(tight.formats.values())) > 1
    graph = small.build(Recipe(cache="int8"), Formats.by_weight(tight.formats, "int8"))
    assert Divergence(small, few).of(graph.model, int8_cache=True) == pytest.approx(tight.loss)
    assert graph.model.ByteSize() == tight.size

    size = tight.size + 1000  # nodes take more bytes for some formats than for others, which is not counted
    fitted = choose(small, Recipe("auto", cache="int8", max_size=size), measured, few)
    assert fitted.size <= size
    assert fitted.loss.kl <= 1.2 * tight.loss.kl  # the same problem from the other side, but for what sums leave out


# The command line.


@pytest.fixture
def automatic(packages: Path, text_folder: Path) -> tuple[object, ...]:
    """Arguments of a choice measured on little text."""
    text = ("--calibration-data", text_folder / "01.txt", "--calibration-data", text_folder / "02.txt")
    return ("quantize", packages / "float32", "--out", "out", "--precision", "auto", *text)


def test_a_package_keeps_its_size_and_says_what_it_chose(packages: Path, automatic: tuple[object, ...]) -> None:
    four, eight = ((packages / name / MODEL_FILE).stat().st_size for name in ("int4-weight", "int8-weight"))
    limit = (four + eight) // 2
    succeed(*automatic, "--max-size", f"{limit}B")

    manifest, size = read_package(Path("out/auto")).manifest, Path("out/auto", MODEL_FILE).stat().st_size
    assert size <= limit
    assert manifest.precision == "auto"
    assert manifest.calibration is not None
    choice = manifest.calibration["choice"]
    assert choice["size"] == size
    chosen = {one["weight"]: one["format"] for one in choice["weights"]}
    assert chosen == {**manifest.linears, EMBEDDING: manifest.embedding}
    assert {part["part"]: part["format"] for part in manifest.parts}.items() >= chosen.items()
    assert Generator.load(Path("out/auto")).generate(["the tree"], max_new_tokens=5)[0].tokens


def test_a_budget_out_of_reach_is_refused_with_what_can_be_had(automatic: tuple[object, ...]) -> None:
    found = refused(*automatic, "--max-size", "1kB")
    assert re.fullmatch(
        r"--max-size 1000 is out of reach: the smallest choice of formats takes \d+ bytes, at \S+ nats per token; "
        "raise it, or train a smaller model",
        found,
    )


def test_sensitivity_is_shown_written_and_drawn(packages: Path) -> None:
    options = ("--precision", "int4-weight", "--precision", "int8-weight", "--documents", "2")
    result = succeed(
        *("sensitivity", packages / "float32", *options, "--json", "figures.json", "--plot", "plot.png"),
    )
    figures = json.loads(Path("figures.json").read_text(encoding="utf-8"))
    assert figures["tokens"] == 2 * 32
    linears = read_package(packages / "float32").manifest.linears
    assert {(one["weight"], one["format"]) for one in figures["results"]} == {
        *((linear, precision) for linear in linears for precision in ("int4-weight", "int8-weight")),
        (EMBEDDING, "int8"),
        *([(CACHE, "int8")] if HAS_INT8_CACHE else []),
    }
    assert all(name in result.stdout for name in (*linears, "int4-weight", "int8-weight"))
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert names(".") == ["figures.json", "plot.png"]


def test_inspect_shows_every_part_and_writes_the_manifest(packages: Path) -> None:
    for name in ("int8-static", "int4-weight"):
        result = succeed("inspect", packages / name, "--json", "manifest.json")
        written = json.loads(Path("manifest.json").read_text(encoding="utf-8"))
        manifest = read_package(packages / name).manifest
        assert written["manifest"] == json.loads(json.dumps(manifest.to_dict()))
        assert written["bytes"] == {file.name: file.stat().st_size for file in (packages / name).iterdir()}
        shown = [*manifest.linears, *(part["format"] for part in manifest.parts), manifest.requires_onnxruntime]
        assert [text for text in shown if text not in result.stdout] == []
    assert refused("inspect", "nowhere") == "nowhere: no such package directory"
