"""Tokens: byte-level BPE trained on the corpus, or plain bytes, in the `tokenizers` format that every client reads.

Text is text: where a document spells the separator, it is encoded by its characters. The code alone adds separators.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from expe_edge.errors import CheckpointError, ConfigError, reason_of
from expe_edge.package.directory import TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from expe_edge.package.tokenizer import open_tokenizer
from expe_edge.progress import interruptible
from expe_edge.text.documents import Document

#: Separates documents; opens a text and ends it. Always id 0.
END_OF_TEXT = "<|endoftext|>"
#: Characters of a word beyond which training a tokenizer breaks it.
LONGEST_WORD = 256
_LONG_WORD = re.compile("|".join(rf"{kind}{{{LONGEST_WORD}}}(?={kind})" for kind in (r"\w", r"[^\w\s]", r"\s")))
#: 256 bytes and the separator.
BYTE_VOCABULARY = 257


def train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of `vocab_size` tokens; with 257 it is plain bytes. Every text opens with the separator.

    Raises:
        ConfigError: a vocabulary below 257.
    """
    if vocab_size < BYTE_VOCABULARY:
        raise ConfigError(f"vocab_size is {vocab_size}; at least {BYTE_VOCABULARY}: 256 bytes and {END_OF_TEXT}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [bounded_words(document.text) for document in documents]
    interruptible("training the tokenizer", lambda: tokenizer.train_from_iterator(texts, trainer))
    separator = (END_OF_TEXT, tokenizer.token_to_id(END_OF_TEXT))
    tokenizer.post_processor = processors.TemplateProcessing(f"{END_OF_TEXT} $A", special_tokens=[separator])
    tokenizer.encode_special_tokens = True
    return tokenizer


def bounded_words(text: str) -> str:
    """Return text whose runs of letters, of signs and of spaces are broken after `LONGEST_WORD` characters.

    Pairs are merged within such runs, and the trainer's time grows with the square of their length: it stands still at
    text without spaces. What a tokenizer encodes later may be as long as it likes.
    """
    return _LONG_WORD.sub(r"\g<0>\n", text)


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """Write `tokenizer.json`, and a `tokenizer_config.json` that every client reads.

    transformers 5 itself would name a class in it that transformers 4 does not know.
    """
    tokenizer.save(str(directory / TOKENIZER_FILE))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (directory / TOKENIZER_CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(directory: Path, vocab_size: int | None = None) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint or a package.

    vocab_size: of the model, where it is known.

    Raises:
        CheckpointError: it is missing, damaged, not one that `train` writes, or of another vocabulary.
    """
    path = directory / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{directory}: no {TOKENIZER_FILE} in it")
    try:
        tokenizer: Tokenizer = open_tokenizer(path, Tokenizer.from_file)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(f"{path}: not a tokenizer ({reason_of(error)})") from error
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise CheckpointError(f"{path}: not a tokenizer of train: no {END_OF_TEXT}")
    tokens = tokenizer.get_vocab_size()
    if vocab_size not in (None, tokens):
        raise CheckpointError(
            f"{directory}: the tokenizer has {tokens} tokens, the model's vocabulary {vocab_size}; they do "
            "not belong together"
        )
    return tokenizer


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[npt.NDArray[np.int32]]:
    """Return each document's token ids, int32, opened by the separator."""
    separator = tokenizer.token_to_id(END_OF_TEXT)
    encoded = tokenizer.encode_batch_fast([document.text for document in documents], add_special_tokens=False)
    return [np.array([separator, *encoding.ids], dtype=np.int32) for encoding in encoded]


def token_byte_lengths(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Return how many bytes of text each token id stands for, (V,) int64; 0 for the separator."""
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)  # one character of the alphabet is one byte
    return lengths
