"""A package opened in onnxruntime, and its two ways of running: prefill in chunks, decode one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from expe_edge.errors import GenerationError, PackageError, reason_of
from expe_edge.package.contract import GraphContract
from expe_edge.package.directory import Package, read_package
from expe_edge.package.manifest import release
from expe_edge.runtime.cache import Cache, make_cache

Ids = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

#: Tokens per prefill step: enough to fill the matrix kernels, few enough that the (T, S) scores stay small.
PREFILL_CHUNK = 256

#: Threads beyond any machine's, each of which would take memory.
MOST_THREADS = 1024

#: `--device` to the execution provider it stands for.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class PackageSession:
    """An onnxruntime session over a verified package.

    Attributes:
        package: the package. contract: its graph's inputs and outputs.
    """

    def __init__(self, package: Package, *, threads: int | None = None, device: str = "cpu") -> None:
        self.package = package
        self.contract: GraphContract = package.manifest.contract
        self.session = _open_session(package, threads, device)
        difference = self.contract.difference(self.session.get_inputs(), self.session.get_outputs())
        if difference is not None:
            raise PackageError(f"{package.model_path} is not the graph that its manifest describes: {difference}")

    @classmethod
    def load(cls, path: str | Path, *, threads: int | None = None, device: str = "cpu") -> PackageSession:
        """Verify and open the package at `path`.

        Args:
            threads: threads within an operator; None lets onnxruntime choose, one for each physical core.
            device: `cpu` or `cuda`.

        Raises:
            PackageError: a missing, damaged or newer package. GenerationError: a device that is not there.
        """
        return cls(read_package(Path(path)), threads=threads, device=device)

    @property
    def reach(self) -> int:
        """Positions that the encoding represents exactly; no row may be longer."""
        return int(self.package.manifest.model["max_position_embeddings"])

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """Allocate a cache for `batch` rows of `capacity` tokens.

        Raises:
            GenerationError: more tokens than the encoding has positions, or than memory has room for.
        """
        self._require_within_reach(capacity)
        return make_cache(self.contract, batch, capacity)

    def prefill(self, cache: Cache, tokens: Ids, chunk: int = PREFILL_CHUNK) -> Iterator[Logits]:
        """Append `tokens` (T,) to a cache of one row; yield logits (t, V) for each chunk of t <= `chunk` tokens."""
        if cache.batch != 1:
            raise ValueError("prefill fills one row at a time; take cache.row(i)")
        for begin in range(0, len(tokens), chunk):
            part = tokens[begin : begin + chunk]
            yield Step(self, cache, len(part)).run(part[None])[0]

    def forward(self, rows: Sequence[Ids]) -> list[Logits]:
        """Return the logits (T, V) of each of `rows` (T,), all computed in one run that keeps no cache.

        Rows are padded on the right to the longest, and memory holds the logits of all: it is for short ones. With
        int8-dynamic they share the activations' range, so that logits depend on the other rows.

        Raises:
            GenerationError: a row longer than the encoding has positions.
            PackageError: onnxruntime cannot run the graph.
        """
        longest, contract = max(map(len, rows)), self.contract
        self._require_within_reach(longest)
        ids = np.zeros((len(rows), longest), dtype=np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        mask = np.ones_like(ids)  # no token sees what stands to its right
        positions = np.arange(longest, dtype=np.int64)[None].repeat(len(rows), axis=0)
        past = np.zeros((len(rows), contract.key_value_heads, 0, contract.head_size), dtype=contract.cache_dtype)
        feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds |= dict.fromkeys(contract.past_names, past)
        try:
            (logits,) = self.session.run(["logits"], feeds)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise _run_failed(self.package.model_path, error) from error
        return [logits[index, : len(row)] for index, row in enumerate(rows)]

    def _require_within_reach(self, tokens: int) -> None:
        if tokens > self.reach:
            raise GenerationError(f"{tokens} tokens exceed the {self.reach} positions of this model's encoding")


class Step:
    """One forward pass of fixed shape (B, T) over a cache, bound once and run as often as wanted.

    Only the attention mask, which grows by T with every run, is bound anew, and a cache that grows.
    """

    def __init__(self, session: PackageSession, cache: Cache, tokens: int) -> None:
        self.session, self.cache, self.tokens = session.session, cache, tokens
        self.path = session.package.model_path
        self.input_ids = np.zeros((cache.batch, tokens), dtype=np.int64)
        self.position_ids = np.zeros((cache.batch, tokens), dtype=np.int64)
        self.logits = np.zeros((cache.batch, tokens, session.contract.vocab_size), dtype=np.float32)
        self.offsets = np.arange(tokens, dtype=np.int64)
        self.binding = self.session.io_binding()
        for name, array in (("input_ids", self.input_ids), ("position_ids", self.position_ids)):
            self.binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        self.binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self.logits))

    def run(self, tokens: Ids) -> Logits:
        """Append `tokens` (B, T) to every row; return logits (B, T, V), valid until the next run.

        Raises:
            PackageError: onnxruntime cannot run the graph. GenerationError: the cache is full.
        """
        cache = self.cache
        mask = ort.OrtValue.ortvalue_from_numpy(cache.mask(self.tokens))
        self.input_ids[:] = tokens
        np.add(cache.lengths[:, None], self.offsets, out=self.position_ids)
        self.binding.bind_ortvalue_input("attention_mask", mask)
        cache.bind(self.binding, self.tokens)
        try:
            self.session.run_with_iobinding(self.binding)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise _run_failed(self.path, error) from error
        cache.advance(self.tokens)
        return self.logits


def _open_session(package: Package, threads: int | None, device: str) -> ort.InferenceSession:
    if device not in PROVIDERS:
        raise GenerationError(f"unknown device {device!r}; available: {', '.join(PROVIDERS)}; change `device`")
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise GenerationError(
            f"`device` {device}: this onnxruntime has no {provider}; install onnxruntime-gpu on a machine with a GPU, "
            "or use `device` cpu"
        )
    needed = package.manifest.requires_onnxruntime
    if release(ort.__version__) < release(needed):
        raise PackageError(f"{package.path} needs onnxruntime {needed} or newer, this is {ort.__version__}; upgrade it")
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors alone
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            limit = "at least 1" if threads < 1 else f"at most {MOST_THREADS}"
            raise GenerationError(f"`threads` is {threads}; {limit}")
        options.intra_op_num_threads = threads
    providers = [provider] if device == "cpu" else [provider, PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(str(package.model_path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        reason = reason_of(error)
        raise PackageError(f"{package.model_path}: onnxruntime {ort.__version__} cannot open it ({reason})") from error
    if session.get_providers()[0] != provider:
        raise GenerationError(f"`device` {device}: {provider} found no device; use `device` cpu")
    return session


def _run_failed(path: Path, error: Exception) -> PackageError:
    return PackageError(f"{path}: onnxruntime cannot run it ({reason_of(error)})")
