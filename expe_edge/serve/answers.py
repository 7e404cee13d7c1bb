"""From rows to OpenAI's completion objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from expe_edge.runtime import Alternative, TokenLogprobs
from expe_edge.runtime.decoding import Row
from expe_edge.serve.fields import CompletionBody
from expe_edge.serve.scheduler import Gain

#: OpenAI's reasons for an end by ours.
REASONS = {"length": "length", "end_of_text": "stop", "stop": "stop", "constraint": "stop"}
#: What is shown for probabilities that are smaller.
LEAST_LOGPROB = -9999.0


class ChoiceLogprobs:
    """Log probabilities of one choice as OpenAI has them, token after token.

    Attributes:
        offset: characters of text before the next token.
    """

    def __init__(self, row: Row) -> None:
        self.row, self.offset = row, 0

    def of(self, known: Sequence[TokenLogprobs | None], ids: Sequence[int]) -> dict[str, Any]:
        """Return those of the next tokens `ids`; known: theirs, None of a prompt's first."""
        names = [self._name(token) for token in ids]
        offsets = []
        for token in ids:
            offsets.append(self.offset)
            self.offset += len(self.row.text.token_text(token))
        return {
            "tokens": names,
            "token_logprobs": [None if each is None else _shown(each) for each in known],
            "top_logprobs": [None if each is None else self._top(each) for each in known],
            "text_offset": offsets,
        }

    def _top(self, each: TokenLogprobs) -> dict[str, float]:
        """The likeliest tokens, and the chosen one."""
        return {self._name(one.token): _shown(one) for one in (*each.top, each)}

    def _name(self, token: int) -> str:
        """A token's text, or its bytes where they are none by themselves."""
        data = self.row.text.token_bytes(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _shown(one: Alternative) -> float:
    return max(one.logprob, LEAST_LOGPROB)


class Choice:
    """One of an answer's texts.

    echo: the text of the prompt, which the answer repeats; None where it does not.
    """

    def __init__(self, row: Row, index: int, body: CompletionBody, echo: str | None) -> None:
        self.row, self.index, self.body, self.echo = row, index, body, echo
        self.logprobs = None if body.logprobs is None else ChoiceLogprobs(row)
        self.opened = False

    def part(self, gain: Gain) -> dict[str, Any] | None:
        """Return what a step adds to the text, as OpenAI's choice; None where that is nothing."""
        text, begin, end = gain.text, gain.begin, gain.end
        if self.body.max_tokens == 0:
            text, begin = "", end
        repeats = self.echo is not None and not self.opened
        if repeats:
            text = f"{self.echo}{text}"
        self.opened = True
        parts = []
        if self.logprobs is not None:
            parts = [self._prompt()] if repeats else []
            parts.append(self._generated(begin, end))
        if not (text or gain.ended or (self.logprobs is not None and end > begin)):
            return None
        reason = REASONS[str(self.row.completion.finish_reason)] if gain.ended else None
        return {
            "text": text,
            "index": self.index,
            "logprobs": joined(parts) if parts else None,
            "finish_reason": "length" if gain.ended and self.body.max_tokens == 0 else reason,
        }

    def _prompt(self) -> dict[str, Any]:
        assert self.logprobs is not None
        return self.logprobs.of(self.row.completion.prompt_logprobs or [], self.row.ids.tolist())

    def _generated(self, begin: int, end: int) -> dict[str, Any]:
        assert self.logprobs is not None
        completion = self.row.completion
        return self.logprobs.of((completion.logprobs or [])[begin:end], completion.tokens[begin:end])


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Join the lists of log probabilities that parts of a text have."""
    return {name: [one for part in parts for one in part[name]] for name in parts[0]}


@dataclass
class Whole:
    """A choice whose parts are brought together."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)

    def add(self, part: dict[str, Any]) -> None:
        """Add the next part."""
        self.texts.append(part["text"])
        if part["logprobs"] is not None:
            self.logprobs.append(part["logprobs"])
        self.last = part

    def choice(self) -> dict[str, Any]:
        """Return all of it."""
        logprobs = joined(self.logprobs) if self.logprobs else None
        return {**self.last, "text": "".join(self.texts), "logprobs": logprobs}


class Envelope:
    """What all objects of one answer have in common. fingerprint: of the package, on which alone answers depend."""

    def __init__(self, model: str, fingerprint: str) -> None:
        self.common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def of(self, choices: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """Return the object that holds `choices`."""
        return {**self.common, "choices": list(choices), **more}


def usage(rows: Sequence[Row], body: CompletionBody) -> dict[str, Any]:
    """Return the tokens of an answer; a prompt counts once, whatever its choices."""
    prompts = sum(len(row.ids) for row in rows[:: body.n])
    generated = 0 if body.max_tokens == 0 else sum(len(row.completion.tokens) for row in rows)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": generated,
        "total_tokens": prompts + generated,
        "prompt_tokens_details": {"cached_tokens": sum(row.completion.reused_tokens for row in rows[:: body.n])},
    }
