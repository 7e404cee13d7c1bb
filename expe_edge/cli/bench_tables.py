"""What `bench` measured, laid out for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from expe_edge.cli.tables import rows_by_name
from expe_edge.speed.bench import BenchResult, BenchSettings, DepthResult, OpenedResult, ProfileResult

#: Operators that a profile names; the rest are summed up.
NAMED_OPERATORS = 12
MEGABYTE = 1e6


def bench_tables(result: BenchResult, settings: BenchSettings) -> Iterator[Table]:
    """Yield a table of packages as they are opened, one of figures by depth, and one for every profiled phase."""
    yield opened_table(result.opened)
    yield depth_table(result.depths, settings)
    for _, group in groupby(result.profiles, key=lambda each: (each.package, each.threads, each.phase)):
        yield profile_table(list(group), settings)


def opened_table(opened: Sequence[OpenedResult]) -> Table:
    """Lay out what is known of packages before they read: a row for each."""
    table = rows_by_name("Packages", ("load, ms", "memory, MB", "nodes", "kernels", "weights, MB", "cache a token, kB"))
    for each in opened:
        table.add_row(
            _name(each),
            _spread(each.load_ms, 0),
            _megabytes(each.opened_bytes),
            str(each.nodes),
            "expe-edge" if each.own_kernels else "onnxruntime",
            f"{each.weight_bytes / MEGABYTE:.1f}",
            f"{each.cache_bytes_per_token / 1e3:.1f} {each.cache_dtype}",
        )
    return table


def depth_table(results: Sequence[DepthResult], settings: BenchSettings) -> Table:
    """Lay out figures by depth: a section for each measure, a row for each package, a column for each depth."""
    depths = list(dict.fromkeys(result.depth for result in results))
    title = (
        f"By tokens in the cache, medians of {settings.turns} turns (quartiles)\n"
        f"first token: of a prompt that is {settings.prefill} tokens longer"
    )
    table = rows_by_name(title, [f"{depth:,}" for depth in depths])
    sections: list[tuple[str, Callable[[DepthResult], str]]] = [
        (f"prefill of {settings.prefill}, tokens/s", lambda r: _spread(r.prefill, 0)),
        ("decode, tokens/s", lambda r: _spread(r.decode, 1)),
        ("first token, ms", lambda r: _spread(r.first_token_ms, 0) if r.first_token_ms else ""),
        ("decode, ms a step", lambda r: _spread(r.step_ms, 2)),
        ("decode, µs a node", lambda r: _spread(r.node_us, 1)),
        ("reading so many bytes, GB/s", lambda r: _spread(r.bandwidth, 1)),
        ("share of that, decoding", lambda r: f"{r.read_share[1]:.0%} ({r.read_share[0]:.0%}–{r.read_share[2]:.0%})"),
        ("peak memory, MB", lambda r: _megabytes(r.peak_bytes)),
        ("cache, MB", lambda r: _megabytes(r.cache_bytes)),
    ]
    by_name: dict[str, list[DepthResult]] = {}
    for result in results:
        by_name.setdefault(_name(result), []).append(result)
    for heading, cell in sections:
        table.add_row(f"[bold]{heading}")
        for name, rows in by_name.items():
            table.add_row(Text(f"  {name}"), *map(cell, rows))
        table.add_section()
    return table


def profile_table(profiles: Sequence[ProfileResult], settings: BenchSettings) -> Table:
    """Lay out where the time of a phase goes: a row for each operator, a column for each depth."""
    phase = "a decode step" if profiles[0].phase == "decode" else f"a prefill of {settings.prefill}"
    title = f"{_name(profiles[0])}: {phase}\nms and share, by tokens in the cache"
    table = rows_by_name(title, ["nodes", *(f"{each.depth:,}" for each in profiles)])
    kernels = [each.profile.kernels for each in profiles]
    times = [{operator.operator: operator.ms for operator in each.operators} for each in kernels]
    nodes = {operator.operator: operator.nodes for each in kernels for operator in each.operators}
    order = sorted(nodes, key=lambda name: max(of.get(name, 0) / sum(of.values()) for of in times), reverse=True)
    for names in [*([name] for name in order[:NAMED_OPERATORS]), order[NAMED_OPERATORS:]]:
        if names:
            label = names[0] if len(names) == 1 else f"{len(names)} other operators"
            spent = [sum(of.get(name, 0) for name in names) for of in times]
            _profile_row(table, label, str(sum(nodes[name] for name in names)), spent, profiles)
    table.add_section()
    _profile_row(table, "kernels", str(sum(nodes.values())), [each.kernels_ms for each in kernels], profiles)
    _profile_row(table, "between kernels", "", [each.profile.between_ms for each in profiles], profiles)
    _profile_row(table, "outside onnxruntime", "", [each.profile.python_ms for each in profiles], profiles)
    _profile_row(table, "all", "", [each.profile.ms for each in profiles], profiles)
    return table


def _profile_row(
    table: Table, name: str, nodes: str, times: Sequence[float], profiles: Sequence[ProfileResult]
) -> None:
    cells = [f"{ms:.3f} {ms / each.profile.ms:>6.1%}" for ms, each in zip(times, profiles, strict=True)]
    table.add_row(Text(name), nodes, *cells)


def _name(of: OpenedResult | DepthResult | ProfileResult) -> str:
    return f"{of.package}, {of.threads} thread{'s' * (of.threads > 1)}"


def _spread(quartiles: Sequence[float], digits: int) -> str:
    low, median, high = (f"{value:,.{digits}f}" for value in quartiles)
    return f"{median} ({low}–{high})"


def _megabytes(size: int) -> str:
    return f"{size / MEGABYTE:,.1f}"
