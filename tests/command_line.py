"""Running the command line as a user would, and checking that a refusal is one line with nothing written."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from click.testing import Result

from expe_edge.cli.main import main
from tests.small import command_runner

#: A run of a second on any text.
QUICK = (
    *("--vocab-size", "300", "--training-length", "32", "--hidden-size", "32", "--num-hidden-layers", "1"),
    *("--num-attention-heads", "2", "--batch-size", "4", "--warmup-steps", "2"),
)
#: Stages that `export` and `quantize` report before an error can come.
PROGRESS = re.compile(
    r"\S+: (building|validating against \S+)|(calibrating|observing) \d+ windows of \d+ tokens|searching smoothing.*"
    r"|measuring weights .*|choosing formats: .*|building the page: .*"
)


def invoke(*arguments: object, stdin: bytes = b"") -> Result:
    """Run the command line in this process."""
    return command_runner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def succeed(*arguments: object, stdin: bytes = b"") -> Result:
    """Run it and check that all is well."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def refused(*arguments: object, stdin: bytes = b"") -> str:
    """Run it, check that it ends in one line, exit code 2 and nothing written here; return the line's message."""
    before = tree(Path.cwd())
    result = invoke(*arguments, stdin=stdin)
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 2
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not PROGRESS.fullmatch(line)]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert tree(Path.cwd()) == before
    return lines[0].removeprefix("Error: ")


def tree(folder: Path) -> dict[str, int]:
    """Name and time of change of everything below `folder`, hidden files too."""
    return {str(path.relative_to(folder)): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def names(folder: Path | str) -> list[str]:
    """Names of everything in `folder`, hidden ones too; nothing where there is no such folder."""
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else []


def write_text(name: str, text: str) -> Path:
    """Write a file in the current directory."""
    path = Path.cwd() / name
    path.write_text(text, encoding="utf-8")
    return path


def command(*arguments: object) -> list[str]:
    """The command line of a process of its own."""
    return [sys.executable, "-m", "expe_edge", *(str(argument) for argument in arguments)]


def start_two_processes(*arguments: object) -> subprocess.Popen[str]:
    """Start a command under torch's launcher on two processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    return _start([*launcher, f"--master-port={free_port()}", *command(*arguments)[1:]])


def free_port() -> int:
    """A port that nothing listens at: processes of two runs that meet at one would train together."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def on_two_processes(*arguments: object) -> str:
    """Run such a command, check that all is well, and return its standard output."""
    process = start_two_processes(*arguments)
    printed, said = process.communicate()
    assert process.returncode == 0, said
    return printed


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    return _start(command(*arguments))


def _start(line: list[str]) -> subprocess.Popen[str]:
    """Start a process as a shell's foreground does, Ctrl-C not ignored."""
    return subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(process: subprocess.Popen[str]) -> str:
    """Send Ctrl-C; return what the process then still says on standard error."""
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=60)[1]


def lines_until(stream: IO[str] | None, text: str) -> Iterator[str]:
    """Yield lines up to and with the first that holds `text`."""
    assert stream is not None
    for line in stream:
        yield line
        if text in line:
            return
