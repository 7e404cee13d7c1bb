"""Packages on an Arm processor, where `python -m benchmarks.arm setup` has made a system for qemu to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.arm.comparing import PROCESSORS, compare
from benchmarks.arm.system import System
from tests.conftest import HAS_INT8_CACHE

SYSTEM = System.find()
pytestmark = pytest.mark.skipif(
    SYSTEM is None, reason="no aarch64 system; `python -m benchmarks.arm setup` makes one on a Debian"
)
#: The most nats per token between the processors: 4 bits round activations by row there where it has dot products.
CLOSE = {"float32": 1e-9, "int8-static": 1e-6, "int8-dynamic": 1e-4, "int4-weight": 0.02}


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("name", CLOSE)
def test_results_agree(packages: Path, name: str, processor: str) -> None:
    assert SYSTEM is not None
    found = compare(SYSTEM, packages / name, processor)
    assert found.kl < CLOSE[name]
    if name != "int4-weight":
        assert found.same == found.written


@pytest.mark.skipif(not HAS_INT8_CACHE, reason="onnxruntime has no kernels for an int8 cache")
def test_an_int8_cache_agrees(packages: Path, tmp_path: Path) -> None:
    from expe_edge.export.exporter import export
    from expe_edge.quant.recipe import Recipe

    assert SYSTEM is not None
    (made,) = export(packages / "float32", tmp_path, [Recipe("int8-static", cache="int8")])
    found = compare(SYSTEM, made.path, "max")
    assert found.kl < 1e-4
    assert found.same == found.written
