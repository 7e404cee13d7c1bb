"""How a package is opened in onnxruntime: on which device, with how many threads."""

from __future__ import annotations

import os

import onnxruntime as ort

from expe_edge.errors import GenerationError, PackageError, reason_of
from expe_edge.package.directory import Package
from expe_edge.package.manifest import release

#: Threads beyond any machine's, each of which would take memory.
MOST_THREADS = 1024

#: `--device` to the execution provider it stands for.
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def provider_of(device: str) -> str:
    """Return the execution provider that a device stands for.

    Raises:
        GenerationError: an unknown device, or one that this onnxruntime cannot run on.
    """
    if device not in PROVIDERS:
        raise GenerationError(f"unknown device {device!r}; available: {', '.join(PROVIDERS)}; change `device`")
    provider = PROVIDERS[device]
    if provider not in ort.get_available_providers():
        raise GenerationError(
            f"`device` {device}: this onnxruntime has no {provider}; install onnxruntime-gpu on a machine with a GPU, "
            "or use `device` cpu"
        )
    return provider


def session_options(threads: int | None) -> ort.SessionOptions:
    """Return what every session is opened with.

    Raises:
        GenerationError: no threads, or more than `MOST_THREADS`.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors alone
    options.enable_mem_pattern = False  # every step has other shapes than the last, and would be planned anew
    if threads is not None:
        if not 1 <= threads <= MOST_THREADS:
            limit = "at least 1" if threads < 1 else f"at most {MOST_THREADS}"
            raise GenerationError(f"`threads` is {threads}; {limit}")
        cores = os.cpu_count()
        if cores is not None and threads > cores:
            from expe_edge.progress import note

            note(f"`threads` is {threads}, but this machine has {cores} cores: they will wait for one another")
        options.intra_op_num_threads = threads
    return options


def open_session(package: Package, threads: int | None, device: str) -> ort.InferenceSession:
    """Open the graph of a verified package; arguments and errors as of `PackageSession.load`."""
    provider = provider_of(device)
    needed = package.manifest.requires_onnxruntime
    if release(ort.__version__) < release(needed):
        raise PackageError(f"{package.path} needs onnxruntime {needed} or newer, this is {ort.__version__}; upgrade it")
    options = session_options(threads)
    providers = [provider] if device == "cpu" else [provider, PROVIDERS["cpu"]]
    try:
        session = ort.InferenceSession(str(package.model_path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions share no narrower base
        reason = reason_of(error)
        raise PackageError(f"{package.model_path}: onnxruntime {ort.__version__} cannot open it ({reason})") from error
    if session.get_providers()[0] != provider:
        raise GenerationError(f"`device` {device}: {provider} found no device; use `device` cpu")
    return session
