"""`expe-edge generate`."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import click

from expe_edge.cli.contexts import context_options, kept_context, window_of
from expe_edge.cli.output import PATH
from expe_edge.cli.reference import say_reference
from expe_edge.errors import GenerationError
from expe_edge.text.documents import decoded


@click.command(short_help="Continue a text with a package.")
@click.argument("package", type=PATH, required=False)
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=PATH, help="File that holds it; - or neither for standard input.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--temperature", default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", default=0, show_default=True, help="Keep the k best tokens; 0 for all.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the fewest tokens that reach this probability.")
@click.option("--min-p", default=0.0, show_default=True, help="Keep tokens at least this times as likely as the best.")
@click.option("--repetition-penalty", default=1.0, show_default=True, help="1 is none.")
@click.option("--seed", type=int, help="Makes sampling repeatable.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--cache-length", type=int, help="Tokens to reserve a cache for; by default prompt and new tokens.")
@context_options
@click.option("--threads", type=int, help="By default one for each physical core.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
def generate(
    package: Path | None,
    prompt: str | None,
    prompt_file: Path | None,
    max_new_tokens: int,
    stop: tuple[str, ...],
    cache_length: int | None,
    prompt_cache: Path | None,
    window: int | None,
    sinks: int | None,
    prompt_lookup: bool,
    threads: int | None,
    device: str,
    as_json: bool,
    **sampling: Any,
) -> None:
    """Continue a prompt with PACKAGE, or with the reference model, printing the text as it comes."""
    from expe_edge.runtime import Generator, Sampling

    settings, kept = Sampling(**sampling), window_of(window, sinks)
    text = read_prompt(prompt, prompt_file)
    if not text:
        raise GenerationError("the prompt is empty; give --prompt, --prompt-file or text on standard input")
    generator = Generator.load(package, threads=threads, device=device)
    with kept_context(generator, prompt_cache, kept) as context:
        stream = generator.stream(
            text,
            max_new_tokens=max_new_tokens,
            sampling=settings,
            stop=stop,
            cache_length=cache_length,
            context=context,
            window=kept,
            prompt_lookup=prompt_lookup,
        )
        if package is None:
            say_reference([generator.session.package.path])
        for piece in stream:
            if not as_json:
                click.echo(piece, nl=False)
                sys.stdout.flush()
    click.echo(json.dumps({"prompt": text, **dataclasses.asdict(stream.completion)}, indent=2) if as_json else "")


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt from the option, the file or standard input."""
    if prompt is not None and prompt_file is not None:
        raise GenerationError("both --prompt and --prompt-file are given; use one")
    if prompt is not None:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python hands on bytes that are no text
            raise GenerationError("--prompt: not UTF-8 text")
        return prompt
    if prompt_file is None or str(prompt_file) == "-":
        nothing = sys.stdin is None or sys.stdin.isatty()  # None where it was closed
        return "" if nothing else decoded("standard input", sys.stdin.buffer.read())
    try:
        return decoded(f"--prompt-file {prompt_file}", prompt_file.read_bytes())
    except OSError as error:
        raise GenerationError(f"--prompt-file {prompt_file}: {error.strerror}") from error
