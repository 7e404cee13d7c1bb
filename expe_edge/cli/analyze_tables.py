"""Results of `analyze` as tables on a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from expe_edge.cli.tables import rows_by_name, with_error
from expe_edge.quality.analysis import AnalysisReport, HeadReach, HeadSlopes, ModelAnalysis, Spread
from expe_edge.quality.analysis.reach import SINKS, TAIL, first_query

#: Neighbours of an example that a table shows; the JSON has all.
SHOWN = 5


def analysis_tables(report: AnalysisReport) -> Iterator[Table]:
    """Yield a table for each kind of figure that some model has."""
    if any(model.dims for model in report.models):
        yield spread_table(report)
    with_neighbours = [model for model in report.models if model.neighbours is not None]
    if with_neighbours:
        yield neighbour_table(with_neighbours)
        yield from map(example_table, with_neighbours)
    yield position_table(report)
    if any(model.slopes for model in report.models):
        yield slope_table(report)
    yield reach_table(report)


def spread_table(report: AnalysisReport) -> Table:
    """Lay size and variance out as a section for each model that overrides dimensions, a row for each place."""
    columns = ("size, first l", "others", "variance, first l", "others", "share of variance in l", "in any l")
    table = rows_by_name(
        "What the first l dimensions hold: root mean square and variance of a dimension; ± standard deviation", columns
    )
    for model in report.models:
        if model.dims:
            table.add_row(Text(f"{model.model}, l = {model.dims}", style="bold"))
            for spread in model.spreads:
                table.add_row(f"  {_place(spread)}", *_spread_cells(spread))
            table.add_section()
    return table


def _place(spread: Spread) -> str:
    return spread.place if spread.layer == 0 else f"{spread.place}, layer {spread.layer}"


def _spread_cells(spread: Spread) -> list[str]:
    sizes = (spread.rms_first, spread.rms_others, spread.variance_first, spread.variance_others)
    chance = with_error(spread.chance, spread.chance_deviation, ".2%")
    return [*(_figure(size, ".4g") for size in sizes), _figure(spread.share, ".2%"), chance]


def _figure(value: float, form: str, error: float | None = None) -> str:
    return "–" if math.isnan(value) else with_error(value, error, form)


def neighbour_table(models: Sequence[ModelAnalysis]) -> Table:
    """Lay the overlap of neighbourhoods out as a row for each model."""
    found = [(model.model, model.neighbours) for model in models if model.neighbours is not None]
    columns = ("tokens", "without the first l", "without l others")
    title = f"Of a token's {found[0][1].neighbours} nearest by cosine, share that stays, ± standard error over tokens"
    table = rows_by_name(title, columns)
    for name, near in found:
        table.add_row(
            Text(name),
            str(near.tokens),
            with_error(near.overlap, near.overlap_stderr, ".1%"),
            _figure(near.overlap_without_others, ".1%", near.overlap_without_others_stderr),
        )
    return table


def example_table(model: ModelAnalysis) -> Table:
    """Lay a few tokens out with their nearest, both ways."""
    assert model.neighbours is not None
    table = rows_by_name(f"Nearest tokens, {model.model}", ("by all dimensions", "without the first l"))
    for example in model.neighbours.examples:
        ways = (", ".join(map(repr, way[:SHOWN])) for way in (example.by_all, example.without_first))
        table.add_row(Text(repr(example.token)), *map(Text, ways))
    return table


def position_table(report: AnalysisReport) -> Table:
    """Lay the probe for position out as a section for each model, a row for each layer."""
    title = (
        f"Position read off the residual stream: R² on unseen documents, fitted within N = {report.training_length}; "
        f"{report.documents} documents of {report.length} tokens"
    )
    table = rows_by_name(title, ("n, within N", "n, beyond", "log n, within N", "log n, beyond"))
    for model in report.models:
        table.add_row(Text(model.model, style="bold"))
        for probe in model.positions:
            figures = (
                *(probe.position_within, probe.position_beyond),
                *(probe.log_position_within, probe.log_position_beyond),
            )
            place = f"  after layer {probe.layer}" if probe.layer else "  embeddings"
            table.add_row(place, *(_figure(figure, ".3f") for figure in figures))
        table.add_section()
    return table


def slope_table(report: AnalysisReport) -> Table:
    """Lay slopes out as a section for each model that has some, a row for a layer and limb, a column for each head."""
    title = "Slopes, nats per token of distance: median, 5…95 % of queries, share of queries below 0"
    cells = {
        model.model: [(_layer(slope.layer, slope.limb), _slope_cell(slope)) for slope in model.slopes]
        for model in report.models
        if model.slopes
    }
    return _by_head(title, cells)


def _layer(layer: int, limb: int | None = None) -> str:
    return f"  layer {layer}" if limb is None else f"  layer {layer}, limb {limb}"


def _slope_cell(slope: HeadSlopes) -> str:
    low, _, median, _, high = slope.quantiles
    if slope.constant:
        return f"{median:.4g}"
    return f"{median:.3g}, {low:.2g}…{high:.2g}, {slope.negative:.0%}"


def reach_table(report: AnalysisReport) -> Table:
    """Lay reach and entropy out as a section for each model, a row for each layer, a column for each head."""
    title = (
        f"Reach in tokens, all but {TAIL:g} of attention: median/90 % of queries beyond {first_query(report.length)}; "
        f"share on the first {SINKS} tokens; entropy in nats"
    )
    cells = {
        model.model: [(_layer(reach.layer), _reach_cell(reach)) for reach in model.reaches] for model in report.models
    }
    return _by_head(title, cells)


def _reach_cell(reach: HeadReach) -> str:
    return f"{reach.reach_median}/{reach.reach_90}, {reach.sinks:.1%}, {reach.entropy:.2f}"


def _by_head(title: str, models: Mapping[str, Iterable[tuple[str, str]]]) -> Table:
    """Lay rows' names with cells, those of a row in the order of heads, out as a section for each model."""
    sections = {model: _gathered(cells) for model, cells in models.items()}
    heads = max(len(cells) for rows in sections.values() for cells in rows.values())
    table = rows_by_name(title, [f"head {head}" for head in range(1, heads + 1)])
    for model, rows in sections.items():
        table.add_row(Text(model, style="bold"))
        for name, cells in rows.items():
            table.add_row(name, *cells)
        table.add_section()
    return table


def _gathered(cells: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    rows: dict[str, list[str]] = {}
    for name, cell in cells:
        rows.setdefault(name, []).append(cell)
    return rows
