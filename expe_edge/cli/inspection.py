"""What a package's manifest says, laid out for people."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from expe_edge.package.directory import Package
from expe_edge.package.manifest import Manifest
from expe_edge.quant.recipe import Recipe


def inspection_tables(package: Package) -> Iterator[Table]:
    """Yield tables of everything in the manifest of a verified package."""
    manifest = package.manifest
    yield _pairs("package", _summary(package))
    yield _parts(manifest.parts)
    calibration = manifest.calibration or {}
    if "ranges" in calibration:
        yield _rows("static ranges", ("linear", "lowest", "highest"), _ranges(calibration["ranges"]))
    if "smoothing" in calibration:
        yield _rows("smoothing strengths", ("linear", "strength"), calibration["smoothing"].items())
    if "cache_scales" in calibration:
        yield _rows("int8 cache, one level is worth", ("layer", "keys", "values"), _scales(calibration["cache_scales"]))
    yield _operators(manifest)
    yield _pairs("provenance", _provenance(manifest))


def _summary(package: Package) -> dict[str, str]:
    manifest, model = package.manifest, package.manifest.model
    usual = Recipe().to_dict()
    options = {name: value for name, value in manifest.recipe.items() if value != usual.get(name)}
    options.pop("precision", None)
    return {
        "path": str(package.path),
        "precision": manifest.precision,
        "options": ", ".join(f"{name} {value}" for name, value in options.items()) or "defaults",
        "cache": _cache(manifest),
        "size": f"{package.size:,} bytes in {len(manifest.files) + 1} files",
        "model": f"{model['num_hidden_layers']} layers, width {model['hidden_size']}, vocabulary {model['vocab_size']}",
        "encoding": f"{model['positional']}, {_settings(model['positional_parameters'])}",
        "positions": f"{manifest.positions}{_code(manifest.position_code)}",
        "lengths": f"trained at {manifest.training_length} tokens, clients reserve {manifest.context_length}, "
        f"exact to {model['max_position_embeddings']}",
    }


def _cache(manifest: Manifest) -> str:
    contract = manifest.contract
    cache = f"{contract.cache_dtype}, {contract.cache_bytes:,} bytes a token"
    kept = [window for window in contract.windows if window]
    if not kept:
        return cache
    cost = (manifest.calibration or {}).get("head_windows", {}).get("loss", math.nan)
    return f"{cache}; {len(kept)} of {len(contract.windows)} heads keep {max(kept)} tokens, for {cost:+.2g} nats"


def _settings(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in parameters.items()) or "no parameters"


def _code(code: Mapping[str, int] | None) -> str:
    return f", as {code['limbs']} integer limbs of {code['bits']} bits" if code else ""


def _parts(parts: Sequence[Mapping[str, Any]]) -> Table:
    total = sum(part["bytes"] for part in parts)
    rows = [(part["part"], part["format"], f"{part['bytes']:,}", f"{part['bytes'] / total:.1%}") for part in parts]
    return _rows("model.onnx by part", ("part", "format", "bytes", "share"), [*rows, ("all", "", f"{total:,}", "")])


def _ranges(ranges: Mapping[str, Sequence[float]]) -> list[tuple[str, str, str]]:
    return [(linear, f"{low:.4g}", f"{high:.4g}") for linear, (low, high) in ranges.items()]


def _scales(layers: Sequence[Mapping[str, Sequence[float]]]) -> list[tuple[str, ...]]:
    return [
        (str(index), *(f"{low:.3g} … {high:.3g}" for low, high in (layer["key"], layer["value"])))
        for index, layer in enumerate(layers)
    ]


def _operators(manifest: Manifest) -> Table:
    rows = [
        (name, str(manifest.operators.get(name, "")), str(manifest.kernels.get(name, "")))
        for name in dict.fromkeys((*manifest.operators, *manifest.kernels))
    ]
    return _rows("operators in the graph, and as onnxruntime runs it", ("operator", "stored", "run"), rows)


def _provenance(manifest: Manifest) -> dict[str, str]:
    calibration, parity = manifest.calibration, manifest.parity
    rows = {
        "made by": manifest.created_by,
        "needs": f"onnxruntime {manifest.requires_onnxruntime} or newer",
        "trained on": ", ".join(map(str, manifest.corpus.get("sources", ()))) or "the standard library of Python",
        "validated": f"over {parity['tokens']} tokens: largest difference of logits "
        f"{max(parity['prefill_max'], parity['decode_max']):.2g}, mean KL {parity['mean_kl']:.2g} nats",
    }
    if calibration:
        rows["calibrated"] = (
            f"{calibration['windows']} windows of {calibration['window_tokens']} tokens, {calibration['method']}, on "
            + ", ".join(map(str, calibration["sources"]))
        )
    if calibration and "choice" in calibration:
        choice = calibration["choice"]
        rows["chosen"] = f"by measurement: KL {choice['kl']:.2g} nats, {math.ceil(choice['size'] / 1000)} kB of graph"
    return rows


def _pairs(title: str, values: Mapping[str, str]) -> Table:
    return _rows(title, ("", ""), values.items())


def _rows(title: str, headings: Sequence[str], rows: Any) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=any(headings))
    numbers = {"bytes", "share", "stored", "run", "lowest", "highest", "strength"}
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in numbers else "left")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    return table
