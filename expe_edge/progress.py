"""Progress that a person can read while long work runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from expe_edge.errors import wording

Result = TypeVar("Result")

#: Reports go to standard output, progress to standard error, so that a pipe carries results alone.
console = Console(stderr=True)


def progress_bar(*columns: str) -> Progress:
    """Return a bar with a description, counts, the time left, and the task fields named in `columns`."""
    fields = [TextColumn(f"{{task.fields[{name}]}}") for name in columns]
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *fields,
        TimeRemainingColumn(),
        console=console,
    )


def interruptible(description: str, work: Callable[[], Result]) -> Result:
    """Return what `work` returns, with a spinner, and end at Ctrl-C even within a library that does not look for it."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whatever it is, it is raised where the result is waited for
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    with console.status(description):
        return future.result()


def note(*lines: str) -> None:
    """Print lines beside the progress, as they are but for the `wording` of settings."""
    for line in map(wording.get(), lines):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal: what they say of a failure, our own error says."""
    from transformers.utils import logging

    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def counted(description: str, total: int) -> Iterator[Any]:
    """Show a bar over `total` items; yields the function to call after each, or with how many have been done."""
    with progress_bar() as progress:
        task = progress.add_task(description, total=total)
        yield lambda done=1: progress.advance(task, done)
