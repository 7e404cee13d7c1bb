"""What a case of `benchmarks.fuzz` has: valid inputs to change, a folder to write in, ways to use what it has drawn.

A target draws an input, notes it in `Trial.given`, and uses it as a user would: by the library, or by the command line.
It returns where the input was good and lets an `ExPEEdgeError` through where it was refused; all else is a fault.
"""

from __future__ import annotations

import functools
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from expe_edge.cli.main import main as command_line
from expe_edge.errors import ExPEEdgeError
from expe_edge.export.exporter import export
from expe_edge.quant.recipe import Recipe
from expe_edge.training import run as training
from tests.small import command_runner, small_settings, write_documents

#: The packages of `Materials`.
PACKAGES = ("float32", "int8-static", "float32-portable")


@dataclass(frozen=True)
class Materials:
    """The valid inputs that are changed: a folder of text, a checkpoint and its packages, all very small."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Materials:
        """Train and export for a second or two."""
        made = cls(root)
        made.text.mkdir()
        write_documents(made.text)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "max_steps": 2, "save_every": 1, "batch_size": 2}
        training.train(small_settings(made.text, **sizes, warmup_steps=0), made.checkpoint)
        export(made.checkpoint, root / "packages", ["float32", "int8-static", Recipe(portable=True)])
        return made

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    def package(self, name: str) -> Path:
        """The package of that name."""
        return self.root / "packages" / name

    @functools.cached_property
    def sample(self) -> str:
        """Plain text."""
        return (self.text / "00.txt").read_text(encoding="utf-8")


@dataclass
class Trial:
    """One case. folder: empty, to write in. given: what was drawn, to be printed where the case is a fault."""

    random: Random
    materials: Materials
    folder: Path
    given: dict[str, Any] = field(default_factory=dict)

    def copy(self, original: Path) -> Path:
        """Return a copy of a directory whose files can be replaced, but not written to."""
        return Path(shutil.copytree(original, self.folder / "copy", copy_function=os.link))

    def replace(self, file: Path, content: bytes) -> None:
        """Replace a file of a copy, and note it."""
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        self.given[file.name] = content

    def use(self, *ways: Callable[[Path], object], path: Path) -> None:
        """Open `path` in one of several ways."""
        way = self.random.choice(ways)
        self.given["used by"] = way.__name__
        way(path)

    def run(self, *arguments: object, stdin: bytes = b"") -> None:
        """Run the command line. It must end well, or in a line; what it refuses may have written nothing.

        Raises:
            ExPEEdgeError: it refused, by that line. AssertionError: it ended otherwise.
        """
        texts = [str(argument).replace("\0", "") for argument in arguments]  # no process can be given NUL
        self.given["arguments"] = texts
        before = sorted(self.folder.rglob("*"))
        result = command_runner().invoke(command_line, texts, input=stdin)
        if result.exit_code == 0:
            return
        if not isinstance(result.exception, SystemExit):
            raise result.exception or AssertionError("no exception")
        lines = result.stderr.splitlines()
        assert result.exit_code == 2, f"exit code {result.exit_code}: {result.stderr}"
        assert lines[-1].startswith("Error: "), f"the last line is no error: {result.stderr}"
        assert sum(line.startswith("Error: ") for line in lines) == 1, f"more than one line: {result.stderr}"
        assert "Traceback" not in result.stderr, result.stderr
        assert sorted(self.folder.rglob("*")) == before, "something was written"
        raise ExPEEdgeError(lines[-1])


def innermost(error: BaseException) -> str:
    """Return where in this project an exception was last at home, to tell faults apart."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/expe_edge/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"
