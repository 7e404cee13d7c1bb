"""What `benchmarks.fuzz` gives changed inputs to: one function for each kind of input, all listed in `TARGETS`.

A target draws an input, notes it in `Trial.given`, and uses it as a user would: by the library, or by the command line.
It returns where the input was good and lets an `ExPEEdgeError` through where it was refused; all else is a fault.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pyarrow
import pyarrow.parquet
import torch
import yaml
from click.testing import CliRunner

from benchmarks.mutations import (
    ODD_NUMBERS,
    ODD_TEXTS,
    as_json,
    bytes_changed,
    changed,
    json_changed,
    odd_text,
    odd_value,
)
from expe_edge.calibration.observations import Calibration
from expe_edge.cli.compare import parse_lengths
from expe_edge.cli.main import main as command_line
from expe_edge.cli.recipe import parse_size
from expe_edge.cli.train import parse_parameter
from expe_edge.errors import ExPEEdgeError
from expe_edge.export.exporter import export
from expe_edge.export.source import open_source
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.package.directory import file_hash
from expe_edge.package.manifest import MANIFEST_FILE
from expe_edge.positions.parameters import POSITIONAL_PARAMETERS
from expe_edge.quality.comparison import require_rising
from expe_edge.quality.scoring import open_scorer
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, Sampling
from expe_edge.text.corpus import load_corpus
from expe_edge.text.tokenization import encode_documents, load_tokenizer, train_tokenizer
from expe_edge.training import run as training
from expe_edge.training.checkpoint import load_checkpoint, starting_settings
from expe_edge.training.settings import TrainSettings, make_settings, stored_settings
from expe_edge.training.trainer import WindowDataset
from tests.small import small_settings, write_documents

PACKAGES = ("float32", "int8-static", "float32-portable")
#: Models of more weights are not made: that they take memory and time is no fault.
MOST_WEIGHTS = 10**7
#: Longer prompts are not drawn, for the same reason.
LONGEST_PROMPT = 4000


@dataclass(frozen=True)
class Materials:
    """The valid inputs that are changed: a folder of text, a checkpoint and its packages, all very small."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> Materials:
        """Train and export for a second or two."""
        made = cls(root)
        made.text.mkdir()
        write_documents(made.text)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "max_steps": 2, "save_every": 1, "batch_size": 2}
        training.train(small_settings(made.text, **sizes, warmup_steps=0), made.checkpoint)
        export(made.checkpoint, root / "packages", ["float32", "int8-static", Recipe(portable=True)])
        return made

    @property
    def text(self) -> Path:
        return self.root / "text"

    @property
    def checkpoint(self) -> Path:
        return self.root / "checkpoint"

    def package(self, name: str) -> Path:
        """The package of that name."""
        return self.root / "packages" / name

    @functools.cached_property
    def sample(self) -> str:
        """Plain text."""
        return (self.text / "00.txt").read_text(encoding="utf-8")


@functools.cache
def opened(package: Path) -> Generator:
    """Return an unchanged package, opened once a process."""
    return Generator.load(package, threads=1)


