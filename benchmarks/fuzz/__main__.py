"""Changed inputs by the thousand: each must be used, or refused in one line by an error of ours.

    python -m benchmarks.fuzz --seconds 60
    python -m benchmarks.fuzz --seed 0 --case 1234

A case is a function of the seed and its number. Cases run in a process of their own, which is started anew where one
crashes it, hangs for more than ten seconds or asks for more than a gigabyte; each of that is a loss, as is every
exception that is not of the `ExPEEdgeError` family, a message of several lines, and a file left by what was refused.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "EXPE_EDGE_DEBUG": "1"}

import click
import torch

from benchmarks.fuzz.targets import TARGETS
from benchmarks.fuzz.trial import Materials, Trial, innermost
from expe_edge.errors import ExPEEdgeError

#: Seconds that one case may take, and bytes it may add.
LONGEST, LARGEST = 10.0, 2**30
#: Cases of one process: what libraries keep for good is not to add up.
CASES_EACH = 2000
#: Characters of an input that are printed; `--case` prints all.
SHOWN = 600
#: Characters of a line.
WIDEST_LINE = 10_000

USED, REFUSED = "used", "refused"


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `USED`, `REFUSED`, or the name of its loss."""

    case: int
    target: str
    end: str
    where: str = ""
    detail: str = ""
    given: str = ""

    @property
    def lost(self) -> bool:
        return self.end not in (USED, REFUSED)


def target_of(seed: int, case: int, targets: Mapping[str, Any]) -> str:
    """Return the name of the target of a case."""
    return Random(f"{seed}/{case}/target").choice(sorted(targets))


def run_case(
    seed: int, case: int, materials: Materials, folder: Path, targets: Mapping[str, Callable[[Trial], object]]
) -> Outcome:
    """Run one case in an empty `folder`."""
    name = target_of(seed, case, targets)
    trial = Trial(Random(f"{seed}/{case}"), materials, folder)
    end, where, detail = USED, "", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # as NumPy's, which a user would see
            targets[name](trial)
    except ExPEEdgeError as error:
        end = REFUSED
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > WIDEST_LINE:
            end, where, detail = "message", innermost(error), message[:SHOWN]
    except BaseException as error:  # also a panic of Rust's, which is no `Exception`
        end, where, detail = type(error).__name__, innermost(error), traceback.format_exc()[-2 * SHOWN :]
    return Outcome(case, name, end, where, detail, repr(trial.given) if end != REFUSED and end != USED else "")


def work(
    pipe: Connection,
    seed: int,
    cases: range,
    materials: Materials,
    targets: Mapping[str, Callable[[Trial], object]],
) -> None:
    """Run `cases` in this process, sending each outcome; never returns."""
    limit_memory()
    silence(2)  # Rust's panics and onnxruntime's log print there whatever is caught
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=materials.root))
    for case in cases:
        work_folder = folder / "case"
        work_folder.mkdir()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = run_case(seed, case, materials, work_folder, targets)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > LARGEST:
            outcome = Outcome(case, outcome.target, "memory", detail=f"{grown:,} bytes")
        pipe.send(outcome)
        shutil.rmtree(work_folder)
    shutil.rmtree(folder)
    os._exit(0)


def limit_memory() -> None:
    """Let this process ask for `LARGEST` bytes more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LARGEST,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def silence(*descriptors: int) -> None:
    """Send file descriptors nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)


class Worker:
    """A forked process that runs cases, watched from here."""

    def __init__(self, seed: int, cases: range, materials: Materials, targets: Mapping[str, Any]) -> None:
        self.cases, self.seed, self.targets = cases, seed, targets
        fork = multiprocessing.get_context("fork")
        self.pipe, other = fork.Pipe(duplex=False)
        self.process = fork.Process(target=work, args=(other, seed, cases, materials, targets))
        self.process.start()
        other.close()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield outcomes until the cases are through, or one has ended the process."""
        case = self.cases.start
        try:
            for case in self.cases:
                if not self.pipe.poll(LONGEST):
                    yield self._lost(case, "hang")
                    return
                yield self.pipe.recv()
        except EOFError:
            self.process.join()
            yield self._lost(case, f"crash {self.process.exitcode}")

    def _lost(self, case: int, end: str) -> Outcome:
        return Outcome(case, target_of(self.seed, case, self.targets), end)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def fuzz(
    seed: int,
    cases: range,
    seconds: float,
    materials: Materials,
    targets: Mapping[str, Callable[[Trial], object]],
) -> Iterator[Outcome]:
    """Yield the outcomes of `cases`, as many as `seconds` allow."""
    until = time.monotonic() + seconds
    case = cases.start
    while case < cases.stop and time.monotonic() < until:
        worker = Worker(seed, range(case, min(case + CASES_EACH, cases.stop)), materials, targets)
        try:
            for outcome in worker.outcomes():
                case = outcome.case + 1
                yield outcome
                if time.monotonic() > until:
                    break
        finally:
            worker.stop()


def in_a_process(work: Callable[[], object]) -> None:
    """Do `work` in a forked process, so that no thread of a library's is here to be forked."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"exit code {process.exitcode}")


def summary(seed: int, outcomes: list[Outcome], seconds: float) -> dict[str, Any]:
    """Return what was tried and what was lost, each kind of loss once, with the first case that shows it."""
    kinds: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.lost:
            kinds.setdefault((outcome.target, outcome.end, outcome.where), []).append(outcome)
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "tried": len(outcomes),
        "tried_by_target": dict(sorted(Counter(outcome.target for outcome in outcomes).items())),
        "used": sum(outcome.end == USED for outcome in outcomes),
        "refused": sum(outcome.end == REFUSED for outcome in outcomes),
        "lost": sum(outcome.lost for outcome in outcomes),
        "losses": [
            {**asdict(found[0]), "cases": [outcome.case for outcome in found[:20]], "times": len(found)}
            for found in kinds.values()
        ],
    }


def report(result: Mapping[str, Any], *, whole: bool) -> None:
    """Print a result for people."""
    for loss in result["losses"]:
        print(f"lost: {loss['target']}: {loss['end']} {loss['where']}, {loss['times']} times")
        print(f"  again: python -m benchmarks.fuzz --seed {result['seed']} --case {loss['case']}")
        print(f"  input: {loss['given'] if whole else loss['given'][:SHOWN]}")
        print("  " + loss["detail"].strip().replace("\n", "\n  "))
    print(
        f"{result['tried']} cases tried in {result['seconds']} s: {result['used']} used, {result['refused']} refused, "
        f"{result['lost']} lost ({len(result['losses'])} kinds)"
    )


@click.command()
@click.option("--cases", default=100_000, show_default=True)
@click.option("--seconds", default=float("inf"), help="Stop after so many.  [default: after all cases]")
@click.option("--seed", default=0, show_default=True)
@click.option("--case", type=int, help="Run this one alone, and print all of its input.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the result there.")
def main(cases: int, seconds: float, seed: int, case: int | None, json_file: Path | None) -> None:
    """Try changed inputs of every kind; exit code 1 where one is neither used nor refused."""
    numbers = range(cases) if case is None else range(case, case + 1)
    with tempfile.TemporaryDirectory() as root:
        materials = Materials(Path(root))
        in_a_process(lambda: Materials.make(materials.root))
        began = time.monotonic()
        outcomes = list(fuzz(seed, numbers, seconds, materials, TARGETS))
        result = summary(seed, outcomes, time.monotonic() - began)
    report(result, whole=case is not None)
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if result["lost"] else 0)


if __name__ == "__main__":
    main()
