"""Packages on an Arm processor, where `python -m benchmarks.arm setup` has made a system for qemu to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.arm.comparing import PROCESSORS, compare
from benchmarks.arm.system import System
from expe_edge.export.exporter import export
from expe_edge.quant.recipe import Recipe
from tests.conftest import HAS_INT8_CACHE

SYSTEM = System.find()
pytestmark = pytest.mark.skipif(
    SYSTEM is None, reason="no aarch64 system; `python -m benchmarks.arm setup` makes one on a Debian"
)
#: The most nats per token between the processors: 4 bits round activations by row there where it has dot products.
CLOSE = {
    "float32": 1e-9,
    "int8-static": 1e-6,
    "int8-dynamic": 1e-4,
    "int4-weight": 0.02,
    "int8-static-int8-cache": 1e-4,
}


@pytest.fixture(scope="module")
def paths(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    out = tmp_path_factory.mktemp("arm")
    cached = export(packages / "float32", out, [Recipe("int8-static", cache="int8")] if HAS_INT8_CACHE else [])
    return [*(packages / name for name in CLOSE if (packages / name).is_dir()), *(made.path for made in cached)]


@pytest.mark.parametrize("processor", PROCESSORS)
def test_results_agree(paths: list[Path], processor: str) -> None:
    assert SYSTEM is not None
    for path, found in zip(paths, compare(SYSTEM, paths, processor), strict=True):
        assert found.kl < CLOSE[path.name], path.name
        assert path.name == "int4-weight" or found.same == found.written, path.name
