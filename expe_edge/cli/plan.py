"""`expe-edge plan`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from expe_edge.cli.contexts import window_of, window_options
from expe_edge.cli.output import PATH, require_writable, write_json
from expe_edge.cli.reference import say_reference
from expe_edge.errors import GenerationError

if TYPE_CHECKING:
    from expe_edge.runtime.memory import MemoryPlan


@click.command(short_help="Say how much memory a context needs.")
@click.argument("package", type=PATH, required=False)
@click.option("--context", type=int, metavar="TOKENS", help="Prompt and new tokens together.  [default: the package's]")
@click.option("--batch-size", default=1, show_default=True, help="Prompts that are completed at once.")
@window_options
@click.option("--kernels", metavar="DIRECTORY|off", help="Where build-kernels has kept kernels; by default the user's.")
@click.option("--json", "json_file", type=PATH, help="Write the figures there, in bytes.")
def plan(
    package: Path | None,
    context: int | None,
    batch_size: int,
    window: int | None,
    sinks: int | None,
    kernels: str | None,
    json_file: Path | None,
) -> None:
    """Predict what memory PACKAGE, or the reference model, takes for a context, and whether this machine has it."""
    require_writable(json_file)
    from expe_edge.package.directory import read_package
    from expe_edge.package.reference import reference_package
    from expe_edge.runtime.kernels import kernels_at
    from expe_edge.runtime.memory import available_memory, plan_memory
    from expe_edge.runtime.window import window_refusal

    for name, value in (("context", context), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise GenerationError(f"`{name}` is {value}; at least 1")
    kept, opened = window_of(window, sinks), read_package(package or reference_package())
    refusal = window_refusal(opened.manifest) if kept is not None else None
    if refusal is not None:
        raise GenerationError(refusal)
    reach = int(opened.manifest.model["max_position_embeddings"])
    tokens = context or opened.manifest.context_length
    tokens = tokens if kept is None else min(tokens, kept.capacity)
    if tokens > reach:
        raise GenerationError(f"`context` is {tokens}; the model's encoding has {reach} positions")
    if package is None:
        say_reference([opened.path])
    built = kernels_at(kernels)
    own = built is not None and built.library(opened.manifest) is not None
    predicted, free = plan_memory(opened, tokens, rows=batch_size, own_kernels=own), available_memory()
    print_plan(predicted, free)
    write_json(json_file, {**dataclasses.asdict(predicted), "peak": predicted.peak, "available": free})


def print_plan(plan: MemoryPlan, free: int | None) -> None:
    """Print the parts of a plan, their sum, and whether there is as much."""
    from rich.console import Console

    from expe_edge.cli.tables import print_whole, rows_by_name

    table = rows_by_name(f"Memory for {plan.rows} × {plan.tokens:,} tokens", ["MB"])
    parts = {
        "weights": plan.weights,
        "keys and values": plan.cache,
        f"position bias and scores, {plan.chunk} tokens at once": plan.scores,
        "other activations and logits": plan.activations,
        "Python, the libraries and the tokenizer": plan.runtime,
        "[bold]peak": plan.peak,
    }
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    print_whole(table, Console())
    if free is not None:
        fits = "fits" if plan.peak <= free else "does not fit"
        click.echo(f"{fits}: {free / 1e6:,.0f} MB are available")
