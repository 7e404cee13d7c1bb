"""A training run from settings to checkpoint: fresh, resumed, or started from another checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tokenizers import Tokenizer
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from expe_edge.errors import CheckpointError, ConfigError
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.progress import interruptible, note, quiet_transformers
from expe_edge.text.corpus import Corpus, describe_skipped, load_corpus
from expe_edge.text.tokenization import encode_documents, load_tokenizer, save_tokenizer, train_tokenizer
from expe_edge.training.callbacks import SaveOnInterrupt, SettingsWin, TrainingProgress
from expe_edge.training.checkpoint import Checkpoint, load_checkpoint
from expe_edge.training.compiling import compile_model
from expe_edge.training.record import (
    MODEL_SETTINGS,
    START_SETTINGS,
    STREAM_SETTINGS,
    explicit,
    last_checkpoint,
    require_same,
    require_same_stream,
)
from expe_edge.training.replacing import (
    bring_back,
    kept_until_complete,
    require_outside,
    require_room,
    require_writable,
    set_aside,
)
from expe_edge.training.rounding import round_weights
from expe_edge.training.settings import TRAINING_FILE, WEIGHTS_FILE, TrainSettings
from expe_edge.training.trainer import WindowDataset, WindowTrainer, training_arguments

#: With less than this free, a failed write is taken for a full disk: not every library says so.
LEAST_FREE_BYTES = 1 << 20
#: Where what finishes a run is written before it is put in its places.
PARTIAL = ".finished"


def train(settings: TrainSettings, out: Path, *, resume: bool = False, force: bool = False) -> dict[str, Any]:
    """Train a model and write the checkpoint `out`: config, safetensors, tokenizer and `training.json`.

    Returns:
        the content of `training.json`: settings, corpus, parameters, loss history.

    Raises:
        ConfigError, CorpusError, CheckpointError: bad settings or text, a checkpoint to start from that is damaged or
            another model, or an `out` that exists and is neither resumed nor forced. Nothing is written then.
        ConfigError: training has diverged; checkpoints from before are kept.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint that `resume` continues is on disk.
    """
    settings = explicit(settings)
    state = PartialState(cpu=not torch.cuda.is_available())
    arguments = training_arguments(settings, out, state.num_processes)
    start = _open_start(settings, out)
    given = None if resume else start.tokenizer if start else _open_tokenizer(settings)
    config = start.config if start else ExPEConfig(**{name: getattr(settings, name) for name in MODEL_SETTINGS})
    _require_reach(settings, config)
    last = _open_last(settings, out) if resume else None
    if state.is_main_process:  # alone: the others may come to see what it has made
        _require_place(settings, out, resume=resume, force=force)
    corpus = interruptible("reading the text", lambda: load_corpus(settings.data, settings.text_field))
    if state.is_main_process:
        note(*describe_skipped(corpus.skipped))
        note(*filter(None, (config.too_large, config.needs_portable, config.needs_inline)))
    kept = kept_until_complete(out) if state.is_main_process else nullcontext()
    with quiet_transformers(), no_memory_is_an_error(), kept:
        return _run(settings, arguments, config, corpus, start, given, last, state)


def _run(
    settings: TrainSettings,
    arguments: TrainingArguments,
    config: ExPEConfig,
    corpus: Corpus,
    start: Checkpoint | None,
    given: Tokenizer | None,
    last: Path | None,
    state: PartialState,
) -> dict[str, Any]:
    """Train in the directory of `arguments`, made anew unless there is a `last` checkpoint."""
    out = Path(arguments.output_dir).parent
    fresh = state.is_main_process and last is None
    with state.main_process_first():
        tokenizer, dataset = _prepare(corpus, settings, out, given, fresh=fresh)
    if last is not None:
        require_same_stream(dataset.digest, out)
    set_seed(settings.seed)
    config.vocab_size = tokenizer.get_vocab_size()
    model, teacher = _make_models(settings, config, start)
    if settings.compile:
        compile_model(model)
    interrupt = SaveOnInterrupt()
    progress = TrainingProgress(settings.batch_size * settings.training_length)
    trainer = WindowTrainer(
        model=model,
        teacher=teacher,
        args=arguments,
        train_dataset=dataset,
        callbacks=[interrupt, progress, SettingsWin()],
    )
    trainer.remove_callback(PrinterCallback)
    with disk_full_is_an_error(out), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="mtime may not be reliable")  # it then orders by number, rightly
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if interrupt.interrupted:
        state.wait_for_everyone()  # a launcher ends all processes when the first one ends, so not before all is saved
        raise KeyboardInterrupt
    trainer.require_finite()
    report = {**_report(settings, corpus, dataset, trainer, state), "tokens_per_second": progress.tokens_per_second}
    if state.is_main_process:
        with disk_full_is_an_error(out):
            _finish(model, report, out)
    state.wait_for_everyone()
    return report


def _open_start(settings: TrainSettings, out: Path) -> Checkpoint | None:
    """Load the checkpoint that the run starts from, if it does; it is never written to."""
    if settings.from_checkpoint is None:
        return None
    path = Path(settings.from_checkpoint)
    start = load_checkpoint(path)
    require_same(settings, path, MODEL_SETTINGS, "from_checkpoint")
    if out.resolve() in (path.resolve(), *path.resolve().parents):
        raise ConfigError(f"{out} holds the checkpoint of `from_checkpoint`; choose another `out`")
    return start


def _open_tokenizer(settings: TrainSettings) -> Tokenizer | None:
    """Load the tokenizer that is to be used, if one is named."""
    if settings.tokenizer is None:
        return None
    try:
        return load_tokenizer(Path(settings.tokenizer))
    except CheckpointError as error:
        raise CheckpointError(f"`tokenizer` {error}") from error


def _require_place(settings: TrainSettings, out: Path, *, resume: bool, force: bool) -> None:
    """Raise `ConfigError` where the run cannot be written to `out`, or would delete its own text there."""
    if resume:
        require_writable(out)
        return
    bring_back(out)
    require_room(out, force=force)
    if force:
        require_outside(out, settings.data, "data")


def _open_last(settings: TrainSettings, out: Path) -> Path:
    """Return the checkpoint to go on from, if these settings can."""
    last, damaged = last_checkpoint(out)
    require_same(settings, out, (*MODEL_SETTINGS, *START_SETTINGS, *STREAM_SETTINGS), "resume")
    done = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if settings.max_steps < done:
        raise ConfigError(f"max_steps is {settings.max_steps}, but the run of {out} has done {done}; raise `max_steps`")
    note(*damaged)
    return last


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


def _report(
    settings: TrainSettings, corpus: Corpus, dataset: WindowDataset, trainer: WindowTrainer, state: PartialState
) -> dict[str, Any]:
    """Return the content of `training.json` but for the speed."""
    return {
        "settings": dataclasses.asdict(settings),
        "corpus": {
            "sources": list(corpus.sources),
            "training_documents": len(corpus.training),
            "held_out_documents": len(corpus.held_out),
            "held_out": corpus.digests(),
            "skipped_files": len(corpus.skipped),
            "training_tokens": len(dataset.stream),
        },
        "parameters": trainer.model.num_parameters(),
        "processes": state.num_processes,
        "stream": dataset.digest,
        "history": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def _prepare(
    corpus: Corpus, settings: TrainSettings, out: Path, given: Tokenizer | None, *, fresh: bool
) -> tuple[Tokenizer, WindowDataset]:
    """Return tokenizer and sequences; where the run is `fresh`, make `out` anew once nothing is left to refuse.

    given: the tokenizer of a fresh run, where it is not to be trained.
    """
    if not fresh:
        given = load_tokenizer(out)
    tokenizer = given or train_tokenizer(corpus.training, settings.vocab_size)
    encoded = interruptible("encoding the text", lambda: encode_documents(tokenizer, corpus.training))
    dataset = WindowDataset(np.concatenate(encoded), settings)
    if given is None and tokenizer.get_vocab_size() < settings.vocab_size:
        note(
            f"the text holds {tokenizer.get_vocab_size()} tokens to learn, fewer than `vocab_size` "
            f"{settings.vocab_size}; the model's vocabulary is of {tokenizer.get_vocab_size()}"
        )
    if fresh:
        with disk_full_is_an_error(out):
            _make_directory(out, tokenizer, settings, dataset.digest)
    return tokenizer, dataset


def _make_directory(out: Path, tokenizer: Tokenizer, settings: TrainSettings, stream: str) -> None:
    """Make `out` anew with its tokenizer, and the settings and the digest of the text that resuming reads."""
    set_aside(out)
    _write_json(out / TRAINING_FILE, {"settings": dataclasses.asdict(settings), "stream": stream})
    save_tokenizer(tokenizer, out)


def _require_reach(settings: TrainSettings, config: ExPEConfig) -> None:
    farthest = (settings.position_offset + 1) * settings.training_length
    if farthest > config.max_position_embeddings:
        lower = "lower `position_offset`" if settings.position_offset else "lower `training_length`"
        raise ConfigError(
            f"position_offset {settings.position_offset} reaches position {farthest}, beyond the encoding's "
            f"{config.max_position_embeddings}; {lower}, or raise `max_position_embeddings` where it is set"
        )


def _finish(model: ExPEForCausalLM, report: dict[str, Any], out: Path) -> None:
    """Write config, record and weights beside their places first, then put them there, the weights last.

    So no file is ever half-written, and where this is stopped midway the run is unfinished, with no weights of another
    record: --resume finishes it.
    """
    directory = out / PARTIAL
    shutil.rmtree(directory, ignore_errors=True)  # of a process that was killed here
    try:
        model.save_pretrained(directory)
        _write_json(directory / TRAINING_FILE, report)
        mode = (directory / TRAINING_FILE).stat().st_mode  # as the umask has it, which safetensors does not ask
        (out / WEIGHTS_FILE).unlink(missing_ok=True)
        for file in sorted(directory.iterdir(), key=lambda file: file.name == WEIGHTS_FILE):
            file.chmod(mode)
            file.replace(out / file.name)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def no_memory_is_an_error() -> Iterator[None]:
    """Turn the failures of NumPy and torch into `ConfigError` where memory has no room for a model or its batch."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
            raise ConfigError(
                "no memory for this model and batch; lower `batch_size`, `training_length` or `hidden_size`"
            ) from error
        raise


@contextmanager
def disk_full_is_an_error(out: Path) -> Iterator[None]:
    """Turn the failures of the libraries that write checkpoints into `CheckpointError` where the disk is full."""
    try:
        yield
    except Exception as error:  # the libraries that write share no narrower base
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full or (out.exists() and shutil.disk_usage(out).free < LEAST_FREE_BYTES):
            raise CheckpointError(f"{out}: no space left on the device; free some or change `out`") from error
        raise


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
