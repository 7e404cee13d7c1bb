"""`expe-edge train`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from expe_edge.cli.output import PATH, is_given, require_writable, sources, write_json
from expe_edge.errors import ConfigError
from expe_edge.training.settings import PRESETS, TrainSettings, make_settings, stored_settings

#: Options of settings whose names they do not have.
FLAGS = {"positional_parameters": "--positional-parameter", "from_checkpoint": "--from"}


def setting_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add an option for every setting; its default is the preset's, so None here."""
    for setting in reversed(dataclasses.fields(TrainSettings)):
        name, shown = FLAGS.get(setting.name, "--" + setting.name.replace("_", "-")), setting.metadata["help"]
        if setting.name == "data":
            option = sources(name, shown)
        elif setting.name == "positional_parameters":
            option = click.option(name, setting.name, multiple=True, metavar="KEY=VALUE", help=shown)
        elif isinstance(setting.default, bool):
            option = click.option(f"{name}/--no-{name[2:]}", setting.name, default=None, help=shown)
        else:
            kind = setting.metadata.get("kind", type(setting.default))
            option = click.option(name, setting.name, type=kind, default=None, help=shown)
        command = option(command)
    return command


@click.command(short_help="Train a model on text.")
@click.option("--out", type=PATH, required=True, help="Directory of the checkpoint.")
@click.option("--preset", default="tiny", show_default=True, metavar="|".join(PRESETS), help="Size of model and run.")
@click.option(
    "--config", "config_file", type=PATH, help="YAML file of settings; flags win over it, it over the preset."
)
@click.option("--resume", is_flag=True, help="Continue the run in --out from its last checkpoint.")
@click.option("--force", is_flag=True, help="Replace --out if it exists.")
@click.option("--json", "json_file", type=PATH, help="Write settings, corpus and loss history there.")
@setting_options
def train(
    out: Path,
    preset: str,
    config_file: Path | None,
    resume: bool,
    force: bool,
    json_file: Path | None,
    positional_parameters: tuple[str, ...],
    **flags: Any,
) -> None:
    """Train a model on text and write a checkpoint.

    Without --data the text is the source code of Python's standard library. Settings come from the preset, the YAML
    file and the flags; the later wins. The same command runs on several processes under torchrun or accelerate.

    With --from, the model, its tokenizer and, in place of a preset's, its settings are those of a checkpoint, which
    stays as it is. With --quantization-aware too, the model learns to predict the same with its weights rounded.
    """
    require_writable(json_file)
    flags["positional_parameters"] = dict(map(parse_parameter, positional_parameters)) or None
    if resume and flags["from_checkpoint"] is not None:
        raise ConfigError("--from starts a new run and --resume continues one; drop one of them")
    if is_given("preset") and flags["from_checkpoint"] is not None:
        raise ConfigError(f"--preset {preset} has no meaning with --from, whose settings hold; drop it")
    if force and config_file is not None:
        from expe_edge.training.replacing import require_outside

        require_outside(out, [config_file], "config_file")
    stored = stored_settings(out) if resume else None
    settings = make_settings(preset, config_file, flags, stored)  # refuse a bad setting before the slow imports
    from accelerate import PartialState

    from expe_edge.training.checkpoint import starting_settings
    from expe_edge.training.run import train as run

    if settings.from_checkpoint is not None and not resume:
        stored = starting_settings(Path(settings.from_checkpoint), settings.rounding)
        settings = make_settings(preset, config_file, flags, stored)
    report = run(settings, out, resume=resume, force=force)
    if not PartialState().is_main_process:
        return
    write_json(json_file, report)
    last = report["history"][-1]["loss"] if report["history"] else float("nan")
    click.echo(f"{out}: {report['parameters']:,} parameters, last loss {last:.4f}")


def parse_parameter(text: str) -> tuple[str, Any]:
    """Split KEY=VALUE; the value is a number, a list of numbers, or a word."""
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"--positional-parameter {text!r}: expected KEY=VALUE, such as step=0.0078125")
    try:
        return key, json.loads(value)
    except RecursionError as error:
        raise ConfigError(f"--positional-parameter {key}: nested too deeply") from error
    except ValueError:
        return key, value
