"""Progress that a person can read while long work runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Reports go to standard output, progress to standard error, so that a pipe carries results alone.
console = Console(stderr=True)


def progress_bar(*columns: str) -> Progress:
    """Return a bar with a description, counts, the time left, and the task fields named in `columns`."""
    fields = [TextColumn(f"{{task.fields[{name}]}}") for name in columns]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *fields,
        TimeRemainingColumn(),
        console=console,
    )


def note(*lines: str) -> None:
    """Print lines as they are, beside the progress."""
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def counted(description: str, total: int) -> Iterator[Any]:
    """Show a bar over `total` items; yields the function to call after each, or with how many have been done."""
    with progress_bar() as progress:
        task = progress.add_task(description, total=total)
        yield lambda done=1: progress.advance(task, done)
