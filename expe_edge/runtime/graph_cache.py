"""Graphs as onnxruntime has optimised and packed them, kept from one opening of a package to the next.

What onnxruntime makes of a graph is written when the first session is opened of it: the optimised graph, and a file of
its weights, packed as the kernels of this processor read them, which later sessions map into memory. An entry is named
by all that it depends on, and holds the hashes of its files; what does not agree with them is never used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import onnxruntime as ort

from expe_edge.package.directory import MODEL_FILE, Package, file_hash
from expe_edge.package.manifest import release
from expe_edge.runtime.device import Device
from expe_edge.runtime.leftovers import is_abandoned
from expe_edge.runtime.processor import processor_features
from expe_edge.runtime.user_caches import kept_in, require_private

#: The directory for it, or `OFF`.
VARIABLE = "EXPE_EDGE_GRAPH_CACHE"
#: The most bytes of all entries. One takes up to three times the bytes of its graph, and no more than a half of all.
MOST_BYTES, COPIES = 2**32, 3
#: Weights whose packed form onnxruntime reads back since this release; older ones may crash on it.
UNSAFE_WEIGHTS, SAFE_SINCE = "int8-weight", "1.32"
#: Counted up when entries are made in another way.
LAYOUT = 1
GRAPH_FILE, WEIGHTS_FILE, RECORD_FILE = "graph.onnx", "weights.bin", "entry.json"
#: Names of entries.
ENTRY = re.compile(r"[0-9a-f]{64}")
#: What begins the name of an entry that is being written.
DRAFT = ".draft-"
#: How onnxruntime is asked to write an entry: tensors of at least so many bytes apart, and packed.
WRITING = {
    "session.optimized_model_external_initializers_file_name": WEIGHTS_FILE,
    "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    "session.save_external_prepacked_constant_initializers": "1",
}
PROVIDERS = Device().providers


@dataclass(frozen=True)
class GraphCache:
    """Entries in a directory, the least recently used of which make room for others.

    Nothing that goes wrong with an entry is an error: a read-only directory, a full disk, files that were changed. The
    package's own graph is opened then.
    """

    directory: Path
    most_bytes: int = MOST_BYTES

    def open(self, name: str, options: ort.SessionOptions) -> ort.InferenceSession | None:
        """Return a session of the entry of that name, once its hashes are verified; None without."""
        place = self.directory / name
        try:
            require_private(self.directory)
            record = json.loads((place / RECORD_FILE).read_text(encoding="utf-8"))
            weights = place / WEIGHTS_FILE
            whole = file_hash(place / GRAPH_FILE) == record[GRAPH_FILE] and weights.stat().st_size == record["bytes"]
            if whole:
                options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
                with ThreadPoolExecutor(1) as pool:
                    found = pool.submit(file_hash, weights)
                    session = ort.InferenceSession(str(place / GRAPH_FILE), options, providers=PROVIDERS)
                    if found.result() == record[WEIGHTS_FILE]:
                        with suppress(OSError):
                            os.utime(place)
                        return session
        except FileNotFoundError:
            return None
        except Exception:  # noqa: S110  # whatever it is, an entry that cannot be used is removed
            pass
        shutil.rmtree(place, ignore_errors=True)
        return None

    @contextmanager
    def draft(self, name: str, graph_bytes: int) -> Iterator[Draft | None]:
        """Yield a directory in which onnxruntime can write an entry; None where there is no room for one.

        Afterwards nothing is left of what was not kept. graph_bytes: of the package's own graph.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            require_private(self.directory)
            room = min(self.most_bytes // 2, shutil.disk_usage(self.directory).free // 2)
            place = Path(tempfile.mkdtemp(prefix=DRAFT, dir=self.directory)) if COPIES * graph_bytes <= room else None
        except OSError:
            place = None
        try:
            yield None if place is None else Draft(self, name, place)
        finally:
            if place is not None:
                shutil.rmtree(place, ignore_errors=True)

    def make_room(self) -> None:
        """Remove the least recently used entries until the rest fits, and what killed processes have left.

        All else in the directory, which may be a user's own, stays.
        """
        entries = []
        for place in filter(_is_own, self.directory.iterdir()):
            if not place.name.startswith(DRAFT):
                entries.append((place.stat().st_mtime, place, sum(file.stat().st_size for file in place.iterdir())))
            elif is_abandoned(place):
                shutil.rmtree(place, ignore_errors=True)
        kept = 0
        for _, place, size in sorted(entries, reverse=True):
            kept += size
            if kept > self.most_bytes:
                shutil.rmtree(place, ignore_errors=True)


def _is_own(place: Path) -> bool:
    """Tell whether a place is an entry or a draft: by its name, and by the names of all that is in it."""
    if place.is_symlink() or not place.is_dir():
        return False
    is_draft = place.name.startswith(DRAFT)
    if not (is_draft or ENTRY.fullmatch(place.name)):
        return False
    names = {inside.name for inside in place.iterdir()} - {GRAPH_FILE, WEIGHTS_FILE, RECORD_FILE}
    return all(is_draft and ENTRY.fullmatch(name) for name in names)  # an entry that was moved aside


@dataclass(frozen=True)
class Draft:
    """An entry that onnxruntime writes while it opens a session."""

    cache: GraphCache
    name: str
    directory: Path

    def write_with(self, options: ort.SessionOptions) -> None:
        """Let a session with these options write the entry."""
        options.optimized_model_filepath = str(self.directory / GRAPH_FILE)
        for key, value in WRITING.items():
            options.add_session_config_entry(key, value)

    def keep(self) -> None:
        """Put what was written in the place of what was there, if that can be."""
        place = self.cache.directory / self.name
        with suppress(OSError):
            self._seal()
            with tempfile.TemporaryDirectory(prefix=DRAFT, dir=self.cache.directory) as aside:
                if place.exists():
                    place.rename(Path(aside, self.name))
                self.directory.rename(place)
            self.cache.make_room()

    def _seal(self) -> None:
        graph, weights = self.directory / GRAPH_FILE, self.directory / WEIGHTS_FILE
        weights.touch()  # a graph whose tensors are all small has none
        record = {GRAPH_FILE: file_hash(graph), WEIGHTS_FILE: file_hash(weights), "bytes": weights.stat().st_size}
        (self.directory / RECORD_FILE).write_text(json.dumps(record), encoding="utf-8")


def cache_at(where: str | Path | None = None) -> GraphCache | None:
    """Return the cache in the directory `where`; None where it is `OFF`.

    where: None for what the environment's `EXPE_EDGE_GRAPH_CACHE` says, or else a directory among the user's caches.
    """
    directory = kept_in(where, VARIABLE, "graphs")
    return None if directory is None else GraphCache(directory)


def may_be_kept(package: Package) -> bool:
    """Tell whether this onnxruntime can be trusted with an entry of a package's graph."""
    return release(ort.__version__) >= release(SAFE_SINCE) or UNSAFE_WEIGHTS not in package.manifest.linears.values()


def entry_name(package: Package, kernels: Path | None = None) -> str:
    """Return a name for all that an entry depends on: the graph, onnxruntime, the processor, how it is written.

    kernels: the library that takes the place of some of onnxruntime's.
    """
    parts = {
        "graph": package.manifest.files[MODEL_FILE],
        "onnxruntime": ort.__version__,
        "providers": PROVIDERS,
        "options": WRITING,
        "layout": LAYOUT,
        "processor": processor_features(),
        "kernels": kernels.name if kernels is not None else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
