"""Node.js for tests and benchmarks: programs of `benchmarks/node`, the page, a browser; what is missing skips."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.node.environment import PLACE, MissingError, locked, programs, run_node

BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def run_script(name: str, order: Mapping[str, Any], *, timeout: float = 200) -> dict[str, Any]:
    """Run one of the programs; return its answer."""
    return run_node(node_programs() / name, order, timeout=timeout)


def node_programs() -> Path:
    """The directory of the programs, in one that holds the npm packages."""
    try:
        return programs()
    except MissingError as error:
        pytest.skip(str(error))


def browser() -> str:
    """The system's Chromium or Chrome."""
    found = os.environ.get("CHROMIUM") or next((path for path in map(shutil.which, BROWSERS) if path), None)
    if found is None:
        pytest.skip("there is no Chromium on the PATH")
    return found


def run_page(order: Mapping[str, Any]) -> dict[str, Any]:
    """Run the page's model in Node.js; return its answer."""
    from expe_edge.web.building import NODE

    return run_node(page() / NODE / "node.js", order)


@cache
def page() -> Path:
    """The directory of the built page, as `built_page` returns it."""
    from expe_edge.errors import ConfigError
    from expe_edge.web.building import CACHE, built_page

    os.environ.setdefault(CACHE, str(PLACE / "page"))  # what tests build is nothing for the user
    with locked(PLACE / "page"):
        try:
            return built_page()
        except ConfigError as error:
            pytest.skip(str(error))
