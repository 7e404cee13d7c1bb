"""How a client's program is told what to do, and answers; it imports the standard library alone.

    python -m benchmarks.clients.programs.NAME JOB ANSWERS

JOB is a JSON list of cases, each {"id", "package", "call", "arguments"}. For each case one line of JSON is appended to
ANSWERS: its id with "began" before it is tried, and then with what the call returned, or "refused" and the message of
what was raised. So a program that dies says on which case. Programs in JavaScript do the same (`protocol.mjs`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(opened: Callable[[str], Any]) -> None:
    """Answer the cases of the command line. opened: from the path of a package to an object that has the calls."""
    job, answers = map(Path, sys.argv[1:3])
    client, package = None, None
    with answers.open("a", encoding="utf-8") as file:

        def say(**values: object) -> None:
            file.write(json.dumps(values) + "\n")
            file.flush()

        for case in json.loads(job.read_text(encoding="utf-8")):
            say(id=case["id"], began=True)
            try:
                if case["package"] != package:
                    client, package = None, None  # whose memory is free before the next is opened
                    client, package = opened(case["package"]), case["package"]
                say(id=case["id"], **getattr(client, case["call"])(**case["arguments"]))
            except Exception as error:  # whatever a client raises is its refusal
                say(id=case["id"], refused=f"{type(error).__name__}: {error}")