@dataclass
class Trial:
    """One case. folder: empty, to write in. given: what was drawn, to be printed where the case is a fault."""

    random: Random
    materials: Materials
    folder: Path
    given: dict[str, Any] = field(default_factory=dict)

    def copy(self, original: Path) -> Path:
        """Return a copy of a directory whose files can be replaced, but not written to."""
        return Path(shutil.copytree(original, self.folder / "copy", copy_function=os.link))

    def replace(self, file: Path, content: bytes) -> None:
        """Replace a file of a copy, and note it."""
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        self.given[file.name] = content

    def use(self, *ways: Callable[[Path], object], path: Path) -> None:
        """Open `path` in one of several ways."""
        way = self.random.choice(ways)
        self.given["used by"] = way.__name__
        way(path)

    def run(self, *arguments: object, stdin: bytes = b"") -> None:
        """Run the command line. It must end well, or in a line; what it refuses may have written nothing.

        Raises:
            ExPEEdgeError: it refused, by that line. AssertionError: it ended otherwise.
        """
        texts = [str(argument).replace("\0", "") for argument in arguments]  # no process can be given NUL
        self.given["arguments"] = texts
        before = sorted(self.folder.rglob("*"))
        result = CliRunner().invoke(command_line, texts, input=stdin)
        if result.exit_code == 0:
            return
        if not isinstance(result.exception, SystemExit):
            raise result.exception or AssertionError("no exception")
        lines = result.stderr.splitlines()
        assert result.exit_code == 2, f"exit code {result.exit_code}: {result.stderr}"
        assert lines[-1].startswith("Error: "), f"the last line is no error: {result.stderr}"
        assert sum(line.startswith("Error: ") for line in lines) == 1, f"more than one line: {result.stderr}"
        assert "Traceback" not in result.stderr, result.stderr
        assert sorted(self.folder.rglob("*")) == before, "something was written"
        raise ExPEEdgeError(lines[-1])


# Packages


def sealed(values: dict[str, Any]) -> bytes:
    """Return a manifest whose digest is right."""
    values.pop("digest", None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return as_json({**values, "digest": digest})


def read_manifest(package: Path) -> dict[str, Any]:
    """The manifest as plain data."""
    values: dict[str, Any] = json.loads((package / MANIFEST_FILE).read_bytes())
    return values


def manifest(trial: Trial) -> None:
    """A manifest with changed entries, mostly one whose digest agrees."""
    package = trial.copy(trial.materials.package(trial.random.choice(PACKAGES)))
    if trial.random.random() < 0.1:
        trial.replace(package / MANIFEST_FILE, bytes_changed((package / MANIFEST_FILE).read_bytes(), trial.random))
    else:
        trial.replace(package / MANIFEST_FILE, sealed(changed(read_manifest(package), trial.random)))
    use_package(trial, package)


def contract(trial: Trial) -> None:
    """A manifest that lies about a size in both places that must agree."""
    package = trial.copy(trial.materials.package(trial.random.choice(PACKAGES)))
    values, size = read_manifest(package), trial.random.choice(ODD_NUMBERS)
    model, agreed = values["model"], values["contract"]
    kind = trial.random.choice(("layers", "heads", "head_size", "vocab_size", "length", "reach", "cache"))
    if kind == "layers":
        agreed["layers"] = model["num_hidden_layers"] = size
    elif kind == "heads":
        agreed["key_value_heads"] = model["num_key_value_heads"] = size
    elif kind == "head_size" and isinstance(size, int):
        agreed["head_size"], model["hidden_size"] = size, size * model["num_attention_heads"]
    elif kind == "vocab_size":
        agreed["vocab_size"] = model["vocab_size"] = size
    elif kind == "length":
        values["training_length"] = model["training_length"] = size
    elif kind == "reach":
        values["context_length"] = model["max_position_embeddings"] = size
    else:
        agreed["cache_dtype"], agreed["growing_cache"] = (
            trial.random.choice(("int8", "float32")),
            odd_value(trial.random),
        )
    trial.replace(package / MANIFEST_FILE, sealed(values))
    use_package(trial, package)


def use_package(trial: Trial, package: Path) -> None:
    """Open a package in one of the ways there are."""

    def inspect(path: Path) -> None:
        trial.run("inspect", path, "--json", path.parent / "manifest.json")

    def generate(path: Path) -> None:
        trial.run("generate", path, "--prompt", "the", "--max-new-tokens", 2, "--threads", 1)

    def quantize(path: Path) -> None:
        open_source(path, folded=True)

    def compare(path: Path) -> None:
        open_scorer(path, threads=1)

    trial.use(inspect, generate, quantize, compare, path=package)


def reseal(package: Path, name: str) -> None:
    """Make the hash of a file, and the digest, right again."""
    values = read_manifest(package)
    values["files"][name] = file_hash(package / name)
    (package / MANIFEST_FILE).unlink()
    (package / MANIFEST_FILE).write_bytes(sealed(values))


def graph(trial: Trial) -> None:
    """A graph with changed bytes or nodes, in a package whose hashes agree."""
    package = trial.copy(trial.materials.package(trial.random.choice(PACKAGES)))
    content = (package / "model.onnx").read_bytes()
    change = bytes_changed if trial.random.random() < 0.5 else nodes_changed
    trial.replace(package / "model.onnx", change(content, trial.random))
    reseal(package, "model.onnx")
    use_package(trial, package)


def nodes_changed(content: bytes, random: Random) -> bytes:
    """Return a graph with a node, a stored tensor or the shape of an input changed."""
    model = onnx.load_from_string(content)
    inside = model.graph
    node, tensor = random.choice(inside.node), random.choice(inside.initializer)
    place = random.choice([*inside.input, *inside.output])
    kind = random.choice(("type", "remove", "attribute", "wire", "dims", "data", "name", "axis", "opset"))
    if kind == "type":
        node.op_type = random.choice(inside.node).op_type
    elif kind == "remove":
        inside.node.remove(node)
    elif kind == "attribute" and node.attribute:
        random.choice(node.attribute).i = random.choice((0, -1, 1, 2, 1000))
    elif kind == "wire" and node.input:
        node.input[random.randrange(len(node.input))] = random.choice(random.choice(inside.node).output)
    elif kind == "dims" and tensor.dims:
        tensor.dims[0] = random.choice((0, -1, 1, 2**20, 2**40, 2**62))
    elif kind == "data":
        tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data) + 1)]
    elif kind == "name":
        tensor.name = random.choice(inside.initializer).name
    elif kind == "axis":
        place.type.tensor_type.shape.dim[-1].dim_value = random.choice((0, 1, 2**31, 2**40))
    else:
        model.opset_import[0].version = random.choice((0, 1, 7, 100))
    return model.SerializeToString()


