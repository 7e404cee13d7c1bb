"""What training is given: settings, encodings and files of text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml

from benchmarks.fuzz.mutations import ODD_TEXTS, as_json, bytes_changed, changed, odd_text, odd_value
from benchmarks.fuzz.trial import Trial
from expe_edge.cli.train import parse_parameter
from expe_edge.errors import CorpusError
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.positions.parameters import POSITIONAL_PARAMETERS
from expe_edge.text.corpus import Corpus, load_corpus
from expe_edge.text.tokenization import encode_documents, train_tokenizer
from expe_edge.training import run as training
from expe_edge.training.record import MODEL_SETTINGS, explicit
from expe_edge.training.settings import TrainSettings, make_settings
from expe_edge.training.trainer import WindowDataset

#: Models of more weights are not made: that they take memory and time is no fault.
MOST_WEIGHTS = 10**7
#: Parts of the path of a text that is read.
FEWEST_PARTS = 3
#: What YAML alone has.
YAML_PIECES = (
    *(b"seed: 2024-99-99", b"seed: 2024-01-01", b"seed: !!int ''", b"seed: !!float x", b"seed: 0b", b"seed: 1:99"),
    *(b"seed: !!binary '%'", b"seed: !!python/object:os.system x", b"? [a, b]\n: 1", b"<<: 5", b"<<: [{seed: 1}, 2]"),
    *(b"data: &a [*a]", b"positional_parameters: &a {start: *a}", b"seed: *nothing", b"--- \nseed: 1", b"%YAML 3.0"),
    *(b"data: !!set {a}", b"data: !!omap [a: 1]", b"data: !!pairs [a: 1]", b"seed: _", b"seed: 0o7", b"seed: 0x"),
    *(b"seed: !!timestamp x", b"seed: !!bool x", b"seed: !!null x", b"= : 1", b"seed: =", b"seed: 190:20:30.15"),
    b"data: [&a [x,x,x,x,x,x,x,x,x,x], "
    + b", ".join(b"&%c [%s]" % (97 + n, b", ".join([b"*%c" % (96 + n)] * 10)) for n in range(1, 12))
    + b"]",
)


def weights(settings: TrainSettings) -> int:
    """Return about how many weights a model has."""
    width = settings.hidden_size
    wide = settings.intermediate_size or 4 * width
    return width * settings.vocab_size * 2 + settings.num_hidden_layers * width * (4 * width + 3 * wide)


def rehearsal(settings: TrainSettings, arguments: Any, config: ExPEConfig, *_: Any) -> dict[str, Any]:
    """Stand in for `training.run._run`: make what it makes, train nothing."""
    del arguments
    stream = np.zeros(10_000, dtype=np.int32)
    if weights(settings) < MOST_WEIGHTS:
        dataset = WindowDataset(stream, settings)
        if len(dataset):
            dataset[0]
        training._make_models(settings, config, None)
    return {"history": [], "parameters": 0}


def text_at_hand(sources: Sequence[str], text_field: str) -> Corpus:
    """Do as `load_corpus`, but take no folder of the machine itself: to read all of it takes what it takes."""
    for source in sources:
        with suppress(OSError, ValueError):  # of a name that no file system takes
            if len(Path(source).resolve().parts) < FEWEST_PARTS:
                raise CorpusError("not at hand")
    return load_corpus(sources, text_field)


def settings_file(trial: Trial) -> None:
    """A YAML file for `train --config`."""
    names = list(TrainSettings.__dataclass_fields__)
    values: dict[str, Any] = {"data": str(trial.materials.text), "vocab_size": 300, "hidden_size": 32}
    for name in trial.random.sample(names, trial.random.choice((1, 1, 2, 4))):
        values[name] = odd_value(trial.random)
    if trial.random.random() < 0.4:
        values["positional"] = trial.random.choice(list(POSITIONAL_PARAMETERS))
        values["positional_parameters"] = odd_parameters(trial.random, values["positional"])
    if trial.random.random() < 0.3:
        values = changed(values, trial.random)
    content = as_json(values) if trial.random.random() < 0.5 else as_yaml(values)  # JSON is YAML
    if trial.random.random() < 0.5:
        content = bytes_changed(content, trial.random)
    if trial.random.random() < 0.2:
        content += b"\n" + trial.random.choice(YAML_PIECES)
    trial.replace(trial.folder / "config.yaml", content)
    with mock.patch.object(training, "_run", rehearsal), mock.patch.object(training, "load_corpus", text_at_hand):
        trial.run("train", "--config", trial.folder / "config.yaml", "--out", trial.folder / "out")


def as_yaml(values: Any) -> bytes:
    """Return values as YAML in block style, or as JSON where YAML cannot write them."""
    try:
        return yaml.safe_dump(values, allow_unicode=True).encode()
    except (yaml.YAMLError, RecursionError, UnicodeEncodeError):
        return as_json(values)


def odd_parameters(random: Random, name: str) -> dict[str, Any]:
    """Draw settings of an encoding, some of them plausible."""
    plausible = {
        "dims": (2, 4, 6, 8, 16, 32),
        "limbs": (1, 2, 3),
        "limb_bits": (1, 4, 7),
        "where": ("key", "query_key", "query_key_value", "embedding"),
        "how": ("override", "add"),
        "slopes": ("alibi", "zero", "random", [0.5, 0.25, 0.125, 0.0]),
        "start": (0, 1, 1.5, [1.0, 0.0]),
        "step": (0.125, 0, 1e-3, [0.0, 0.5]),
    }
    fields = list(POSITIONAL_PARAMETERS[name].__dataclass_fields__)
    chosen = random.sample(fields, random.randint(0, len(fields)))
    odd = random.random()
    return {
        key: odd_value(random) if random.random() < odd else random.choice(plausible.get(key, (8,))) for key in chosen
    }


def positions(trial: Trial) -> None:
    """Settings of an encoding as `--positional-parameter`, through to a model's logits."""
    name = trial.random.choice(list(POSITIONAL_PARAMETERS))
    given = [f"{key}={spelled(value)}" for key, value in odd_parameters(trial.random, name).items()]
    if trial.random.random() < 0.1:
        given.append(odd_text(trial.random, "dims=4,step=0.5"))
    trial.given |= {"positional": name, "positional_parameters": given}
    flags = {"positional": name, "positional_parameters": dict(map(parse_parameter, given)), "hidden_size": 32}
    settings = explicit(make_settings(flags={**flags, "vocab_size": 257, "num_hidden_layers": 1}))
    config = ExPEConfig(**{key: getattr(settings, key) for key in MODEL_SETTINGS})
    model = ExPEForCausalLM(config).eval()
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 257)


