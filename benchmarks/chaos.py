"""Kills `train`, `export` and `quantize` at random moments, by SIGKILL and by Ctrl-C, and looks at what is left.

    python -m benchmarks.chaos --seconds 60
    python -m benchmarks.chaos --seed 0 --kill 123

After a kill what stands at --out must be what stood there before, whole, or what was to be, whole, or nothing that is
taken for either. The next run must then do all that the killed one was to do and leave nothing of it behind; a training
run that is resumed must end with the weights, bit for bit, of one that nobody stopped. Ctrl-C must be obeyed within ten
seconds and be answered in one line.

Moments are random times over the length of an undisturbed run, or, every other time, the moment before a random change
to a file or folder. Runs are forked from a process that has imported everything: starting takes longer than running.
"""

from __future__ import annotations

import functools
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import click
import torch

from expe_edge.cli.main import main as command_line
from expe_edge.errors import CheckpointError, ExPEEdgeError
from expe_edge.export import exporter
from expe_edge.package.directory import MODEL_FILE, file_hash, read_package
from expe_edge.training import run as training
from expe_edge.training.checkpoint import load_checkpoint
from expe_edge.training.settings import WEIGHTS_FILE
from tests.small import write_documents

#: Seconds within which Ctrl-C is obeyed.
PROMPT = 10.0
#: What Python reports of a change to files before it makes it.
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate")
SIZES = (
    *("--vocab-size", "300", "--training-length", "16", "--hidden-size", "32", "--num-hidden-layers", "1"),
    *("--num-attention-heads", "4", "--batch-size", "2", "--warmup-steps", "0"),
    *("--log-every", "1", "--save-every", "1"),
)
PRECISIONS = ("--precision", "float32", "--precision", "int8-dynamic")


@dataclass(frozen=True)
class Moment:
    """When a run is stopped, and by which signal: after some seconds, or before a change to files, counted from 1."""

    signal: int
    seconds: float | None = None
    change: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a run ended. code: its exit code, negative for the signal it died of. changes: that it made to files."""

    code: int
    stderr: str
    seconds: float
    answered: float
    changes: int


def run(arguments: Sequence[str], stderr: Path, moment: Moment | None = None) -> Ended:
    """Run a command in a forked process, stopped at `moment`, and wait for its end."""
    counter = mmap.mmap(-1, 8)
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        _become(arguments, stderr, counter, moment)
    if moment is not None and moment.seconds is not None:
        time.sleep(moment.seconds)
        os.kill(process, moment.signal)  # whoever has ended is not yet waited for, so it is still this process
    sent = time.monotonic()
    status = _wait(process, PROMPT if moment and moment.seconds is not None else 60.0)
    now = time.monotonic()
    (changes,) = struct.unpack("q", counter[:8])
    return Ended(status, stderr.read_text(encoding="utf-8", errors="replace"), now - began, now - sent, changes)


def _become(arguments: Sequence[str], stderr: Path, counter: mmap.mmap, moment: Moment | None) -> None:
    """Be the command; never returns."""
    code = 70
    try:
        for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, str(stderr))):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), descriptor)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        sys.addaudithook(functools.partial(_count, counter, moment))
        command_line(list(arguments), prog_name="expe-edge")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        os._exit(code)


def _count(counter: mmap.mmap, moment: Moment | None, event: str, arguments: tuple[Any, ...]) -> None:
    """Count changes to files; before the one that `moment` names, send its signal."""
    opened_to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if event not in CHANGES and not opened_to_write:
        return
    (count,) = struct.unpack("q", counter[:8])
    counter[:8] = struct.pack("q", count + 1)
    if moment is not None and moment.change == count + 1:
        os.kill(os.getpid(), moment.signal)


def _wait(process: int, seconds: float) -> int:
    """Return how a process ended; one that takes longer is killed, and reported as such by `Lost`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    raise LostError(f"still running after {seconds} seconds")


class LostError(Exception):
    """What a kill has done that it must not."""


def require(holds: bool, loss: str) -> None:
    """Raise `LostError` unless it holds."""
    if not holds:
        raise LostError(loss)


@dataclass(frozen=True)
class Scenario:
    """A command to be killed.

    arguments: its command line, which writes to `place/out`. before: makes what stands in `place` when it starts.
    identities: returns what of `out` must be old or new, by name. follow: makes the next run, or the next two.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    before: Callable[[Path], None]
    identities: Callable[[Path], dict[str, str]]
    follow: Callable[[Scenario, Path], None]


def weights_of(place: Path) -> dict[str, str]:
    """Return the hash of a finished run's weights, which must load; nothing of an unfinished one."""
    out = place / "out"
    if not (out / WEIGHTS_FILE).exists():
        try:
            load_checkpoint(out)
        except CheckpointError:
            return {}
        raise LostError("a checkpoint without weights was loaded")
    load_checkpoint(out)
    return {"out": file_hash(out / WEIGHTS_FILE)}


