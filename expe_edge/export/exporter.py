"""Checkpoint to packages: build, validate, write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from expe_edge import __version__
from expe_edge.checkpoint import Checkpoint, load_checkpoint
from expe_edge.corpus import Corpus, load_corpus
from expe_edge.encodings import ExPEParameters
from expe_edge.errors import ExportError, unknown_name
from expe_edge.export.graph import BuiltGraph, build_graph, graph_contract
from expe_edge.export.hub import write_client_files
from expe_edge.export.parity import DECODED, Parity, measure_parity, require_parity
from expe_edge.package import MODEL_FILE, TOKENIZER_FILE, Manifest, require_absent, seal_package, write_package
from expe_edge.quant.calibration import Calibration, measure_ranges, sample_windows
from expe_edge.quant.formats import LINEAR_FORMATS, Float32, Range, make_format
from expe_edge.tokenization import encode_documents

POSITIONS = ("folded", "inline")
#: The validation's sequence, and what a client reserves a cache for, in training lengths.
PARITY_LENGTHS = 16
CONTEXT_LENGTHS = 64
#: Files of the checkpoint's tokenizer that a package carries.
TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class ExportedPackage:
    """One package written: where, in which precision, how large, and how well it agreed with PyTorch."""

    path: Path
    precision: str
    size_bytes: int
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


def export(
    source: Path,
    out: Path,
    precisions: Sequence[str],
    *,
    positions: str = "folded",
    calibration: Calibration | None = None,
    calibration_data: Sequence[str] = (),
    text_field: str = "text",
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> list[ExportedPackage]:
    """Export the checkpoint `source` to `out/PRECISION` for each precision.

    Args:
        positions: `folded` out of the products, or left `inline`, as an exporter would that knows nothing of ExPE.
        calibration_data: sources of text for static ranges and for the validation; the training text by default.
        progress: called with a line before each stage.

    Raises:
        ExportError, CheckpointError, CorpusError, ConfigError: nothing of the package at fault is written then.
    """
    for precision in precisions:
        if precision not in LINEAR_FORMATS:
            raise ExportError(unknown_name("precision", precision, LINEAR_FORMATS) + "; change --precision")
        require_absent(out / precision, force=force)
    if positions not in POSITIONS:
        raise ExportError(unknown_name("positions", positions, POSITIONS) + "; change --positions")
    checkpoint = load_checkpoint(source)
    corpus = load_corpus(calibration_data, text_field) if calibration_data else checkpoint.corpus()
    if calibration_data:  # text given for this purpose is used whole
        corpus = dataclasses.replace(corpus, training=corpus.training + corpus.held_out)
    exporter = _Exporter(checkpoint, positions, calibration or Calibration(), corpus)
    if any(LINEAR_FORMATS[precision].calibrated for precision in precisions):
        _ = exporter.windows  # refuses text that is too short before anything is written
    return [exporter.write(precision, out / precision, force=force, progress=progress) for precision in precisions]


class _Exporter:
    """Everything the packages of one checkpoint share: the float graph, the ranges, the validation's text."""

    def __init__(self, checkpoint: Checkpoint, positions: str, calibration: Calibration, corpus: Corpus) -> None:
        self.checkpoint, self.positions = checkpoint, positions
        self.calibration, self.corpus = calibration, corpus
        self.model, self.config = checkpoint.model, checkpoint.config
        parameters = self.config.encoding_parameters
        self.encoding = parameters if isinstance(parameters, ExPEParameters) else None
        if self.encoding is not None and self.encoding.where == "embedding" and positions == "folded":
            raise ExportError(
                "positions at the embedding pass through every norm and cannot be folded; use --positions inline"
            )
        self.contract = graph_contract(self.config)
        self._ranges: dict[str, Range] | None = None
        self.plain = self._build(Float32.name)

    def _build(self, precision: str) -> BuiltGraph:
        return build_graph(self.model, make_format(precision, self._ranges), folded=self.positions == "folded")

    def write(self, precision: str, path: Path, *, force: bool, progress: Callable[[str], None]) -> ExportedPackage:
        """Build, validate and write one package."""
        if LINEAR_FORMATS[precision].calibrated and self._ranges is None:
            progress(f"calibrating {self.calibration.windows} windows of {self.config.training_length} tokens")
            self._ranges = self._measure_ranges()
        progress(f"{precision}: building")
        graph = self.plain if precision == Float32.name else self._build(precision)
        progress(f"{precision}: validating against PyTorch")
        parity = measure_parity(self.model, graph.model, self.contract, self._parity_tokens)
        require_parity(parity, precision, folded=self.positions == "folded")
        with write_package(path, force=force) as directory:
            self._fill(directory, graph.model, self._manifest(precision, graph, parity))
        size = sum(file.stat().st_size for file in path.iterdir())
        return ExportedPackage(path, precision, size, parity)

    @cached_property
    def windows(self) -> list[npt.NDArray[np.int64]]:
        """The text that static ranges are measured on."""
        stream = np.concatenate(encode_documents(self.checkpoint.tokenizer, self.corpus.training))
        return sample_windows(stream, self.config.training_length, self.calibration)

    def _measure_ranges(self) -> dict[str, Range]:
        return measure_ranges(self.plain.model, self.contract, self.plain.linear_inputs, self.windows, self.calibration)

    @cached_property
    def _parity_tokens(self) -> npt.NDArray[np.int64]:
        """The longest document, held-out if there is one, repeated where it is short."""
        longest = max(self.corpus.held_out or self.corpus.training, key=lambda document: len(document.text))
        (tokens,) = encode_documents(self.checkpoint.tokenizer, [longest])
        length = min(PARITY_LENGTHS * self.config.training_length, self.config.max_position_embeddings)
        return np.resize(tokens[:length], max(length, 2 * DECODED)).astype(np.int64)

    def _manifest(self, precision: str, graph: BuiltGraph, parity: Parity) -> Manifest:
        code = self.encoding.code.stored if self.encoding else None
        return Manifest(
            model=json.loads(self.config.to_json_string(use_diff=False)),
            contract=self.contract,
            training_length=self.config.training_length,
            context_length=min(CONTEXT_LENGTHS * self.config.training_length, self.config.max_position_embeddings),
            precision=precision,
            linears=dict.fromkeys(graph.linear_inputs, precision),
            positions=self.positions,
            position_code=dataclasses.asdict(code) if code else None,
            calibration=self._calibration_record() if LINEAR_FORMATS[precision].calibrated else None,
            parity=parity.to_dict(),
            corpus=self.checkpoint.sources,
            created_by=f"expe-edge {__version__}",
        )

    def _calibration_record(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.calibration),
            "sources": list(self.corpus.sources),
            "window_tokens": self.config.training_length,
            "ranges": self._ranges,
        }

    def _fill(self, directory: Path, model: onnx.ModelProto, manifest: Manifest) -> None:
        onnx.save(model, directory / MODEL_FILE)
        for name in TOKENIZER_FILES:
            if (self.checkpoint.path / name).is_file():
                shutil.copyfile(self.checkpoint.path / name, directory / name)
        write_client_files(directory, self.config, manifest.context_length)
        seal_package(directory, manifest)
