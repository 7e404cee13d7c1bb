"""What a recipe asks of a model, of its text and of onnxruntime, looked at before anything is written."""

from __future__ import annotations

import onnxruntime as ort

from expe_edge.calibration.auto import LINEAR_CANDIDATES
from expe_edge.calibration.evidence import Evidence
from expe_edge.calibration.text import CalibrationText
from expe_edge.calibration.windows import head_windows
from expe_edge.errors import ExportError
from expe_edge.export.plan import oldest_to_export
from expe_edge.graph.build import require_narrow
from expe_edge.graph.linears import LINEAR_FORMATS
from expe_edge.package.manifest import release
from expe_edge.quant.recipe import Recipe


def require_possible(recipe: Recipe, evidence: Evidence, text: CalibrationText) -> None:
    """Raise `ExportError`, or `CorpusError` of the text, for a recipe of which no package can be made."""
    _require_model(recipe, evidence)
    _require_onnxruntime(recipe)
    if recipe.smoothing and evidence.given_ranges is not None:
        raise ExportError("`smoothing` changes what the ranges of `ranges_from` were measured on; drop one of them")
    _require_text(recipe, evidence, text)


def _require_model(recipe: Recipe, evidence: Evidence) -> None:
    """Raise `ExportError` for a recipe that this model cannot follow."""
    weights, config = evidence.weights, evidence.weights.config
    if not recipe.portable and recipe.gpu is None and config.needs_portable is not None:
        raise ExportError(config.needs_portable)
    if recipe.gpu == "float16":
        require_narrow(weights)
    if recipe.cache == "int8" and weights.positioned_values:
        raise ExportError(
            "the values of this model carry positions (where: query_key_value), which no fixed int8 range holds at "
            "every length; use `cache` float32"
        )
    if recipe.embedding is not None and config.tie_word_embeddings:
        raise ExportError("this model's head is its embedding, stored once in the head's format; drop `embedding`")
    if recipe.head_window is not None:
        head_windows(weights, recipe.head_window)


def _require_onnxruntime(recipe: Recipe) -> None:
    """Raise `ExportError` where this onnxruntime has no kernels for `recipe`, to validate it with."""
    needed = oldest_to_export(recipe, _formats(recipe))
    if release(ort.__version__) < release(needed):
        raise ExportError(
            f"{recipe.name} needs onnxruntime {needed} or newer, this is {ort.__version__}; upgrade it, or choose "
            "another `precision` or `cache`"
        )


def _require_text(recipe: Recipe, evidence: Evidence, text: CalibrationText) -> None:
    """Raise `CorpusError` or `ExportError` where there is too little text to calibrate on."""
    formats = _formats(recipe)
    ranges = any(LINEAR_FORMATS[name].calibrated for name in formats) and evidence.given_ranges is None
    moments = evidence.needs_moments(recipe, formats)
    if not (ranges or moments or recipe.smoothing or recipe.cache == "int8"):
        return
    _ = text.windows
    if ranges:
        evidence.require_ranges()
    if moments:
        evidence.require_moments()


def _formats(recipe: Recipe) -> set[str]:
    """Return the formats that linears may get."""
    return set(LINEAR_CANDIDATES) if recipe.precision == "auto" else {recipe.precision}
