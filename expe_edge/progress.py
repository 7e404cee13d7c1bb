"""Progress that a person can read while long work runs; nothing where the output is not a terminal's."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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


@contextmanager
def counted(description: str, total: int) -> Iterator[Any]:
    """Show a bar over `total` items; yields the function to call after each."""
    with progress_bar() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


class TrainingProgress(TrainerCallback):  # type: ignore[misc]  # transformers publishes no types
    """A bar with loss, tokens per second and time left; one line per tenth of the run without a terminal."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step = tokens_per_step
        self.progress = progress_bar("loss", "speed")
        self.task: TaskID | None = None

    def on_train_begin(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        self.first_step, self.began = state.global_step, time.perf_counter()
        if not state.is_world_process_zero:
            return
        self.task = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss="", speed=""
        )
        if console.is_terminal:
            self.progress.start()

    def on_step_end(self, _: TrainingArguments, state: TrainerState, __: TrainerControl, **___: Any) -> None:
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self, _: TrainingArguments, state: TrainerState, __: TrainerControl, logs: dict[str, float], **___: Any
    ) -> None:
        if self.task is None or "loss" not in logs:
            return
        steps = state.global_step - self.first_step
        speed = steps * self.tokens_per_step / (time.perf_counter() - self.began)
        loss, rate = f"loss {logs['loss']:.3f}", f"{speed:,.0f} tokens/s"
        self.progress.update(self.task, loss=loss, speed=rate)
        milestone = max(state.max_steps // 10, 1)
        if not console.is_terminal and state.global_step % milestone < state.logging_steps:
            console.print(f"step {state.global_step}/{state.max_steps}  {loss}  {rate}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.progress.stop()
