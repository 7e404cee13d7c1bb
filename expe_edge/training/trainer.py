"""transformers' `Trainer` on windows of text with random position offsets.

Every sample is a function of the seed and its number alone, so that a resumed run, and a run on several processes,
see exactly the sequences that one uninterrupted process sees.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    Trainer,
    TrainingArguments,
)

from expe_edge.errors import ConfigError, CorpusError
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.training.rounding import distillation_loss
from expe_edge.training.settings import TRAINER_DIRECTORY, TrainSettings

# Under a launcher the processor is called cpu:0, a place onto which torch does not load by itself.
torch.serialization.register_package(50, lambda _: None, lambda storage, place: storage if place == "cpu:0" else None)


class WindowDataset(Dataset[dict[str, Tensor]]):
    """The run's sequences in order: sample i is a random window of the text at a random position offset."""

    def __init__(self, stream: npt.NDArray[np.int32], settings: TrainSettings) -> None:
        if len(stream) < settings.training_length:
            raise CorpusError(
                f"the training text has {len(stream)} tokens, less than one sequence of {settings.training_length}; "
                "add `data` or lower `training_length`"
            )
        self.stream, self.settings = stream, settings

    @cached_property
    def digest(self) -> str:
        """The sha256 of the token stream."""
        return hashlib.sha256(self.stream.tobytes()).hexdigest()

    def __len__(self) -> int:
        return self.settings.max_steps * self.settings.batch_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self.settings.training_length
        generator = np.random.default_rng((self.settings.seed, index))
        begin = generator.integers(len(self.stream) - length + 1)
        offset = generator.integers(max(self.settings.position_offset * length, 1))
        tokens = torch.from_numpy(self.stream[begin : begin + length].astype(np.int64))
        return {"input_ids": tokens, "labels": tokens, "position_ids": torch.arange(length) + int(offset)}


class WindowTrainer(Trainer):  # type: ignore[misc]  # transformers publishes no types
    """Trainer that keeps the dataset's order: its samples are random already.

    teacher: a model whose predictions are the target in place of the text.
    """

    def __init__(self, *, model: ExPEForCausalLM, teacher: ExPEForCausalLM | None = None, **arguments: Any) -> None:
        use_cache = model.config.use_cache
        super().__init__(model=model, **arguments)
        model.config.use_cache = use_cache  # transformers 5 turns it off, in what is saved too
        self.teacher = None if teacher is None else teacher.to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *arguments: Any, **options: Any) -> Any:
        if self.teacher is None:
            # All tokens of the step, as transformers 4 counts them; 5 leaves out the first of each sequence.
            options["num_items_in_batch"] = inputs["labels"].numel() * self.accelerator.num_processes
            return super().compute_loss(model, inputs, *arguments, **options)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), self.accelerator.autocast():
            targets = self.teacher(**inputs, use_cache=False).logits
        return distillation_loss(model(**inputs).logits, targets)

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **options)
        if not torch.isfinite(loss):
            raise self._diverged(f"the loss is {loss.item()}")
        return loss

    def _save_checkpoint(self, *arguments: Any, **options: Any) -> None:
        self.require_finite()
        super()._save_checkpoint(*arguments, **options)

    def require_finite(self) -> None:
        """Raise `ConfigError` where weights are NaN or infinite, so that none are ever saved."""
        if not all(torch.isfinite(weight).all() for weight in self.model.parameters()):
            raise self._diverged("weights are not finite")

    def _diverged(self, how: str) -> ConfigError:
        kept = any(Path(self.args.output_dir).glob("checkpoint-*"))
        return ConfigError(
            f"training diverged after step {self.state.global_step}: {how}; lower `learning_rate`, "
            f"{self.args.learning_rate:g} now, or raise `warmup_steps`"
            + (", and `resume` from the last checkpoint" if kept else "")
        )

    def _inner_training_loop(self, batch_size: int | None = None, *arguments: Any, **options: Any) -> Any:
        del batch_size  # a checkpoint's own, of as many processes as there were then
        return super()._inner_training_loop(self.args.train_batch_size, *arguments, **options)

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def training_arguments(settings: TrainSettings, out: Path, processes: int) -> TrainingArguments:
    """Return what a run of `settings` on so many processes asks of `Trainer`, whose files go below `out`."""
    batch_size, remainder = divmod(settings.batch_size, processes)
    if remainder:
        raise ConfigError(
            f"batch_size {settings.batch_size} does not divide over {processes} processes; change `batch_size`"
        )
    on_cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(out / TRAINER_DIRECTORY),
        max_steps=settings.max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta2=0.95,
        average_tokens_across_devices=processes > 1,  # as transformers does by itself since 4.54
        seed=settings.seed,
        bf16=computes_in_bfloat16() if settings.dtype == "auto" else settings.dtype == "bfloat16",
        logging_first_step=True,
        logging_nan_inf_filter=False,
        logging_steps=settings.log_every,
        save_steps=settings.save_every,
        save_total_limit=2,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=[],
        log_level="error",
    )


def computes_in_bfloat16() -> bool:
    """Tell whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
