"""Training on transformers' `Trainer`: windows of text with random position offsets, checkpoints, resuming.

Every sample is a function of the seed and its number alone, so that a resumed run, and a run on several processes,
see exactly the sequences that one uninterrupted process sees.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import PartialState
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import (
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from expe_edge.errors import CheckpointError, ConfigError, CorpusError
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.positions.parameters import encoding_parameters
from expe_edge.progress import note
from expe_edge.text.corpus import Corpus, absolute_source, describe_skipped, load_corpus
from expe_edge.text.tokenization import END_OF_TEXT, encode_documents, load_tokenizer, train_tokenizer
from expe_edge.training.callbacks import SaveOnInterrupt, TrainingProgress
from expe_edge.training.checkpoint import Checkpoint, load_checkpoint
from expe_edge.training.rounding import distillation_loss, explicit_rounding, round_weights
from expe_edge.training.settings import TRAINING_FILE, TrainSettings, stored_settings

#: Where Trainer keeps what resuming needs.
TRAINER_DIRECTORY = "trainer"
#: With less than this free, a failed write is taken for a full disk: not every library says so.
LEAST_FREE_BYTES = 1 << 20


class WindowDataset(Dataset[dict[str, Tensor]]):
    """The run's sequences in order: sample i is a random window of the text at a random position offset."""

    def __init__(self, stream: npt.NDArray[np.int32], settings: TrainSettings) -> None:
        if len(stream) < settings.training_length:
            raise CorpusError(
                f"the training text has {len(stream)} tokens, less than one sequence of {settings.training_length}; "
                "add --data or lower --training-length"
            )
        self.stream, self.settings = stream, settings

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

    def __init__(self, *, teacher: ExPEForCausalLM | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = None if teacher is None else teacher.to(self.args.device)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *arguments: Any, **options: Any) -> Any:
        if self.teacher is None:
            return super().compute_loss(model, inputs, *arguments, **options)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), self.accelerator.autocast():
            wanted = self.teacher(**inputs, use_cache=False).logits
        return distillation_loss(model(**inputs).logits, wanted)

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(settings: TrainSettings, out: Path, *, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Train a model and write the checkpoint `out`: config, safetensors, tokenizer and `training.json`.

    Returns:
        the content of `training.json`: settings, corpus, parameters, loss history.

    Raises:
        ConfigError, CorpusError, CheckpointError: bad settings or text, a checkpoint to start from that is damaged or
            another model, or an `out` that exists and is neither resumed nor forced. Nothing is written then.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint that `resume` continues is on disk.
    """
    settings = _explicit(settings)
    state = PartialState(cpu=not torch.cuda.is_available())
    arguments = _training_arguments(settings, out, state.num_processes)
    start = _open_start(settings, out)
    config = start.config if start else ExPEConfig(**{name: getattr(settings, name) for name in MODEL_SETTINGS})
    _require_reach(settings, config)
    last = _last_checkpoint(out, resume=resume, force=force)
    if resume:
        _require_same(settings, out, (*MODEL_SETTINGS, *START_SETTINGS), "--resume")
    corpus = load_corpus(settings.data, settings.text_field)
    if state.is_main_process:
        note(*describe_skipped(corpus.skipped))
    with state.main_process_first():
        tokenizer, dataset = _prepare(corpus, settings, out, start, fresh=state.is_main_process and not resume)
    set_seed(settings.seed)
    config.vocab_size = tokenizer.get_vocab_size()
    model, teacher = _make_models(settings, config, start)
    interrupt = SaveOnInterrupt()
    progress = TrainingProgress(settings.batch_size * settings.training_length)
    trainer = WindowTrainer(
        model=model, teacher=teacher, args=arguments, train_dataset=dataset, callbacks=[interrupt, progress]
    )
    trainer.remove_callback(PrinterCallback)
    with disk_full_is_an_error(out), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mtime may not be reliable")  # it then orders by number, rightly
        trainer.train(resume_from_checkpoint=last)
    if interrupt.interrupted:
        raise KeyboardInterrupt
    report = {
        "settings": dataclasses.asdict(settings),
        "corpus": _corpus_record(corpus, dataset),
        "parameters": model.num_parameters(),
        "processes": state.num_processes,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }
    if state.is_main_process:
        with disk_full_is_an_error(out):
            _save_model(model, out)
            _write_json(out / TRAINING_FILE, report)
    state.wait_for_everyone()
    return report


def _explicit(settings: TrainSettings) -> TrainSettings:
    """Return settings that mean the same wherever and by whatever release they are read again."""
    rounding = explicit_rounding(settings.rounding)
    start = settings.from_checkpoint
    parameters = encoding_parameters(settings.positional, settings.positional_parameters, settings.training_length)
    return dataclasses.replace(
        settings,
        positional_parameters=parameters.to_dict(),
        data=tuple(map(absolute_source, settings.data)),
        from_checkpoint=None if start is None else str(Path(start).absolute()),
        block_size=None if rounding is None else rounding.block_size,
    )


def _open_start(settings: TrainSettings, out: Path) -> Checkpoint | None:
    """Load the checkpoint that the run starts from, if it does; it is never written to."""
    if settings.from_checkpoint is None:
        return None
    path = Path(settings.from_checkpoint)
    start = load_checkpoint(path)
    _require_same(settings, path, MODEL_SETTINGS, "--from")
    if out.resolve() in (path.resolve(), *path.resolve().parents):
        raise ConfigError(f"{out} holds the checkpoint of --from; choose another --out")
    return start


def _make_models(
    settings: TrainSettings, config: ExPEConfig, start: Checkpoint | None
) -> tuple[ExPEForCausalLM, ExPEForCausalLM | None]:
    """Return the model to train, and the one whose predictions are its target, if any."""
    if start is None:
        return ExPEForCausalLM(config), None
    if settings.rounding is None:
        return start.model, None
    teacher = copy.deepcopy(start.model).requires_grad_(False) if settings.distillation else None
    round_weights(start.model, settings.rounding)
    return start.model, teacher


def _prepare(
    corpus: Corpus, settings: TrainSettings, out: Path, start: Checkpoint | None, *, fresh: bool
) -> tuple[Tokenizer, WindowDataset]:
    """Return tokenizer and sequences; where the run is `fresh`, make `out` anew once nothing is left to refuse."""
    if fresh:
        tokenizer = start.tokenizer if start else train_tokenizer(corpus.training, settings.vocab_size)
    else:
        tokenizer = load_tokenizer(out)
    dataset = WindowDataset(np.concatenate(encode_documents(tokenizer, corpus.training)), settings)
    if fresh:
        with disk_full_is_an_error(out):
            _make_directory(out, tokenizer, settings)
    return tokenizer, dataset


def _make_directory(out: Path, tokenizer: Tokenizer, settings: TrainSettings) -> None:
    """Make `out` anew with its tokenizer and the settings that resuming reads."""
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_input_names=["input_ids", "attention_mask"],
    )
    wrapped.save_pretrained(out)
    _write_json(out / TRAINING_FILE, {"settings": dataclasses.asdict(settings)})


def _corpus_record(corpus: Corpus, dataset: WindowDataset) -> dict[str, Any]:
    return {
        "sources": list(corpus.sources),
        "training_documents": len(corpus.training),
        "held_out_documents": len(corpus.held_out),
        "skipped_files": len(corpus.skipped),
        "training_tokens": len(dataset.stream),
    }


#: Settings that the weights of a run depend on.
MODEL_SETTINGS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("hidden_act", "tie_word_embeddings", "positional", "positional_parameters", "training_length"),
)
#: What a run starts from, and what its weights are rounded to.
START_SETTINGS = ("from_checkpoint", "quantization_aware", "block_size")


def _require_same(settings: TrainSettings, run: Path, names: Sequence[str], option: str) -> None:
    recorded = TrainSettings(**stored_settings(run))
    stored, wanted = (json.loads(json.dumps(dataclasses.asdict(_explicit(each)))) for each in (recorded, settings))
    for name in names:
        if stored.get(name) != wanted[name]:
            raise ConfigError(
                f"{name} is {wanted[name]}, but {stored.get(name)} in the run of {run}; drop the option, or {option}"
            )


def _require_reach(settings: TrainSettings, config: ExPEConfig) -> None:
    farthest = max(settings.position_offset, 1) * settings.training_length + settings.training_length
    if farthest > config.max_position_embeddings:
        raise ConfigError(
            f"position_offset {settings.position_offset} reaches position {farthest}, beyond the encoding's "
            f"{config.max_position_embeddings}; lower --position-offset"
        )


def _last_checkpoint(out: Path, *, resume: bool, force: bool) -> str | None:
    if resume:
        last = get_last_checkpoint(str(out / TRAINER_DIRECTORY)) if (out / TRAINER_DIRECTORY).is_dir() else None
        if last is None:
            raise CheckpointError(f"{out}: no checkpoint to resume from; drop --resume")
        return str(last)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file, not a directory; choose another --out")
    if out.exists() and any(out.iterdir()):
        if not force:
            raise ConfigError(f"{out} exists; use --force to replace it, --resume to continue it, or another --out")
        if not (out / TRAINING_FILE).is_file():
            raise ConfigError(f"{out} holds something else than a training run; --force will not delete it")
    return None


def _training_arguments(settings: TrainSettings, out: Path, processes: int) -> TrainingArguments:
    batch_size, remainder = divmod(settings.batch_size, processes)
    if remainder:
        raise ConfigError(
            f"batch_size {settings.batch_size} does not divide over {processes} processes; change --batch-size"
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
        seed=settings.seed,
        bf16=computes_in_bfloat16() if settings.dtype == "auto" else settings.dtype == "bfloat16",
        logging_first_step=True,
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


def _save_model(model: ExPEForCausalLM, out: Path) -> None:
    """Write config and weights beside their places first, so that a failure leaves no half-written file."""
    with tempfile.TemporaryDirectory(prefix=".model-", dir=out) as directory:
        model.save_pretrained(directory)
        for file in Path(directory).iterdir():
            file.chmod(0o644)
            file.replace(out / file.name)


@contextmanager
def disk_full_is_an_error(out: Path) -> Iterator[None]:
    """Turn the failures of the libraries that write checkpoints into `CheckpointError` where the disk is full."""
    try:
        yield
    except Exception as error:  # the libraries that write share no narrower base
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full or (out.exists() and shutil.disk_usage(out).free < LEAST_FREE_BYTES):
            raise CheckpointError(f"{out}: no space left on the device; free some or change --out") from error
        raise


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
