"""Packages in other people's clients, as `benchmarks.clients` asks them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from benchmarks.clients.cases import Task, Texts, Truth, tasks
from benchmarks.clients.clients import CLIENTS, Client, special_tasks
from benchmarks.clients.judging import Bench, Outcome, judge
from benchmarks.clients.kinds import kinds
from benchmarks.clients.running import Case, Program, ask
from benchmarks.clients.table import clients_table
from benchmarks.node.environment import MissingError
from expe_edge.package.manifest import release
from expe_edge.quant.recipe import Recipe
from tests.conftest import PRECISIONS

#: Training length of the fixtures, and tokens that are generated at a time.
N, NEW = 32, 24
LONG = "The old tree grows under the bright river and the stone runs over, but a tree is old. " * 3
SHORT, MORE = "A river", " and the tree."
RECIPES = [Recipe(precision) for precision in PRECISIONS]
#: Marks what looks for a cause in weights of 8 bits that meet floats.
needs_level_0 = pytest.mark.skipif(
    release(ort.__version__) < release("1.23"), reason="onnxruntime 1.22 has no kernel of 8 bits at accuracy level 0"
)
#: All but ours, and one that a Python is made for.
TRIED = [client for client in CLIENTS if client.name not in ("our generator, onnxruntime", "onnxruntime-oldest")]


@pytest.fixture(scope="module")
def texts(packages: Path) -> Texts:
    generator = Truth(packages / "float32").generator
    long, short = (generator.encode(text).tolist() for text in (LONG, SHORT))
    assert len(long) > N
    return Texts(long, short, generator.encode(MORE).tolist()[1:])


@pytest.fixture
def bench(packages: Path, texts: Texts, tmp_path: Path) -> Bench:
    for recipe in RECIPES:
        (tmp_path / recipe.name).symlink_to(packages / recipe.name)
    return Bench(tmp_path, tmp_path / "altered", RECIPES, tasks(texts, N, NEW), special_tasks(texts, N, NEW))


@pytest.fixture
def greedy(texts: Texts) -> Task:
    return tasks(texts, N, NEW)[0]


@needs_level_0
@pytest.mark.parametrize("client", TRIED, ids=lambda client: client.name)
def test_a_client_gives_our_tokens_or_a_reason_that_holds(bench: Bench, client: Client) -> None:
    try:
        client.start()
    except MissingError as error:
        pytest.skip(str(error))
    outcomes = list(bench.try_client(client))
    asked = len(bench.tasks) + len(client.special)
    assert len(outcomes) == len(RECIPES) * asked
    assert not [outcome for outcome in outcomes if outcome.result in ("wrong", "not run")]
    usual = {task.name for task in bench.tasks} - set(client.without)
    assert {one.result for one in outcomes if one.kind == "float32" and one.task in usual} == {"equal"}


@needs_level_0
def test_another_token_is_wrong(packages: Path, greedy: Task, tmp_path: Path) -> None:
    for recipe in RECIPES:
        truth = Truth(packages / recipe.name)
        (tokens,) = truth.answer(greedy)
        other = [*tokens[:-1], (tokens[-1] + 100) % 300]
        result, note, _ = judge({"tokens": [other]}, recipe, greedy, truth, tmp_path)
        assert (result, note.partition(":")[0]) == ("wrong", "other tokens, unexplained"), recipe.name


def test_a_refusal_nobody_knows_is_wrong(packages: Path, greedy: Task, tmp_path: Path) -> None:
    truth = Truth(packages / "float32")
    result, note, _ = judge({"refused": "ValueError: of some kind"}, RECIPES[0], greedy, truth, tmp_path)
    assert (result, note) == ("wrong", "refused, unexplained: ValueError: of some kind")


def test_a_client_that_dies_does_so_on_one_case_alone(packages: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "import json, os, sys\n"
        "job, answers = sys.argv[1:]\n"
        "for case in json.load(open(job)):\n"
        "    if case['call'] == 'die':\n"
        "        sys.stderr.write('no more')\n"
        "        os._exit(3)\n"
        "    with open(answers, 'a') as file:\n"
        "        file.write(json.dumps({'id': case['id'], 'tokens': [[len(case['arguments'])]]}) + '\\n')\n"
    )
    cases = [Case(packages, call, {}) for call in ("answer", "die", "answer")]
    first, second, third = ask(Program(["python3", str(program)], ""), cases)
    assert first == third == {"tokens": [[0]]}
    assert second["refused"] == "it ended with code 3: no more"


def test_a_client_that_is_missing_has_a_column_that_says_so(bench: Bench) -> None:
    def start() -> Program:
        raise MissingError("there is no such thing")

    outcomes = list(bench.try_client(Client("nothing", start)))
    assert {(outcome.result, outcome.note) for outcome in outcomes} == {("not run", "there is no such thing")}


def test_every_kind_of_package_is_among_the_kinds() -> None:
    names = {recipe.name for recipe in kinds(N)}
    assert len(names) == 7 * 5
    assert {"float32", "int4-weight-portable", "int8-dynamic-int8-cache", "int8-static-int8-cache-windowed"} <= names


def test_cells_alike_share_a_row_and_every_other_has_a_note() -> None:
    def outcome(kind: str, task: str, result: str, note: str = "") -> Outcome:
        return Outcome("theirs", kind, task, result, note)

    table = clients_table(
        [
            outcome("float32", "greedy", "equal"),
            outcome("float32", "batch", "equal"),
            outcome("int8-static", "greedy", "equal"),
            outcome("int8-static", "batch", "equal"),
            outcome("int8-dynamic", "greedy", "equal"),
            outcome("int8-dynamic", "batch", "differs", "ranges"),
            outcome("float32-int8-cache", "greedy", "refused", "no cache"),
            outcome("float32-int8-cache", "batch", "refused", "no cache"),
            outcome("float32", "beams", "wrong", "who knows"),
        ],
        ("greedy", "batch"),
        {"theirs": "theirs 1.0"},
    )
    assert table.split("\n") == [
        "",
        "| packages | theirs 1.0 |",
        "|---|---|",
        "| float32, int8-static | equal |",
        "| int8-dynamic | equal; batch: differs [1] |",
        "| int8 cache: all precisions | refused [2] |",
        "",
        "| packages | theirs, beams |",
        "|---|---|",
        "| all precisions | **wrong** [3] |",
        "",
        "1. ranges.",
        "2. no cache.",
        "3. who knows.",
        "",
    ]
