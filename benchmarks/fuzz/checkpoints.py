"""Checkpoints with a changed file, and changed tokenizers in them and in packages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.fuzz.mutations import bytes_changed, json_changed, odd_text
from benchmarks.fuzz.packages import reseal, use_package
from benchmarks.fuzz.training import MOST_WEIGHTS, weights
from benchmarks.fuzz.trial import Trial
from expe_edge.model.config import ExPEConfig
from expe_edge.runtime import Generator
from expe_edge.text.corpus import load_corpus
from expe_edge.text.tokenization import encode_documents, load_tokenizer
from expe_edge.training import run as training
from expe_edge.training.checkpoint import load_checkpoint, starting_settings
from expe_edge.training.record import MODEL_SETTINGS, explicit
from expe_edge.training.settings import make_settings, stored_settings


def use_checkpoint(trial: Trial, checkpoint: Path) -> None:
    """Open a checkpoint as `export`, `train --from` and `train --resume` do."""

    def whole(path: Path) -> None:
        load_checkpoint(path)

    def start_from(path: Path) -> None:
        settings = make_settings(flags={"from_checkpoint": str(path)}, stored=starting_settings(path))
        training._open_start(explicit(settings), path.parent / "out")

    def resume(path: Path) -> None:
        settings = explicit(make_settings(stored=stored_settings(path)))
        if weights(settings) < MOST_WEIGHTS:
            ExPEConfig(**{name: getattr(settings, name) for name in MODEL_SETTINGS})
        training._open_last(settings, path)

    def use_text(path: Path) -> None:
        load_checkpoint(path).corpus()

    trial.use(whole, start_from, resume, use_text, path=checkpoint)


def changed_file(name: str) -> Callable[[Trial], None]:
    """Return the target of a checkpoint with one JSON file changed."""

    def target(trial: Trial) -> None:
        checkpoint = trial.copy(trial.materials.checkpoint)
        trial.replace(checkpoint / name, json_changed((checkpoint / name).read_bytes(), trial.random))
        use_checkpoint(trial, checkpoint)

    return target


def weights_file(trial: Trial) -> None:
    """A checkpoint whose weights have changed bytes."""
    checkpoint = trial.copy(trial.materials.checkpoint)
    name = trial.random.choice(("model.safetensors", "trainer/checkpoint-2/model.safetensors"))
    content = (checkpoint / name).read_bytes()
    head = trial.random.choice((8, 2000, len(content)))  # the header is where most can go wrong
    trial.replace(checkpoint / name, bytes_changed(content[:head], trial.random) + content[head:])
    use_checkpoint(trial, checkpoint)


def tokenizer(trial: Trial) -> None:
    """A changed tokenizer.json, in a package whose hashes agree or in a checkpoint."""
    in_package = trial.random.random() < 0.6
    origin = trial.materials.package("float32") if in_package else trial.materials.checkpoint
    copy = trial.copy(origin)
    trial.replace(copy / "tokenizer.json", json_changed((copy / "tokenizer.json").read_bytes(), trial.random))
    text = trial.given["text"] = odd_text(trial.random, trial.materials.sample).encode(errors="replace").decode()
    if in_package:
        reseal(copy, "tokenizer.json")
        generator = Generator.load(copy, threads=1, graph_cache="off")
        generator.generate([text or "the"], max_new_tokens=3)
        generator.tokenizer.decode(list(range(50)))
    else:
        read_by_training = load_tokenizer(copy, 300)
        documents = load_corpus([str(trial.materials.text / "00.txt")]).training
        encode_documents(read_by_training, documents)


def tokenizer_settings(trial: Trial) -> None:
    """Changed files beside tokenizer.json, which only other clients read."""
    name = trial.random.choice(("tokenizer_config.json", "generation_config.json"))
    if trial.random.random() < 0.5:
        changed_file(name)(trial)
        return
    package = trial.copy(trial.materials.package("float32"))
    trial.replace(package / name, json_changed((package / name).read_bytes(), trial.random))
    reseal(package, name)
    use_package(trial, package)