# Checkpoints


def use_checkpoint(trial: Trial, checkpoint: Path) -> None:
    """Open a checkpoint as `export`, `train --from` and `train --resume` do."""

    def whole(path: Path) -> None:
        load_checkpoint(path)

    def start_from(path: Path) -> None:
        settings = make_settings(flags={"from_checkpoint": str(path)}, stored=starting_settings(path))
        training._open_start(training.explicit(settings), path.parent / "out")

    def resume(path: Path) -> None:
        settings = training.explicit(make_settings(stored=stored_settings(path)))
        if weights(settings) < MOST_WEIGHTS:
            ExPEConfig(**{name: getattr(settings, name) for name in training.MODEL_SETTINGS})
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


# Tokenizers


def tokenizer(trial: Trial) -> None:
    """A changed tokenizer.json, in a package whose hashes agree or in a checkpoint."""
    in_package = trial.random.random() < 0.6
    origin = trial.materials.package("float32") if in_package else trial.materials.checkpoint
    copy = trial.copy(origin)
    trial.replace(copy / "tokenizer.json", json_changed((copy / "tokenizer.json").read_bytes(), trial.random))
    text = trial.given["text"] = odd_text(trial.random, trial.materials.sample).encode(errors="replace").decode()
    if in_package:
        reseal(copy, "tokenizer.json")
        generator = Generator.load(copy, threads=1)
        generator.generate([text or "the"], max_new_tokens=3)
        generator.tokenizer.decode(list(range(50)))
    else:
        read_by_training = load_tokenizer(copy, 300)
        documents = load_corpus([str(trial.materials.text / "00.txt")]).training
        encode_documents(read_by_training, documents)


