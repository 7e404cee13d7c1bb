"""The page, built of its sources by Node.js, once for each version of them, and kept among the user's caches."""

from __future__ import annotations

import atexit
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from expe_edge.errors import ConfigError, reason_of
from expe_edge.runtime.user_caches import kept_in, require_private

SOURCES = Path(__file__).parent / "page"
#: What is kept of a build: the static page, and the page's model for Node.js.
PAGE, NODE = "dist", "dist-node"
#: The environment variable that names where builds are kept, or turns that off.
CACHE = "EXPE_EDGE_WEB_CACHE"
#: The oldest Node.js that Vite runs on.
OLDEST_NODE = (20, 19)
#: Seconds that npm and Vite may take each.
PATIENCE = 900


def built_page(progress: Callable[[str], None] = lambda _: None) -> Path:
    """Return the directory of the built page, `PAGE` and `NODE` in it; build it where this version is not kept yet.

    Raises:
        ConfigError: there is no Node.js, or too old a one, or npm cannot install or build.
    """
    cache = kept_in(None, CACHE, "web")
    place = _passing() if cache is None else cache
    target = place / _version()
    if place.exists():
        try:
            require_private(place)
        except OSError as error:
            raise ConfigError(f"{error}; {CACHE} names another place for the page") from error
    if not (target / PAGE).is_dir():
        npm = _npm()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        progress("building the page: npm installs onnxruntime-web and Vite, some 200 MB, for this once")
        with tempfile.TemporaryDirectory(dir=place, prefix=".building-") as directory:
            _build(Path(directory), npm)
            made = Path(directory, "made")
            made.mkdir()
            for part in (PAGE, NODE):
                Path(directory, part).rename(made / part)
            with suppress(OSError):  # another process has been faster
                made.rename(target)
    return target


def _version() -> str:
    """Return a hash of the sources."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*")):
        if file.is_file():
            digest.update(file.relative_to(SOURCES).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _passing() -> Path:
    """Return a directory that goes when the process ends."""
    place = Path(tempfile.mkdtemp(prefix="expe-edge-web-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def _npm() -> str:
    """Return npm's place, once Node.js is known to be new enough."""
    node, npm = shutil.which("node"), shutil.which("npm")
    wanted = f"the page is built by Node.js {'.'.join(map(str, OLDEST_NODE))} or newer and npm"
    if node is None or npm is None:
        raise ConfigError(f"{wanted}; there is no {'node' if node is None else 'npm'} on the PATH; install it")
    found = _run([node, "--version"], Path.cwd(), "node")
    version = tuple(map(int, re.findall(r"\d+", found)[:2]))
    if version < OLDEST_NODE:
        raise ConfigError(f"{wanted}; {node} is {found.strip()}; install a newer one")
    return npm


def _build(directory: Path, npm: str) -> None:
    shutil.copytree(SOURCES, directory, dirs_exist_ok=True)
    _run([npm, "ci", "--ignore-scripts", "--omit=dev", "--no-audit", "--no-fund"], directory, "npm ci")
    _run([npm, "run", "build"], directory, "vite build")


def _run(command: Sequence[str], directory: Path, name: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603  # npm and node, found on the PATH
            command, cwd=directory, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"the page cannot be built: {name} did not run ({reason_of(error)})") from error
    if done.returncode != 0:
        said = " ".join(line.removeprefix("npm error ") for line in (done.stderr or done.stdout).splitlines())
        raise ConfigError(f"the page cannot be built: {name} failed ({reason_of(Exception(said))})")
    return done.stdout
