"""`--precision auto`: a format for each weight; the smallest model within a budget of KL divergence, or the reverse.

Every weight is measured alone in each format. Divergences of single weights very nearly add up to that of the whole
model, so the choice is a knapsack problem, solved exactly but for rounding; the whole model is then measured, and the
choice made again with less where the sum promised too much, or where the text itself is predicted worse than the
divergence tells: a trained model is a little too sure of itself, so rounding costs more perplexity than divergence.
What that leaves of a budget is spent on one weight after another, measured whole each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.sensitivity import Divergence, Loss, Sensitivity, weights_of
from expe_edge.errors import ExportError
from expe_edge.quant.formats import EMBEDDING, Formats
from expe_edge.quant.recipe import Recipe

#: What a weight may become, and the embedding.
LINEAR_CANDIDATES = ("int4-weight", "int8-weight", "float16")
EMBEDDING_CANDIDATES = ("int4", "int8", "float16")
#: The budget is counted in this many units.
UNITS = 4000
#: How much of a budget of divergence the loss on text may rise by, and how sure of that to be: one-sided, 95 %.
RISE_SHARE = 0.5
CONFIDENCE = 1.645
#: How often a choice is made again after one missed the budget when measured whole; how much below what would just do.
ATTEMPTS = 6
MARGIN = 0.97
#: The least divergence that bytes are weighed against.
TINY = 1e-12

Ids = npt.NDArray[np.int64]
Options = list[list[Sensitivity]]


@dataclass(frozen=True)
class Choice:
    """A format for each weight, with what it was chosen by.

    chosen: one measurement for each weight. loss: of the whole model. size: of its graph, bytes.
    """

    chosen: tuple[Sensitivity, ...]
    loss: Loss
    size: int

    @property
    def formats(self) -> dict[str, str]:
        """Weight to format."""
        return {one.weight: one.format for one in self.chosen}

    @property
    def cost(self) -> float:
        """What a budget must cover, nats per token: the divergence, and what the loss may have risen by."""
        rise = self.loss.rise + CONFIDENCE * self.loss.rise_stderr
        return max(self.loss.kl, float(np.nan_to_num(rise)) / RISE_SHARE)

    def __str__(self) -> str:
        loss = self.loss
        return (
            f"{self.size / 1e6:.2f} MB, {loss.kl:.2g} nats per token, the loss on text {loss.rise:+.2g} ± "
            f"{loss.rise_stderr:.1g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest."""
        return {**self.loss._asdict(), "size": self.size, "weights": [one.to_dict() for one in self.chosen]}


#: Measures the whole model with one format for each weight.
Measure = Callable[[Sequence[Sensitivity]], Choice]


def candidates_of(evidence: Evidence) -> dict[str, tuple[str, ...]]:
    """Return the formats to measure for each weight."""
    return {
        weight: EMBEDDING_CANDIDATES if weight == EMBEDDING else LINEAR_CANDIDATES for weight in weights_of(evidence)
    }


def choose(evidence: Evidence, recipe: Recipe, measured: Sequence[Sensitivity], texts: Sequence[Ids]) -> Choice:
    """Choose within `recipe.budget_kl` or `recipe.max_size`.

    Args:
        measured: every weight in each of its formats, see `candidates_of`.
        texts: token ids (T,) to measure the whole model on, all of one length.

    Raises:
        ExportError: a budget that nothing meets; the message has the best that can be had.
    """
    options = [[one for one in measured if one.weight == weight] for weight in weights_of(evidence)]
    divergence, int8_cache = Divergence(evidence, texts), recipe.cache == "int8"

    def measure(chosen: Sequence[Sensitivity]) -> Choice:
        graph = evidence.build(recipe, Formats.by_weight({one.weight: one.format for one in chosen}, recipe.cache))
        choice = Choice(tuple(chosen), divergence.of(graph.model, int8_cache=int8_cache), graph.model.ByteSize())
        evidence.progress(f"choosing formats: {choice}")
        return choice

    if recipe.budget_kl is not None:
        return smallest_within(recipe.budget_kl, options, measure)
    assert recipe.max_size is not None
    return best_within(recipe.max_size, options, measure)


