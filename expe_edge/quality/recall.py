"""Recall: how well models answer from what stands far back, and what its standing there is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from expe_edge.divergence import ratio_of_sums
from expe_edge.errors import ConfigError
from expe_edge.kinds import require_choice
from expe_edge.progress import note
from expe_edge.quality.losses import Panel
from expe_edge.quality.needles import PUZZLES, Case, Material, Puzzle, place
from expe_edge.quality.scoring import Ids, Predictions
from expe_edge.results import Result

#: Shares of the text before the needle.
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Recall(Result):
    """One model's answers in one cell of a probe.

    length: tokens of the texts; of `code-definition` the longest distance in the cell. depth: place of the needle, 0 at
    the beginning and 1 before the question; None for `code-definition`. distance: mean, from the evidence's first token
    to the answer's. exact_match: share of cases where every token of the answer is the likeliest prediction, as greedy
    decoding needs. gained: loss of the answer where it does not stand in the text less its loss where it does, nats per
    token of the answer. loss, loss_without: the two. Standard errors are over documents.
    """

    model: str
    probe: str
    length: int
    depth: float | None
    distance: float
    documents: int
    cases: int
    exact_match: float
    exact_match_stderr: float
    gained: float
    gained_stderr: float
    loss: float
    loss_without: float


@dataclass(frozen=True)
class Grid:
    """The cells of recall in filler text.

    probes: of `PUZZLES`. lengths: of the texts in tokens, rising. depths: from 0 to 1. cases: for each cell.

    Raises:
        ConfigError: a probe that is unknown or a depth that is out of range.
    """

    probes: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = DEPTHS
    cases: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for probe in self.probes:
            require_choice("probe", probe, tuple(PUZZLES))
        require_depths(self.depths)

    @property
    def tokens(self) -> int:
        """Tokens of all texts, each with the answer and without."""
        return 2 * len(self.probes) * len(self.depths) * self.cases * sum(self.lengths)


def require_depths(depths: Sequence[float]) -> None:
    """Raise `ConfigError` unless depths rise from 0 to 1 at most."""
    if not depths or depths[0] < 0 or depths[-1] > 1 or list(depths) != sorted(set(depths)):
        given = ",".join(f"{100 * depth:g}" for depth in depths)
        raise ConfigError(f"`depths` {given}: expected rising percentages from 0 to 100, as 0,25,50,75,100")


def needle_cases(
    grid: Grid, documents: Sequence[Ids], tokenizer: Any, skipped: Callable[[int], None] = lambda _: None
) -> Iterator[Case]:
    """Yield the cases of all cells; those that differ in depth alone follow one another.

    Case i is made of document i mod `len(documents)`, its numbers and names of the seed and i alone: they are the same
    at every length and depth. Lengths that a probe does not fit in are left out, with a note.

    Args:
        documents: token ids (T,), each at least `CUE` + `COPIED` tokens longer than the longest of the grid's lengths.
        skipped: called with the tokens of texts that are left out.
    """
    for probe in grid.probes:
        puzzles = {
            (case, depth): PUZZLES[probe](_material(grid, documents, tokenizer, case, depth))
            for case in range(grid.cases)
            for depth in grid.depths
        }
        lengths = _lengths_that_fit(grid.lengths, probe, list(puzzles.values()))
        skipped(2 * len(puzzles) * (sum(grid.lengths) - sum(lengths)))
        for length in lengths:
            for (case, depth), puzzle in puzzles.items():
                document = case % len(documents)
                yield place(probe, puzzle, documents[document][:length], depth, document)


def _material(grid: Grid, documents: Sequence[Ids], tokenizer: Any, case: int, depth: float) -> Material:
    beyond = documents[case % len(documents)][grid.lengths[-1] :]
    return Material(tokenizer, grid.seed, case, depth, beyond)


def _lengths_that_fit(lengths: Sequence[int], probe: str, puzzles: Sequence[Puzzle]) -> list[int]:
    shortest = max(puzzle.shortest for puzzle in puzzles)
    short = [str(length) for length in lengths if length < shortest]
    if short:
        note(f"{probe} takes {shortest} tokens: it is left out of texts of {', '.join(short)}")
    return list(lengths[len(short) :])


def recall(panel: Panel, cases: Iterable[Case], advance: Callable[[int], None] = lambda _: None) -> tuple[Recall, ...]:
    """Put cases to every model and gather the answers by probe, length and depth, model by model.

    advance: called with the number of tokens of each case, with the answer and without.
    """
    cells: dict[tuple[str, int, float | None], list[tuple[Case, list[Predictions], list[Predictions]]]] = {}
    before: tuple[Ids, list[Predictions]] | None = None
    for case in cases:
        answers = panel.score(case.tokens, case.answer)
        if before is None or not np.array_equal(before[0], case.without):  # often the same at every depth
            before = case.without, panel.score(case.without, case.answer)
        cells.setdefault((case.probe, case.length, case.depth), []).append((case, answers, before[1]))
        advance(2 * len(case.tokens))
    return tuple(
        _result(name, [(case, answers[model], without[model]) for case, answers, without in cell])
        for model, name in enumerate(panel.names)
        for cell in cells.values()
    )


def _result(model: str, answered: Sequence[tuple[Case, Predictions, Predictions]]) -> Recall:
    """Reduce the answers of one model in one cell."""
    units = sorted({case.document for case, _, _ in answered})
    sums = np.zeros((len(units), 5))  # cases, exact ones, tokens, losses with and without, by document
    for case, answers, without in answered:
        sums[units.index(case.document)] += (
            *(1, answers.likeliest.all(), len(answers.nll)),
            *(answers.nll.sum(), without.nll.sum()),
        )
    cases, exact, tokens, losses, losses_without = sums.T
    exact_match, exact_error = ratio_of_sums(exact, cases)
    gained, gained_error = ratio_of_sums(losses_without - losses, tokens)
    first = answered[0][0]
    return Recall(
        model=model,
        probe=first.probe,
        length=first.length,
        depth=first.depth,
        distance=float(np.mean([case.distance for case, _, _ in answered])),
        documents=len(units),
        cases=len(answered),
        exact_match=exact_match,
        exact_match_stderr=exact_error,
        gained=gained,
        gained_stderr=gained_error,
        loss=ratio_of_sums(losses, tokens)[0],
        loss_without=ratio_of_sums(losses_without, tokens)[0],
    )
