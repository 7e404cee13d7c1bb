"""Seeded changes to valid inputs, for `benchmarks.fuzz`: values of JSON, text and bytes that nobody would write."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from random import Random
from typing import Any

#: Values of every kind at the edges of what a number, a text, a name or a list can be.
ODD_NUMBERS = (
    *(0, -1, 1, 2, 3, 7, 255, 256, 2**20, 2**24, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64),
    *(-(2**63), -(2**64), 10**30, 10**400, 0.0, -0.0, 0.5, 1.5, -1.5, 1e-38, 1e-320, 5e-324, 1e38, 1e300, 1e308),
    *(math.nan, math.inf, -math.inf),
)
ODD_TEXTS = (
    *("", " ", "0", "1e3", "null", "\0", "\n", "a\nb", "\r", "\x1b[2J", "\u202e", "\ufeff", "\ud800", "a\udfff", "é"),
    *(
        "日本語",
        "🙂",
        "x" * 5000,
        "%s{}",
        "[bold]",
        "../x",
        "/etc/passwd",
        "a/b",
        ".",
        "..",
        "~",
        "*",
        "auto",
        "float32",
    ),
    *("expe", "exqpe", "rotary", "<|endoftext|>"),
)
ODD_VALUES: tuple[Any, ...] = (
    *ODD_NUMBERS,
    *ODD_TEXTS,
    *(None, True, False, [], {}, [[]], [None], [0], ["a"], {"": 0}, {"a": {}}, [1.0, math.nan], [0, 1, 2]),
)
#: Pieces that text formats stumble over.
ODD_BYTES = (
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\r", b"\r\n", b"\x85", b"\xed\xa0\x80", b"\x1a"),
    *(b"{", b"}", b"[", b"]", b'"', b"\\", b"\\u", b"\\ud800", b",", b":", b"- ", b"\t", b"#", b"&a ", b"*a", b"!!"),
    *(b"NaN", b"Infinity", b"1e999", b"-0", b"9" * 400, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null", b"true"),
)
#: Lists in lists, so deep that a recursive reader runs out of stack, or nearly.
DEPTHS = (50, 200, 350)

#: Where a value is in a nested one: keys and indices from the outside in.
Path = tuple[Any, ...]


def odd_value(random: Random) -> Any:
    """Draw a value of any kind, seldom a very deep one."""
    if random.random() < 0.03:
        return nested(random.choice(DEPTHS), as_list=random.random() < 0.5)
    return copy.deepcopy(random.choice(ODD_VALUES))


def nested(depth: int, *, as_list: bool) -> Any:
    """Return lists in lists, or mappings in mappings."""
    value: Any = []
    for _ in range(depth):
        value = [value] if as_list else {"a": value}
    return value


def changed(value: Any, random: Random) -> Any:
    """Return a copy of a JSON value with one to three places changed."""
    value = copy.deepcopy(value)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(paths(value))
        if not places:
            return odd_value(random)
        _change(value, random.choice(places), random)
    return value


def paths(value: Any, before: Path = ()) -> Iterator[Path]:
    """Yield the path of everything inside `value`, but for all beyond the hundredth of a long list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:100]) if isinstance(value, list) else ()
    for key, item in items:
        yield (*before, key)
        if len(before) < 8:
            yield from paths(item, (*before, key))


def _change(value: Any, path: Path, random: Random) -> None:
    """Replace, tweak, wrap, remove, rename or add to what is at `path`."""
    for key in path[:-1]:
        value = value[key]
    key = path[-1]
    kind = random.choice(("replace", "replace", "replace", "tweak", "tweak", "wrap", "remove", "rename", "add"))
    if kind == "replace":
        value[key] = odd_value(random)
    elif kind == "tweak":
        value[key] = _tweaked(value[key], random)
    elif kind == "wrap":
        value[key] = random.choice(([value[key]], {"a": value[key]}, str(value[key])[:1000]))
    elif kind == "remove":
        del value[key]
    elif isinstance(value, dict):
        new = random.choice((*ODD_TEXTS, f"{key}s", str(key)[:-1]))
        value[new] = value.pop(key) if kind == "rename" else odd_value(random)
    else:
        value.insert(random.randint(0, len(value)), odd_value(random))


def _tweaked(value: Any, random: Random) -> Any:
    """Return a value of the same kind."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        near = (value + 1, value - 1, -value, value * 2, value * 10**6, value // 3, 0)
        return random.choice(near if abs(value) > sys.float_info.max else (*near, value / 3, float(value)))
    if isinstance(value, str):
        return bytes_changed(value.encode(errors="replace"), random).decode(errors="replace")
    if isinstance(value, list):
        return value * 2 if len(value) < 1000 else value[:1]
    return {**value, "a": odd_value(random)}


def bytes_changed(content: bytes, random: Random) -> bytes:
    """Return bytes with one to three pieces flipped, cut, repeated or put in."""
    for _ in range(random.choice((1, 1, 2, 3))):
        begin = random.randint(0, len(content))
        end = min(begin + random.choice((1, 1, 4, 16, 256)), len(content))
        kind = random.choice(("flip", "flip", "cut", "truncate", "repeat", "insert", "insert", "noise"))
        if kind == "flip" and content:
            place = min(begin, len(content) - 1)
            content = content[:place] + bytes([content[place] ^ 1 << random.randrange(8)]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:begin] + content[end:]
        elif kind == "truncate":
            content = content[:begin]
        elif kind == "repeat":
            content = content[:end] + content[begin:end] * random.choice((1, 2, 100)) + content[end:]
        elif kind == "insert":
            content = content[:begin] + random.choice(ODD_BYTES) + content[begin:]
        else:
            content = content[:begin] + random.randbytes(end - begin) + content[end:]
    return content


def json_changed(content: bytes, random: Random) -> bytes:
    """Return the bytes of a JSON file with values changed, or now and then the bytes themselves."""
    if random.random() < 0.2:
        return bytes_changed(content, random)
    return as_json(changed(json.loads(content), random))


def as_json(value: Any) -> bytes:
    """Return a value as JSON, numbers that JSON does not have included."""
    return json.dumps(value).encode()


def odd_text(random: Random, sample: str) -> str:
    """Draw a text: odd ones, pieces of `sample` and noise, strung together."""
    pieces = []
    for _ in range(random.choice((1, 1, 2, 5))):
        begin = random.randrange(len(sample))
        noise = "".join(chr(random.choice((random.randrange(32), random.randrange(0x110000)))) for _ in range(5))
        pieces.append(random.choice((random.choice(ODD_TEXTS), sample[begin : begin + random.randrange(200)], noise)))
    return "".join(pieces)