def tokenizer_settings(trial: Trial) -> None:
    """Changed files beside tokenizer.json, which only other clients read."""
    name = trial.random.choice(("tokenizer_config.json", "special_tokens_map.json", "generation_config.json"))
    if trial.random.random() < 0.5:
        changed_file(name)(trial)
        return
    package = trial.copy(trial.materials.package("float32"))
    trial.replace(package / name, json_changed((package / name).read_bytes(), trial.random))
    reseal(package, name)
    use_package(trial, package)


# Training


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
    with mock.patch.object(training, "_run", rehearsal):
        trial.run("train", "--config", trial.folder / "config.yaml", "--out", trial.folder / "out")


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
    settings = training.explicit(make_settings(flags={**flags, "vocab_size": 257, "num_hidden_layers": 1}))
    config = ExPEConfig(**{key: getattr(settings, key) for key in training.MODEL_SETTINGS})
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
        return gzip.compress(lines) if suffix.endswith(".gz") else lines
    encoding = random.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "utf-16-le"))
    return "\n".join(texts).encode(encoding, errors="replace")


def parquet(texts: list[str], random: Random) -> bytes:
    """Return a parquet file of these texts, as text, bytes or something else."""
    clean = [text.encode(errors="replace") for text in texts]
    column = random.choice((clean, [text.decode() for text in clean], [len(text) for text in clean], [None, *clean]))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), sink)
    return sink.getvalue().to_pybytes()


# Generating


def odd_number(random: Random, low: float, high: float, *, whole: bool) -> Any:
    """Draw a number of these bounds, or now and then an odd one of the same type."""
    if random.random() < 0.3:
        return random.choice([number for number in ODD_NUMBERS if isinstance(number, int) or not whole])
    return random.randint(int(low), int(high)) if whole else random.uniform(low, high)


def odd_sampling(random: Random) -> dict[str, Any]:
    """Draw settings of `Sampling`."""
    return {
        "temperature": odd_number(random, 0, 3, whole=False),
        "top_k": odd_number(random, 0, 400, whole=True),
        "top_p": odd_number(random, 0, 1, whole=False),
        "min_p": odd_number(random, 0, 1, whole=False),
        "repetition_penalty": odd_number(random, 0, 3, whole=False),
        "seed": odd_number(random, 0, 10, whole=True),
    }


def sampling(trial: Trial) -> None:
    """Settings of sampling and cache lengths, by the library."""
    generator = opened(trial.materials.package(trial.random.choice(PACKAGES)))
    names = trial.random.sample(list(odd_sampling(trial.random)), trial.random.randint(0, 6))
    drawn = odd_sampling(trial.random)
    settings = trial.given["sampling"] = {name: drawn[name] for name in names}
    stop = trial.given["stop"] = trial.random.choice(((), "", "e", ("", "th"), ODD_TEXTS))
    room = trial.given["cache_length"] = trial.random.choice((None, odd_number(trial.random, 1, 64, whole=True)))
    count = trial.given["max_new_tokens"] = odd_number(trial.random, 1, 8, whole=True)
    if isinstance(count, int) and 100 < count < 2**24:
        count = 8  # may be asked for, and takes as long as it takes
    prompts = trial.random.choice((["the"], ["the", "a tree"], [[1, 2], [0]]))
    done = generator.generate(
        prompts, max_new_tokens=count, sampling=Sampling(**settings), stop=stop, cache_length=room
    )
    assert all(completion.tokens for completion in done)


def generate_options(trial: Trial) -> None:
    """The same by the command line, with the options that the library has no words for."""
    options = {**odd_sampling(trial.random), "max_new_tokens": odd_number(trial.random, 1, 4, whole=True)}
    options |= {
        "threads": trial.random.choice((1, 1, 0, -1, 2**31, 10**30)),
        "device": trial.random.choice(("cpu", "", "x")),
    }
    options |= {"stop": trial.random.choice(ODD_TEXTS), "cache_length": odd_number(trial.random, 1, 2000, whole=True)}
    if options["max_new_tokens"] > 100 and options["max_new_tokens"] < 2**24:
        options["max_new_tokens"] = 4
    chosen = trial.random.sample(list(options), trial.random.randint(0, 4))
    flags = [f"--{name.replace('_', '-')}={options[name]}" for name in {*chosen, "max_new_tokens", "threads"}]
    package = trial.materials.package(trial.random.choice(PACKAGES))
    trial.run("generate", package, "--prompt", "the", *sorted(flags))


