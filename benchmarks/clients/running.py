"""Running a client's program over cases: what it answered, refused or died of."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Where Python programs are started, so that they find each other.
ROOT = Path(__file__).parents[2]
#: Seconds without an answer after which a program is ended.
PATIENCE = 300


@dataclass(frozen=True)
class Program:
    """A client as it is started: a command that takes the paths of a job and of its answers.

    version: of the client. speaks_text: it takes and returns texts, not tokens.
    """

    command: Sequence[str]
    version: str
    speaks_text: bool = False


@dataclass(frozen=True)
class Case:
    """One question to a client: a package, a call of its program and the call's arguments."""

    package: Path
    call: str
    arguments: Mapping[str, Any]


#: What a program said of a case: what its call returned, or {"refused": why}.
Answer = dict[str, Any]


def ask(program: Program, cases: Sequence[Case]) -> Iterator[Answer]:
    """Yield a program's answers, in the order of `cases`. Where it dies, that is the case's, and it starts again."""
    done = 0
    while done < len(cases):
        answers, ending = _run(program, cases[done:])
        yield from answers
        done += len(answers)
        if done < len(cases):
            yield {"refused": ending, "died": True}
            done += 1


def _run(program: Program, cases: Sequence[Case]) -> tuple[list[Answer], str]:
    """Return the answers that a program gave before it ended, and how it did."""
    job = [
        {"id": number, "package": str(case.package.resolve()), "call": case.call, "arguments": dict(case.arguments)}
        for number, case in enumerate(cases)
    ]
    with tempfile.TemporaryDirectory() as directory:
        question, answers = Path(directory, "job.json"), Path(directory, "answers.jsonl")
        question.write_text(json.dumps(job), encoding="utf-8")
        ending = _wait(program, question, answers)
        lines = answers.read_text(encoding="utf-8").splitlines() if answers.is_file() else []
    given = [{key: value for key, value in json.loads(line).items() if key != "id"} for line in lines]
    return [answer for answer in given if "began" not in answer], ending


def _wait(program: Program, question: Path, answers: Path) -> str:
    """Run a program; say how it ended."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [*program.command, str(question), str(answers)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        code = _ended(process, answers)
        log.seek(0)
        last = [line.strip() for line in log.read().splitlines() if line.strip()][-1:]
    return f"it ended with code {code}" + "".join(f": {line}" for line in last)


def _ended(process: subprocess.Popen[bytes], answers: Path) -> int:
    """Wait for a program, which is killed when it has said nothing for `PATIENCE`; return its code."""
    said = -1
    while _runs(process):
        size = answers.stat().st_size if answers.is_file() else 0
        if size == said:
            process.kill()
        said = size
    return process.returncode


def _runs(process: subprocess.Popen[bytes]) -> bool:
    """Wait for `PATIENCE` at most; tell whether a program still runs."""
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        return True
    return False
