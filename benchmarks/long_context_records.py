"""What `benchmarks.long_context` is asked to measure, and what it has measured."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.long_context_reading import Part
from expe_edge.package.directory import MODEL_FILE
from expe_edge.quality.recall import Grid
from expe_edge.quality.scoring import Ids, PackageScorer

#: What is summed over the tokens between two lengths.
SUMMED = ("tokens", "nll", "kl", "top1")


@dataclass(frozen=True)
class Settings:
    """What is measured.

    lengths: of texts in tokens, rising, multiples of `PREFILL_CHUNK`, two of them at least apart. decoded: tokens
    before each that are read one by one. threads: of a package. chunk: tokens of a run. grid: of recall.
    """

    lengths: tuple[int, ...]
    decoded: int
    threads: int
    chunk: int
    grid: Grid

    @property
    def steps(self) -> list[tuple[int, int]]:
        """Each length, after the one before it."""
        return list(pairwise([0, *self.lengths]))


class Records:
    """What has been measured, in a file that is replaced whole after each addition.

    reading: by run, text and lengths (see `run_of`, `digest_of`, `between`), the fields of `Measured`. answers: by
    package and text (see `asked_of`), those of `Predictions` for the answer's tokens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.reading: dict[str, dict[str, Any]] = found.get("reading", {})
        self.answers: dict[str, dict[str, Any]] = found.get("answers", {})

    def save(self) -> None:
        """Write all."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps({"reading": self.reading, "answers": self.answers}) + "\n", encoding="utf-8")
        partial.replace(self.path)


@dataclass
class Measured:
    """What one package made of one text between two lengths.

    sums: of `SUMMED`. prefill, decode: seconds of every whole chunk, and of every token read by itself. prefill_ratio,
    decode_ratio: the same over the first package's. seconds: of all runs over many tokens. opened, peak: bytes that the
    process held before it read, and most until the length.
    """

    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMMED, 0.0))
    prefill: list[float] = field(default_factory=list)
    prefill_ratio: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    decode_ratio: list[float] = field(default_factory=list)
    seconds: float = 0.0
    opened: int = 0
    peak: int = 0

    def add(self, part: Part, first: Part, measures: dict[str, Any]) -> None:
        """Add a chunk that the first package has read as `first`."""
        for name in SUMMED:
            self.sums[name] += float(measures[name].sum())
        self.seconds, self.peak = self.seconds + part.prefill, part.peak
        if not part.decode:
            self.prefill.append(part.prefill)
            self.prefill_ratio.append(part.prefill / first.prefill)
        self.decode += part.decode
        self.decode_ratio += [own / its for own, its in zip(part.decode, first.decode, strict=True)]


def digest_of(text: Ids) -> str:
    """Name a text."""
    return hashlib.sha256(text.tobytes()).hexdigest()[:16]


def between(begin: int, end: int) -> str:
    """Name two lengths."""
    return f"{begin}-{end}"


def _graph_of(scorer: PackageScorer) -> str:
    return scorer.session.package.manifest.files[MODEL_FILE][:16]


def asked_of(scorer: PackageScorer, settings: Settings) -> str:
    """Name a package, by what its graph is, and the setting that its answers depend on."""
    return f"{_graph_of(scorer)}, chunks of {settings.chunk}"


def run_of(scorer: PackageScorer, first: PackageScorer, settings: Settings) -> str:
    """Name a package, read beside another, and the settings that its seconds depend on."""
    return (
        f"{asked_of(scorer, settings)}, beside {_graph_of(first)}, {settings.threads} threads, "
        f"{settings.decoded} decoded"
    )