def prompts(trial: Trial) -> None:
    """Prompts as an option, a file, standard input, a text and ids."""
    text = trial.given["prompt"] = odd_text(trial.random, trial.materials.sample)[:LONGEST_PROMPT]
    content = bytes_changed(text.encode(errors="surrogatepass"), trial.random)[:LONGEST_PROMPT]
    package = trial.materials.package(trial.random.choice(PACKAGES))
    way = trial.given["used by"] = trial.random.choice(("option", "file", "stdin", "library", "ids"))
    command = ("generate", package, "--max-new-tokens", 2, "--threads", 1)
    if way == "option":
        trial.run(*command, "--json", f"--prompt={text}")
    elif way == "file":
        trial.replace(trial.folder / "prompt", content)
        trial.run(*command, "--prompt-file", trial.folder / "prompt")
    elif way == "stdin":
        trial.given["stdin"] = content
        trial.run(*command, stdin=content)
    elif way == "library":
        opened(package).generate([text], max_new_tokens=2)
    else:
        ids = trial.given["ids"] = [odd_number(trial.random, 0, 299, whole=True) for _ in range(3)]
        "".join(opened(package).stream(ids, max_new_tokens=2))


# Options of export and compare


def options(trial: Trial) -> None:
    """Options that are parsed by functions of ours, and settings of exports."""
    kind = trial.given["kind"] = trial.random.choice(("size", "lengths", "recipe", "calibration"))
    text = trial.given["text"] = trial.random.choice(
        (odd_text(trial.random, "1.5MB 600kB 1,2,4"), f"{trial.random.choice(ODD_NUMBERS)}kB", "9" * 400, "9" * 5000)
    )
    if kind == "size":
        parse_size(text)
    elif kind == "lengths":
        require_rising(parse_lengths(text))
    elif kind == "recipe":
        fields = list(Recipe.__dataclass_fields__)
        values = {"budget_kl": trial.random.choice(ODD_NUMBERS), "max_size": trial.random.choice(ODD_NUMBERS)}
        values |= {name: trial.random.choice(ODD_TEXTS) for name in ("precision", "embedding", "cache", "solver")}
        values |= {"block_size": trial.random.choice(ODD_NUMBERS), "portable": True, "smoothing": True}
        chosen = [name for name in fields if name in values and trial.random.random() < 0.4]
        trial.given["recipe"] = {name: values[name] for name in chosen}
        Recipe(**trial.given["recipe"])
    else:
        whole = [number for number in ODD_NUMBERS if isinstance(number, int)]
        Calibration(trial.random.choice(ODD_TEXTS), trial.random.choice(whole), trial.random.choice(whole))


TARGETS: dict[str, Callable[[Trial], None]] = {
    "manifest": manifest,
    "contract": contract,
    "graph": graph,
    "config": changed_file("config.json"),
    "training record": changed_file("training.json"),
    "trainer state": changed_file("trainer/checkpoint-2/trainer_state.json"),
    "weights": weights_file,
    "tokenizer": tokenizer,
    "tokenizer settings": tokenizer_settings,
    "settings": settings_file,
    "positions": positions,
    "text": text_files,
    "sampling": sampling,
    "generate options": generate_options,
    "prompts": prompts,
    "options": options,
}


def innermost(error: BaseException) -> str:
    """Return where in this project an exception was last at home, to tell faults apart."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/expe_edge/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "outside"
