"""Drafts without a second model: what followed the last tokens where they stood before."""

from __future__ import annotations

from expe_edge.runtime.history import Ids

#: Tokens that must have stood before, the most first. Shorter matches lose more than they save: a run of two tokens may
#: take twice the time of one (docs/log.md, 2026-11-30).
MATCHED = (8, 6)
#: The least tokens drafted where as many are wanted, and the most.
SHORTEST_DRAFT, LONGEST_DRAFT = 8, 31
#: A draft of which fewer tokens are accepted costs more than it saves.
WORTH = 3
#: For how many tokens none is made then: at first, and at most after several of them.
SHORTEST_PAUSE, LONGEST_PAUSE = 2, 32


class PromptLookup:
    """Prompt lookup decoding (Saxena, 2023): text repeats itself, so its past is a draft of what follows.

    How much is drafted depends on how much was accepted, and on no clock: the same text is drafted in the same way.

    ids: of the prompt, (T,) int64.
    """

    def __init__(self, ids: Ids) -> None:
        self.tokens: list[int] = []
        self.length, self.pause, self.waiting = SHORTEST_DRAFT, SHORTEST_PAUSE, 0
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
        """Return what may follow, `most` tokens at most; nothing where the last tokens are new, or drafts were bad."""
        if self.waiting:
            self.waiting -= 1
            return []
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
        """Draft more where all was accepted, less where little was, and nothing for a while where it did not pay."""
        if drafted == 0:
            return
        if accepted == drafted:
            self.length = min(LONGEST_DRAFT, 2 * self.length)
        elif accepted < self.length // 2:
            self.length = max(SHORTEST_DRAFT, self.length // 2)
        if accepted < WORTH:
            self.waiting, self.pause = self.pause, min(LONGEST_PAUSE, 2 * self.pause)
        else:
            self.pause = SHORTEST_PAUSE
