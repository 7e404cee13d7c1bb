"""The static site: the built page, packages, and the list of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from expe_edge.package.directory import clear_leftovers, open_manifest, require_absent, write_directory
from expe_edge.web.building import PAGE, built_page
from expe_edge.web.choice import note_of, order_of, speed_of
from expe_edge.web.listing import FILES, package_info

#: Where the page looks for packages, and for their list.
PACKAGES, LIST = "packages", "list.json"
#: Folders of the built page that hold onnxruntime's WebGPU build.
WEBGPU = "ort-webgpu-*"
#: What a directory is called that this module may replace.
KIND = "a site that was written here"


def is_site(path: Path) -> bool:
    """Tell whether `path` holds what `write_site` writes."""
    return (path / PACKAGES / LIST).is_file()


def write_site(
    packages: Sequence[Path],
    names: Sequence[str],
    out: Path,
    *,
    title: str,
    webgpu: bool | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Write the site of `packages` to `out`, which appears when all is there.

    Args:
        names: what each package is called.
        webgpu: whether onnxruntime's WebGPU build comes too; None for where a portable package can use it.
        force: replace an earlier site.

    Returns:
        what the page is told of every package, in the order that it shows them.

    Raises:
        ConfigError: the page cannot be built. PackageError: a package at fault. ExportError: `out` cannot be written.
    """
    clear_leftovers(out)
    require_absent(out, force=force, kind=KIND, is_own=is_site)
    listed = _listed(packages, names)
    if webgpu is None:
        webgpu = any(info["contract"]["growing"] for _, info in listed)
    page = built_page(progress) / PAGE
    with write_directory(out, KIND, is_site, force=force) as directory:
        ignored = shutil.ignore_patterns() if webgpu else shutil.ignore_patterns(WEBGPU)
        shutil.copytree(page, directory, dirs_exist_ok=True, ignore=ignored)
        for path, info in listed:
            place = directory / PACKAGES / info["directory"]
            place.mkdir(parents=True)
            for file in FILES:
                shutil.copyfile(path / file, place / file)
        infos = [info for _, info in listed]
        content = {"title": title, "webgpu": webgpu, "packages": infos}
        (directory / PACKAGES / LIST).write_text(json.dumps(content) + "\n", encoding="utf-8")
    return infos


def _listed(packages: Sequence[Path], names: Sequence[str]) -> list[tuple[Path, dict[str, Any]]]:
    """Return every package with what the page is told of it, in the order to show them."""
    manifests = [open_manifest(path).manifest for path in packages]
    infos = [
        package_info(path, name, note_of(manifest))
        for path, name, manifest in zip(packages, names, manifests, strict=True)
    ]
    sizes = [sum(file["bytes"] for file in info["files"].values()) for info in infos]
    return [(packages[index], infos[index]) for index in order_of(sizes, list(map(speed_of, manifests)))]
