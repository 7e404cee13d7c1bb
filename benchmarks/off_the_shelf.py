"""One checkpoint through Optimum and onnxruntime's own quantizers, and through this project, in one table.

    python -m benchmarks.off_the_shelf runs/plain

of `expe-edge train --config examples/plain-slopes.yaml --out runs/plain`: a plain override cannot compute other slopes.
Needs the `dev` extra and onnx-ir, which onnxruntime's MatMulNBits quantizer imports but does not require. Every way
reads the same held-out documents in the same chunks with a cache; what cannot be made or run is a row with its error.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnxruntime as ort
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks import off_the_shelf_tools as tools
from expe_edge.calibration.observations import Calibration, sample_windows
from expe_edge.cli.compare import parse_lengths
from expe_edge.cli.output import require_plot, require_writable, write_json
from expe_edge.cli.plots import drawing
from expe_edge.cli.tables import print_whole, short
from expe_edge.errors import ConfigError, ExportError
from expe_edge.export.exporter import open_exporter
from expe_edge.graph.build import graph_contract
from expe_edge.graph.run import logits_of
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.package.contract import GraphContract
from expe_edge.package.directory import MODEL_FILE
from expe_edge.positions.expe import ExPEParameters
from expe_edge.progress import counted
from expe_edge.quality.comparison import BucketResult, compare, long_documents, require_rising
from expe_edge.quality.scoring import CheckpointScorer, Scorer, open_scorer
from expe_edge.quant.recipe import Recipe
from expe_edge.spool import Spool
from expe_edge.text.tokenization import encode_documents
from expe_edge.training.checkpoint import Checkpoint, load_checkpoint

#: Largest difference of a float32 graph's logits to PyTorch's over the first N tokens. Beyond them it is reported
#: alone: a plain override in float32 loses content beside growing positions (`python -m benchmarks.precision`).
FLOAT_TOLERANCE = 1e-3
AS_IT_IS, PLAIN = "Optimum's export of the class as it is", "Optimum's export of a plain override, as in the paper"
CAPTION = (
    "int8 weights beside uint8 activations saturate on x86 CPUs without VNNI (python -m benchmarks.saturation)\n"
    "linears alone: products with a weight; attention's own products and the embedding stay in float32"
)
PREPARED = "float32, quant_pre_process"
FOLDED, OWN = "this project's float32 graph", "this project's packages"

Export = Callable[[ExPEForCausalLM, Path], Path]
#: Ways to export that have not led to a graph of any length.
REFUSED: dict[str, Export] = {
    "float32, unaided": tools.export_by_optimum,
    "float32, accepted, without a cache": tools.export_without_cache,
}
#: Section to how its float32 graph is made, and what acts on it as it is; onnxruntime's tools act on all, prepared.
EXPORTS: dict[str, tuple[Export, Mapping[str, tools.Quantizer]]] = {
    AS_IT_IS: (tools.export_as_it_is, tools.OPTIMUM),
    PLAIN: (tools.export_plainly, tools.OPTIMUM),
    FOLDED: (tools.export_folded, tools.POSITIONS_KEPT),
}
OURS = tuple(
    Recipe(precision, cache=cache)
    for precision, cache in (
        ("int8-dynamic", "float32"),
        ("int8-static", "float32"),
        ("int8-weight", "float32"),
        ("int4-weight", "float32"),
        ("int8-dynamic", "int8"),
    )
)
WAYS = len(REFUSED) + sum(2 + len(theirs) + len(tools.ONNXRUNTIME) for _, theirs in EXPORTS.values()) + len(OURS)


class GraphScorer(Scorer):
    """A float or quantized graph with the inputs and outputs of `contract`, in chunks with a cache."""

    def __init__(self, path: Path, contract: GraphContract, training_length: int) -> None:
        self.path, self.contract, self.training_length = path, contract, training_length
        self.corpus: dict[str, Any] = {}
        self.session = tools.open_session(path)

    def logits(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Yield logits (t, V) of consecutive chunks."""
        return logits_of(self.session, self.contract, tokens, decoded=0)


