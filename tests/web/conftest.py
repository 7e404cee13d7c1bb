"""A site of every kind of package, built and served once, and what runs scenarios on it in a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from expe_edge.export.exporter import export
from expe_edge.quant.recipe import Recipe
from expe_edge.web.serving import HOST, site_server
from expe_edge.web.site import write_site
from tests import node
from tests.conftest import HAS_INT8_CACHE, HAS_WINDOWS

#: Runs a scenario of `benchmarks/node/browser.mjs` on the site.
Scenario = Callable[..., dict[str, Any]]
#: Beside one package for each precision.
SPECIAL = (
    Recipe("int8-dynamic", portable=True),
    Recipe("int4-weight", portable=True),
    *([Recipe("float32", head_window=32, head_window_cost=1000)] if HAS_WINDOWS else []),
    *([Recipe("int8-static", cache="int8")] if HAS_INT8_CACHE else []),
)


@pytest.fixture(scope="session")
def every_package(tmp_path_factory: pytest.TempPathFactory, packages: Path, checkpoint: Path) -> dict[str, Path]:
    """A package of every kind, by name."""
    out = tmp_path_factory.mktemp("special")
    export(checkpoint, out, SPECIAL)
    return {path.name: path for path in sorted([*packages.iterdir(), *out.iterdir()])}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory, every_package: dict[str, Path]) -> Path:
    """The site of all of them."""
    node.page()
    out = tmp_path_factory.mktemp("web") / "site"
    write_site(list(every_package.values()), list(every_package), out, title="Every package")
    return out


@contextmanager
def serving(directory: Path, *, isolated: bool = True) -> Iterator[str]:
    """Serve a directory; yield its address."""
    server = site_server(directory, 0, isolated=isolated)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def scenario(site: Path) -> Scenario:
    """Run a scenario of `benchmarks/node/browser.mjs` on the site, or on another."""

    def run(name: str, *, directory: Path = site, isolated: bool = True, **order: Any) -> dict[str, Any]:
        with serving(directory, isolated=isolated) as url:
            return node.run_script("browser.mjs", {"scenario": name, "browser": node.browser(), "url": url, **order})

    return run
