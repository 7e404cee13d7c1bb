"""Files of contexts: what is damaged or another package's is refused in one line, and changes nothing."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expe_edge.errors import GenerationError
from expe_edge.runtime import Context, Generator, Window
from expe_edge.runtime.leftovers import ABANDONED


@pytest.fixture
def saved(generator: Generator, tmp_path: Path) -> Path:
    generator.context("The old tree grows").save(tmp_path / "cache")
    return tmp_path / "cache"


def refusal(generator: Generator, path: Path) -> str:
    """Return why a file is refused, which leaves the context as it was."""
    context = generator.context([5, 6])
    with pytest.raises(GenerationError) as caught:
        context.load(path)
    assert context.tokens.tolist() == [5, 6]
    return str(caught.value)


def test_a_file_of_another_package_is_refused(saved: Path, packages: Path) -> None:
    other = Generator.load(packages / "int8-static")

    assert refusal(other, saved) == (
        f"{saved} holds what another package has read: its model is not this one's; name another file"
    )


def test_a_file_of_another_window_is_refused(generator: Generator, saved: Path) -> None:
    with pytest.raises(GenerationError) as caught:
        generator.context(window=Window(32, 2)).load(saved)
    assert str(caught.value) == f"{saved} was written with `window` none, not 32 and `sinks` 2"


@pytest.mark.parametrize("content", [b"", b"no cache", b"expe-edge cache 2\n{}\n", b"\x80\x04pickle"])
def test_what_is_no_cache_is_refused(generator: Generator, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cache").write_bytes(content)

    assert refusal(generator, tmp_path / "cache") == (
        f"{tmp_path / 'cache'} is not a cache of expe-edge; delete it or name another file"
    )


def test_no_file_is_refused(generator: Generator, tmp_path: Path) -> None:
    assert refusal(generator, tmp_path / "none") == (
        f"{tmp_path / 'none'}: the cache cannot be read (No such file or directory)"
    )
    with pytest.raises(GenerationError, match=r"the cache cannot be written \(No such file or directory\)$"):
        generator.context([1]).save(tmp_path / "none" / "cache")


def with_header(content: bytes, **changes: object) -> bytes:
    magic, header, rest = content.split(b"\n", 2)
    return b"\n".join([magic, json.dumps({**json.loads(header), **changes}).encode(), rest])


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "a token": lambda content: content.replace(b"}\n\0", b"}\n\1", 1),
    "no JSON": lambda content: content.replace(b'"held"', b"'held'"),
    "a larger one": lambda content: with_header(content, held=2**23),
    "a negative one": lambda content: with_header(content, held=-1),
    "a digest of none": lambda content: with_header(content, digest="xyz"),
    "one more entry": lambda content: with_header(content, more=1),
    "deep": lambda content: content.split(b"\n", 1)[0] + b"\n" + b"[" * 4000 + b"\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(generator: Generator, saved: Path, damage: str) -> None:
    content = saved.read_bytes()
    damaged = DAMAGES[damage](content)
    assert damaged != content
    saved.write_bytes(damaged)

    assert refusal(generator, saved) == f"{saved}: a damaged cache; delete it or name another file"


def test_no_changed_byte_goes_unnoticed(generator: Generator, saved: Path) -> None:
    content, chosen = saved.read_bytes(), random.Random(0)
    for _ in range(200):
        place = chosen.randrange(len(content))
        saved.write_bytes(content[:place] + bytes([content[place] ^ 1 << chosen.randrange(8)]) + content[place + 1 :])
        refusal(generator, saved)


def test_a_file_is_replaced_only_when_complete(
    generator: Generator, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, context = saved.read_bytes(), generator.context("the")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("expe_edge.runtime.cache.Cache.tensors", full)

    with pytest.raises(GenerationError, match=r"the cache cannot be written \(No space left on device\)$"):
        context.save(saved)

    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_what_a_killed_process_left_is_removed(generator: Generator, saved: Path) -> None:
    left, others = (
        saved.with_name(".cache-0123abcd"),
        [saved.with_name(name) for name in (".cache-own", ".cachf-0123abcd")],
    )
    recent = saved.with_name(".cache-4567cdef")
    before = time.time() - ABANDONED - 60
    for file in (left, recent, *others):
        file.write_bytes(b"half")
    for file in (left, *others):
        os.utime(file, (before, before))

    generator.context("the").save(saved)

    assert sorted(saved.parent.iterdir()) == sorted([saved, recent, *others])


def test_several_may_write_the_same_file_at_once(generator: Generator, saved: Path) -> None:
    """What one of them is writing is nothing that a killed process left to the others."""
    contexts = [generator.context(f"{text} " * 60) for text in ("the old", "tree runs")]
    started, failures = threading.Barrier(len(contexts)), list[GenerationError]()

    def save(context: Context) -> None:
        started.wait()
        try:
            for _ in range(40):
                context.save(saved)
        except GenerationError as error:
            failures.append(error)

    threads = [threading.Thread(target=save, args=(context,)) for context in contexts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert failures == []
    assert list(saved.parent.iterdir()) == [saved]
    read = generator.context()
    read.load(saved)
    assert read.tokens.tolist() in [context.tokens.tolist() for context in contexts]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_what_names_no_file(generator: Generator, name: str) -> None:
    with pytest.raises(GenerationError, match=r"^\.+: the cache cannot be written \(Is a directory\)$"):
        generator.context([1]).save(name)


def test_tokens_that_no_window_can_have_dropped(generator: Generator, tmp_path: Path) -> None:
    """By a file that is whole: who goes on from it would skip as many tokens of a prompt."""
    for window, dropped in ((None, 5), (Window(8, 1), 5)):
        context = generator.context("The old tree", window=window)
        context.cache.histories[0].dropped = dropped
        context.save(tmp_path / "cache")

        with pytest.raises(GenerationError, match=r"a damaged cache; delete it or name another file$"):
            generator.context(window=window).load(tmp_path / "cache")


def test_nothing_is_allocated_on_the_word_of_a_file(
    generator: Generator, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved.write_bytes(with_header(saved.read_bytes(), held=2**24))
    taken, empty = list[int](), np.empty

    def counting(shape: Any, *arguments: Any, **keywords: Any) -> Any:
        array = empty(shape, *arguments, **keywords)
        taken.append(array.nbytes)
        return array

    context = generator.context([5, 6])
    monkeypatch.setattr(np, "empty", counting)
    with pytest.raises(GenerationError, match="a damaged cache"):
        context.load(saved)
    assert sum(taken) < 10_000