class StoredScorer(Scorer):
    """The logits of another scorer, computed once for each text and put aside."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self.path, self.training_length, self.corpus = scorer.path, scorer.training_length, scorer.corpus
        self.stored: dict[bytes, Spool] = {}

    def logits(self, tokens: np.ndarray) -> Iterator[np.ndarray]:
        """Yield logits (t, V) of consecutive chunks."""
        key = tokens.tobytes()
        if key not in self.stored:
            self.stored[key] = Spool(self.scorer.logits(tokens))
        return iter(self.stored[key])


@dataclass
class Row:
    """What became of one way: the size of its model file and its quality by bucket, or why there is none.

    largest_difference: of a float32 graph's logits to PyTorch's, over a whole document.
    """

    section: str
    name: str
    bytes: int | None = None
    results: list[BucketResult] = field(default_factory=list)
    largest_difference: float | None = None
    error: str | None = None

    @property
    def perplexity_change(self) -> float:
        """Relative to the reference, in the worst bucket."""
        return float(np.max([result.perplexity_change for result in self.results]))

    @property
    def top1(self) -> float:
        """Share of all tokens whose likeliest prediction is the reference's."""
        return float(np.average([result.top1 for result in self.results], weights=[r.tokens for r in self.results]))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        plain = {name: getattr(self, name) for name in ("section", "name", "bytes", "largest_difference", "error")}
        if not self.results:
            return plain
        summary = {"perplexity_change_worst_bucket": self.perplexity_change, "top1": self.top1}
        return {**plain, **summary, "results": [result.to_dict() for result in self.results]}


