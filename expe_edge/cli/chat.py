"""Turns of one text in the terminal: what is typed and what a model answers follow one another."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expe_edge.cli.prompt import PromptBar
from expe_edge.errors import ConfigError, GenerationError, one_line, reason_of, wording

if TYPE_CHECKING:
    from expe_edge.runtime import Context, Generator, Stream

#: What stands in a template for what is typed.
TYPED = "{}"
COMMANDS = "/undo takes back the last turn, /reset all, /save FILE writes the text; // begins a line with a slash"
HELP = f"{COMMANDS}. Ctrl-C stops an answer, Ctrl-D leaves."


class Chat:
    """A text that goes on by turns. What was read stays read: a turn costs what it adds.

    Args:
        context: what was read, or nothing yet.
        start: what the text begins with.
        template: a turn, with `{}` for what is typed; None for a line of its own.
        options: of `Generator.stream`.

    Attributes:
        text: all of it, as it was printed.
    """

    def __init__(
        self, generator: Generator, context: Context, start: str, template: str | None, options: dict[str, Any]
    ) -> None:
        self.generator, self.context, self.options = generator, context, options
        self.start, self.template = start, template
        self.turns: list[str] = []

    @property
    def text(self) -> str:
        """All that was said."""
        return self.start + "".join(self.turns)

    def turn(self, typed: str) -> str:
        """Return what a turn adds to the text before the answer."""
        if self.template is not None:
            return self.template.replace(TYPED, typed)
        begins_line = not self.text or self.text.endswith("\n")
        return typed and ("" if begins_line else "\n") + typed + "\n"

    def answer(self, typed: str, write: Callable[[str], None]) -> Stream:
        """Write what follows `typed`, piece by piece, and keep both; Ctrl-C ends the answer.

        Raises:
            GenerationError: nothing to go on from, or a text that is too long; it stays as it was.
        """
        added = self.turn(typed)
        if not self.text + added:
            raise GenerationError("there is no text yet; type some")
        sampling = self.options["sampling"]
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + len(self.turns))
        with stopping() as stopped, PromptBar() as bar:

            def on_prefill(done: int, total: int) -> None:
                bar(done, total)
                if stopped():
                    raise Stopped

            stream = self.generator.stream(
                self.text + added,
                **{**self.options, "sampling": sampling},
                context=self.context,
                callback=lambda *_: stopped(),
                on_prefill=on_prefill,
            )
            with contextlib.suppress(Stopped):
                for piece in stream:
                    write(piece)
        self.turns.append(added + stream.completion.text)
        return stream

    def undo(self) -> bool:
        """Take back the last turn; return whether there was one."""
        return bool(self.turns and self.turns.pop())

    def reset(self) -> None:
        """Take back all turns."""
        self.turns.clear()


class Stopped(Exception):  # noqa: N818  # no error
    """Ctrl-C while a text is being read."""


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Give whether Ctrl-C has been pressed. It is not raised, which could be amid a step, unless pressed twice."""
    presses = 0

    def press(*_: object) -> None:
        nonlocal presses
        presses += 1
        if presses > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: presses > 0
    finally:
        signal.signal(signal.SIGINT, before)


def require_template(template: str | None) -> None:
    """Raise `ConfigError` where a template has no place for what is typed."""
    if template is not None and TYPED not in template:
        raise ConfigError(f"--template {template!r}: put {TYPED} where what is typed goes")


def converse(chat: Chat, report: Callable[[Stream], None]) -> None:
    """Read turns from standard input until it ends, and write the answers. report: called after each."""
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # gives `input` its history and its editing
        click.echo(HELP, err=True)
    write(chat.start)
    for line in _lines("> " if is_terminal else ""):
        if line.startswith("/") and not line.startswith("//"):
            _command(chat, line)
            continue
        try:
            report(chat.answer(line.removeprefix("/") if line.startswith("//") else line, write))
        except GenerationError as error:
            click.echo(f"Error: {wording.get()(str(error))}", err=True)
        click.echo("")


def _lines(marker: str) -> Iterator[str]:
    """Yield lines as they are typed."""
    while sys.stdin is not None and (typed := _typed(marker)) is not None:
        yield from typed
    if marker:
        click.echo("", err=True)


def _typed(marker: str) -> list[str] | None:
    """Return the next line; none where Ctrl-C takes it back, None at the end of the input.

    Raises:
        GenerationError: bytes that are no text.
    """
    try:
        return [input(marker)]
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise GenerationError(f"standard input: not UTF-8 text ({error.reason})") from error
    except KeyboardInterrupt:
        click.echo("", err=True)
        return []


def _command(chat: Chat, line: str) -> None:
    name, _, argument = line[1:].strip().partition(" ")
    if name == "undo":
        note = "the last turn is taken back" if chat.undo() else "there is no turn to take back"
    elif name == "reset":
        chat.reset()
        note = "all turns are taken back"
    elif name == "save" and argument.strip():
        note = _save(chat, argument.strip())
    else:
        note = COMMANDS
    click.echo(note, err=True)


def _save(chat: Chat, name: str) -> str:
    try:
        path = Path(name).expanduser()
        path.write_text(chat.text, encoding="utf-8")
    except OSError as error:
        return f"{name}: {error.strerror}"
    except (RuntimeError, ValueError) as error:  # a user that there is not, and characters that no name has
        return f"{one_line(name)}: {reason_of(error)}"
    return f"wrote {path}"


def write(piece: str) -> None:
    """Print a piece of the text at once."""
    click.echo(piece, nl=False)
    sys.stdout.flush()
