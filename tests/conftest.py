"""Fixtures made once a session: a small corpus, a checkpoint really trained on it, and its packages."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a hub
os.environ["EXPE_EDGE_GRAPH_CACHE"] = "off"  # no test may leave anything with the user
os.environ["EXPE_EDGE_KERNELS"] = "off"  # or depend on what the user has built

import onnxruntime as ort
import torch
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from expe_edge.errors import ConfigError
from expe_edge.export.exporter import export
from expe_edge.graph.attention import SINCE_INT8_CACHE, SINCE_WINDOWS
from expe_edge.graph.linears import LINEAR_FORMATS
from expe_edge.package.manifest import release
from expe_edge.runtime.kernels import compiler, require_possible
from expe_edge.training.run import train
from tests.small import small_settings, write_documents

torch.set_num_threads(1)
hypothesis_settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("ci")

PRECISIONS = ("float32", "float16", "bfloat16", "int8-dynamic", "int8-static", "int8-weight", "int4-weight")
#: Those that can be exported as portable packages with this onnxruntime.
PORTABLE_PRECISIONS = tuple(
    name for name in PRECISIONS if release(LINEAR_FORMATS[name].fused_since) <= release(ort.__version__)
)
HAS_INT8_CACHE = release(ort.__version__) >= release(SINCE_INT8_CACHE)
HAS_WINDOWS = release(ort.__version__) >= release(SINCE_WINDOWS)
#: Marks what goes through windows of heads, likewise.
needs_windows = pytest.mark.skipif(not HAS_WINDOWS, reason=f"onnxruntime has windows with a bias since {SINCE_WINDOWS}")
#: Marks what goes through an int8 cache, which expe-edge refuses by the same comparison.
needs_int8_cache = pytest.mark.skipif(
    not HAS_INT8_CACHE, reason=f"onnxruntime has kernels for an int8 cache since {SINCE_INT8_CACHE}"
)


@pytest.fixture(scope="session")
def compiled() -> None:
    """Skips where kernels of our own cannot be compiled, or do not run."""
    try:
        require_possible()
        compiler()
    except ConfigError as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents, long enough for 16 training lengths of 32."""
    folder = tmp_path_factory.mktemp("text")
    write_documents(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """A trained ExPE checkpoint with grouped key/value heads."""
    out = tmp_path_factory.mktemp("checkpoint") / "model"
    train(small_settings(text_folder), out)
    return out


@pytest.fixture(scope="session")
def plain_checkpoint(tmp_path_factory: pytest.TempPathFactory, text_folder: Path) -> Path:
    """The same of slopes that are products alone, so that positions may stay inline."""
    out = tmp_path_factory.mktemp("plain") / "model"
    train(small_settings(text_folder, positional_parameters={"softplus": False, "content_heads": 0}), out)
    return out


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """The checkpoint's folded packages, one directory for each of `PRECISIONS`."""
    out = tmp_path_factory.mktemp("packages")
    export(checkpoint, out, PRECISIONS)
    return out


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in an empty directory, where anything written by mistake would show."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def own_checkpoint(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("trainer")))


@pytest.fixture
def own_package(packages: Path, tmp_path: Path) -> Path:
    """A copy of the float32 package, to be damaged."""
    return Path(shutil.copytree(packages / "float32", tmp_path / "package"))
