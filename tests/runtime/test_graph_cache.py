"""Optimised graphs that are kept: the same results, sooner opened, and never a wrong one nor an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from expe_edge.errors import PackageError
from expe_edge.export.exporter import export
from expe_edge.package.directory import file_hash, read_package
from expe_edge.quant.recipe import Recipe
from expe_edge.runtime import Generator, PackageSession
from expe_edge.runtime.graph_cache import (
    DRAFT,
    GRAPH_FILE,
    RECORD_FILE,
    VARIABLE,
    WEIGHTS_FILE,
    GraphCache,
    cache_at,
    entry_name,
    may_be_kept,
)
from expe_edge.runtime.leftovers import ABANDONED
from expe_edge.runtime.processor import processor_features
from tests.conftest import PRECISIONS, needs_int8_cache

NEEDS_OWNERS = pytest.mark.skipif(not hasattr(os, "getuid"), reason="files have no owners here")


@pytest.fixture
def cache(tmp_path: Path) -> GraphCache:
    """A cache of its own, which is not there yet."""
    return GraphCache(tmp_path / "caches" / "graphs")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that sessions are opened of from now on."""
    names: list[str] = []
    real = ort.InferenceSession

    def session(path: str, *arguments: object, **named: object) -> ort.InferenceSession:
        names.append(Path(path).name)
        return real(path, *arguments, **named)

    monkeypatch.setattr(ort, "InferenceSession", session)
    return names


def logits(session: PackageSession) -> np.ndarray:
    """What a session makes of a prefill and some steps."""
    tokens = np.random.default_rng(0).integers(0, 300, 50)
    cache = session.new_cache(1, 60)
    parts = list(session.prefill(cache, tokens[:40])) + [
        row for t in tokens[40:] for row in session.prefill(cache, t[None])
    ]
    return np.concatenate(parts)


def entry(cache: GraphCache, package: Path) -> Path:
    return cache.directory / entry_name(read_package(package))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_kept_is_the_same_graph(packages: Path, cache: GraphCache, opened: list[str], precision: str) -> None:
    """Bit for bit, with the input that leaves logits away, whether it is written, read or never kept."""
    if not may_be_kept(read_package(packages / precision)):
        pytest.skip(f"onnxruntime {ort.__version__} does not read back what it has packed of {precision}")
    plain, first, second = (PackageSession.load(packages / precision, cache=each) for each in (None, cache, cache))

    assert opened == ["model.onnx", "model.onnx", GRAPH_FILE]
    assert {file.name for file in entry(cache, packages / precision).iterdir()} == {
        GRAPH_FILE,
        WEIGHTS_FILE,
        RECORD_FILE,
    }
    assert plain.keeps_last
    assert second.keeps_last
    np.testing.assert_array_equal(logits(first), logits(plain))
    np.testing.assert_array_equal(logits(second), logits(plain))


@pytest.mark.parametrize(
    "recipe", [Recipe(portable=True), pytest.param(Recipe("int8-dynamic", cache="int8"), marks=needs_int8_cache)]
)
def test_so_are_other_kinds_of_cache(checkpoint: Path, tmp_path: Path, cache: GraphCache, recipe: Recipe) -> None:
    (exported,) = export(checkpoint, tmp_path / "out", [recipe])
    plain, _, second = (PackageSession.load(exported.path, cache=each) for each in (None, cache, cache))

    np.testing.assert_array_equal(logits(second), logits(plain))


def test_what_an_old_onnxruntime_would_crash_on_is_not_kept(
    packages: Path, cache: GraphCache, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "__version__", "1.31.1")
    for name in ("int8-weight", "int8-weight", "int4-weight", "int4-weight"):
        PackageSession.load(packages / name, cache=cache)
    assert opened == ["model.onnx", "model.onnx", "model.onnx", GRAPH_FILE]


# What is damaged


def changed(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "emptied": lambda file: file.write_bytes(b""),
    "one bit": changed,
    "removed": lambda file: file.unlink(),
}


@pytest.mark.parametrize("name", [GRAPH_FILE, WEIGHTS_FILE, RECORD_FILE])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_was_damaged_is_not_used_and_written_anew(
    packages: Path, cache: GraphCache, opened: list[str], name: str, damage: str
) -> None:
    package = packages / "int8-dynamic"
    expected = logits(PackageSession.load(package, cache=cache))
    DAMAGES[damage](entry(cache, package) / name)
    opened.clear()

    np.testing.assert_array_equal(logits(PackageSession.load(package, cache=cache)), expected)
    assert opened[-1] == "model.onnx"
    np.testing.assert_array_equal(logits(PackageSession.load(package, cache=cache)), expected)
    assert opened[-1] == GRAPH_FILE
    assert [place.name for place in cache.directory.iterdir()] == [entry_name(read_package(package))]