def packages_of(place: Path) -> dict[str, str]:
    """Return the hash of the graph of every package, each of which must be whole."""
    found = sorted((place / "out").iterdir()) if (place / "out").is_dir() else []
    return {path.name: read_package(path).manifest.files[MODEL_FILE] for path in found if path.name[0] != "."}


def finish_training(scenario: Scenario, place: Path) -> None:
    """Go on with a killed run; start it anew, as the message says, where it had no checkpoint yet."""
    given = scenario.arguments(place)
    if "--resume" not in given and weights_of(place):  # what stood there still does, or the run was through
        require_success(run([*given, "--force"], place.with_name("again.txt")))
        return
    arguments = [argument for argument in given if argument not in ("--force", "--resume")]
    resumed = run([*arguments, "--resume"], place.with_name("again.txt"))
    if resumed.code == 0:
        return
    require("drop --resume" in resumed.stderr, f"--resume: exit {resumed.code}: {resumed.stderr}")
    require_success(run([*arguments, "--force"], place.with_name("again.txt")))


def write_again(scenario: Scenario, place: Path) -> None:
    """Give the same command again, to replace what is there."""
    require_success(run([*scenario.arguments(place), "--force"], place.with_name("again.txt")))


def require_success(ended: Ended) -> None:
    """Raise `LostError` unless the run that follows a killed one ended well."""
    require(ended.code == 0, f"the next run: exit {ended.code}: {ended.stderr}")


def names(place: Path) -> list[str]:
    """Return the names of all that stands in `place`, but for what Trainer keeps of its steps."""
    found = (path.relative_to(place) for path in place.rglob("*"))
    return sorted(str(path) for path in found if "trainer" not in path.parts)


