"""How a package is opened in onnxruntime: on which device, with how many threads."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import onnxruntime as ort

from expe_edge.errors import GenerationError, PackageError, reason_of
from expe_edge.package.directory import MODEL_FILE, Package, verify_files
from expe_edge.package.manifest import release
from expe_edge.quiet import ERRORS, quiet_onnxruntime
from expe_edge.runtime.device import Device
from expe_edge.runtime.graph_cache import GraphCache, entry_name, may_be_kept
from expe_edge.runtime.kernels import Kernels
from expe_edge.runtime.memory import plans_runs
from expe_edge.runtime.threads import default_threads

#: Threads beyond any machine's, each of which would take memory.
MOST_THREADS = 1024

#: The first onnxruntime that refuses graphs whose weights are outside their directory; before, hashes come first.
SINCE_OWN_FILES = "1.24"

#: Operators that a step spends its time in, all of which a device must have kernels for.
HEAVY = ("MultiHeadAttention", "MatMul", "MatMulNBits", "SkipSimplifiedLayerNormalization")


def session_options(threads: int | None, library: Path | None = None, *, plans: bool = False) -> ort.SessionOptions:
    """Return what every session is opened with. library: of kernels. plans: as `plans_runs` tells.

    Raises:
        GenerationError: no threads, or more than `MOST_THREADS`. PackageError: onnxruntime does not take the library.
    """
    return _options(checked_threads(threads), library, plans=plans)


def checked_threads(threads: int | None) -> int:
    """Return the threads that are asked for, or else `default_threads`; say where they are more than the machine's.

    Raises:
        GenerationError: no threads, or more than `MOST_THREADS`.
    """
    threads = default_threads() if threads is None else threads
    if not 1 <= threads <= MOST_THREADS:
        limit = "at least 1" if threads < 1 else f"at most {MOST_THREADS}"
        raise GenerationError(f"`threads` is {threads}; {limit}")
    cores = os.cpu_count()
    if cores is not None and threads > cores:
        from expe_edge.progress import note

        note(f"`threads` is {threads}, but this machine has {cores} cores: they will wait for one another")
    return threads


def _options(threads: int, library: Path | None, *, plans: bool) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS
    options.enable_mem_pattern = plans
    options.intra_op_num_threads = threads
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            raise PackageError(f"{library}: onnxruntime cannot load it ({reason_of(error)})") from error
    return options


def open_session(
    package: Package,
    threads: int | None,
    device: Device,
    cache: GraphCache | None = None,
    kernels: Kernels | None = None,
) -> tuple[ort.InferenceSession, Path | None]:
    """Open the graph of a package, or what a cache has of it, and verify all files that are used.

    Arguments and errors as of `PackageSession.load`.

    Returns:
        the session, and the library of kernels that it runs.
    """
    if device.kind != "cpu" and package.manifest.recipe.get("device", "cpu") != device.kind:
        raise GenerationError(
            f"`device` {device.kind}: {package.path} is for CPUs, whose attention {device.provider} has no kernel for; "
            f"export it with `device` {device.kind}"
        )
    needed = package.manifest.requires_onnxruntime
    if release(ort.__version__) < release(needed):
        raise PackageError(f"{package.path} needs onnxruntime {needed} or newer, this is {ort.__version__}; upgrade it")
    threads = checked_threads(threads)
    verify_files(package, but=MODEL_FILE)
    if device.kind != "cpu":
        options = _options(threads, None, plans=False)
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        with _quiet_provider():
            session = _open_graph(package, options, device)
        require_on_device(package, session, device)
        return session, None
    library = kernels.library(package.manifest) if kernels is not None else None
    if library is not None:
        with suppress(PackageError):  # kernels that refuse a node are left away, and what else is wrong is said below
            return open_on_cpu(package, threads, cache, library), library
    return open_on_cpu(package, threads, cache, None), None


def open_on_cpu(package: Package, threads: int, cache: GraphCache | None, library: Path | None) -> ort.InferenceSession:
    """Open the graph of a package, or what a cache has of it, with a library of kernels or without."""

    def options() -> ort.SessionOptions:
        return _options(threads, library, plans=plans_runs(package.manifest))

    if cache is None or not may_be_kept(package):
        return _open_graph(package, options(), Device())
    name = entry_name(package, library)
    session = cache.open(name, options())
    return _open_and_keep(package, cache, name, options) if session is None else session


def _open_and_keep(
    package: Package, cache: GraphCache, name: str, options: Callable[[], ort.SessionOptions]
) -> ort.InferenceSession:
    """Open the package's own graph, and let onnxruntime write what it makes of it to the cache, where that can be."""
    with cache.draft(name, package.model_path.stat().st_size) as draft:
        if draft is not None:
            writing = options()
            draft.write_with(writing)
            with suppress(PackageError):  # it cannot be written, or else it is said below
                session = _open_graph(package, writing, Device())
                draft.keep()
                return session
    return _open_graph(package, options(), Device())


@contextmanager
def _quiet_provider() -> Iterator[None]:
    """Load NVIDIA's libraries where pip has put them, and leave away what onnxruntime remarks on while it opens.

    It prints which libraries are missing, and logs that ScatterND must not be told one place twice, which it never is.
    """
    if hasattr(ort, "preload_dlls"):
        with redirect_stdout(io.StringIO()):
            ort.preload_dlls()
    with quiet_onnxruntime():
        yield


def require_on_device(package: Package, session: ort.InferenceSession, device: Device) -> None:
    """Raise `PackageError` where onnxruntime runs attention, products or norms elsewhere.

    Releases that do not say where nodes run are believed.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return
    parts = [part for part in session.get_provider_graph_assignment_info() if part.ep_name != device.provider]
    elsewhere = sorted({node.op_type for part in parts for node in part.get_nodes()} & set(HEAVY))
    if elsewhere:
        raise PackageError(
            f"{package.model_path}: onnxruntime {ort.__version__} runs {', '.join(elsewhere)} elsewhere than on "
            f"{device.provider}; use another onnxruntime-gpu, or `device` cpu"
        )


def _open_graph(package: Package, options: ort.SessionOptions, device: Device) -> ort.InferenceSession:
    """Open the package's own graph, and verify it while onnxruntime reads it."""
    with ThreadPoolExecutor(1) as pool:
        verified = pool.submit(verify_files, package, only=MODEL_FILE)
        if release(ort.__version__) < release(SINCE_OWN_FILES):
            verified.result()
        try:
            session = ort.InferenceSession(str(package.model_path), options, providers=device.providers)
        except Exception as error:  # onnxruntime's exceptions share no narrower base
            verified.result()  # damage is the better reason
            reason = reason_of(error)
            raise PackageError(
                f"{package.model_path}: onnxruntime {ort.__version__} cannot open it ({reason})"
            ) from error
        verified.result()
    give_back()
    if session.get_providers()[0] != device.provider:
        raise GenerationError(
            f"`device` {device.kind}: {device.provider} found no device, or not its libraries; use `device` cpu"
        )
    return session


def give_back() -> None:
    """Return to the system what was allocated to read and pack weights: glibc keeps a quarter of their size."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)
