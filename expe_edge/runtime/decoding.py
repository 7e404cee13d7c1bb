"""One sequence being generated, what comes of it, and the stream of its text."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from expe_edge.runtime.cache import Cache
from expe_edge.runtime.lookup import PromptLookup
from expe_edge.runtime.sampling import Sampler
from expe_edge.runtime.session import Ids, Logits
from expe_edge.runtime.streaming import TextStream


@dataclass
class Completion:
    """What was generated for one prompt.

    Attributes:
        text: the new text, without the prompt. tokens: the new ids, the closing end-of-text included.
        finish_reason: `length`, `end_of_text` or `stop`; None until the text is complete.
        reused_tokens: of the prompt's, those that a context had read before.
        drafted_tokens: proposed by prompt lookup. accepted_tokens: of these, those that were chosen.
    """

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


class Row:
    """One sequence being generated: its sampler, its text, its completion.

    ids: of the prompt, (T,) int64. end_of_text: the id that ends the sequence, or None. lookup: drafts tokens where the
        row decodes alone.

    Attributes:
        prefix: a cache of one row that may have read the beginning of the prompt; None for none. goes_on: whether that
            has read all of it, some of which it may have dropped.
    """

    prefix: Cache | None = None
    goes_on = False

    def __init__(
        self,
        ids: Ids,
        sampler: Sampler,
        text: TextStream,
        *,
        max_new_tokens: int,
        end_of_text: int | None,
        lookup: PromptLookup | None = None,
    ) -> None:
        self.ids, self.sampler, self.text = ids, sampler, text
        self.max_new_tokens, self.end_of_text, self.lookup = max_new_tokens, end_of_text, lookup
        self.completion = Completion(prompt_tokens=len(ids))
        self.began = 0.0  # when it was first decoded, by `time.perf_counter`

    @property
    def finish_reason(self) -> str | None:
        """Why no token follows the last; None where one does."""
        tokens = self.completion.tokens
        if self.text.stopped:
            return "stop"
        if tokens[-1:] == [self.end_of_text]:
            return "end_of_text"
        return "length" if len(tokens) >= self.max_new_tokens else None

    def accept(self, logits: Logits) -> str:
        """Choose the next token from `logits` (V,); return the text that is now certain."""
        token = self.sampler.choose(logits)
        self.completion.tokens.append(token)
        if self.lookup is not None:
            self.lookup.push(token)
        piece = self.text.push(token)
        self.completion.text += piece
        return piece

    def finish(self) -> str:
        """Note why the sequence ended; return the text held back to the end."""
        self.completion.finish_reason = self.finish_reason
        piece = self.text.finish()
        self.completion.text += piece
        return piece


class Stream(Iterator[str]):
    """The text that follows a prompt, piece by piece, never part of a character. Asking for a piece decodes it.

    pieces: what a batch of one row adds to its text.

    Attributes:
        completion: what has been generated so far; complete once iteration has ended.
    """

    def __init__(self, pieces: Generator[str, None, None], completion: Completion) -> None:
        self.completion = completion
        self._pieces = pieces

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Decode no further and free the cache; the completion stays as it is."""
        self._pieces.close()
