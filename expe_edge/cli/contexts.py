"""What `generate` reads before its prompt, and how much of it stays: options that all say what the cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expe_edge.cli.output import PATH, require_writable
from expe_edge.errors import GenerationError

if TYPE_CHECKING:
    from expe_edge.runtime import Context, Generator, Window

WINDOW_OPTIONS = (
    click.option(
        "--window",
        type=int,
        metavar="TOKENS",
        help="Keep no more than the last tokens, so that memory does not grow; by default all.",
    ),
    click.option("--sinks", type=int, metavar="TOKENS", help="First tokens that a --window keeps too.  [default: 4]"),
)
OPTIONS = (
    click.option(
        "--prompt-cache",
        type=PATH,
        metavar="FILE",
        help="Take what this file has read of the prompt's beginning, and write there what was read.",
    ),
    *WINDOW_OPTIONS,
    click.option(
        "--prompt-lookup",
        is_flag=True,
        help="Verify several tokens at once where the text repeats itself: the same tokens, sooner.",
    ),
)


def context_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of `OPTIONS`."""
    return _with_options(command, OPTIONS)


def window_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that `window_of` reads."""
    return _with_options(command, WINDOW_OPTIONS)


def _with_options(
    command: Callable[..., Any], options: Sequence[Callable[[Callable[..., Any]], Callable[..., Any]]]
) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def window_of(window: int | None, sinks: int | None) -> Window | None:
    """Return the window that the options ask for."""
    from expe_edge.runtime import Window

    if window is None:
        if sinks is not None:
            raise GenerationError("`sinks` are kept beside a `window`; give it too")
        return None
    return Window(window) if sinks is None else Window(window, sinks)


@contextmanager
def kept_context(generator: Generator, file: Path | None, window: Window | None) -> Iterator[Context | None]:
    """Yield a context that holds what a file has, where there is one, and write it there in the end; None without."""
    if file is None:
        yield None
        return
    require_writable(file)
    context = generator.context(window=window)
    if file.exists():
        context.load(file)
    yield context
    context.save(file)
