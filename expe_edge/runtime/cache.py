"""The key/value cache: rows that each hold what they have read, as keys and values and as tokens."""

from __future__ import annotations

from collections.abc import Sequence

import onnxruntime as ort

from expe_edge.errors import GenerationError
from expe_edge.package.contract import GraphContract
from expe_edge.runtime.device import Device
from expe_edge.runtime.growing import GrowingStorage
from expe_edge.runtime.history import History
from expe_edge.runtime.shared import SharedStorage
from expe_edge.runtime.storage import Array, Ids, Storage
from expe_edge.runtime.window import Window


class Cache:
    """Keys and values of `batch` rows with room for up to `capacity` tokens each, in memory that is taken in blocks.

    window: lets rows drop what is oldest where there is no more room. Where keys carry no positions, those that stay
        are counted anew, so that a row with a window is a shorter text.
    device: in whose memory it is; None for the process's own.

    Attributes:
        lengths: tokens held by each row, (batch,) int64. histories: which they are, one for each row.

    Raises:
        GenerationError: memory has no room for it.
    """

    def __init__(
        self,
        contract: GraphContract,
        batch: int,
        capacity: int,
        window: Window | None = None,
        device: Device | None = None,
    ) -> None:
        self.contract, self.capacity, self.window = contract, capacity, window
        self.storage = make_storage(contract, batch, capacity, device)
        self.lengths: Ids = self.storage.lengths
        self.histories = [History() for _ in range(batch)]
        self.begin, self.batch = 0, batch

    def rows(self, begin: int, end: int) -> Cache:
        """Return rows [begin, end) as a cache over the same memory: what is put there is put here."""
        view = object.__new__(Cache)
        view.contract, view.capacity, view.window = self.contract, self.capacity, self.window
        view.storage = self.storage
        view.lengths, view.histories = self.lengths[begin:end], self.histories[begin:end]
        view.begin, view.batch = self.begin + begin, end - begin
        return view

    def row(self, index: int) -> Cache:
        """Return row `index` as a cache of one row over the same memory."""
        return self.rows(index, index + 1)

    @property
    def end(self) -> int:
        """The row of the memory behind the last."""
        return self.begin + self.batch

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, those of rows beside these included."""
        return self.storage.nbytes

    @property
    def version(self) -> int:
        """Differs whenever what was bound is no longer where it was."""
        return self.storage.version

    # What a run needs

    def prepare(self, tokens: int) -> int:
        """Make room for a run that appends `tokens` to every row; return how many the longest row has then.

        Raises:
            GenerationError: they do not fit.
        """
        longest: int = max(self.lengths.tolist()) + tokens
        if longest > self.capacity:
            longest = self._drop(tokens)
        self.storage.prepare(self.begin, self.end, tokens, longest)
        return longest

    @property
    def columns(self) -> int:
        """Tokens for which every row has memory."""
        return self.storage.columns

    def mask(self, tokens: int, columns: int) -> Ids:
        """Return the attention mask of that run, (batch, total_sequence), `columns` long where nothing is between."""
        return self.storage.mask(self.begin, self.end, tokens, columns)

    def bind(self, binding: ort.IOBinding, tokens: int) -> None:
        """Bind past and present for that run."""
        self.storage.bind(binding, self.begin, self.end, tokens)

    def bind_lengths(self, binding: ort.IOBinding) -> None:
        """Bind anew what the graph is told of the rows besides, for sessions that take copies."""
        self.storage.bind_lengths(binding, self.begin, self.end)

    def advance(self, tokens: Ids) -> None:
        """Note that the run has appended `tokens` (batch, T)."""
        self.storage.advance(self.begin, self.end, tokens.shape[1])
        for history, ids in zip(self.histories, tokens.tolist(), strict=True):
            history.append(ids)

    def reserve(self, columns: int) -> None:
        """Take the memory for `columns` tokens in every row at once, or for as many as there may be."""
        self.storage.reserve(min(columns, self.capacity))

    @property
    def room(self) -> int:
        """Tokens that the next run may append; where a window is full, as many as it will drop."""
        room = self.capacity - max(self.lengths.tolist())
        return self.window.block if self.window is not None and room == 0 else room

    def _drop(self, tokens: int) -> int:
        """Let rows that are full drop the oldest block of their window; return the longest row after the run."""
        if self.window is not None and tokens <= self.window.block:
            begin, end = self.window.sinks, self.window.sinks + self.window.block
            for index, length in enumerate(self.lengths.tolist()):
                if length + tokens > self.capacity:
                    self.storage.remove(self.begin + index, begin, end)
                    self.histories[index].drop(begin, end)
        longest: int = max(self.lengths.tolist()) + tokens
        if longest > self.capacity:
            raise GenerationError(f"the cache holds {self.capacity} tokens; {longest} are needed")
        return longest

    # What is done to one row

    @property
    def dropped(self) -> int:
        """Tokens that the one row has read and no longer holds."""
        return self.histories[0].dropped

    @property
    def read(self) -> int:
        """Tokens that the one row has read, those that a window has dropped included."""
        return int(self.lengths[0]) + self.dropped

    def earliest(self) -> int:
        """The least length that `truncate` takes: what a window has dropped cannot come back.

        The token read right after that stays, for whoever runs it again.
        """
        kept = self.storage.earliest(self.begin) + self.dropped
        if not self.dropped or self.window is None:
            return kept
        return max(kept, self.capacity - self.window.block + self.dropped + 1)

    def truncate(self, read: int) -> None:
        """Let the one row have read no more than its first `read` tokens.

        Raises:
            GenerationError: there are not as many, or a window has dropped what the last of them saw.
        """
        earliest = self.earliest()
        if not earliest <= read <= self.read:
            raise GenerationError(f"{read} tokens are not between {earliest} and {self.read}, those that can be kept")
        self._keep(read - self.dropped)

    def _keep(self, held: int) -> None:
        self.storage.remove(self.begin, held, int(self.lengths[0]))
        self.histories[0].truncate(held)

    def clear(self) -> None:
        """Let the one row hold nothing."""
        self.storage.remove(self.begin, 0, int(self.lengths[0]))
        self.histories[0].clear()

    def shared(self, ids: Ids) -> int:
        """Return how many tokens at the beginning of `ids` (T,) the one row has read and can go on from."""
        shared = self.histories[0].shared(ids, self.window)
        return shared if shared >= self.earliest() else 0

    def reuse(self, ids: Ids) -> Ids:
        """Take back what the one row has read but for the beginning of `ids` (T,); return the rest of these to read.

        They are one at least, for the logits that follow it.
        """
        kept = self.shared(ids[:-1])
        if kept == 0:
            self.clear()
        else:
            self.truncate(kept)
        return ids[kept:]

    def begin_with(self, prefix: Cache | None, ids: Ids) -> None:
        """Take from another cache of one row what it has read of the beginning of `ids` (T,) but the last, if any."""
        shared = 0 if prefix is None else prefix.shared(ids[:-1])
        if prefix is not None and shared:
            self.take(prefix, shared)

    def last(self) -> Ids:
        """Take back the last token that the one row has read; return it, (1,)."""
        last = self.histories[0].ids[-1:].copy()
        self._keep(int(self.lengths[0]) - 1)
        return last

    def tensors(self) -> list[Array]:
        """Return what the one row holds, (Hkv, length, D) each in the contract's order, valid until the next change."""
        return self.storage.read(self.begin)

    def restore(self, tensors: Sequence[Array], history: History) -> None:
        """Let the one row hold `tensors`, as `tensors` returns them, which are those of `history`."""
        self.clear()
        self.reserve(len(history.ids))
        self.storage.write(self.begin, tensors, len(history.ids))
        self.histories[0].assign(history)

    def take(self, other: Cache, read: int | None = None) -> None:
        """Become a copy of another cache of one row, or of the first `read` tokens that it has read.

        Heads with windows of their own may have forgotten what the last of these saw: nothing is taken then.
        """
        surplus = 0 if read is None else other.read - read
        if surplus and self.contract.windows:
            self.clear()
            return
        history = History()
        history.assign(other.histories[0])
        history.truncate(len(history.ids) - surplus)
        self.restore([tensor[:, : tensor.shape[1] - surplus] for tensor in other.tensors()], history)


def make_storage(contract: GraphContract, batch: int, capacity: int, device: Device | None = None) -> Storage:
    """Return memory of the kind that the graph wants, holding nothing. device: whose; None for the process's own.

    Raises:
        GenerationError: memory has no room for it.
    """
    if contract.growing_cache:
        return GrowingStorage(contract, batch, capacity)
    return SharedStorage(contract, batch, capacity, device)
