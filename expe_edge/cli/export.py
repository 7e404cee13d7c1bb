"""`expe-edge export`."""

from __future__ import annotations

from pathlib import Path

import click

from expe_edge.cli.output import PATH, require_writable, write_json


@click.command(short_help="Turn a checkpoint into ONNX packages.")
@click.argument("checkpoint", type=PATH)
@click.option("--out", type=PATH, required=True, help="Each package goes to OUT/PRECISION.")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    default=("float32",),
    show_default=True,
    metavar="float32|int8-dynamic|int8-static",
    help="Format of the linears; repeatable.",
)
@click.option(
    "--positions",
    default="folded",
    show_default=True,
    metavar="folded|inline",
    help="Positions folded out of the products, exactly, or left inside as an off-the-shelf exporter would.",
)
@click.option(
    "--calibration-data",
    multiple=True,
    metavar="PATH",
    help="Text for static ranges; else the training text.",
)
@click.option("--calibration-method", default="minmax", show_default=True, metavar="minmax|percentile|entropy")
@click.option("--calibration-windows", default=32, show_default=True, help="Windows of one training length.")
@click.option("--text-field", default="text", show_default=True, help="Field of JSON lines and parquet.")
@click.option("--seed", default=0, show_default=True, help="Which windows calibrate.")
@click.option("--force", is_flag=True, help="Replace packages that exist.")
@click.option("--json", "json_file", type=PATH, help="Write sizes and parity figures there.")
def export(
    checkpoint: Path,
    out: Path,
    precisions: tuple[str, ...],
    positions: str,
    calibration_data: tuple[str, ...],
    calibration_method: str,
    calibration_windows: int,
    text_field: str,
    seed: int,
    force: bool,
    json_file: Path | None,
) -> None:
    """Export CHECKPOINT to self-contained ONNX packages, validated against PyTorch before they are written."""
    require_writable(json_file)
    from expe_edge.export.exporter import export as run
    from expe_edge.quant.calibration import Calibration

    packages = run(
        checkpoint,
        out,
        list(dict.fromkeys(precisions)),
        positions=positions,
        calibration=Calibration(calibration_method, calibration_windows, seed),
        calibration_data=calibration_data,
        text_field=text_field,
        force=force,
        progress=lambda line: click.echo(line, err=True),
    )
    write_json(json_file, {"packages": [package.to_dict() for package in packages]})
    for package in packages:
        parity = package.parity
        click.echo(
            f"{package.path}: {package.size_bytes / 1e6:.2f} MB; against PyTorch over {parity.tokens} tokens: largest "
            f"difference of logits {max(parity.prefill_max, parity.decode_max):.2g}, mean KL {parity.mean_kl:.2g} nats"
        )
