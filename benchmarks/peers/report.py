"""What `benchmarks.peers` has measured, as tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from expe_edge.results import Result
from expe_edge.speed.measuring import quartiles

PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Timings(Result):
    """A contender at one depth: tokens a second in every turn, of reading a prompt and of decoding.

    bits: of the weights. ours: whether it is our runtime.
    """

    contender: str
    bits: int
    ours: bool
    depth: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def rates(self, phase: str) -> tuple[float, ...]:
        """Return those of `prefill` or `decode`."""
        return self.prefill if phase == "prefill" else self.decode


Column = tuple[str, int]


def columns(timings: Sequence[Timings]) -> list[Column]:
    """Return phases and depths, those of one phase together."""
    depths = sorted({each.depth for each in timings})
    return [(phase, depth) for phase in PHASES for depth in depths]


def best(timings: Sequence[Timings], column: Column, *, ours: bool, bits: int | None = None) -> Timings | None:
    """Return the fastest of ours, or of the others, with weights of so many bits; None where there is none."""
    phase, depth = column
    among = [
        each for each in timings if each.depth == depth and each.ours == ours and (bits is None or each.bits == bits)
    ]
    return max(among, key=lambda each: float(np.median(each.rates(phase))), default=None)


def ratio(of: Timings, against: Timings, phase: str) -> list[float]:
    """Return quartiles over turns of one's rate over the other's in the same turn."""
    return quartiles(np.divide(of.rates(phase), against.rates(phase)))


def speed_table(timings: Sequence[Timings], prefill: int) -> str:
    """Lay out tokens a second, with quartiles, and the ratio to the fastest peer of each column, which is bold."""
    places = columns(timings)
    fastest = {place: best(timings, place, ours=False) for place in places}
    by_name: dict[str, dict[int, Timings]] = {}
    for each in timings:
        by_name.setdefault(each.contender, {})[each.depth] = each
    heads = [f"prefill {prefill} at {d:,}" if phase == "prefill" else f"decode at {d:,}" for phase, d in places]
    rows = [[name, *(_cell(found, place, fastest[place]) for place in places)] for name, found in by_name.items()]
    return "\n".join(_markdown(["tokens/s, × the best peer", *heads], rows))


def _cell(found: Mapping[int, Timings], place: Column, fastest: Timings | None) -> str:
    phase, depth = place
    if depth not in found:
        return ""
    low, median, high = quartiles(found[depth].rates(phase))
    digits = 0 if median >= 100 else 1
    text = f"{median:,.{digits}f} ({low:,.{digits}f}–{high:,.{digits}f})"
    if fastest is None:
        return text
    if found[depth] is fastest:
        return f"**{text}**"
    return f"{text} {ratio(found[depth], fastest, phase)[1]:.2f}×"


def ratio_table(timings: Sequence[Timings]) -> str:
    """Lay out our fastest package over the fastest peer, of all weights and of those of 8 and 4 bits."""
    places = columns(timings)
    rows = []
    for label, bits in (("any weights", None), ("8-bit weights", 8), ("4-bit weights", 4)):
        cells = []
        for place in places:
            ours, theirs = (best(timings, place, ours=own, bits=bits) for own in (True, False))
            if ours is None or theirs is None:
                cells.append("")
                continue
            low, median, high = ratio(ours, theirs, place[0])
            cells.append(f"{median:.2f} ({low:.2f}–{high:.2f})")
        rows.append([label, *cells])
    heads = [f"{phase} at {depth:,}" for phase, depth in places]
    return "\n".join(_markdown(["our best over the best peer", *heads], rows))


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for cells in (heads, ["---"] * len(heads), *rows):
        yield "| " + " | ".join(cells) + " |"