class Chaos:
    """The scenarios, and what each leaves when nobody stops it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.materials = root / "materials"
        self.scenarios = list(self._scenarios())
        self.expected: dict[str, tuple[dict[str, str], list[str], Ended]] = {}

    def make_materials(self) -> None:
        """Make the text, two checkpoints of other seeds and a package of each."""
        text = self.materials / "text"
        text.mkdir(parents=True)
        write_documents(text)
        for seed in (0, 1):
            self._make(f"checkpoint-{seed}", self._train(str(seed), steps=2))
            exported = ["export", str(self.materials / f"checkpoint-{seed}"), *PRECISIONS]
            self._make(f"packages-{seed}", exported)

    def _make(self, name: str, arguments: list[str]) -> None:
        ended = run([*arguments, "--out", str(self.materials / name)], self.root / "materials.txt")
        require(ended.code == 0, f"{name}: {ended.stderr}")

    def _train(self, seed: str, steps: int) -> list[str]:
        data = ("--data", str(self.materials / "text"), "--seed", seed, "--max-steps", str(steps))
        return ["train", *SIZES, *data]

    def _scenarios(self) -> list[Scenario]:
        checkpoint = str(self.materials / "checkpoint-0")
        package = str(self.materials / "packages-0" / "float32")

        def fresh(command: list[str]) -> Callable[[Path], list[str]]:
            return lambda place: [*command, "--out", str(place / "out")]

        def over(command: list[str]) -> Callable[[Path], list[str]]:
            return lambda place: [*command, "--out", str(place / "out"), "--force"]

        def old(name: str) -> Callable[[Path], None]:
            def copy(place: Path) -> None:
                shutil.copytree(self.materials / name, place / "out")

            return copy

        def nothing(place: Path) -> None:
            del place

        def resume(place: Path) -> list[str]:
            return [*self._train("0", steps=4), "--out", str(place / "out"), "--resume"]

        train, export = self._train("0", steps=3), ["export", checkpoint, *PRECISIONS]
        quantize = ["quantize", package, "--precision", "int8-dynamic"]
        return [
            Scenario("train", fresh(train), nothing, weights_of, finish_training),
            Scenario("train --force", over(train), old("checkpoint-1"), weights_of, finish_training),
            Scenario("train --resume", resume, old("checkpoint-0"), weights_of, finish_training),
            Scenario("export", fresh(export), nothing, packages_of, write_again),
            Scenario("export --force", over(export), old("packages-1"), packages_of, write_again),
            Scenario("quantize", fresh(quantize), nothing, packages_of, write_again),
            Scenario("quantize --force", over(quantize), old("packages-1"), packages_of, write_again),
        ]

    def place(self, scenario: Scenario) -> Path:
        """Return a folder as it is before the command."""
        place = self.root / "place"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        scenario.before(place)
        return place

    def undisturbed(self, scenario: Scenario) -> tuple[dict[str, str], list[str], Ended]:
        """Return what a run that nobody stops leaves, and how it went."""
        if scenario.name not in self.expected:
            place = self.place(scenario)
            ended = run(scenario.arguments(place), self.root / "first.txt")
            require(ended.code == 0, f"{scenario.name}: {ended.stderr}")
            self.expected[scenario.name] = (scenario.identities(place), names(place), ended)
        return self.expected[scenario.name]

    def kill(self, seed: int, number: int) -> dict[str, Any]:
        """Kill one run; return what was done, and under `lost` what was lost by it, or None."""
        random = Random(f"{seed}/{number}")
        scenario = self.scenarios[number % len(self.scenarios)]
        expected = self.undisturbed(scenario)
        moment = draw_moment(random, expected[2])
        kept = {"kill": number, "command": scenario.name, "moment": asdict(moment)}
        try:
            self._kill(scenario, moment, expected)
        except (LostError, ExPEEdgeError) as error:
            return {**kept, "lost": f"{type(error).__name__}: {error}", "left": names(self.root / "place")}
        return {**kept, "lost": None}

    def _kill(self, scenario: Scenario, moment: Moment, expected: tuple[dict[str, str], list[str], Ended]) -> None:
        wanted, left, _ = expected
        place = self.place(scenario)
        before = scenario.identities(place)
        ended = run(scenario.arguments(place), place.with_name("killed.txt"), moment)
        if moment.signal == signal.SIGINT:
            require_obeyed(ended)
        for name, identity in scenario.identities(place).items():
            require(identity in (before.get(name), wanted.get(name)), f"{name} is neither the old one nor the new one")
        scenario.follow(scenario, place)
        require(scenario.identities(place) == wanted, "the next run made something else")
        require(names(place) == left, f"left behind: {sorted(set(names(place)) ^ set(left))}")


def require_obeyed(ended: Ended) -> None:
    """Raise `LostError` unless a run that got Ctrl-C said so in one line, or had come to its end."""
    if ended.code == 0:
        return
    lines = ended.stderr.splitlines()
    require(ended.code == 130, f"Ctrl-C: exit {ended.code}: {ended.stderr[-2000:]}")
    require(lines[-1:] == ["interrupted"], f"Ctrl-C: the last line is {lines[-1:]}")
    require("Traceback" not in ended.stderr, f"Ctrl-C: {ended.stderr[-2000:]}")


def draw_moment(random: Random, undisturbed: Ended) -> Moment:
    """Draw a signal, and a time or a change to files."""
    number = random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGINT))
    if random.random() < 0.5:
        return Moment(number, seconds=random.uniform(0, undisturbed.seconds))
    return Moment(number, change=random.randint(1, undisturbed.changes))


@click.command()
@click.option("--kills", default=1000, show_default=True)
@click.option("--seconds", default=float("inf"), help="Stop after so many.  [default: after all kills]")
@click.option("--seed", default=0, show_default=True)
@click.option("--kill", "one", type=int, help="Do this one alone.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result there.")
def main(kills: int, seconds: float, seed: int, one: int | None, json_file: Path | None) -> None:
    """Kill runs at random moments; exit code 1 where anything is lost by it."""
    numbers = range(kills) if one is None else range(one, one + 1)
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        chaos = Chaos(Path(root))
        chaos.make_materials()
        began = time.monotonic()
        for number in numbers:
            if time.monotonic() - began > seconds:
                break
            done.append(chaos.kill(seed, number))
            if done[-1]["lost"]:
                print(
                    f"lost: {json.dumps(done[-1])}\n  again: python -m benchmarks.chaos --seed {seed} --kill {number}"
                )
    lost = [each for each in done if each["lost"]]
    result = {
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "kills": len(done),
        "by_command": {each.name: sum(kill["command"] == each.name for kill in done) for each in chaos.scenarios},
        "lost": len(lost),
        "losses": lost,
    }
    print(f"{len(done)} runs killed in {result['seconds']} s, {len(lost)} lost something")
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if lost else 0)


#: Imported for the runs that are forked.
PRELOADED = (exporter, training)

if __name__ == "__main__":
    main()
