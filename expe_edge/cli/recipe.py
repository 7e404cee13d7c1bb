"""The options that `export` and `quantize` share: what a package is to be, and what calibration runs on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expe_edge.cli.flags import Setting
from expe_edge.cli.output import PATH, TEXT_FIELD, is_given, require_writable, sources, write_json
from expe_edge.errors import ExportError
from expe_edge.hub.card import CardOptions
from expe_edge.quant.recipe import (
    BLOCK_SIZES,
    CACHES,
    CALIBRATION_WINDOWS,
    DEVICES,
    EMBEDDINGS,
    HEAD_WINDOW_COST,
    PRECISIONS,
    SOLVERS,
    Recipe,
    require_used,
)
from expe_edge.quant.targets import TARGETS, chosen_for

if TYPE_CHECKING:
    from expe_edge.export.exporter import ExportedPackage

#: Sizes as people write them.
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kMG]?)B?", re.IGNORECASE)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

_OPTIONS = (
    click.option("--out", type=PATH, required=True, help="Each package goes to OUT/NAME, named by its formats."),
    click.option(
        "--precision",
        "precisions",
        multiple=True,
        default=("float32",),
        show_default=True,
        metavar="|".join(PRECISIONS),
        help="Format of the linears; repeatable. auto chooses one for each, within --budget-kl or --max-size.",
    ),
    click.option("--embedding", metavar="|".join(EMBEDDINGS), help="Embedding; else the precision's own."),
    click.option("--cache", default="float32", show_default=True, metavar="|".join(CACHES), help="Key/value cache."),
    click.option(
        "--solver",
        metavar="|".join(SOLVERS),
        help="For integer weights; by default gptq, or rtn for weights trained for it.",
    ),
    click.option("--block-size", type=int, help=f"For int*-weight: {', '.join(map(str, BLOCK_SIZES))}."),
    click.option("--smoothing", is_flag=True, help="Move outliers of activations into weights where that helps."),
    click.option("--reduce-range", is_flag=True, help="7-bit weights, for WebAssembly and CPUs without VNNI."),
    click.option(
        "--target",
        metavar="|".join(TARGETS),
        help="The place it is for, which chooses the options that are not given, and says why.",
    ),
    click.option("--portable", is_flag=True, help="Standard ONNX operators alone."),
    click.option(
        "--device",
        default="cpu",
        show_default=True,
        metavar="|".join(DEVICES),
        help="What it is for. On cuda float32 computes in float32, all else in float16.",
    ),
    click.option("--ort-format", is_flag=True, help="model.ort and its operators too, for reduced builds."),
    click.option(
        "--head-window",
        type=int,
        metavar="TOKENS",
        help="Heads with slopes see and keep so many; N is a good choice. For this runtime alone.",
    ),
    click.option(
        "--head-window-cost",
        default=HEAD_WINDOW_COST,
        show_default=True,
        help="Most nats per token that windows may add to the loss.",
    ),
    click.option("--budget-kl", type=float, help="For auto: most KL divergence to float32, nats per token."),
    click.option("--max-size", metavar="SIZE", help="For auto: most bytes of model.onnx, as 600kB or 1.5MB."),
    click.option(
        "--positions",
        default="folded",
        show_default=True,
        metavar="folded|inline",
        help="Positions folded out of the products, exactly, or left inside as an off-the-shelf exporter would.",
    ),
    sources("--calibration-data", "Text; else the training text."),
    click.option(
        "--calibration-method",
        cls=Setting,
        setting="method",
        default="output-error",
        show_default=True,
        metavar="output-error|minmax|percentile|entropy",
        help="Ranges of int8-static.",
    ),
    click.option(
        "--calibration-windows",
        cls=Setting,
        setting="windows",
        default=CALIBRATION_WINDOWS,
        show_default=True,
        help="Texts of one training length.",
    ),
    click.option("--ranges-from", type=PATH, metavar="PACKAGE", help="Use the ranges of a package of this model."),
    TEXT_FIELD,
    click.option("--seed", default=0, show_default=True, help="Which windows calibrate."),
    click.option("--names", is_flag=True, help="Readable names of tensors, for graph viewers; some kilobytes."),
    click.option(
        "--license",
        "license_id",
        cls=Setting,
        setting="license",
        metavar="ID",
        help="Of the weights, for the card: apache-2.0, mit, other, ….  [default: none is stated]",
    ),
    click.option("--base-model", metavar="OWNER/NAME", help="What it was made from on the Hub, for the card."),
    click.option("--force", is_flag=True, help="Replace packages that exist."),
    click.option("--json", "json_file", type=PATH, help="Write sizes and parity figures there."),
)


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of `make_packages`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def make_packages(
    source: Path,
    *,
    out: Path,
    precisions: tuple[str, ...],
    target: str | None,
    max_size: str | None,
    positions: str,
    calibration_data: tuple[str, ...],
    calibration_method: str,
    calibration_windows: int,
    ranges_from: Path | None,
    text_field: str,
    seed: int,
    names: bool,
    license_id: str | None,
    base_model: str | None,
    force: bool,
    json_file: Path | None,
    **formats: Any,
) -> None:
    """Make the packages and report them."""
    require_writable(json_file)
    size = parse_size(max_size)
    if target is not None:
        precisions, formats = completed(target, precisions, formats)
    recipes = [Recipe(precision, max_size=size, **formats) for precision in dict.fromkeys(precisions)]
    require_used(recipes, ranges_from=ranges_from is not None)  # as `export` does, after seconds of imports
    card = CardOptions(license=license_id, base_model=base_model)
    from expe_edge.calibration.observations import Calibration
    from expe_edge.export.exporter import export

    packages = export(
        source,
        out,
        recipes,
        positions=positions,
        calibration=Calibration(calibration_method, calibration_windows, seed),
        calibration_data=calibration_data,
        text_field=text_field,
        ranges_from=ranges_from,
        names=names,
        card=card,
        force=force,
        progress=lambda line: click.echo(line, err=True),
    )
    write_json(json_file, {"packages": [package.to_dict() for package in packages]})
    for package in packages:
        report(package)


def completed(
    target: str, precisions: tuple[str, ...], formats: dict[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the precisions and other options with what a target chooses where they are not given, and say what.

    Raises:
        ExportError: an unknown target.
    """
    given = {name for name in formats if is_given(name)}
    if is_given("precisions"):
        given.add("precision")
    choices = chosen_for(target, given)
    values = {name: choice.value for name, choice in choices.items()}
    if "precision" in values:
        precisions = (values.pop("precision"),)
    for name, choice in choices.items():
        flag = f"--{name.replace('_', '-')}" + ("" if choice.value is True else f" {choice.value}")
        click.echo(f"--target {target}: {flag}, since {choice.reason}", err=True)
    return precisions, formats | values | {"target": target, "chosen": tuple(choices)}


def report(package: ExportedPackage) -> None:
    """Print one line on a package, and why its formats were chosen where they were."""
    parity = package.parity
    click.echo(
        f"{package.path}: {package.size_bytes / 1e6:.2f} MB; against {package.validated_against} over {parity.tokens} "
        f"tokens: largest difference of logits {max(parity.prefill_max, parity.decode_max):.2g}, mean KL "
        f"{parity.mean_kl:.2g} nats"
    )
    if package.choice is not None:
        from rich.console import Console

        from expe_edge.cli.tables import print_whole, sensitivity_table

        click.echo(f"chosen by what each weight costs alone; together {package.choice}:")
        print_whole(sensitivity_table(package.choice.chosen), Console())


def parse_size(text: str | None) -> int | None:
    """Parse a number of bytes."""
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip())
    size = float(match[1]) * UNITS[match[2].lower()] if match else math.inf
    if not math.isfinite(size):
        raise ExportError(f"--max-size {text}: expected bytes, as 600kB or 1.5MB")
    return int(size)