class Bench:
    """What all ways share: the checkpoint, the reference, its held-out documents and the calibration text."""

    def __init__(self, checkpoint: Path, directory: Path, lengths: Sequence[int], most: int) -> None:
        self.path, self.directory, self.lengths = checkpoint, directory, lengths
        opened = load_checkpoint(checkpoint)
        self.contract, self.training_length = graph_contract(opened.config), opened.config.training_length
        require_override(opened)
        self.reference = StoredScorer(CheckpointScorer(opened))
        tokens = lengths[-1] * self.training_length + 1
        self.documents, self.byte_lengths = long_documents(self.reference, (), "text", tokens, most)
        self.exporter = open_exporter(checkpoint)
        stream = np.concatenate(encode_documents(opened.tokenizer, opened.corpus().training))
        self.windows = sample_windows(stream, self.training_length, Calibration())
        self.rows: list[Row] = []
        self.advance: Callable[[], None] = lambda: None

    def model(self) -> ExPEForCausalLM:
        """Load the model anew: exports leave their marks on it."""
        return load_checkpoint(self.path).model

    def attempt(self, section: str, name: str, make: Callable[[Path], Path], *, exact: bool = False) -> Path | None:
        """Make a graph or package, measure it and add a row; return it if it is to be kept.

        Args:
            make: writes it into a directory.
            exact: it is float32; it has to agree with PyTorch, and is kept.
        """
        row, directory, kept = Row(section, name), Path(tempfile.mkdtemp(dir=self.directory)), None
        self.rows.append(row)
        try:
            with quiet():
                made = make(directory)
                self._measure(row, made, exact=exact)
            kept = made if exact else None
        except Exception as error:  # whatever a tool raises is the result of this way
            row.error = readable(error)
        if kept is None:
            shutil.rmtree(directory)
        self.advance()
        return kept

    def _measure(self, row: Row, made: Path, *, exact: bool) -> None:
        file = made / MODEL_FILE if made.is_dir() else made
        row.bytes = file.stat().st_size
        scorer = open_scorer(made) if made.is_dir() else GraphScorer(made, self.contract, self.training_length)
        if exact:
            row.largest_difference = self._difference(scorer)
        compared = compare([self.reference, scorer], self.documents, self.byte_lengths, self.lengths)
        row.results = compared.of(compared.models[1])

    def _difference(self, scorer: Scorer) -> float:
        """Return the largest difference of logits to the reference's over one document.

        Raises:
            ExportError: it is too large within N tokens.
        """
        tokens = self.documents[0][: self.lengths[-1] * self.training_length]
        pairs = zip(scorer.logits(tokens), self.reference.logits(tokens), strict=True)
        differences = np.concatenate([np.abs(found - wanted).max(axis=-1) for found, wanted in pairs])
        near = float(differences[: self.training_length].max())
        if not near <= FLOAT_TOLERANCE:
            raise ExportError(f"float32 logits differ from PyTorch's by {near:.2g}, more than {FLOAT_TOLERANCE}")
        return float(differences.max())

    def attempt_all(self, section: str, export: Export, theirs: Mapping[str, tools.Quantizer]) -> None:
        """Attempt an export to float32 and, if it succeeds, `theirs` on it, and onnxruntime's tools.

        Those act on the graph prepared as they ask for, where it can be.
        """
        graph = self.attempt(section, "float32", partial(self._export, export), exact=True)
        self.quantize(section, graph, theirs)
        prepared = graph and self.attempt(section, PREPARED, partial(tools.prepare, graph), exact=True)
        if not graph:
            self.advance()
        self.quantize(section, prepared or graph, tools.ONNXRUNTIME)

    def quantize(self, section: str, graph: Path | None, quantizers: Mapping[str, tools.Quantizer]) -> None:
        """Attempt `quantizers` on a float32 graph, if there is one."""
        feeds = tools.calibration_feeds(graph, self.contract, self.windows) if graph and quantizers else []
        for name, quantizer in quantizers.items():
            if graph:
                self.attempt(section, name, partial(quantizer, graph, feeds))
            else:
                self.advance()

    def run(self) -> None:
        """Attempt everything."""
        for name, refused in REFUSED.items():
            self.attempt(AS_IT_IS, name, partial(self._export, refused))
        for section, (export, theirs) in EXPORTS.items():
            self.attempt_all(section, export, theirs)
        for recipe in OURS:
            self.attempt(OWN, recipe.name, partial(self._package, recipe))

    def _export(self, export: Export, directory: Path) -> Path:
        return export(self.model(), directory)

    def _package(self, recipe: Recipe, directory: Path) -> Path:
        return self.exporter.write(recipe, directory / recipe.name, force=False).path


def require_override(checkpoint: Checkpoint) -> None:
    """Raise `ConfigError` for a model whose positions do not enter at the projections."""
    parameters = checkpoint.config.encoding_parameters
    if not isinstance(parameters, ExPEParameters) or parameters.where == "embedding":
        raise ConfigError(f"{checkpoint.path}: positions do not enter at the projections; give an ExPE or ExQPE model")
    if parameters.shaped:
        raise ConfigError(f"{checkpoint.path}: {checkpoint.config.needs_folding}")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what the tools print and warn of; what they raise is reported."""
    logging.disable(logging.CRITICAL)
    ort.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        ort.set_default_logger_severity(2)
        logging.disable(logging.NOTSET)


def readable(error: Exception) -> str:
    """Return the first line of what was raised, without onnxruntime's codes and conditions."""
    line = next(iter(str(error).splitlines()), "")
    line = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", line)
    return f"{type(error).__name__}: {line.rpartition(' was false. ')[2]}".removesuffix(": ")