@pytest.mark.parametrize(
    "record", ["[]", "{}", "null", '{"graph.onnx": 5, "weights.bin": [], "bytes": "many"}', "\xff"]
)
def test_a_record_that_says_nothing(packages: Path, cache: GraphCache, record: str) -> None:
    PackageSession.load(packages / "float32", cache=cache)
    (entry(cache, packages / "float32") / RECORD_FILE).write_text(record, encoding="latin-1")

    PackageSession.load(packages / "float32", cache=cache)

    assert "bytes" in json.loads((entry(cache, packages / "float32") / RECORD_FILE).read_text(encoding="utf-8"))


def test_a_damaged_package_is_refused_and_not_kept(own_package: Path, cache: GraphCache) -> None:
    """Where nothing is kept of it. Afterwards its graph is not read any more, and its other files are as ever."""
    whole = (own_package / "model.onnx").read_bytes()
    changed(own_package / "model.onnx")
    with pytest.raises(PackageError, match=r"model\.onnx differs from its hash"):
        PackageSession.load(own_package, cache=cache)
    assert list(cache.directory.iterdir()) == []

    (own_package / "model.onnx").write_bytes(whole)
    expected = logits(PackageSession.load(own_package, cache=cache))
    changed(own_package / "model.onnx")
    np.testing.assert_array_equal(logits(PackageSession.load(own_package, cache=cache)), expected)
    changed(own_package / "tokenizer.json")
    with pytest.raises(PackageError, match=r"tokenizer\.json differs from its hash"):
        PackageSession.load(own_package, cache=cache)


# What an entry depends on


