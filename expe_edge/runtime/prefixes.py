"""Beginnings of prompts that were read before, in pieces that many prompts may share."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np

from expe_edge.runtime.cache import Cache
from expe_edge.runtime.history import History, Ids
from expe_edge.runtime.storage import Array


class Prefixes:
    """Keys and values of prompts' beginnings, in pieces of `piece` tokens; the least recently used are dropped.

    A piece is known by its tokens and all before them. What a prompt takes from here was read in the same pieces as the
    prompt would be read in by itself, so its keys and values have the very same bits, whatever the format.

    Args:
        piece: tokens of one; prompts must be read in chunks of as many. most_tokens: kept at once, at most.

    Attributes:
        tokens: kept now. nbytes: bytes of their keys and values.
    """

    def __init__(self, piece: int, most_tokens: int) -> None:
        self.piece, self.most = piece, most_tokens // piece
        self.pieces: OrderedDict[bytes, list[Array]] = OrderedDict()

    @property
    def tokens(self) -> int:
        return len(self.pieces) * self.piece

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.pieces.values() for array in arrays)

    def fill(self, place: Cache, ids: Ids) -> None:
        """Let an empty cache of one row hold what is known of the beginning of `ids` (T,), but for the last token."""
        known = []
        for key in self._keys(ids[:-1]):
            if key not in self.pieces:
                break
            known.append(key)
        if not known:
            return
        self._touch(known)
        parts = zip(*(self.pieces[key] for key in known), strict=True)
        history = History(ids[: len(known) * self.piece])
        place.restore([np.concatenate(part, axis=1) for part in parts], history)

    def keep(self, place: Cache, ids: Ids) -> None:
        """Keep the whole pieces of `ids` (T,), which a cache of one row has read from its beginning."""
        keys = list(self._keys(ids))[: self.most]
        tensors = place.tensors()
        for index, key in enumerate(keys):
            if key not in self.pieces:
                begin = index * self.piece
                self.pieces[key] = [tensor[:, begin : begin + self.piece].copy() for tensor in tensors]
        self._touch(keys)
        while len(self.pieces) > self.most:
            self.pieces.popitem(last=False)

    def _touch(self, keys: list[bytes]) -> None:
        """Note that pieces are used; those that others stand behind are dropped last."""
        for key in reversed(keys):
            self.pieces.move_to_end(key)

    def _keys(self, ids: Ids) -> Iterator[bytes]:
        """Yield the keys of the whole pieces of `ids`."""
        key = b""
        for begin in range(0, len(ids) - self.piece + 1, self.piece):
            key = hashlib.sha256(key + ids[begin : begin + self.piece].astype("<i8").tobytes()).digest()
            yield key
