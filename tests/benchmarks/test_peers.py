"""`benchmarks.peers`: our runtime on a real package, the peers that are installed, and the tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from benchmarks.peers import __main__ as peers
from benchmarks.peers import models
from benchmarks.peers.report import Timings, ratio_table, speed_table
from benchmarks.peers.runtimes import CTranslate2, GenAI, LlamaCpp, Optimum, Ours, Runtime, Torch, repeated_state
from expe_edge.package.manifest import release
from expe_edge.speed.apart import Apart
from tests.conftest import needs_int8_cache
from tests.small import command_runner

VOCAB = 300


@pytest.fixture(scope="module")
def made(checkpoint: Path, packages: Path, tmp_path_factory: pytest.TempPathFactory) -> models.Models:
    """Models of the shape of the tests' checkpoint, in place of `tiny`; some packages are yet to be made."""
    folder = tmp_path_factory.mktemp("peers")
    shutil.copytree(checkpoint, folder / "tiny" / "checkpoint", ignore=shutil.ignore_patterns("trainer"))
    for precision in ("int8-dynamic", "int8-weight", "int4-weight"):
        shutil.copytree(packages / precision, folder / "tiny" / "packages" / precision)
    return models.Models(folder, "tiny")


@needs_int8_cache
def test_ours_and_what_is_missing(made: models.Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda module: None if module == "llama_cpp" else find_spec(module))
    options = ["--depths", "0,40", "--prefill", "9", "--steps", "3", "--turns", "2", "--threads", "1"]
    options += ["--size", made.size, "--only", "ours, int8-weight(, int8 cache)?$|Q4_0, f16"]

    done = command_runner().invoke(
        peers.main,
        [*options, "--out", str(made.folder)],
        catch_exceptions=False,
    )

    assert done.exit_code == 0, done.stderr
    assert "llama.cpp Q4_0, f16 cache: llama_cpp is not installed; left out\n" in done.stderr
    found = json.loads((made.folder / "tiny.json").read_text())
    names = ["ours, int8-weight", "ours, int8-weight, int8 cache"]
    assert [(each["depth"], each["contender"]) for each in found["timings"]] == [(d, n) for d in (0, 40) for n in names]
    for each in found["timings"]:
        assert (each["bits"], each["ours"], len(each["prefill"]), len(each["decode"])) == (8, True, 2, 2)
        assert min(*each["prefill"], *each["decode"]) > 0
    assert found["settings"]["threads"] == 1
    assert (made.folder / "tiny.md").read_text().strip() in done.stdout


def test_a_contender_that_fails_leaves_the_others_running(made: models.Models, tmp_path: Path) -> None:
    broken = peers.Contender("broken", 8, Ours, (), lambda _: (tmp_path / "none", "off"))
    whole = peers.Contender("whole", 4, Ours, (), lambda of: (of.package("int4-weight", ""), "off"))
    settings = peers.Settings(made.size, (0, 2**30), 4, 2, 1, 1, "wall")

    *_, found = peers.measure([broken, whole], made, settings)

    assert [(each.contender, each.depth) for each in found] == [("whole", 0)]  # the encoding ends before the other


@pytest.mark.usefixtures("compiled")
def test_ours_with_kernels_of_our_own(made: models.Models) -> None:
    chosen = [
        each for each in peers.contenders() if each.name in ("ours, int8-weight", "ours, int8-weight, own kernels")
    ]
    settings = peers.Settings(made.size, (0,), 4, 2, 1, 1, "wall")

    *_, found = peers.measure(chosen, made, settings)

    assert [each.contender for each in found] == [each.name for each in chosen]
    assert list((made.folder / "kernels").glob("*.so"))


#: A runtime, the module it needs, and what it opens of a shape.
PEERS: list[tuple[type[Runtime], str, Callable[[Any], Any]]] = [
    (GenAI, "onnxruntime_genai", lambda made: (made.package("int8-weight", ""),)),
    (Optimum, "optimum", lambda made: (made.package("int8-weight", ""),)),
    (LlamaCpp, "llama_cpp", lambda made: (made.gguf("Q8_0"), "f16")),
    (CTranslate2, "ctranslate2", lambda made: (made.ctranslate2(),)),
    (Torch, "torch", lambda made: (made.llama(), False)),
]


