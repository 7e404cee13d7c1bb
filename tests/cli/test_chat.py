"""Turns in the terminal: one text that goes on, commands, Ctrl-C and the end of the input."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from expe_edge.runtime import Generator
from tests.command_line import command, succeed

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="module")
def generator(packages: Path) -> Generator:
    return Generator.load(packages / "float32")


def chat(packages: Path, typed: str, *options: object) -> tuple[str, list[str]]:
    """Type lines; return what was printed and what was noted."""
    given = ("--max-new-tokens", "12", *options)
    result = succeed("generate", packages / "float32", "--interactive", *given, stdin=typed.encode())
    return result.stdout, result.stderr.splitlines()


def test_turns_go_on_with_one_text(packages: Path, generator: Generator) -> None:
    text, printed = "the ", ["the "]
    for turn in ("the \nold tree\n", "river\n", ""):
        text = turn if len(printed) == 1 else text + ("\n" + turn if turn else "")
        (answer,) = generator.generate([text], max_new_tokens=12)
        text += answer.text
        printed.append(answer.text + "\n")

    found, noted = chat(packages, "old tree\nriver\n\n", "--prompt", "the ")

    assert found == "".join(printed)
    assert noted == []


def test_a_turn_reads_only_what_it_adds(packages: Path) -> None:
    _, noted = chat(packages, "old tree\nriver\n", "--verbose")

    _, first, second = noted
    assert "read before" not in first
    match = re.match(r"prompt: (\d+) tokens, (\d+) of them read before", second)
    assert match
    assert int(match[2]) >= 0.7 * int(match[1])


def test_a_template_makes_turns(packages: Path, generator: Generator) -> None:
    first = "Q: why\nA:"
    (answer,) = generator.generate([first], max_new_tokens=12, stop=" the")
    second = f"{first}{answer.text}Q: how\nA:"
    (other,) = generator.generate([second], max_new_tokens=12, stop=" the")

    found, _ = chat(packages, "why\nhow\n", "--template", "Q: {}\nA:", "--stop", " the")

    assert found == f"{answer.text}\n{other.text}\n"


def test_turns_are_taken_back(packages: Path) -> None:
    once, _ = chat(packages, "old tree\nriver\n")
    again, noted = chat(packages, "old tree\nwood\n/undo\nriver\n/reset\nold tree\nriver\n/reset\n/undo\n")
    first, second = once.splitlines(keepends=True)[0], once[len(once.splitlines(keepends=True)[0]) :]

    assert again.startswith(first)
    assert again.count(once) >= 1
    assert again.endswith(once)
    assert second in again
    assert noted == [
        "the last turn is taken back",
        "all turns are taken back",
        "all turns are taken back",
        "there is no turn to take back",
    ]


def test_a_turn_that_is_no_text(packages: Path) -> None:
    """Whether Python refuses its bytes itself or hands them on, which the locale decides."""
    given = ("generate", packages / "float32", "--interactive", "--max-new-tokens", "2")
    for errors, status in (("strict", 2), ("surrogateescape", 0)):
        environment = {**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"}
        done = subprocess.run(
            command(*given), input=b"old tree\n\xff\n", capture_output=True, env=environment, timeout=120
        )
        assert done.returncode == status
        (said,) = done.stderr.decode().splitlines()
        assert said in (
            "Error: standard input: not UTF-8 text (invalid start byte)",
            "Error: the prompt holds half a surrogate pair, which is no text",
        )


def test_a_name_that_cannot_be_saved_under(packages: Path) -> None:
    """The text goes on, and can be saved under another."""
    _, noted = chat(packages, "old tree\n/save ~no-such-user/x\n/save a\0b\n/save text.txt\n")

    assert [line.partition(":")[0] for line in noted] == ["~no-such-user/x", "a\\x00b", "wrote text.txt"]


def test_the_text_is_saved_whole(packages: Path) -> None:
    found, noted = chat(
        packages, "old tree\n/save text.txt\n/save no/text.txt\n/sing\n//x\n/save more.txt\n", "--prompt", "a"
    )

    assert noted == [
        "wrote text.txt",
        "no/text.txt: No such file or directory",
        "/undo takes back the last turn, /reset all, /save FILE writes the text; // begins a line with a slash",
        "wrote more.txt",
    ]
    text, more = Path("text.txt").read_text(), Path("more.txt").read_text()
    answer = text.removeprefix("a\nold tree\n")
    assert text == f"a\nold tree\n{answer}"
    other = found.removeprefix(f"a{answer}\n").removesuffix("\n")
    assert found == f"a{answer}\n{other}\n"
    assert more == f"{text}\n/x\n{other}"


def test_a_turn_that_cannot_be_is_refused_and_the_chat_goes_on(packages: Path) -> None:
    found, noted = chat(packages, "\nthe old\nriver runs\nthe\n", "--cache-length", "24")

    assert noted[0] == "Error: there is no text yet; type some"
    assert "need a cache of" in noted[1]
    assert found.count("\n") >= 4


def test_answers_follow_a_constraint(packages: Path) -> None:
    found, _ = chat(packages, "is it\nand now\n", "--choice", "yes", "--choice", "no")

    assert re.fullmatch(r"(yes|no)\n(yes|no)\n", found)


@contextmanager
def terminal(packages: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A chat in a terminal of its own; what is to be typed and read goes through the file number."""
    ours, theirs = pty.openpty()
    line = command("generate", packages / "float32", "-i", *options)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit its neglect
    try:
        process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    os.close(theirs)
    try:
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(ours: int, pattern: str, before: str = "") -> str:
    """Read until the pattern has been printed behind `before`; return all of it."""
    found, deadline = before, time.monotonic() + 60
    while not re.search(pattern, found[len(before) :]):
        assert time.monotonic() < deadline, found
        found += os.read(ours, 4096).decode(errors="replace")
    return found


def wait_for_input(process: subprocess.Popen[bytes]) -> None:
    """Wait until a process that has printed its prompt sleeps.

    Python's readline misses a signal between printing a prompt and waiting for a key, until the next key comes.
    """
    stat, asleep, deadline = Path(f"/proc/{process.pid}/stat"), 0, time.monotonic() + 60
    while asleep < 3:
        assert time.monotonic() < deadline
        state = stat.read_text().rpartition(")")[2].split()[0]
        asleep = asleep + 1 if state == "S" else 0
        time.sleep(0.05)


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(packages: Path) -> None:
    with terminal(packages, "--max-new-tokens", "1000000", "--stop-token", "0", "--logit-bias", "0=-100") as (
        process,
        ours,
    ):
        said = read_until(ours, "> $")
        assert "Ctrl-C stops an answer, Ctrl-D leaves" in said
        os.write(ours, b"the old tree\n")
        read_until(ours, "tree\r\n.{40}")

        process.send_signal(signal.SIGINT)
        said = read_until(ours, r"\r\n> $")
        wait_for_input(process)
        process.send_signal(signal.SIGINT)  # while nothing is answered: the line is taken back
        read_until(ours, r"\r\n> $")
        os.write(ours, b"/save said.txt\n")
        read_until(ours, r"wrote said.txt\r\n> $")
        os.write(ours, b"\x04")

        assert process.wait(timeout=60) == 0
    text = Path("said.txt").read_text()
    assert text.startswith("the old tree\n")
    assert len(text) > 50