def test_entries_are_named_by_all_they_depend_on(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = read_package(packages / "float32")
    names = {entry_name(package), entry_name(read_package(packages / "float16"))}
    monkeypatch.setattr(ort, "__version__", "1.99.0")
    names.add(entry_name(package))
    monkeypatch.setattr("expe_edge.runtime.graph_cache.processor_features", lambda: ["another"])
    names.add(entry_name(package))
    monkeypatch.setattr("expe_edge.runtime.graph_cache.WRITING", {})
    names.add(entry_name(package))

    assert len(names) == 5


def test_features_of_a_processor(tmp_path: Path) -> None:
    """Those of all kinds of cores, whatever their order, and nothing that changes from one start to the next."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\ncpu MHz\t: 2600.1\nflags\t\t: fpu avx2\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    found = processor_features(cpuinfo)
    assert found[-2:] == ["flags:fpu", "flags:fpu avx2"]

    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu\n\nprocessor\t: 1\ncpu MHz\t: 900\nflags\t\t: fpu avx2\n")
    assert processor_features(cpuinfo) == found
    cpuinfo.write_text("flags\t\t: fpu avx2 avx512f\n")
    assert processor_features(cpuinfo) != found
    assert processor_features(tmp_path / "none")[:1] == found[:1]


# Where it is, and how large


def test_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_at() is None  # as the tests are run
    assert cache_at("off") is None
    assert cache_at(tmp_path) == GraphCache(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "chosen"))
    assert cache_at() == GraphCache(tmp_path / "chosen")
    assert cache_at("off") is None
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_at() == GraphCache(tmp_path / "expe-edge" / "graphs")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert cache_at() == GraphCache(tmp_path / "home" / ".cache" / "expe-edge" / "graphs")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError

    for name in (VARIABLE, "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_at() is None


def test_a_generator_keeps_graphs_unless_told_not_to(packages: Path, tmp_path: Path, opened: list[str]) -> None:
    for where in ("off", tmp_path / "graphs", tmp_path / "graphs"):
        Generator.load(packages / "float32", graph_cache=where)

    assert opened == ["model.onnx", "model.onnx", GRAPH_FILE]


def test_the_least_recently_used_make_room(packages: Path, cache: GraphCache) -> None:
    names = ("float32", "float16", "int8-static")
    for minute, name in enumerate(("float32", "float16", "float32", "int8-static")):
        PackageSession.load(packages / name, cache=cache)
        os.utime(entry(cache, packages / name), (minute, minute))
    sizes = {name: sum(file.stat().st_size for file in entry(cache, packages / name).iterdir()) for name in names}

    GraphCache(cache.directory, sizes["float32"] + sizes["int8-static"]).make_room()
    assert [name for name in names if entry(cache, packages / name).exists()] == ["float32", "int8-static"]
    GraphCache(cache.directory, sizes["float32"]).make_room()
    assert [name for name in names if entry(cache, packages / name).exists()] == ["int8-static"]


def test_use_is_what_counts(packages: Path, cache: GraphCache) -> None:
    PackageSession.load(packages / "float32", cache=cache)
    os.utime(entry(cache, packages / "float32"), (1, 1))

    PackageSession.load(packages / "float32", cache=cache)

    assert time.time() - entry(cache, packages / "float32").stat().st_mtime < 3600


def test_a_graph_as_large_as_the_cache_is_not_kept(packages: Path, tmp_path: Path) -> None:
    PackageSession.load(packages / "float32", cache=GraphCache(tmp_path / "graphs", 1000))

    assert list((tmp_path / "graphs").iterdir()) == []


def test_what_killed_processes_left_is_removed(packages: Path, cache: GraphCache) -> None:
    old, new = cache.directory / f"{DRAFT}old", cache.directory / f"{DRAFT}new"
    for place in (old, new):
        place.mkdir(parents=True)
    cache.directory.chmod(0o700)
    before = time.time() - ABANDONED - 60
    os.utime(old, (before, before))

    PackageSession.load(packages / "float32", cache=cache)

    assert not old.exists()
    assert new.exists()


def test_what_else_is_in_the_directory_stays(packages: Path, cache: GraphCache) -> None:
    """Whoever names a directory of their own, as one with models, loses nothing, and the cache keeps to its bytes."""
    names = ("models/big.bin", "notes.txt", f"{DRAFT}letter/text", f"{'0' * 64}/other")
    others = [cache.directory / name for name in names]
    for file in others:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x" * 1000)
        os.utime(file.parent, (1, 1))
    cache.directory.chmod(0o700)
    for name in ("float16", "float32"):
        PackageSession.load(packages / name, cache=cache)
    os.utime(entry(cache, packages / "float16"), (2, 2))
    size = sum(file.stat().st_size for file in entry(cache, packages / "float32").iterdir())

    GraphCache(cache.directory, size).make_room()

    assert all(file.is_file() for file in others)
    assert [entry(cache, packages / name).exists() for name in ("float16", "float32")] == [False, True]


# What is no error


@NEEDS_OWNERS
@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_directory_that_others_may_write_to_is_not_used(packages: Path, cache: GraphCache, mode: int) -> None:
    cache.directory.mkdir(parents=True)
    cache.directory.chmod(mode)

    PackageSession.load(packages / "float32", cache=cache)

    assert list(cache.directory.iterdir()) == []


def test_a_directory_that_cannot_be_made(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")

    assert PackageSession.load(packages / "float32", cache=GraphCache(tmp_path / "file" / "graphs")).keeps_last


FULL = """
import resource, signal, sys
from pathlib import Path
from expe_edge.runtime import PackageSession
from expe_edge.runtime.graph_cache import GraphCache
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
PackageSession.load(sys.argv[1], cache=GraphCache(Path(sys.argv[2])))
print(sorted(file.name for file in Path(sys.argv[2]).rglob("*") if file.is_file()))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files have no limit here")
@pytest.mark.parametrize("limit", [0, 5000, 100_000])
def test_a_disk_that_is_full(packages: Path, tmp_path: Path, limit: int) -> None:
    """As a process sees it that may write no longer files."""
    command = [sys.executable, "-c", FULL, str(packages / "float32"), str(tmp_path / "graphs"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert done.stderr == ""
    assert done.stdout == "[]\n"


def test_two_processes_at_once(packages: Path, cache: GraphCache, opened: list[str]) -> None:
    """The one that comes second puts its entry in place of the first one's; sessions go on with the files they have."""
    package = read_package(packages / "int8-static")
    first = PackageSession.load(package.path, cache=cache)
    session = PackageSession.load(package.path, cache=cache)
    with cache.draft(entry_name(package), package.model_path.stat().st_size) as draft:
        assert draft is not None
        shutil.copytree(entry(cache, package.path), draft.directory, dirs_exist_ok=True)
        draft.keep()

    assert [place.name for place in cache.directory.iterdir() if not place.name.startswith(DRAFT)] == [draft.name]
    np.testing.assert_array_equal(logits(session), logits(first))
    np.testing.assert_array_equal(logits(PackageSession.load(package.path, cache=cache)), logits(first))
    assert opened == ["model.onnx", GRAPH_FILE, GRAPH_FILE]
    assert file_hash(entry(cache, package.path) / GRAPH_FILE) in (entry(cache, package.path) / RECORD_FILE).read_text()
