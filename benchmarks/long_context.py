"""Packages of one model over long texts: quality, recall, memory and speed by length.

    python -m benchmarks.long_context package/float32 package/int8-dynamic --lengths 8192,16384,32768,65536
    python -m benchmarks.long_context package/* --recall-lengths 8192,16384 --depths 0,50,100 --cases 2 --threads 2

A text is read once by every package, each in a process of its own, in turn chunk by chunk, so that a busy machine slows
all: perplexity, divergence to the first package, memory and seconds all come from that. Before each length `--decoded`
tokens are read one by one. Recall is that of `expe-edge probe`; what two of its texts share is read once. Time grows
with the square of the length.

What is measured goes to OUT/records.json by package, length and text, and is kept: the same command goes on where it
was interrupted, and others add to it. OUT/report.md and report.json are made anew after every text and every package's
recall, OUT/report.png at the end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.long_context_reading import BranchingScorer, Reader, in_order, work
from benchmarks.long_context_records import Measured, Records, Settings, asked_of, between, digest_of, run_of
from benchmarks.long_context_report import Row, plot, summarize, write_report
from expe_edge.cli.compare import parse_integers
from expe_edge.cli.flags import Setting, with_flags
from expe_edge.errors import ExPEEdgeError
from expe_edge.progress import counted, note
from expe_edge.quality.comparison import long_documents, measure_chunk, require_rising, require_same_vocabulary
from expe_edge.quality.losses import Panel
from expe_edge.quality.needles import COPIED, CUE, Case
from expe_edge.quality.recall import Grid, Recall, needle_cases, recall
from expe_edge.quality.scoring import Ids, PackageScorer, Predictions, Scorer
from expe_edge.runtime import PackageSession
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.text.tokenization import load_tokenizer

COUNT = click.IntRange(1)


def read(
    scorers: Sequence[PackageScorer], text: Ids, settings: Settings, advance: Callable[[int], None] = lambda _: None
) -> Iterator[tuple[str, list[Measured]]]:
    """Read a text (T,), longer than the last length, with every package in turn, the first one first.

    Yields at each length its name (see `between`) and what each package made of the tokens since the one before.

    Args:
        advance: called with the number of tokens that all have just read.
    """
    with ExitStack() as stack:
        readers = [
            stack.enter_context(Reader(scorer.path, settings.lengths[-1], settings.threads, settings.chunk))
            for scorer in scorers
        ]
        for begin, end in settings.steps:
            measured = [Measured(opened=reader.opened) for reader in readers]
            for start in range(begin, end, PREFILL_CHUNK):
                stop = start + PREFILL_CHUNK
                single = settings.decoded if stop == end else 0
                parts = [reader.read(text[start:stop], single) for reader in readers]
                measures = measure_chunk([part.logits for part in parts], text[start + 1 : stop + 1])
                for of_package, part, values in zip(measured, parts, measures, strict=True):
                    of_package.add(part, parts[0], values)
                advance(PREFILL_CHUNK)
            yield between(begin, end), measured


def read_missing(scorers: Sequence[PackageScorer], text: Ids, settings: Settings, records: Records) -> None:
    """Read a text with the packages that have not read it to every length, and with the first beside them."""
    wanted = {between(*step) for step in settings.steps}
    kept = [
        records.reading.setdefault(run_of(scorer, scorers[0], settings), {}).setdefault(digest_of(text), {})
        for scorer in scorers
    ]
    missing = [index for index, found in enumerate(kept) if not wanted <= found.keys()]
    if not missing:
        return
    chosen = sorted({0, *missing})
    with counted("reading a text", settings.lengths[-1]) as advance:
        for step, measured in read([scorers[index] for index in chosen], text, settings, advance):
            for index, values in zip(chosen, measured, strict=True):
                kept[index].setdefault(step, vars(values))
            records.save()


class Answered(Panel):
    """One package whose answers have been recorded."""

    def __init__(self, scorer: Scorer, answers: dict[str, Any]) -> None:
        super().__init__([scorer])
        self.answers = answers

    def score(self, tokens: Ids, begin: int) -> list[Predictions]:
        """Return what was recorded of `tokens[begin:]`."""
        found = self.answers[digest_of(tokens)]
        return [Predictions(np.array(found["nll"]), np.array(found["likeliest"], dtype=np.bool_))]


def ask(scorer: PackageScorer, cases: Sequence[Case], settings: Settings, records: Records) -> None:
    """Put all cases to a package that have not been put to it."""
    answers = records.answers.setdefault(asked_of(scorer, settings), {})
    begins = {text.tobytes(): case.answer for case in cases for text in (case.tokens, case.without)}
    branching = BranchingScorer(scorer.session, settings.grid.lengths[-1], settings.chunk)
    texts = [text for text in in_order(begins) if digest_of(text) not in answers]
    if not texts:
        return
    times = work(texts, settings.lengths[-1])
    note(f"recall takes {scorer.path} {times:.1f} times the work of reading {settings.lengths[-1]} tokens")
    with counted(f"asking {scorer.path.name}", sum(map(len, texts))) as advance:
        for text in texts:
            found = branching.predictions(text, begins[text.tobytes()])
            answers[digest_of(text)] = {"nll": found.nll.tolist(), "likeliest": found.likeliest.tolist()}
            records.save()
            advance(len(text))


def recalled(scorer: PackageScorer, cases: Sequence[Case], settings: Settings, records: Records) -> tuple[Recall, ...]:
    """Return the recall of a package in the cases that have been put to it."""
    answers = records.answers.get(asked_of(scorer, settings), {})
    known = [case for case in cases if {digest_of(case.tokens), digest_of(case.without)} <= answers.keys()]
    return recall(Answered(scorer, answers), known)


def make_settings(
    lengths: str, recall_lengths: str | None, depths: str, probes: Sequence[str], **values: int
) -> Settings:
    """Return the settings that the options stand for.

    Raises:
        ConfigError: lengths that do not rise, or unknown probes. click.BadParameter: what does not fit in chunks.
    """
    ends = parse_integers("--lengths", lengths, "8192,16384")
    asked = parse_integers("--recall-lengths", recall_lengths, "8192,16384") if recall_lengths else ends
    percents = parse_integers("--depths", depths, "0,50,100")
    for given in (ends, asked):
        require_rising(given)
    grid = Grid(tuple(probes), tuple(asked), tuple(p / 100 for p in percents), values["cases"], values["seed"])
    settings = Settings(tuple(ends), values["decoded"], values["threads"], values["chunk"], grid)
    if any(end % PREFILL_CHUNK or end - begin < 2 * PREFILL_CHUNK for begin, end in settings.steps):
        raise click.BadParameter(
            f"--lengths {lengths}: expected multiples of {PREFILL_CHUNK}, two of them apart or more"
        )
    if asked[-1] > ends[-1]:
        raise click.BadParameter(f"--recall-lengths {recall_lengths}: at most the longest of --lengths, {ends[-1]}")
    if PREFILL_CHUNK % settings.chunk:
        raise click.BadParameter(f"--chunk is {settings.chunk}; a divisor of {PREFILL_CHUNK}")
    return settings


def measure(packages: Sequence[Path], out: Path, sources: Sequence[str], documents: int, settings: Settings) -> str:
    """Measure what is not recorded in `out` of `documents` texts at most; write the reports and return their table.

    Raises:
        ExPEEdgeError: packages that are none or not of one tokenizer, or text that is too short.
    """
    scorers = [PackageScorer(PackageSession.load(path, threads=settings.threads)) for path in packages]
    names = Panel(scorers).names
    require_same_vocabulary(scorers)
    chosen, _ = long_documents(scorers[0], sources, "text", settings.lengths[-1] + CUE + COPIED, documents)
    tokenizer = load_tokenizer(scorers[0].path)
    cases = list(needle_cases(settings.grid, chosen, tokenizer)) if settings.grid.cases else []
    out.mkdir(parents=True, exist_ok=True)
    records = Records(out / "records.json")

    def report() -> tuple[str, list[Row]]:
        rows = summarize(names, scorers, chosen, settings, records)
        recalls = {
            name: recalled(scorer, cases, settings, records) for name, scorer in zip(names, scorers, strict=True)
        }
        return write_report(out, rows, recalls, settings), rows

    for document in chosen:
        read_missing(scorers, document, settings, records)
        report()
    for scorer in scorers:
        ask(scorer, cases, settings, records)
        report()
    text, rows = report()
    plot(rows, out / "report.png")
    return text


@click.command(help=__doc__)
@click.argument("packages", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PACKAGE …")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/long_context"), show_default=True)
@click.option("--lengths", default="8192,16384,32768,65536", show_default=True, help="In tokens.")
@click.option(
    "--text", "texts", cls=Setting, setting="sources", multiple=True, help="Else the text held out of the first's."
)
@click.option("--documents", default=1, type=COUNT, show_default=True, help="Most texts to read.")
@click.option(
    "--decoded",
    default=32,
    type=click.IntRange(1, PREFILL_CHUNK - 1),
    show_default=True,
    help="Tokens before each length to read one by one.",
)
@click.option("--probe", "probes", multiple=True, default=("passkey", "keys"), show_default=True)
@click.option("--recall-lengths", help="Lengths of recall.  [default: --lengths]")
@click.option("--depths", default="50", show_default=True, help="Places of needles, percent of a text.")
@click.option(
    "--cases",
    default=1,
    type=click.IntRange(0),
    show_default=True,
    help="Questions for each length and depth; 0 for no recall.",
)
@click.option("--seed", default=0, type=click.IntRange(0), show_default=True)
@click.option(
    "--threads", default=os.cpu_count(), type=COUNT, show_default=True, help="Of each package; they run in turn."
)
@click.option("--chunk", default=PREFILL_CHUNK, type=COUNT, show_default=True, help="Tokens of a run.")
def main(
    packages: tuple[Path, ...],
    out: Path,
    lengths: str,
    texts: tuple[str, ...],
    documents: int,
    recall_lengths: str | None,
    depths: str,
    probes: tuple[str, ...],
    **values: int,
) -> None:
    try:
        click.echo(
            measure(packages, out, texts, documents, make_settings(lengths, recall_lengths, depths, probes, **values))
        )
    except ExPEEdgeError as error:
        raise click.UsageError(with_flags(str(error), {"": main}, "")) from error


if __name__ == "__main__":
    main()