def spelled(value: Any) -> str:
    """Return a value as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def text_files(trial: Trial) -> None:
    """Files of training text of every kind, through to tokens."""
    for _ in range(trial.random.choice((1, 1, 2))):
        suffix = trial.random.choice(
            (".txt", ".jsonl", ".json", ".parquet", ".jsonl.gz", ".txt.xz", ".csv", "", ".JSON")
        )
        content = text_content(suffix, trial.random, trial.materials.sample)
        if trial.random.random() < 0.8:
            content = bytes_changed(content, trial.random)
        trial.replace(trial.folder / f"text{trial.random.randrange(3)}{suffix}", content)
    path = trial.random.choice([trial.folder, *trial.folder.iterdir(), trial.folder / "*"])
    text_field = trial.given["text field"] = trial.random.choice(("text", "text", "text", *ODD_TEXTS))
    corpus = load_corpus([str(path)], text_field)
    found = train_tokenizer(corpus.training, 300)
    encode_documents(found, corpus.training + corpus.held_out)


def text_content(suffix: str, random: Random, sample: str) -> bytes:
    """Return what a file of that suffix could hold, some rows of it odd."""
    texts = [odd_text(random, sample) + sample[:80] for _ in range(random.choice((1, 3)))]
    rows: list[Any] = [{"text": text, "number": 1} for text in texts]
    if random.random() < 0.3:
        rows = [changed(row, random) for row in rows]
    if suffix == ".parquet":
        return parquet(texts, random)
    if suffix.lower() == ".json":
        return as_json(rows if random.random() < 0.5 else rows[:1])
    if suffix.startswith(".jsonl"):
        lines = b"\n".join(map(as_json, rows))
        return gzip.compress(lines, mtime=0) if suffix.endswith(".gz") else lines
    encoding = random.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le"))
    return "\n".join(texts).encode(encoding, errors="replace")


def parquet(texts: list[str], random: Random) -> bytes:
    """Return a parquet file of these texts, as text, bytes or something else."""
    clean = [text.encode(errors="replace") for text in texts]
    column = random.choice((clean, [text.decode() for text in clean], [len(text) for text in clean], [None, *clean]))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