@pytest.mark.parametrize(("kind", "module", "opened"), PEERS, ids=[module for _, module, _ in PEERS])
def test_a_peer_that_is_installed(
    made: models.Models, kind: type[Runtime], module: str, opened: Callable[[Any], Any]
) -> None:
    pytest.importorskip(module)
    if kind is Torch and release(transformers.__version__) < release("4.56"):
        pytest.skip(f"transformers {transformers.__version__} sets up caches and dtypes otherwise")
    with Apart(kind, *opened(made), VOCAB, 1, "cpu") as peer:
        for depth in (0, 600, 600, 40):
            seconds = peer.call("measure", depth, 9, 3)
            assert min(seconds) > 0
        if kind.deepest is not None:
            assert peer.call("measure", kind.deepest[0] + 1, 9, 3) == kind.deepest[1]


def test_the_state_of_a_sequence_is_repeated() -> None:
    """By hand: two cells, one layer, rows of 2 and 3 bytes."""

    def state(cells: int, keys: bytes, values: bytes) -> bytes:
        places = b"".join(np.array([cell, 1, 0], np.int32).tobytes() for cell in range(cells))
        head = np.array([7, 0, 1, cells], np.int32).tobytes() + places + np.array([0, 1], np.int32).tobytes()
        blocks = ((np.int32(kind).tobytes() + np.uint64(row).tobytes()) for kind, row in ((8, 2), (1, 3)))
        return head + next(blocks) + keys + next(blocks) + values

    assert repeated_state(state(2, b"abcd", b"uvwxyz"), 5) == state(5, b"abcdabcdab", b"uvwxyzuvwxyzuvw")
    assert repeated_state(state(2, b"abcd", b"uvwxyz"), 1) == state(1, b"ab", b"uvw")
    with pytest.raises(RuntimeError, match="another layout"):
        repeated_state(state(2, b"abcd", b"uvwxyz!"), 5)


def test_ratios_are_of_turns_and_to_the_best_peer_of_a_column() -> None:
    def timings(name: str, bits: int, depth: int, prefill: float, decode: tuple[float, ...]) -> Timings:
        return Timings(name, bits, name.startswith("ours"), depth, (prefill,) * len(decode), decode)

    found = [
        timings("ours", 8, 0, 300, (20, 40, 60)),
        timings("ours, 4", 4, 0, 100, (30, 30, 30)),
        timings("a", 8, 0, 100, (10, 10, 40)),
        timings("b", 16, 0, 150, (5, 5, 5)),
        timings("ours", 8, 64, 10, (1, 1, 1)),
    ]

    assert speed_table(found, 512).splitlines() == [
        "| tokens/s, × the best peer | prefill 512 at 0 | prefill 512 at 64 | decode at 0 | decode at 64 |",
        "| --- | --- | --- | --- | --- |",
        "| ours | 300 (300–300) 2.00× | 10.0 (10.0–10.0) | 40.0 (30.0–50.0) 2.00× | 1.0 (1.0–1.0) |",
        "| ours, 4 | 100 (100–100) 0.67× |  | 30.0 (30.0–30.0) 3.00× |  |",
        "| a | 100 (100–100) 0.67× |  | **10.0 (10.0–25.0)** |  |",
        "| b | **150 (150–150)** |  | 5.0 (5.0–5.0) 0.50× |  |",
    ]
    assert ratio_table(found).splitlines()[2:] == [
        "| any weights | 2.00 (2.00–2.00) |  | 2.00 (1.75–3.00) |  |",
        "| 8-bit weights | 3.00 (3.00–3.00) |  | 2.00 (1.75–3.00) |  |",
        "| 4-bit weights |  |  |  |  |",
    ]
