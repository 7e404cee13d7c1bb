"""What is asked of the generator beside the prompts: how tokens are chosen, when the text ends, who looks on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from expe_edge.errors import GenerationError
from expe_edge.runtime.constraint import Constraint
from expe_edge.runtime.penalties import require_known
from expe_edge.runtime.sampling import Sampling
from expe_edge.runtime.window import Window

if TYPE_CHECKING:
    from expe_edge.runtime.decoding import Completion

#: Called after every token with the row's index and its completion so far; what is true ends that row.
Callback = Callable[[int, "Completion"], object]
#: Called after every chunk of a prompt with the tokens of it that have been read and those there are.
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Request:
    """One call's wishes, for all of its rows; `Generator.stream` says what each is.

    prompt_logprobs: how many of the likeliest tokens to give log probabilities of in every place of the prompt, beside
        those of its own token; None for none at all. All of the prompt is read for them, whatever was read before.

    Raises:
        GenerationError: one that is out of range, or at odds with another.
    """

    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    n: int = 1
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    constraint: Constraint | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_length: int | None = None
    prompt_lookup: bool = False
    callback: Callback | None = None
    on_prefill: Progress | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"`max_new_tokens` is {self.max_new_tokens}; at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise GenerationError(
                f"`min_new_tokens` is {self.min_new_tokens}; from 0 to `max_new_tokens`, {self.max_new_tokens}"
            )
        if self.n < 1:
            raise GenerationError(f"`n` is {self.n}; at least 1")
        if self.n > 1 and self.sampling.temperature == 0:
            raise GenerationError(
                f"`n` is {self.n}, but `temperature` is 0, which gives the same text every time; raise it"
            )
        if self.min_new_tokens > 0 and self.constraint is not None:
            raise GenerationError(
                "`min_new_tokens` and a constraint are both given, which says itself when the text may end; use one"
            )

    def require_within(self, vocab_size: int, end_of_text: int | None) -> None:
        """Raise `GenerationError` where it names tokens, or more of them, than the vocabulary has, or leaves none."""
        require_known("stop_tokens", self.stop_tokens, vocab_size)
        if self.min_new_tokens > 0 and len({*self.stop_tokens, end_of_text} - {None}) == vocab_size:
            raise GenerationError(
                "`stop_tokens` leave no other token to choose, and "
                f"`min_new_tokens` is {self.min_new_tokens}; take some out"
            )
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            if count is not None and not 0 <= count <= vocab_size:
                raise GenerationError(f"`{name}` is {count}; from 0 to {vocab_size}, the vocabulary's tokens")

    def capacity(self, prompt_tokens: int, window: Window | None) -> int:
        """Return the tokens that a row's cache needs room for.

        Raises:
            GenerationError: more than `cache_length`.
        """
        if window is not None:
            return window.capacity
        needed = prompt_tokens + self.max_new_tokens
        if self.cache_length is not None and needed > self.cache_length:
            raise GenerationError(
                f"the prompt's {prompt_tokens} tokens and {self.max_new_tokens} new ones need a cache of {needed}, but "
                f"`cache_length` is {self.cache_length}; raise it, or shorten the prompt"
            )
        return self.cache_length or needed
