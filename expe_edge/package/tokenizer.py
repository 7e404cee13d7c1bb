"""What a `tokenizer.json` must hold: a byte-level BPE as `train` writes it.

The library that reads it takes much more, of which some ends the process only when a text is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expe_edge.package.checks import LIST, NOTHING, TEXT, list_of, mapping_of, one_of, optional, record, shallow, whole
from expe_edge.package.contract import WIDEST

_TOKEN = whole(0, WIDEST - 1)
_TEMPLATE = record(
    {
        "type": one_of("TemplateProcessing"),
        "single": list_of(
            record({}, sometimes={"SpecialToken": record({"id": TEXT}), "Sequence": record({})}, closed=True)
        ),
        "special_tokens": mapping_of(record({"ids": list_of(_TOKEN)})),
    }
)
_BYTES = record({"type": one_of("ByteLevel")})
_BPE = record(
    {"type": one_of("BPE"), "vocab": mapping_of(_TOKEN), "merges": LIST},
    sometimes=dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"), NOTHING),
)
_TOKENIZER = record(
    {"pre_tokenizer": _BYTES, "decoder": _BYTES, "model": _BPE},
    sometimes={
        "normalizer": NOTHING,
        "post_processor": optional(_TEMPLATE),
        "added_tokens": list_of(record({"id": _TOKEN, "content": TEXT})),
    },
)


def open_tokenizer(path: Path, read: Callable[[str], Any]) -> Any:
    """Open the tokenizer of a file, to encode text as text: whole, whatever it spells.

    read: `tokenizers.Tokenizer.from_file`; this folder imports no library.

    Raises:
        ValueError: not the JSON of such a tokenizer. Exception: not readable, or of whatever class the library raises.
    """
    require_tokenizer(path)
    tokenizer = read(str(path))
    tokenizer.encode_special_tokens = True  # not as the control token that it spells
    tokenizer.no_padding()  # which a client may have left in the file, as truncation
    tokenizer.no_truncation()
    return tokenizer


def require_tokenizer(path: Path) -> None:
    """Raise `ValueError` unless `path` is the JSON of such a tokenizer."""
    values = json.loads(path.read_text(encoding="utf-8"))
    shallow("tokenizer", values)
    _TOKENIZER("tokenizer", values)
    ids = values["model"]["vocab"] | {token["content"]: token["id"] for token in values.get("added_tokens", ())}
    if set(ids.values()) != set(range(len(ids))):
        raise ValueError(f"the ids of its {len(ids)} tokens are not those from 0 to {len(ids) - 1}")
    template = values.get("post_processor") or {"single": [], "special_tokens": {}}
    for piece in template["single"]:
        if "SpecialToken" in piece and piece["SpecialToken"]["id"] not in template["special_tokens"]:
            raise ValueError(f"the template names {piece['SpecialToken']['id']!r}, which is no special token of it")
