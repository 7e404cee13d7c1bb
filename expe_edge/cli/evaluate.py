"""`expe-edge evaluate`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from expe_edge.cli.reference import say_reference
from expe_edge.errors import ConfigError
from expe_edge.package.reference import reference_package


@click.command(
    short_help="Run tasks of lm-evaluation-harness.",
    context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, required=True, type=click.UNPROCESSED, metavar="[MODEL] [LM-EVAL OPTIONS] …")
def evaluate(arguments: tuple[str, ...]) -> None:
    """Run lm-evaluation-harness on MODEL, a package or a checkpoint; without one on the reference model.

    What follows MODEL are the options of `lm-eval run`, as --tasks and --batch_size; `lm-eval run --help` lists them.
    --model_args takes max_length, max_gen_toks and threads for a package, and what `hf` takes for a checkpoint.
    """
    model, options = _split(arguments)
    model_options = _model_options(model or reference_package())
    if model is None:
        say_reference([reference_package()])
    from lm_eval.__main__ import cli_evaluate

    # lm_eval looks for no plugins: its models are those it lists and those registered in its process, and it reads
    # the process's arguments.
    sys.argv = ["lm-eval", "run", *model_options, *options]
    try:
        cli_evaluate()
    except ValueError as error:  # what it says of a task, an option or a setting that it cannot take
        raise ConfigError(f"lm-eval: {error}") from error


def _split(arguments: tuple[str, ...]) -> tuple[Path | None, tuple[str, ...]]:
    """Return the model, where the first argument is none of lm-eval's options, and those options."""
    if arguments[0].startswith("-"):
        return None, arguments
    return Path(arguments[0]), arguments[1:]


def _model_options(path: Path) -> list[str]:
    """Register the class that reads `path`; return the options by which lm_eval finds it."""
    from expe_edge.quality.scoring import is_checkpoint

    if is_checkpoint(path):
        import expe_edge.quality.harness_checkpoint

        return ["--model", "expe-edge-checkpoint", "--model_args", json.dumps({"pretrained": str(path)})]
    import expe_edge.quality.harness  # noqa: F401

    # Without --device lm_eval asks for a GPU.
    return ["--model", "expe-edge", "--device", "cpu", "--model_args", json.dumps({"package": str(path)})]
