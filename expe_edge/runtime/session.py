"""A package opened in onnxruntime, and its two ways of running: prefill in chunks, decode one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.errors import GenerationError, PackageError, reason_of
from expe_edge.package.contract import FLOATS_FROM, LOGITS_TO_KEEP, NEVER, GraphContract
from expe_edge.package.directory import Package, open_manifest
from expe_edge.runtime.cache import Cache
from expe_edge.runtime.device import Device
from expe_edge.runtime.graph_cache import GraphCache
from expe_edge.runtime.kernels import kernels_at
from expe_edge.runtime.mask import Mask, RoundedMask
from expe_edge.runtime.memory import LEAST_CHUNK, bounded_chunk, far_heads, memory_shortage, near_tokens
from expe_edge.runtime.opening import open_session
from expe_edge.runtime.window import Window, window_refusal

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]


class PackageSession:
    """An onnxruntime session over a verified package.

    Attributes:
        package: the package. contract: its graph's inputs and outputs.
        keeps_last: whether the graph can leave away all logits but the last token's.
        reads_levels: whether runs of many tokens read an int8 cache as it is, which kernels built here do faster than
            floats.
        kernels: the library of kernels that it runs in place of onnxruntime's own, or None.
        device: in whose memory caches are; None for the process's own.
    """

    def __init__(
        self,
        package: Package,
        session: ort.InferenceSession,
        kernels: Path | None = None,
        device: Device | None = None,
    ) -> None:
        self.package, self.session, self.kernels, self.device = package, session, kernels, device
        self.contract: GraphContract = package.manifest.contract
        difference = self.contract.difference(self.session.get_inputs(), self.session.get_outputs())
        if difference is not None:
            raise PackageError(f"{package.model_path} is not the graph that its manifest describes: {difference}")
        optional = [node.name for node in self.session.get_overridable_initializers()]
        self.keeps_last = LOGITS_TO_KEEP.name in optional
        self.reads_levels = kernels is not None and FLOATS_FROM.name in optional

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        threads: int | None = None,
        device: str = "cpu",
        cache: GraphCache | None = None,
        kernels: str | Path | None = None,
    ) -> PackageSession:
        """Verify and open the package at `path`.

        Args:
            threads: threads within an operator; None for `default_threads`.
            device: `cpu`, or `cuda` for a package exported for it; `cuda:1` is the second GPU.
            cache: of optimised graphs, from which it is opened sooner and with weights in mapped files; see
                `Generator.load`.
            kernels: the directory of what `expe-edge build-kernels` has compiled, or `off`; None for what
                `EXPE_EDGE_KERNELS` says, or else one among the user's caches. Where it has none for this processor and
                package, onnxruntime's own run.

        Raises:
            PackageError: a missing, damaged or newer package. GenerationError: a device that is not there, or that the
                package is not for.
        """
        package = open_manifest(Path(path))
        where = Device.parse(device)
        opened = open_session(package, threads, where, cache, kernels_at(kernels))
        return cls(package, *opened, None if where.kind == "cpu" else where)

    @property
    def threads(self) -> int:
        """Threads within an operator."""
        return int(self.session.get_session_options().intra_op_num_threads)

    @property
    def reach(self) -> int:
        """Positions that the encoding represents exactly; no row may be longer."""
        return int(self.package.manifest.model["max_position_embeddings"])

    def new_cache(self, batch: int, capacity: int, window: Window | None = None) -> Cache:
        """Return an empty cache for `batch` rows of up to `capacity` tokens, whose memory is taken as it fills.

        window: what rows keep of longer texts, which sets the capacity.

        Raises:
            GenerationError: more tokens than the encoding has positions, or than memory has room for, or a window for
                keys that carry positions.
        """
        if window is not None:
            refusal = window_refusal(self.package.manifest)
            if refusal is not None:
                raise GenerationError(refusal)
            self._require_wide(window)
            capacity = window.capacity
        self.require_within_reach(capacity)
        return Cache(self.contract, batch, capacity, window, self.device)

    def _require_wide(self, window: Window) -> None:
        """Raise `GenerationError` for a window that drops what heads with windows of their own still keep."""
        kept = near_tokens(self.contract)
        if window.size - window.block < kept:
            raise GenerationError(
                f"`window` is {window.size}, but heads of this package keep {kept} tokens by themselves; give at least "
                f"{4 * kept // 3 + 4}"
            )

    def prefill(self, cache: Cache, tokens: Ids, chunk: int | None = None, *, last: bool = False) -> Iterator[Logits]:
        """Append `tokens` (T,) to a cache of one row; yield logits (t, V) for each chunk of t tokens.

        last: yield those of each chunk's last token alone, (1, V), which spares the rest where the graph can.
        chunk: the most tokens of one; None for `PREFILL_CHUNK`, or fewer where the cache is so full that the position
            bias would be large. Chunks end where a window drops tokens, so that what a token sees depends on no chunk.
        """
        if cache.batch != 1:
            raise ValueError("prefill fills one row at a time; take cache.row(i)")
        begin = 0
        while begin < len(tokens):
            most = chunk or self.chunk_at(int(cache.lengths[0]))
            part = tokens[begin : begin + min(most, max(1, cache.room))]
            yield Step(self, cache, len(part), last=last).run(part[None])[0]
            begin += len(part)

    def chunk_at(self, depth: int) -> int:
        """Return how many tokens to read at once behind `depth` others, so that the position bias stays bounded."""
        return bounded_chunk(far_heads(self.package.manifest), depth, self.device is not None)

    def memory_shortage(self, tokens: int, *, rows: int = 1, chunk: int | None = None, held: int = 0) -> str | None:
        """Say what a cache of `rows` × `tokens` and the steps that fill it lack; None where it has room.

        held: bytes of it there are.
        """
        own = self.kernels is not None
        return memory_shortage(self.package, tokens, rows=rows, chunk=chunk, own_kernels=own, held=held)

    def require_memory(self, tokens: int, *, rows: int = 1, chunk: int | None = None, held: int = 0) -> None:
        """Refuse what cannot fit: a cache of `rows` × `tokens` and the steps that fill it. held: bytes of it there are.

        Raises:
            GenerationError: it needs more than the machine, or a control group, has left. The message says what fits.
                Of a device it is known when its memory is taken.
        """
        if self.device is not None:
            return
        shortage = self.memory_shortage(tokens, rows=rows, chunk=chunk, held=held)
        if shortage is None:
            return
        mended = ["ask for fewer or shorten the prompt"]
        if rows > 1:
            mended.append("lower `batch_size`")
        if window_refusal(self.package.manifest) is None:
            mended.append("give a `window`")
        if self.contract.cache_dtype == "float32" and not self.contract.growing_cache:
            mended.append("export a package with `cache` int8, a quarter of the size")
        if chunk is not None and chunk > LEAST_CHUNK:
            mended.append("read it in shorter chunks")
        raise GenerationError(f"{shortage}: {', or '.join(mended)}")

    def forward(self, rows: Sequence[Ids]) -> list[Logits]:
        """Return the logits (T, V) of each of `rows` (T,), all computed in one run that keeps no cache.

        Rows are padded on the right to the longest, and memory holds the logits of all: it is for short ones. With
        int8-dynamic they share the activations' range, so that logits depend on the other rows.

        Raises:
            GenerationError: a row longer than the encoding has positions.
            PackageError: onnxruntime cannot run the graph.
        """
        longest, contract = max(map(len, rows)), self.contract
        self.require_within_reach(longest)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        mask = np.ones_like(ids)  # no token sees what stands to its right
        positions = np.arange(longest, dtype=np.int64)[None].repeat(len(rows), axis=0)
        feeds: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds |= {name: np.zeros(len(rows), dtype=np.int64) for name in contract.window_lengths if name}
        if self.reads_levels:
            feeds[FLOATS_FROM.name] = np.array(NEVER)
        # Keys of a cache that has room for them are read as floats.
        room = longest if contract.whole_buffer or contract.cache_dtype == "int8" else 0
        for name, group in zip(contract.past_names, contract.cache_groups, strict=True):
            feeds[name] = np.zeros((len(rows), group.heads, room, contract.head_size), dtype=contract.cache_dtype)
        try:
            (logits,) = self.session.run(["logits"], feeds)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise _run_failed(self.package.model_path, error) from error
        return [logits[index, : len(row)] for index, row in enumerate(rows)]

    def require_within_reach(self, tokens: int) -> None:
        if tokens > self.reach:
            raise GenerationError(f"{tokens} tokens exceed the {self.reach} positions of this model's encoding")


class Step:
    """One forward pass of fixed shape (B, T) over a cache, bound once and run as often as wanted.

    last: compute the logits of the last token alone, where the graph can.
    Only an attention mask that has become longer is bound anew, and a cache that has moved; for a device, which copies
    inputs when they are bound, all but the cache.
    """

    def __init__(self, session: PackageSession, cache: Cache, tokens: int, *, last: bool = False) -> None:
        self.session, self.cache, self.tokens = session.session, cache, tokens
        self.copied = session.device is not None
        self.path = session.package.model_path
        self.input_ids = np.zeros((cache.batch, tokens), dtype=np.int64)
        # One token stands at its row's length, whose memory is bound; of several, positions are written every time.
        self.position_ids = cache.lengths[:, None] if tokens == 1 else np.zeros((cache.batch, tokens), dtype=np.int64)
        self.offsets = np.arange(tokens, dtype=np.int64)
        self.binding = self.session.io_binding()
        last = last and session.keeps_last
        # They hold the memory that a binding points to.
        self.one, self.never = (ort.OrtValue.ortvalue_from_numpy(np.array(value)) for value in (1, NEVER))
        if session.reads_levels:
            self.binding.bind_ortvalue_input(FLOATS_FROM.name, self.never)
        if last:
            self.binding.bind_ortvalue_input(LOGITS_TO_KEEP.name, self.one)
        self.logits = np.zeros((cache.batch, 1 if last else tokens, session.contract.vocab_size), dtype=np.float32)
        self._bind_tokens()
        self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))
        self.bound = -1  # the cache's version
        self.mask = (Mask if self.copied or session.contract.growing_cache else RoundedMask)(cache, tokens)

    def run(self, tokens: Ids) -> Logits:
        """Append `tokens` (B, T) to every row; return logits (B, T or 1, V), valid until the next run.

        Raises:
            PackageError: onnxruntime cannot run the graph. GenerationError: the cache is full.
        """
        cache = self.cache
        longest = cache.prepare(self.tokens)
        self.input_ids[:] = tokens
        if self.tokens > 1:
            np.add(cache.lengths[:, None], self.offsets, out=self.position_ids)
        self.mask.bind(self.binding, longest)
        if self.bound != cache.version:
            cache.bind(self.binding, self.tokens)
            self.bound = cache.version
        if self.copied:
            self._bind_tokens()
            cache.bind_lengths(self.binding)
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise _run_failed(self.path, error) from error
        cache.advance(self.input_ids)
        return self.logits

    def _bind_tokens(self) -> None:
        for name, array in (("input_ids", self.input_ids), ("position_ids", self.position_ids)):
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))


def _run_failed(path: Path, error: Exception) -> PackageError:
    return PackageError(f"{path}: onnxruntime cannot run it ({reason_of(error)})")
