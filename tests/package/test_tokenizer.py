"""A tokenizer.json that the library would read, and that would then end the process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from expe_edge.errors import PackageError
from expe_edge.package.directory import file_hash
from expe_edge.package.tokenizer import require_tokenizer
from expe_edge.runtime import Generator
from expe_edge.text.tokenization import load_tokenizer
from tests.damage import set_json
from tests.manifests import edit_manifest, read_manifest


def piece(name: str, **values: Any) -> dict[str, Any]:
    return {name: {"id": "A", "type_id": 0, **values}}


TEMPLATE = {"type": "TemplateProcessing", "single": [piece("Sequence")], "pair": [], "special_tokens": {}}
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"post_processor": {**TEMPLATE, "single": [piece("SpecialToken", id="<x>")]}},
        "the template names '<x>', which is no special token of it",
    ),
    (
        {"post_processor": {"type": "BertProcessing"}},
        "tokenizer.post_processor.type is 'BertProcessing', not one of TemplateProcessing",
    ),
    ({"normalizer": {"type": "NFC"}}, "tokenizer.normalizer is {'type': 'NFC'}, not null"),
    ({"decoder": None}, "tokenizer.decoder is None, not a mapping"),
    ({"model": {"type": "WordLevel"}}, "tokenizer.model.type is 'WordLevel', not one of BPE"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_parts_that_are_not_those_of_train(own_checkpoint: Path, changes: dict[str, Any], message: str) -> None:
    set_json("tokenizer.json", **changes)(own_checkpoint)

    with pytest.raises(ValueError, match=r"^t") as caught:
        require_tokenizer(own_checkpoint / "tokenizer.json")
    assert str(caught.value) == message


def test_those_of_train_are_right(checkpoint: Path, packages: Path) -> None:
    for directory in (checkpoint, packages / "float32"):
        require_tokenizer(directory / "tokenizer.json")


@pytest.mark.parametrize("moved", [7, -1])
def test_ids_with_a_gap(own_package: Path, moved: int) -> None:
    """A token that the model may choose and the tokenizer does not know: beyond a gap, or where two have one id."""
    values = json.loads((own_package / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = values["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] += moved
    set_json("tokenizer.json", model=values["model"])(own_package)
    files = read_manifest(own_package)["files"]
    edit_manifest(own_package, files={**files, "tokenizer.json": file_hash(own_package / "tokenizer.json")})

    with pytest.raises(PackageError, match=r"the ids of its 300 tokens are not those from 0 to 299"):
        Generator.load(own_package)


def test_padding_and_truncation_that_a_client_left_are_not_those_of_prompts(own_package: Path) -> None:
    prompt = "the old tree runs under the river"
    plain = Generator.load(own_package).encode(prompt)
    load_padded = load_tokenizer(own_package)
    load_padded.enable_padding(length=64)
    load_padded.enable_truncation(4)
    load_padded.save(str(own_package / "tokenizer.json"))
    assert json.loads((own_package / "tokenizer.json").read_text(encoding="utf-8"))["padding"]
    files = read_manifest(own_package)["files"]
    edit_manifest(own_package, files={**files, "tokenizer.json": file_hash(own_package / "tokenizer.json")})

    assert Generator.load(own_package).encode(prompt).tolist() == plain.tolist()
    assert load_tokenizer(own_package).encode(prompt).ids == plain.tolist()
