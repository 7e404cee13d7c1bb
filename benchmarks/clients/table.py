"""The table of docs/clients.md: a row for all packages alike, a cell for every client, a note where it is not equal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.clients.judging import Outcome
from docs.tables import row
from expe_edge.quant.recipe import PRECISIONS

#: Forms of packages by what their names end in after the precision.
FORMS = {
    "": "",
    "-portable": "portable",
    "-int8-cache": "int8 cache",
    "-windowed": "windows of heads",
    "-int8-cache-windowed": "windows of heads, int8 cache",
}


class Notes:
    """Numbers of the notes under a table, in the order in which they are first used."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, note: str) -> str:
        """Return the mark of a note."""
        return f"[{self.numbers.setdefault(note, len(self.numbers) + 1)}]" if note else ""

    def lines(self) -> str:
        """Return the notes as a numbered list."""
        return "\n".join(f"{number}. {note}." for note, number in self.numbers.items())


def clients_table(outcomes: Sequence[Outcome], usual: Sequence[str], headings: Mapping[str, str]) -> str:
    """Lay out what became of the `usual` tasks, by client, and of what some clients alone are asked, by task.

    headings: of the columns, by client.
    """
    notes = Notes()
    common = [outcome for outcome in outcomes if outcome.task in usual]
    special = [outcome for outcome in outcomes if outcome.task not in usual]
    grids = [_grid(common, lambda outcome: headings[outcome.client], notes)]
    if special:
        grids.append(_grid(special, lambda outcome: f"{outcome.client}, {outcome.task}", notes))
    return "\n" + "\n\n".join([*grids, notes.lines()]) + "\n"


def _grid(outcomes: Sequence[Outcome], column_of: Callable[[Outcome], str], notes: Notes) -> str:
    """A row for the precisions of every form whose cells are the same."""
    columns = list(dict.fromkeys(map(column_of, outcomes)))
    cells: dict[str, dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        cells.setdefault(outcome.kind, {}).setdefault(column_of(outcome), []).append(outcome)
    rows: dict[tuple[str, ...], list[str]] = {}
    for kind, by_column in cells.items():
        precision, form = divided(kind)
        rows.setdefault((form, *(_cell(by_column[column], notes) for column in columns)), []).append(precision)
    forms = [form for form, *_ in rows]
    lines = [row("packages", columns), "|---" * (len(columns) + 1) + "|"]
    for (form, *found), precisions in rows.items():
        names = ", ".join(precisions) if forms.count(form) > 1 else "all precisions"
        lines.append(row(f"{FORMS[form]}: {names}" if form else names, list(found)))
    return "\n".join(lines)


def divided(kind: str) -> tuple[str, str]:
    """Return the precision that a package's name begins with, and the rest of it, a key of `FORMS`."""
    precision = max((name for name in PRECISIONS if kind.startswith(name)), key=len)
    return precision, kind.removeprefix(precision)


def _cell(outcomes: Iterable[Outcome], notes: Notes) -> str:
    """What became of the tasks: those of one result and note together, named where they are neither all nor equal."""
    together: dict[str, list[str]] = {}
    for outcome in outcomes:
        result = f"**{outcome.result}**" if outcome.result == "wrong" else outcome.result
        together.setdefault(f"{result} {notes.mark(outcome.note)}".strip(), []).append(outcome.task)
    if len(together) == 1:
        return next(iter(together))
    parts = [result if result == "equal" else f"{', '.join(names)}: {result}" for result, names in together.items()]
    return "; ".join(parts)
