"""Packages that lie: a manifest, a contract or a graph changed, mostly with every hash made right again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any

import onnx

from benchmarks.fuzz.mutations import ODD_NUMBERS, as_json, bytes_changed, changed, odd_value
from benchmarks.fuzz.trial import PACKAGES, Trial
from expe_edge.export.source import open_source
from expe_edge.package.directory import file_hash
from expe_edge.package.manifest import MANIFEST_FILE
from expe_edge.quality.scoring import open_scorer


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
    elif kind == "axis" and place.type.tensor_type.shape.dim:
        place.type.tensor_type.shape.dim[-1].dim_value = random.choice((0, 1, 2**31, 2**40))
    else:
        model.opset_import[0].version = random.choice((0, 1, 7, 100))
    serialized: bytes = model.SerializeToString()
    return serialized
