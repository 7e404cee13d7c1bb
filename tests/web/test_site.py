"""What `expe-edge web` does without a browser: the list of packages, their order, the server, and what is refused."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.node.environment import SOURCES as PROGRAMS
from expe_edge.errors import ConfigError, PackageError
from expe_edge.package.directory import open_manifest
from expe_edge.package.manifest import Manifest
from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
from expe_edge.web.building import CACHE, SOURCES, built_page
from expe_edge.web.choice import has_float_weights, note_of, order_of, restored_bytes, speed_of
from expe_edge.web.listing import package_info
from tests.command_line import refused
from tests.conftest import PRECISIONS
from tests.web.conftest import serving


def test_fewest_bytes_for_their_speed_come_first() -> None:
    assert order_of([4_000_000, 1_000_000, 600_000], [1.0, 0.77, 0.19]) == [1, 2, 0]


def reference_manifest(precision: str) -> Manifest:
    return open_manifest(reference_package(precision)).manifest


def test_of_the_reference_packages_int4_comes_first() -> None:
    """Half the bytes, and as fast; its note says what that takes."""
    manifests = [reference_manifest(precision) for precision in REFERENCE_PRECISIONS]
    infos = [package_info(reference_package(precision)) for precision in REFERENCE_PRECISIONS]
    sizes = [sum(file["bytes"] for file in info["files"].values()) for info in infos]
    order = order_of(sizes, [speed_of(manifest) for manifest in manifests])
    assert [REFERENCE_PRECISIONS[index] for index in order] == ["int4-weight", "int8-dynamic"]
    assert [("MB of memory" in note_of(manifest)) for manifest in manifests] == [False, True]
    assert [info["floatWeights"] for info in infos] == [False, True]


def test_weights_too_large_to_restore_stay_slow() -> None:
    manifest = reference_manifest("int4-weight")
    stored = sum(part["bytes"] for part in manifest.parts if part["format"] == "int4-weight")
    assert restored_bytes(manifest) == 8 * stored
    larger = [{**part, "bytes": part["bytes"] * 20} for part in manifest.parts]
    large = replace(manifest, parts=larger)
    assert not has_float_weights(large)
    assert note_of(large) == "4-bit weights; slow in browsers, which restore its weights at every token"
    assert speed_of(large) < speed_of(manifest)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_the_page_is_told_of_a_package(packages: Path, precision: str) -> None:
    info = package_info(packages / precision, "A name/with signs")
    assert info["directory"] == "A-name-with-signs"
    assert info["trainingLength"] == 32
    assert info["contract"]["keepsLast"]
    value = {"past": "past_key_values.0.value", "present": "present.0.value", "heads": 2, "window": None}
    assert info["contract"]["cache"][1] == value
    assert info["files"]["model.onnx"]["bytes"] == (packages / precision / "model.onnx").stat().st_size
    assert len(info["selfTest"]["tokens"]) == len(info["selfTest"]["logits"]) == 24
    assert 0 < info["selfTest"]["tolerance"] < 3


def test_a_damaged_package_is_not_listed(own_package: Path) -> None:
    (own_package / "tokenizer.json").write_text("{}")
    with pytest.raises(PackageError, match=r"tokenizer\.json differs from its hash"):
        package_info(own_package)


@pytest.mark.usefixtures("elsewhere")
def test_what_is_refused(packages: Path) -> None:
    package = packages / "float32"
    assert refused("web", "--out", "site", "--port", 8000) == (
        "--port is where the site is served; give --serve too, or drop it"
    )
    assert refused("web", package) == "there is no place for the site; give --out, or --serve to look at it only"
    assert refused("web", "none", "--out", "site") == "none: no such package directory"
    Path("mine").mkdir()
    Path("mine", "letter").write_text("")
    assert refused("web", package, "--out", "mine") == "mine exists; use --force to replace it, or another --out"
    assert refused("web", package, "--out", "mine", "--force") == (
        "mine holds something else than a site that was written here; --force will not delete it"
    )


def no_node(_: Path) -> str:
    return "there is no node on the PATH; install it"


def old_node(folder: Path) -> str:
    for name, text in (("node", "v18.20.1"), ("npm", "9.0.0")):
        (folder / name).write_text(f"#!/bin/sh\necho {text}\n")
        (folder / name).chmod(0o755)
    return f"{folder / 'node'} is v18.20.1; install a newer one"


def failing_npm(folder: Path) -> str:
    old_node(folder)
    (folder / "node").write_text("#!/bin/sh\necho v22.12.0\n")
    (folder / "npm").write_text("#!/bin/sh\necho npm error network unreachable >&2\nexit 1\n")
    return "the page cannot be built: npm ci failed (network unreachable)"


@pytest.mark.parametrize("prepare", [no_node, old_node, failing_npm])
def test_without_node_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: Path, prepare: Callable[[Path], str]
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    said = prepare(folder)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.chdir(folder)
    assert refused("web", packages / "float32", "--out", "site").endswith(said)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_build_that_others_may_change_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packages: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv(CACHE, str(shared))
    monkeypatch.chdir(tmp_path)
    said = refused("web", packages / "float32", "--out", "site")
    assert said == f"{shared} can be written to by others; {CACHE} names another place for the page"


def test_a_build_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sources' hash: without them changed, nothing is run."""
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no node"):
        built_page()
    from expe_edge.web import building

    (tmp_path / building._version() / "dist").mkdir(parents=True)
    assert built_page() == tmp_path / building._version()


@pytest.mark.parametrize("isolated", [True, False])
def test_the_server(tmp_path: Path, isolated: bool) -> None:
    (tmp_path / "ort-1").mkdir()
    (tmp_path / "ort-1" / "a.wasm").write_bytes(b"\0asm")
    (tmp_path / "index.html").write_text("page")
    with serving(tmp_path, isolated=isolated) as url:
        with urllib.request.urlopen(url) as response:  # noqa: S310  # this machine's
            assert response.read() == b"page"
            assert response.headers["Cache-Control"] == "no-cache"
            assert (response.headers["Cross-Origin-Embedder-Policy"] == "require-corp") == isolated
        with urllib.request.urlopen(f"{url}ort-1/a.wasm") as response:  # noqa: S310  # this machine's
            assert response.headers["Content-Type"] == "application/wasm"
            assert "immutable" in response.headers["Cache-Control"]
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{url}../conftest.py")  # noqa: S310  # this machine's


@pytest.mark.parametrize("folder", [SOURCES, PROGRAMS])
def test_a_lock_names_versions_and_hashes_but_no_registry(folder: Path) -> None:
    lock: dict[str, Any] = json.loads((folder / "package-lock.json").read_text())
    packages = {name: entry for name, entry in lock["packages"].items() if name}
    assert all("integrity" in entry and "resolved" not in entry for entry in packages.values())
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    assert {name: lock["packages"][f"node_modules/{name}"]["version"] for name in wanted} == wanted


def test_the_pages_chunks_are_the_runtimes() -> None:
    from expe_edge.runtime import memory

    source = (SOURCES / "src" / "model" / "package.ts").read_text()
    found = {name: int(value) for name, value in re.findall(r"const ((?:LEAST_)?CHUNK) = (\d+);", source)}
    assert found == {"CHUNK": memory.PREFILL_CHUNK, "LEAST_CHUNK": memory.LEAST_CHUNK}
    assert memory.MOST_SCORES == 2**24
    assert "const MOST_SCORES = 2 ** 24;" in source
