"""Text out of tokens as they come: never half a character, never part of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns tokens into pieces of text that are safe to print.

    stop: a string that ends the text, or several.

    Attributes:
        stopped: whether a stop string has been met; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        stops = (stop,) if isinstance(stop, str) else stop
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stops if text)
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.tokens: list[int] = []
        self.decoded = 0  # characters taken from the decoder
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; return the text that is now certain."""
        self.tokens.append(token)
        piece = self.decoder.step(self.tokenizer, token) or ""
        self.decoded += len(piece)
        return self._release(piece)

    def finish(self) -> str:
        """Return what was held back: an unfinished character as U+FFFD, the start of a stop string as itself."""
        if self.stopped:
            return ""
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        piece = self._release(text[self.decoded :])
        rest, self.held = self.held, ""
        return piece + ("" if self.stopped else rest)

    def _release(self, piece: str) -> str:
        if not self.stop:
            return piece
        text = self.held + piece
        places = [index for index in (text.find(stop) for stop in self.stop) if index >= 0]
        if places:
            self.stopped, self.held = True, ""
            return text[: min(places)]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` could begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