def smallest_within(budget: float, options: Options, measure: Measure) -> Choice:
    """Return the smallest choice whose cost, measured whole, is within `budget`."""
    best = measure([min(formats, key=lambda one: one.kl) for formats in options])
    if best.cost > budget:
        raise ExportError(
            f"`budget_kl` {budget:g} is out of reach: the best choice of formats costs {best.cost:.2g} nats per token "
            f"({best.size / 1e6:.2f} MB); raise it, or use `precision` float32"
        )
    kept, missed, limit = 0.0, math.inf, budget
    for _ in range(ATTEMPTS):
        chosen = knapsack(options, weight=lambda one: max(one.kl, 0.0), price=lambda one: one.bytes, limit=limit)
        choice = measure(chosen) if chosen else best
        if choice.cost <= budget:
            kept, best = limit, min(best, choice, key=lambda choice: choice.size)
        else:
            missed = limit
        if missed == math.inf:
            break
        limit = math.sqrt(kept * missed) if kept else limit * MARGIN * budget / choice.cost
    return shrink(best, budget, options, measure)


def shrink(best: Choice, budget: float, options: Options, measure: Measure) -> Choice:
    """Give one weight of `best` after another a smaller format, most bytes for their divergence first, while it fits.

    What a weight does to the loss on text is far from what it does to the divergence, so the knapsack, blind to that,
    leaves much of the budget where the loss is what fills it.
    """
    given = {one.weight: one for one in best.chosen}

    def saving(one: Sensitivity) -> float:
        return (given[one.weight].bytes - one.bytes) / max(one.kl - given[one.weight].kl, TINY)

    smaller = [one for formats in options for one in formats if one.bytes < given[one.weight].bytes]
    for one in sorted(smaller, key=saving, reverse=True):
        now = {other.weight: other for other in best.chosen}
        changed = list({**now, one.weight: one}.values())
        if one.bytes < now[one.weight].bytes and sum(other.kl for other in changed) <= budget:
            choice = measure(changed)
            best = choice if choice.cost <= budget else best
    return best


def best_within(size: int, options: Options, measure: Measure) -> Choice:
    """Return the choice of least divergence whose graph takes at most `size` bytes."""
    smallest = measure([min(formats, key=lambda one: one.bytes) for formats in options])
    if smallest.size > size:
        raise ExportError(
            f"`max_size` {size} is out of reach: the smallest choice of formats takes {smallest.size} bytes, at "
            f"{smallest.loss.kl:.2g} nats per token; raise it, or train a smaller model"
        )
    best, tried = smallest, set()
    limit = float(size - (smallest.size - sum(one.bytes for one in smallest.chosen)))
    for _ in range(ATTEMPTS):
        chosen = tuple(knapsack(options, weight=lambda one: one.bytes, price=lambda one: one.kl, limit=limit))
        if not chosen or chosen in tried:
            break
        tried.add(chosen)
        choice = measure(chosen)
        if choice.size <= size and choice.loss.kl < best.loss.kl:
            best = choice
        limit += size - choice.size  # nodes take more or less room with other formats
    return best


def knapsack(
    options: Options,
    *,
    weight: Callable[[Sensitivity], float],
    price: Callable[[Sensitivity], float],
    limit: float,
) -> list[Sensitivity]:
    """Return one of each of `options` with the least total price whose total weight is at most `limit`; [] if none.

    Multiple-choice knapsack by dynamic programming; weights are rounded up to units of limit/`UNITS`.
    """
    prices = np.zeros(UNITS + 1)  # the least price of what was decided so far, within each number of units
    decisions: list[npt.NDArray[np.int64]] = []
    units = [[int(np.ceil(weight(one) / limit * UNITS - 1e-9)) for one in formats] for formats in options]
    for formats, costs in zip(options, units, strict=True):
        extended = np.full((len(formats), UNITS + 1), np.inf)
        for index, (one, cost) in enumerate(zip(formats, costs, strict=True)):
            if cost <= UNITS:
                extended[index, cost:] = prices[: UNITS + 1 - cost] + price(one)
        decisions.append(extended.argmin(axis=0))
        prices = extended.min(axis=0)
    if not np.isfinite(prices[UNITS]):
        return []
    chosen, left = [], UNITS
    for formats, costs, decision in reversed(list(zip(options, units, decisions, strict=True))):
        index = int(decision[left])
        chosen.append(formats[index])
        left -= costs[index]
    return chosen[::-1]
