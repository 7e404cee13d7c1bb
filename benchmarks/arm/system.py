"""An aarch64 system to run packages in: qemu, Debian's Python for Arm, and wheels, all in one directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tokenizers

from expe_edge.errors import ConfigError

#: Debian's release that it is made of. The qemu of the one before, 7.2, cannot load onnxruntime 1.32.
SUITE, KEYS = "trixie", "/usr/share/keyrings/debian-archive-keyring.gpg"
#: What is unpacked of it, for the machine's own processor and for Arm.
HOST, GUEST = "qemu-user", ("python3", "libstdc++6")
#: What the base install imports, in this environment's versions where they matter.
WHEELS = (
    f"onnxruntime=={ort.__version__}",
    f"numpy=={np.__version__}",
    f"tokenizers=={tokenizers.__version__}",
    "click",
    "rich",
    "flatbuffers",
    "protobuf",
    "packaging",
)
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
#: Where it is looked for, unless `VARIABLE` says it.
DIRECTORY, VARIABLE = Path(".arm"), "EXPE_EDGE_ARM"


@dataclass(frozen=True)
class System:
    """A directory with `host/`, `guest/` and `site/`, as `make` leaves it."""

    directory: Path

    @classmethod
    def find(cls) -> System | None:
        """Return the one that there is; None without, or where it is not whole."""
        system = cls(Path(os.environ.get(VARIABLE, DIRECTORY)).absolute())
        return system if system.qemu.is_file() and (system.directory / "site" / "onnxruntime").is_dir() else None

    @property
    def qemu(self) -> Path:
        """The emulator."""
        return self.directory / "host" / "usr" / "bin" / "qemu-aarch64"

    @property
    def python(self) -> Path:
        """The interpreter for Arm."""
        return (self.directory / "guest" / "usr" / "bin" / "python3").resolve()

    def run(self, arguments: list[str], processor: str) -> str:
        """Run Python for Arm with this repository on its path; return what it prints. processor: as qemu names it."""
        root = Path(__file__).parents[2]
        path = os.pathsep.join([str(root), str(self.directory / "site")])
        environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        places = [self.qemu, "-L", self.directory / "guest", "-cpu", processor, self.python]
        command = [*map(str, places), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return str(done.stdout)

    def make(self) -> None:
        """Download and unpack it all, as no other user than this one.

        Raises:
            ConfigError: this is no Debian, whose packages it is made of.
        """
        for name in ("host", "guest", "site", "wheels"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        self._unpack("amd64", [HOST], "host", alone=True)
        for other in set(self.qemu.parent.glob("qemu-*")) - {self.qemu}:
            other.unlink()
        self._unpack("arm64", list(GUEST), "guest", alone=False)
        loader = self.directory / "guest" / "lib"
        if not loader.exists():
            loader.symlink_to("usr/lib")  # which Debian's installer makes
        version = self.python.name.removeprefix("python")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", f"--python-version={version}"]
        platforms = [f"--platform={platform}" for platform in PLATFORMS]
        wheels = self.directory / "wheels"
        subprocess.run([*pip, *platforms, f"--dest={wheels}", *WHEELS], check=True)
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self.directory / "site")
        for name in ("apt", "wheels"):
            shutil.rmtree(self.directory / name)

    def _unpack(self, architecture: str, packages: list[str], folder: str, *, alone: bool) -> None:
        """Unpack Debian packages; with all that they need, unless `alone`."""
        environment = os.environ | {"APT_CONFIG": str(self._configure(architecture))}
        debs = self.directory / "apt" / architecture / "cache" / "archives"
        subprocess.run(["apt-get", "-qq", "update"], env=environment, check=True)
        if alone:
            subprocess.run(["apt-get", "-qq", "download", *packages], env=environment, cwd=debs, check=True)
        else:
            install = ["apt-get", "-qq", "install", "-y", "--download-only", "--no-install-recommends"]
            subprocess.run([*install, *packages], env=environment, check=True, stdout=subprocess.DEVNULL)
        for deb in debs.glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", deb, self.directory / folder], check=True)

    def _configure(self, architecture: str) -> Path:
        """Write apt's settings for a state of its own, from the mirror that this machine uses."""
        place = self.directory / "apt" / architecture
        for name in ("lists/partial", "cache/archives/partial"):
            (place / name).mkdir(parents=True, exist_ok=True)
        (place / "status").touch()
        (place / "sources.list").write_text(f"{_source()}\n", encoding="utf-8")
        settings = place / "apt.conf"
        settings.write_text(
            f'APT::Architecture "{architecture}"; APT::Architectures {{ "{architecture}"; }};\n'
            f'Dir::State::lists "{place}/lists"; Dir::State::status "{place}/status"; Dir::Cache "{place}/cache";\n'
            f'Dir::Etc::sourcelist "{place}/sources.list"; Dir::Etc::sourceparts "-"; APT::Sandbox::User "";\n',
            encoding="utf-8",
        )
        return settings


def _source() -> str:
    """Return apt's line for `SUITE` on the mirror that this machine has Debian from."""
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Origin: Debian"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = []
    mirrors = [uri for uri in found if "security" not in uri]
    if not mirrors:
        raise ConfigError("there is no Debian here to make an aarch64 system of; run this on one, or in its container")
    return f"deb [signed-by={KEYS}] {mirrors[0]} {SUITE} main"
