"""Checkpoint, or float32 package, to packages: choose formats, build, verify, validate, write."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx

from expe_edge import __version__
from expe_edge.calibration.auto import Choice, candidates_of, choose
from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.observations import Calibration
from expe_edge.calibration.sensitivity import Sensitivity, measure_sensitivity
from expe_edge.calibration.text import CalibrationText
from expe_edge.calibration.windows import Windows, head_windows, measure_windows
from expe_edge.errors import ExportError, unknown_name
from expe_edge.export.clients import write_client_files
from expe_edge.export.kernels import optimized_operators, require_kernels
from expe_edge.export.ort_format import write_ort_format
from expe_edge.export.parity import ByToken, Parity, measure_parity, require_parity
from expe_edge.export.plan import Plan
from expe_edge.export.portable import require_portable
from expe_edge.export.requirements import require_possible
from expe_edge.export.self_test import self_test
from expe_edge.export.source import Source, open_source
from expe_edge.graph.linears import LINEAR_FORMATS
from expe_edge.graph.names import name_tensors
from expe_edge.graph.nodes import operators_of
from expe_edge.graph.run import DECODED, open_model
from expe_edge.graph.sizes import measure_parts
from expe_edge.hub.card import CardOptions, LengthQuality, Quality, write_card
from expe_edge.package.directory import (
    MODEL_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    Package,
    clear_leftovers,
    is_package,
    read_package,
    require_absent,
    seal_package,
    write_package,
)
from expe_edge.package.manifest import Manifest
from expe_edge.progress import counted
from expe_edge.quant.channels import Range
from expe_edge.quant.formats import Formats
from expe_edge.quant.recipe import Recipe, require_used
from expe_edge.spool import Spool
from expe_edge.text.corpus import load_corpus

POSITIONS = ("folded", "inline")
#: The validation's sequence, and what a client reserves a cache for, in training lengths.
PARITY_LENGTHS = 16
#: Ends of the lengths that a card tells apart, in training lengths.
CARD_LENGTHS = (1, 2, 4, 8, 16)
CONTEXT_LENGTHS = 64
#: Tokens that `auto` measures single weights on, in texts of one training length, and the whole model, in texts as many
#: training lengths long as there are.
TOKENS, LONGER_TOKENS, LONGER = 4096, 32768, (4, 2, 1)
LEAST_TEXTS = 8
#: Texts that windows are measured on, in training lengths, as long as there are; and how many.
WINDOW_LENGTHS, WINDOW_TEXTS = (16, 8, 4, 2), 4
#: Files of the source's tokenizer that a package carries; the last is of checkpoints that earlier releases made.
TOKENIZER_FILES = (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, "special_tokens_map.json")


@dataclass(frozen=True)
class ExportedPackage:
    """One package written: where, in which precision, how large, and how well it agreed with its source."""

    path: Path
    precision: str
    size_bytes: int
    parity: Parity
    validated_against: str
    linears: dict[str, str]
    choice: Choice | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def export(
    source: Path,
    out: Path,
    recipes: Sequence[Recipe | str],
    *,
    positions: str = "folded",
    calibration: Calibration | None = None,
    calibration_data: Sequence[str] = (),
    text_field: str = "text",
    ranges_from: Path | None = None,
    names: bool = False,
    card: CardOptions | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[ExportedPackage]:
    """Export `source`, a checkpoint or a float32 package, to `out/NAME` for each recipe.

    Args:
        recipes: or names of precisions.
        positions: `folded` out of the products, or left `inline`, as an exporter would that knows nothing of ExPE.
        calibration_data: sources of text for calibration and for the validation; the training text by default.
        ranges_from: a package of the same model whose static ranges are used again.
        names: call the graphs' tensors after what they are, see `name_tensors`, not by numbers, which take fewer bytes.
        card: what the model cards say that a model does not tell.
        progress: called with a line before each stage.

    Raises:
        ExportError, CheckpointError, CorpusError, ConfigError: nothing of the package at fault is written then.
    """
    asked = [Recipe(recipe) if isinstance(recipe, str) else recipe for recipe in recipes]
    require_used(asked, ranges_from=ranges_from is not None)
    _require_apart(out, [recipe.name for recipe in asked])
    for recipe in asked:
        clear_leftovers(out / recipe.name)
        require_absent(out / recipe.name, force=force)
    exporter = open_exporter(
        source,
        positions=positions,
        calibration=calibration,
        calibration_data=calibration_data,
        text_field=text_field,
        progress=progress,
    )
    if ranges_from is not None:
        exporter.take_ranges(ranges_from)
    asked = [recipe.resolved(exporter.source.rounding) for recipe in asked]
    for recipe in asked:
        exporter.require_possible(recipe)  # before anything is written
    return [exporter.write(recipe, out / recipe.name, names=names, card=card, force=force) for recipe in asked]


def _require_apart(out: Path, names: Sequence[str]) -> None:
    """Raise `ExportError` where one package would be written over another: not all options are in their names."""
    for name in names:
        if names.count(name) > 1:
            raise ExportError(f"{names.count(name)} packages would all be {out / name}; give each an `out` of its own")


def export_one(source: Path, path: Path, recipe: Recipe) -> ExportedPackage:
    """Export `source`, a checkpoint or a float32 package, to the directory `path` itself; errors as for `export`."""
    require_used([recipe])
    require_absent(path, force=False)
    exporter = open_exporter(source)
    recipe = recipe.resolved(exporter.source.rounding)
    exporter.require_possible(recipe)
    return exporter.write(recipe, path, force=False)


def open_exporter(
    source: Path,
    *,
    positions: str = "folded",
    calibration: Calibration | None = None,
    calibration_data: Sequence[str] = (),
    text_field: str = "text",
    progress: Callable[[str], None] = lambda _: None,
) -> Exporter:
    """Open `source` and its text; arguments and errors as for `export`."""
    if positions not in POSITIONS:
        raise ExportError(unknown_name("positions", positions, POSITIONS) + "; change `positions`")
    opened = open_source(source, folded=positions == "folded")
    sources = {"sources": calibration_data, "text_field": text_field} if calibration_data else opened.corpus
    corpus = load_corpus(**sources)
    if calibration_data:  # text given for this purpose is used whole
        corpus = dataclasses.replace(corpus, training=corpus.training + corpus.held_out)
    text = CalibrationText(corpus, opened.tokenizer, opened.config.training_length, calibration or Calibration())
    return Exporter(opened, text, progress)


class Contents(NamedTuple):
    """What is in a graph: its parts with their sizes, see `measure_parts`, and how often each operator occurs."""

    parts: list[dict[str, Any]]
    operators: Counter[str]


class Exporter:
    """Everything the packages of one model share: the float graph, what calibration shows, the validation's text."""

    def __init__(self, source: Source, text: CalibrationText, progress: Callable[[str], None]) -> None:
        self.source, self.text, self.progress = source, text, progress
        self.config = source.config
        if self.config.too_large is not None:
            raise ExportError(self.config.too_large)
        elsewhere = self.config.needs_inline if source.weights.folded else self.config.needs_folding
        if elsewhere is not None:
            raise ExportError(elsewhere)
        self.evidence = Evidence(
            source.weights, text.calibration, lambda: text.windows, rounding=source.rounding, progress=progress
        )
        self._measured: dict[tuple[int, ...], Windows] = {}

    def take_ranges(self, package: Path) -> None:
        """Use the static ranges of another package of the same model."""
        record = read_package(package).manifest.calibration
        if not record or not record.get("ranges"):
            raise ExportError(f"`ranges_from` {package}: it has no static ranges")
        if record["weights"] != self.evidence.fingerprint:
            raise ExportError(f"`ranges_from` {package}: measured on another model, or on weights smoothed otherwise")
        ranges: dict[str, Range] = {name: (low, high) for name, (low, high) in record["ranges"].items()}
        missing = [name for name in self.evidence.linears if not np.isfinite(ranges.get(name, np.nan)).all()]
        if missing:
            raise ExportError(f"`ranges_from` {package}: no finite range of {missing[0]}; measure them anew")
        self.evidence.given_ranges = ranges

    def require_possible(self, recipe: Recipe) -> None:
        """Raise `ExportError` or `CorpusError` for a recipe that cannot be made of this model, its text or here."""
        require_possible(recipe, self.evidence, self.text)

    def plan(self, recipe: Recipe) -> Plan:
        """Choose the formats, and the windows where there are to be some."""
        plan = self._formats(recipe)
        return plan if recipe.head_window is None else dataclasses.replace(plan, windows=self._windows(recipe))

    def _windows(self, recipe: Recipe) -> Windows:
        """Return the windows that are asked for, whose cost is measured once.

        Raises:
            ExportError: they cost more than they may.
        """
        assert recipe.head_window is not None
        windows = head_windows(self.source.weights, recipe.head_window)
        if windows not in self._measured:
            texts = self.text.beginnings(WINDOW_LENGTHS, WINDOW_TEXTS)
            self.progress(f"measuring windows on {len(texts)} texts of {len(texts[0])} tokens")
            self._measured[windows] = measure_windows(self.source.weights, windows, texts)
        measured = self._measured[windows]
        if not measured.loss <= recipe.head_window_cost:
            raise ExportError(
                f"`head_window` {recipe.head_window} costs {measured.loss:.2g} nats per token, more than "
                f"`head_window_cost` {recipe.head_window_cost:g}; raise one of them"
            )
        return measured

    def _formats(self, recipe: Recipe) -> Plan:
        if recipe.precision == "auto":
            choice = self._choose(recipe)
            return Plan(recipe, self.evidence, Formats.by_weight(choice.formats, recipe.cache), choice=choice)
        names = dict.fromkeys(self.evidence.linears, recipe.precision)
        embedding = recipe.embedding or LINEAR_FORMATS[recipe.precision].embedding
        formats = Formats(names, embedding, recipe.cache)
        if not recipe.smoothing:
            return Plan(recipe, self.evidence, formats)
        evidence, strengths = self.evidence.smoothed(recipe, names)
        return Plan(recipe, evidence, formats, strengths)

    def _choose(self, recipe: Recipe) -> Choice:
        texts, longer = self._beginnings((1,), TOKENS), self._beginnings(LONGER, LONGER_TOKENS)
        measured = self.measure_weights(recipe, candidates_of(self.evidence), texts)
        return choose(self.evidence, recipe, measured, longer)

    def measure_weights(
        self, recipe: Recipe, candidates: Mapping[str, Sequence[str]], texts: Sequence[npt.NDArray[np.int64]]
    ) -> list[Sensitivity]:
        """Return the cost of every weight in its candidate formats, see `measure_sensitivity`, with a progress bar."""
        with counted("measuring weights", sum(map(len, candidates.values()))) as advance:
            return measure_sensitivity(self.evidence, recipe, candidates, texts, advance)

    def _beginnings(self, lengths: Sequence[int], tokens: int) -> list[npt.NDArray[np.int64]]:
        count = tokens // (lengths[0] * self.config.training_length)
        return self.text.beginnings(lengths, max(count, LEAST_TEXTS))

    def write(
        self, recipe: Recipe, path: Path, *, names: bool = False, card: CardOptions | None = None, force: bool
    ) -> ExportedPackage:
        """Choose formats, build, verify, validate and write one package; it appears at `path` when all is well."""
        plan = self.plan(recipe)  # a format for every weight, by what calibration shows
        expected = self._expected  # what the source computes
        with write_package(path, force=force) as directory:
            self.progress(f"{recipe.name}: building")
            # The graph: weights rounded and stored, nodes, one file.
            contents = _save(plan, directory / MODEL_FILE, names=names)
            # What onnxruntime makes of it: an integer kernel for every linear that should have one.
            kernels = optimized_operators(directory / MODEL_FILE)
            require_kernels(kernels, plan.linears)
            # What it computes, token by token, against the source.
            self.progress(f"{recipe.name}: validating against {self.source.origin}")
            session = open_model(directory / MODEL_FILE)
            parity, by_token = measure_parity(expected, session, plan.contract, self._parity_tokens)
            compared = self_test(session, plan.contract, self._parity_tokens)
            del session  # what follows opens others
            self._require_valid(plan, parity, directory / MODEL_FILE)
            if recipe.ort_format:
                write_ort_format(directory, plan.contract, self._parity_tokens)
            # What it is, with the hash of every file.
            manifest = dataclasses.replace(self._manifest(plan, contents, parity, kernels), self_test=compared)
            self._fill(directory, manifest)
            write_card(directory, path.name, manifest, self._quality(by_token), card or CardOptions())
        size = Package(path, manifest).size
        return ExportedPackage(path, recipe.name, size, parity, self.source.origin, plan.linears, plan.choice)

    @cached_property
    def _parity_tokens(self) -> npt.NDArray[np.int64]:
        length = min(PARITY_LENGTHS * self.config.training_length, self.config.max_position_embeddings)
        return self.text.longest(max(length, 2 * DECODED))

    @cached_property
    def _expected(self) -> Spool:
        """What the source computes: once for all packages, before any graph is held beside it."""
        return Spool(self.source.reference(self._parity_tokens))

    def _require_valid(self, plan: Plan, parity: Parity, model: Path) -> None:
        folded = self.source.weights.folded
        require_parity(parity, plan.recipe.name, folded=folded, exact=plan.exact)
        if plan.recipe.portable:
            require_portable(onnx.load(model), plan.contract, self._parity_tokens, plan.linears, folded=folded)

    def _quality(self, by_token: ByToken) -> Quality:
        """The graph's quality by length on the text that it was validated on, as far as nothing of it is repeated."""
        n, tokens = self.config.training_length, min(1 + len(by_token.kl), len(self.text.longest_document))
        ends = [*(end for end in (n * length for length in CARD_LENGTHS) if end < tokens), tokens]
        rows = []
        for start, end in pairwise([0, *ends]):
            at = slice(max(start - 1, 0), end - 1)  # nothing predicts the first token
            rows.append(
                LengthQuality(start, end, float(np.exp(by_token.nats[at].mean())), float(by_token.kl[at].mean()))
            )
        document = "held-out document" if self.text.corpus.held_out else "document of the training text"
        reference = "the float32 package" if is_package(self.source.path) else self.source.origin
        return Quality(f"one {document}", reference, rows)

    def _manifest(self, plan: Plan, contents: Contents, parity: Parity, kernels: Counter[str]) -> Manifest:
        code = self.config.encoding_parameters.code
        recipe = plan.recipe
        return Manifest(
            model=self.config.settings(),
            contract=plan.contract,
            training_length=self.config.training_length,
            context_length=min(CONTEXT_LENGTHS * self.config.training_length, self.config.max_position_embeddings),
            precision=recipe.precision,
            linears=plan.linears,
            embedding=plan.embedding,
            recipe=recipe.to_dict(),
            rounding=dataclasses.asdict(self.source.rounding) if self.source.rounding else None,
            positions="folded" if self.source.weights.folded else "inline",
            position_code=dataclasses.asdict(code.stored) if code else None,
            calibration=self._calibration_record(plan),
            parity=parity.to_dict(),
            corpus=self.source.corpus,
            parts=contents.parts,
            operators=dict(contents.operators.most_common()),
            kernels=dict(kernels.most_common()),
            requires_onnxruntime=plan.requires_onnxruntime,
            created_by=f"expe-edge {__version__}",
        )

    def _calibration_record(self, plan: Plan) -> dict[str, Any] | None:
        measured = plan.measured()
        if measured is None:
            return None
        sources = list(self.text.corpus.sources)
        return {
            **dataclasses.asdict(self.text.calibration),
            "sources": sources,
            "window_tokens": self.config.training_length,
            **measured,
        }

    def _fill(self, directory: Path, manifest: Manifest) -> None:
        for name in TOKENIZER_FILES:
            if (self.source.path / name).is_file():
                shutil.copyfile(self.source.path / name, directory / name)
        write_client_files(directory, self.config, manifest.contract, manifest.context_length)
        seal_package(directory, manifest)


def _save(plan: Plan, path: Path, *, names: bool) -> Contents:
    """Build a graph into a file. It is gone from memory then: what follows runs what the package will hold."""
    model = plan.build().model
    if names:
        name_tensors(model)
    onnx.save(model, path)
    return Contents(measure_parts(model, plan.linears, plan.embedding), operators_of(model))
