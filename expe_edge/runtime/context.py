"""A context: text that a package has read, kept so that it is read once, and what can be done to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from expe_edge.errors import GenerationError
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.cache_file import read_cache_file, write_cache_file
from expe_edge.runtime.history import Ids
from expe_edge.runtime.prompts import Prompt, encode_prompt
from expe_edge.runtime.session import PackageSession
from expe_edge.runtime.window import Window

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Context:
    """Text that a package has read, as keys and values. `Generator.context` makes one, and streams go on from it.

    What it holds may be read on, taken back, copied and saved. One thread or stream at a time may use it.

    Args:
        window: what is kept of text of any length; None for all of it.
        prefill_chunk: the most tokens of one step; None to let the session choose.

    Raises:
        GenerationError: of `PackageSession.new_cache`; and of every use, that another thread or stream has it.
    """

    def __init__(
        self,
        session: PackageSession,
        tokenizer: Tokenizer,
        *,
        window: Window | None = None,
        prefill_chunk: int | None = None,
    ) -> None:
        self.session, self.tokenizer, self.prefill_chunk = session, tokenizer, prefill_chunk
        self.cache: Cache = session.new_cache(1, session.reach, window)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Tokens read, those that a window has dropped included."""
        return self.cache.read

    @property
    def tokens(self) -> Ids:
        """The tokens held, (T,) int64: all that were read, less those that a window has dropped."""
        return self.cache.histories[0].ids.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of its keys and values."""
        return self.cache.nbytes

    def append(self, prompt: Prompt) -> None:
        """Read text, or ids, behind what was read. The end-of-text token opens text where nothing was read before.

        Raises:
            GenerationError: of `encode_prompt`, or more tokens than the encoding has positions.
        """
        with self.used():
            ids = encode_prompt(self.tokenizer, prompt, opened=len(self) == 0)
            if self.cache.window is None:
                self.session.require_within_reach(len(self) + len(ids))
            needed = min(int(self.cache.lengths[0]) + len(ids), self.cache.capacity)
            self.session.require_memory(needed, chunk=self.prefill_chunk, held=self.nbytes)
            self.cache.reserve(needed)
            for _ in self.session.prefill(self.cache, ids, self.prefill_chunk, last=True):
                pass

    def rewind(self, length: int) -> None:
        """Take back all but the first `length` tokens that were read.

        Raises:
            GenerationError: there are not as many, or a window has dropped tokens that the last of them saw.
        """
        with self.used():
            self.cache.truncate(length)

    def fork(self) -> Context:
        """Return a copy, which goes its own way."""
        with self.used():
            copy = Context(self.session, self.tokenizer, window=self.cache.window, prefill_chunk=self.prefill_chunk)
            copy.cache.take(self.cache)
        return copy

    def save(self, path: str | Path) -> None:
        """Write what is held to a file, which replaces the one there only when it is complete.

        Raises:
            GenerationError: the file cannot be written.
        """
        with self.used():
            write_cache_file(Path(path), self.session.package.manifest, self.cache)

    def load(self, path: str | Path) -> None:
        """Read what `save` wrote, in place of all that is held.

        Raises:
            GenerationError: no such file, a damaged one, or one of another package or window.
        """
        with self.used():
            read_cache_file(Path(path), self.session.package.manifest, self.cache)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Keep others from using it meanwhile.

        Raises:
            GenerationError: another thread or stream does.
        """
        if not self._lock.acquire(blocking=False):
            raise GenerationError(
                "the context is in use by a stream or another thread; close the stream, or fork it first"
            )
        try:
            yield
        finally:
            self._lock.release()
