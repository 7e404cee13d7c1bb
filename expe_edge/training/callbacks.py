"""What happens beside the training steps: progress on the terminal, and a checkpoint on Ctrl-C."""

from __future__ import annotations

import signal
import time
from typing import Any

import torch
from rich.progress import TaskID
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from expe_edge.progress import console, progress_bar


class SaveOnInterrupt(TrainerCallback):  # type: ignore[misc]  # transformers publishes no types
    """Turns Ctrl-C into a checkpoint and a clean stop after the step under way; a second one stops at once.

    Several processes stop after the same step, whichever of them was interrupted. A second one is ignored there: the
    launcher passes on the one that the terminal has sent to all already.

    Attributes:
        pressed: whether this process was interrupted, which may be while the others are asked; they are asked again
            after the next step. interrupted: whether all have stopped for it.
    """

    def __init__(self) -> None:
        self.pressed = self.interrupted = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        # A resumed state brings the intervals of the run it is from; the settings of this run win.
        state.logging_steps, state.save_steps = args.logging_steps, args.save_steps
        self.previous = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, self._interrupt)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _interrupt(self, *_: Any) -> None:
        self.pressed = True
        if not torch.distributed.is_initialized():
            signal.signal(signal.SIGINT, self.previous)

    def on_step_end(self, args: TrainingArguments, _: TrainerState, control: TrainerControl, **__: Any) -> None:
        self.interrupted = in_any_process(self.pressed, args.device)
        if self.interrupted:
            control.should_save = control.should_training_stop = True


def in_any_process(flag: bool, device: torch.device) -> bool:
    """Tell whether `flag` is set in any process of the run. All of them must ask at the same step."""
    if not torch.distributed.is_initialized():
        return flag
    shared = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
    return bool(shared.item())


class SettingsWin(TrainerCallback):  # type: ignore[misc]  # transformers publishes no types
    """Lets a run that goes on follow its settings, not those its checkpoint brings: rate, schedule, decay.

    The schedule is that of the whole run as it is now asked for, from the step where it stands.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        *_: Any,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LambdaLR,
        **__: Any,
    ) -> None:
        rates = []
        for group, decay, factor in zip(
            optimizer.param_groups, (args.weight_decay, 0.0), lr_scheduler.lr_lambdas, strict=True
        ):
            rate = args.learning_rate * factor(lr_scheduler.last_epoch)
            group |= {"weight_decay": decay, "initial_lr": args.learning_rate, "lr": rate}
            rates.append(rate)
        lr_scheduler.base_lrs = [args.learning_rate] * len(rates)
        lr_scheduler._last_lr = rates


class TrainingProgress(TrainerCallback):  # type: ignore[misc]  # transformers publishes no types
    """A bar with loss, tokens per second and time left; one line per tenth of the run without a terminal.

    tokens_per_second: of all processes, checkpoints included, since the run began or went on.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step, self.tokens_per_second = tokens_per_step, 0.0
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
        tokens = (state.global_step - self.first_step) * self.tokens_per_step
        self.tokens_per_second = tokens / (time.perf_counter() - self.began)
        if self.task is not None:
            self.progress.update(self.task, completed=state.global_step)

    def on_log(
        self,
        _: TrainingArguments,
        state: TrainerState,
        __: TrainerControl,
        logs: dict[str, float],
        **___: Any,
    ) -> None:
        if self.task is None or "loss" not in logs:
            return
        loss, rate = f"loss {logs['loss']:.4f}", f"{self.tokens_per_second:,.0f} tokens/s"
        self.progress.update(self.task, loss=loss, speed=rate)
        milestone = max(state.max_steps // 10, 1)
        if not console.is_terminal and state.global_step % milestone < state.logging_steps:
            console.print(f"step {state.global_step}/{state.max_steps}  {loss}  {rate}")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if console.is_terminal:
            self.progress.stop()
