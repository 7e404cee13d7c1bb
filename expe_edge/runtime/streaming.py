"""Text out of tokens as they come: never half a character, never part of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def byte_alphabet() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (Radford et al., 2019).

    Printable bytes of Latin-1 stand for themselves, the others for the characters from U+0100 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = byte_alphabet()


class TextStream:
    """Turns tokens of a byte-level vocabulary into pieces of text that are safe to print.

    stop: a string that ends the text, or several.

    Attributes:
        stopped: whether a stop string has been met; the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | Sequence[str] = ()) -> None:
        stops = (stop,) if isinstance(stop, str) else stop
        self.tokenizer, self.stop = tokenizer, tuple(text for text in stops if text)
        self.control = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take one token; return the text that is now certain."""
        return "" if token in self.control else self._release(self.decoder.decode(self.token_bytes(token)))

    def token_text(self, token: int) -> str:
        """Return the text that a token is by itself, none of a control token's."""
        return "" if token in self.control else self.token_bytes(token).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token stands for; of a control token, its name's."""
        name: str = self.tokenizer.id_to_token(token)
        try:
            return bytes([BYTES[character] for character in name])
        except KeyError:  # a token that was added as it is
            return name.encode()

    def finish(self) -> str:
        """Return what was held back: an unfinished character as U+FFFD, the start of a stop string as itself."""
        if self.stopped:
            return ""
        piece = self._release(self.decoder.decode(b"", True))
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
