"""Where results go: what cannot be written there is refused before the work, and JSON is JSON."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from expe_edge.cli import output
from expe_edge.cli.main import main as cli
from expe_edge.cli.output import require_plot, require_writable, write_json
from expe_edge.errors import ConfigError
from tests.command_line import QUICK, refused, tree

pytestmark = pytest.mark.usefixtures("elsewhere")

#: No file can be made here, whoever asks.
NOWHERE = Path("/proc")
STUDY = Path(__file__).parents[2] / "studies" / "ci.yaml"


def test_numbers_that_are_not_finite_are_null_in_json() -> None:
    write_json(Path("figures.json"), {"a": [math.nan, 1.5], "b": {"c": -math.inf}, "d": (True, "NaN")})

    text = Path("figures.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": {"c": None}, "d": [True, "NaN"]}


def test_a_place_that_can_be_written_is_left_as_it_is() -> None:
    Path("there").write_text("before")
    Path("linked").symlink_to("there")
    before = tree(Path.cwd())

    for name in ("there", "linked", "new", "/dev/full", "/dev/null"):
        require_writable(Path(name))

    assert tree(Path.cwd()) == before


def test_a_pipe_is_not_opened() -> None:
    """Opening one waits for its reader, who would then see it closed with nothing in it."""
    os.mkfifo("pipe")

    require_writable(Path("pipe"))


def test_a_file_that_may_not_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its directory allows; the user who runs the tests may be one who may do everything."""
    Path("kept").write_text("before")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ConfigError) as caught:
        require_writable(Path("kept"))

    assert str(caught.value) == "kept cannot be written (Permission denied); change where kept goes"


def test_a_plot_without_matplotlib_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "find_spec", lambda _: None)

    with pytest.raises(ModuleNotFoundError, match="matplotlib"):
        require_plot(Path("plot.png"))
    assert refused("compare", "a", "b", "--plot", "plot.png") == (
        "matplotlib is not installed; pip install 'expe-edge[train]'"
    )


#: Every command, and its options that say where something goes.
COMMANDS: dict[str, tuple[tuple[object, ...], tuple[str, ...]]] = {
    "train": (("--data", "{text}", *QUICK, "--out", "out"), ("--out", "--json")),
    "export": (("{checkpoint}", "--out", "out"), ("--out", "--json")),
    "quantize": (("{package}", "--out", "out"), ("--out", "--json")),
    "sensitivity": (("{package}",), ("--json", "--plot")),
    "compare": (("{package}",), ("--json", "--plot")),
    "bench": (("{package}",), ("--json", "--plot")),
    "build-kernels": ((), ()),
    "web": (("{package}",), ("--out",)),
    "plan": (("{package}",), ("--json",)),
    "probe": (("{package}",), ("--json", "--plot")),
    "analyze": (("{checkpoint}",), ("--json", "--plot")),
    "reproduce": (("{study}",), ("--out",)),
    "inspect": (("{package}",), ("--json",)),
    "generate": (("{package}",), ()),
    "serve": (("{package}",), ()),
    "evaluate": (("{package}",), ()),  # lm_eval has them
}


def test_every_command_is_among_them() -> None:
    for name, command in cli.commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert set(COMMANDS[name][1]) == options & {"--out", "--plot", *([] if name == "generate" else ["--json"])}


@pytest.mark.parametrize(("command", "option"), [(name, option) for name in COMMANDS for option in COMMANDS[name][1]])
def test_what_cannot_be_written_is_refused_before_the_work(
    text_folder: Path, checkpoint: Path, packages: Path, command: str, option: str
) -> None:
    places = {"text": text_folder, "checkpoint": checkpoint, "package": packages / "float32", "study": STUDY}
    target = NOWHERE / ("out" if option == "--out" else "figures.png")
    arguments = (str(part).format(**places) for part in COMMANDS[command][0])

    found = refused(command, *arguments, option, target)

    place = NOWHERE / "out" if option == "--out" and command != "web" else NOWHERE  # which makes one directory alone
    assert found.startswith(f"{place} cannot be written to (")
    assert found.endswith("; choose another --out" if option == "--out" else "; change where figures.png goes")


def test_a_run_that_cannot_be_written_is_not_resumed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expe_edge.training.replacing.why_unwritable", lambda path: f"{path} cannot be written to (no)")

    assert refused("train", "--out", checkpoint, "--resume", "--max-steps", "120") == (
        f"{checkpoint} cannot be written to (no); choose another --out"
    )