def report(bench: Bench) -> Table:
    """Lay the rows out, a section for each graph that tools were given."""
    n, base = bench.training_length, float_bytes(bench.rows)
    title = (
        f"{bench.path}: {len(bench.documents)} held-out documents, N = {n} tokens; KL divergence to float32 PyTorch, "
        "nats per token\nSize of the model file, and as a share of this project's float32; perplexity in the worst "
        "bucket; top-1 agreement over all"
    )
    table = Table(title=title, caption=CAPTION, box=box.SIMPLE, padding=(0, 1))
    table.add_column("", no_wrap=True)
    ends = np.array(bench.lengths) * n
    buckets = [f"{start // n}–{end // n} N" for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    for name in ("bytes", "size", *buckets, "perplexity", "top-1"):
        table.add_column(name, justify="right", no_wrap=True)
    for section in dict.fromkeys(row.section for row in bench.rows):
        table.add_row(f"[bold]{section}")
        for row in bench.rows:
            if row.section == section:
                table.add_row(*cells(row, base))
        table.add_section()
    return table


def float_bytes(rows: Sequence[Row]) -> int | None:
    """Return the size of this project's float32 graph."""
    return next((row.bytes for row in rows if row.section == FOLDED and row.name == "float32"), None)


def cells(row: Row, base: int | None) -> list[str]:
    """Return the table's cells of one row; of a failure, what was raised stands below its name."""
    if row.error is not None:
        return [f"  {row.name}\n{textwrap.indent(textwrap.fill(escape(row.error), 56), ' ' * 4)}"]
    assert row.bytes is not None
    size = f"{row.bytes / base:.0%}" if base else ""
    kl = [short(result.kl, 1) for result in row.results]
    return [f"  {row.name}", f"{row.bytes:,}", size, *kl, f"{row.perplexity_change:+.1%}", f"{row.top1:.1%}"]


def plot(bench: Bench, path: Path) -> None:
    """Draw KL divergence against length, a panel for each section, into `path`."""
    pyplot = drawing()
    sections = list(dict.fromkeys(row.section for row in bench.rows))
    figure, panels = pyplot.subplots(2, 2, figsize=(17, 11), layout="constrained", sharex=True, sharey=True)
    for axes, section in zip(panels.flat, sections, strict=True):
        shown = [row for row in bench.rows if row.section == section and row.results and row.largest_difference is None]
        axes.set_prop_cycle(color=pyplot.get_cmap("tab20").colors)
        for row in shown:
            ends, values = zip(*((result.bucket_end, result.kl) for result in row.results), strict=True)
            axes.plot(ends, values, label=row.name, marker="o")
        axes.set(title=section, yscale="log", xlabel="position, tokens", ylabel="KL, nats per token")
        axes.set_xscale("log", base=2)
        axes.axvline(bench.training_length, color="grey", linewidth=1, linestyle=":")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--lengths", default="1,2,4,8,16", show_default=True, help="Ends of the buckets, in training lengths.")
@click.option("--documents", default=8, show_default=True, help="Most documents to score.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures there.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw KL divergence by length there.")
def main(checkpoint: Path, lengths: str, documents: int, json_file: Path | None, plot_file: Path | None) -> None:
    """Export and quantize CHECKPOINT in every way, and compare them all with PyTorch in float32."""
    require_writable(json_file)
    require_plot(plot_file)
    ends = parse_lengths(lengths)
    require_rising(ends)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(checkpoint, Path(directory), ends, documents)
        with counted("attempting", WAYS) as bench.advance:
            bench.run()
    print_whole(report(bench), Console())
    for row in bench.rows:
        if row.largest_difference is not None:
            print(
                f"{row.section}, {row.name}: logits within {row.largest_difference:.1e} of PyTorch's over {ends[-1]} N"
            )
    versions = {name: version(name) for name in ("torch", "transformers", "optimum", "optimum-onnx", "onnxruntime")}
    found = {"checkpoint": str(checkpoint), "training_length": bench.training_length, "documents": len(bench.documents)}
    write_json(json_file, {**found, "versions": versions, "rows": [row.to_dict() for row in bench.rows]})
    if plot_file is not None:
        plot(bench, plot_file)


if __name__ == "__main__":
    main()
