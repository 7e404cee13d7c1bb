"""From prompts to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from expe_edge.errors import GenerationError
from expe_edge.kinds import is_unicode
from expe_edge.runtime.history import Ids

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: A prompt is text, or token ids taken as they are.
Prompt = str | Sequence[int]


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, *, opened: bool = True) -> Ids:
    """Return the ids of a prompt, (T,) int64.

    opened: whether the end-of-text token stands before text, as it did before documents; not where text goes on.

    Raises:
        GenerationError: an empty prompt, text that is none, or ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        require_text("the prompt", prompt)
    ids = tokenizer.encode(prompt, add_special_tokens=opened).ids if isinstance(prompt, str) else prompt
    if len(prompt) == 0 or len(ids) == 0:
        raise GenerationError("the prompt is empty")
    vocab_size = tokenizer.get_vocab_size()
    outside = [token for token in ids if not 0 <= token < vocab_size]
    if outside:
        raise GenerationError(f"token id {outside[0]} is outside the vocabulary of {vocab_size}")
    return np.array(ids, dtype=np.int64)


def require_text(name: str, text: str) -> None:
    """Raise `GenerationError` where `text`, which is called `name`, could not be written as UTF-8."""
    if not is_unicode(text):
        raise GenerationError(f"{name} holds half a surrogate pair, which is no text")
