"""Drafts without a second model: what followed the last tokens where they stood before."""

from __future__ import annotations

from expe_edge.runtime.history import Ids

#: Tokens that must have stood before, the most first.
MATCHED = (4, 3, 2)
#: Tokens drafted at first, and at most.
FIRST_DRAFT, LONGEST_DRAFT = 4, 16


class PromptLookup:
    """Prompt lookup decoding (Saxena, 2023): text repeats itself, so its past is a draft of what follows.

    ids: of the prompt, (T,) int64.
    """

    def __init__(self, ids: Ids) -> None:
        self.tokens: list[int] = []
        self.length = FIRST_DRAFT
        #: Tuples of tokens to the index behind their latest occurrence that something follows.
        self.places: dict[tuple[int, ...], int] = {}
        for token in ids.tolist():
            self.push(token)

    def push(self, token: int) -> None:
        """Note the next token of the text."""
        end = len(self.tokens)
        for size in MATCHED:
            if size <= end:
                self.places[tuple(self.tokens[end - size :])] = end
        self.tokens.append(token)

    def draft(self, most: int) -> list[int]:
        """Return what may follow, `most` tokens at most; nothing where the last tokens are new."""
        wanted = min(most, self.length)
        for size in MATCHED:
            place = self.places.get(tuple(self.tokens[-size:]))
            if place is not None and wanted > 0:
                return self._copied(place, wanted)
        return []

    def _copied(self, place: int, count: int) -> list[int]:
        """The tokens from `place` on, and, behind the last, again those that the copy began with."""
        tokens = self.tokens[place : place + count]
        return [tokens[index % len(tokens)] for index in range(count)]

    def judge(self, drafted: int, accepted: int) -> None:
        """Draft more where all was accepted, as much as was where not."""
        if drafted and accepted == drafted:
            self.length = min(LONGEST_DRAFT, 2 * self.length)
        elif drafted:
            self.length = max(1, accepted + 1)
