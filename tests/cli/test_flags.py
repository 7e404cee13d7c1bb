"""The library names settings, the command line its options: which name becomes which flag, in errors and in notes."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import expe_edge
from expe_edge.cli.flags import with_flags
from expe_edge.cli.main import main as cli
from expe_edge.errors import NAMED, wording
from expe_edge.training.settings import TrainSettings
from tests.command_line import QUICK, refused, succeed

pytestmark = pytest.mark.usefixtures("elsewhere")
ROOT = Path(expe_edge.__file__).parent
#: All but the command line, model cards, which show commands to people, and what calls npm by npm's flags.
LIBRARY = sorted(
    path
    for path in set(ROOT.rglob("*.py")) - {ROOT / "web" / "building.py"}
    if path.relative_to(ROOT).parts[0] not in ("cli", "hub")
)
#: Settings of a run whose options have names of their own.
OTHERWISE = {"from_checkpoint": "--from", "positional_parameters": "--positional-parameter"}


def literals(path: Path) -> Iterator[str]:
    """Yield every text that the source at `path` is written with, but for docstrings; of an f-string its parts."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def shown(message: str, command: str) -> str:
    return with_flags(message, cli.commands, command)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_names_no_flags_and_settings_that_have_one(path: Path) -> None:
    texts = list(literals(path))

    assert [text for text in texts if re.search(r"--(\w|$)", text)] == []
    names = {name for text in texts for name in NAMED.findall(text)}
    assert {name for name in names if not shown(f"`{name}`", "train").startswith("--")} == set()


@pytest.mark.parametrize("name", [setting.name for setting in dataclasses.fields(TrainSettings)])
def test_every_setting_of_a_run_has_its_flag(name: str) -> None:
    assert shown(f"`{name}`", "train") == OTHERWISE.get(name, "--" + name.replace("_", "-"))


@pytest.mark.parametrize(
    ("command", "name", "flag"),
    [
        ("train", "sources", "--data"),
        ("train", "config_file", "--config"),
        ("compare", "sources", "--data"),
        ("compare", "lengths", "--lengths"),
        ("export", "precision", "--precision"),
        ("export", "sources", "--calibration-data"),
        ("export", "calibration_data", "--calibration-data"),
        ("quantize", "windows", "--calibration-windows"),
        ("quantize", "method", "--calibration-method"),
        ("sensitivity", "windows", "--calibration-windows"),
        ("sensitivity", "sources", "--calibration-data"),
        ("sensitivity", "lengths", "--length"),
        ("generate", "top_k", "--top-k"),
    ],
)
def test_a_name_is_the_option_of_the_command_that_runs(command: str, name: str, flag: str) -> None:
    assert shown(f"`{name}` is 0; raise `{name}`", command) == f"{flag} is 0; raise {flag}"


def test_of_two_flags_the_first_is_the_setting_and_the_second_has_its_own_name() -> None:
    assert shown("`distillation` or `no_distillation`", "train") == "--distillation or --no-distillation"


def test_advice_on_another_command_has_its_flags() -> None:
    assert shown("export with `portable`, or train with another `hidden_size`", "train") == (
        "export with --portable, or train with another --hidden-size"
    )


@pytest.mark.parametrize("text", ["`where`", "`what is this`", "`a-b`", "seed", "`seed", "``"])
def test_what_is_no_option_stays(text: str) -> None:
    assert shown(text, "train") == text


def test_an_error_of_the_library_is_worded_for_the_command_alone(checkpoint: Path) -> None:
    options = ("--out", "out", "--precision", "int8-static", "--calibration-windows", 0)

    assert refused("export", checkpoint, *options) == "--calibration-windows is 0; at least 1"
    assert wording.get()("`windows` is 0") == "`windows` is 0"


def test_a_note_of_the_library_is_worded_too(text_folder: Path) -> None:
    heads = ("--num-attention-heads", 8, "--max-steps", 1)
    result = succeed("train", "--data", text_folder, "--out", "out", *QUICK, *heads, "--vocab-size", 5000)

    notes = " ".join(result.stderr.split())
    assert "export with --portable, or train with another --num-attention-heads or --hidden-size" in notes
    assert re.search(r"the text holds \d+ tokens to learn, fewer than --vocab-size 5000; ", notes)


@pytest.mark.parametrize("prompt", ["", "-"])
def test_where_a_prompt_comes_from_is_said_by_the_command(prompt: str) -> None:
    option = ("--prompt-file", "-") if prompt else ("--prompt", "")

    assert refused("generate", "package", *option) == (
        "the prompt is empty; give --prompt, --prompt-file or text on standard input"
    )
