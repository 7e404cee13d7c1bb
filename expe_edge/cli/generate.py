"""`expe-edge generate`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from expe_edge.cli.chat import Chat, converse, require_template, write
from expe_edge.cli.contexts import context_options, kept_context, window_of
from expe_edge.cli.output import PATH
from expe_edge.cli.prompt import PromptBar, read_prompt
from expe_edge.cli.reference import say_reference
from expe_edge.cli.sampling import biases, constraint_of, sampling_options
from expe_edge.errors import GenerationError

if TYPE_CHECKING:
    from expe_edge.runtime import Completion, Generator, PackageSession, Window


@click.command(short_help="Continue a text with a package.")
@click.argument("package", type=PATH, required=False)
@click.option("--prompt", help="Text to continue.")
@click.option("--prompt-file", type=PATH, help="File that holds it; - or neither for standard input.")
@click.option("-i", "--interactive", is_flag=True, help="Read turns that go on with the text, and answer each.")
@click.option("--template", metavar="TEXT", help="A turn, with {} for what is typed; by default a line of its own.")
@click.option("--max-new-tokens", default=256, show_default=True)
@click.option("--min-new-tokens", default=0, show_default=True, help="Neither end-of-text nor --stop-token before.")
@click.option("--samples", "n", default=1, show_default=True, help="Texts to draw; the prompt is read once.")
@sampling_options
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable.")
@click.option("--stop-token", "stop_tokens", multiple=True, type=int, metavar="ID", help="End at it; repeatable.")
@click.option("--cache-length", type=int, help="Tokens to reserve a cache for; by default prompt and new tokens.")
@context_options
@click.option("--threads", type=int, help="By default one for each core that may be used.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda")
@click.option("--graph-cache", metavar="DIRECTORY|off", help="Where optimised graphs are kept; by default the user's.")
@click.option("--kernels", metavar="DIRECTORY|off", help="Where build-kernels has kept kernels; by default the user's.")
@click.option(
    "--logprobs", type=int, metavar="K", help="Log probabilities of tokens and of the K likeliest, in --json."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text.")
@click.option("-v", "--verbose", is_flag=True, help="Say on standard error how long it took and why it ended.")
def generate(
    package: Path | None,
    prompt: str | None,
    prompt_file: Path | None,
    interactive: bool,
    template: str | None,
    n: int,
    prompt_cache: Path | None,
    window: int | None,
    sinks: int | None,
    threads: int | None,
    device: str,
    graph_cache: str | None,
    kernels: str | None,
    as_json: bool,
    verbose: bool,
    **given: Any,
) -> None:
    """Continue a prompt with PACKAGE, or with the reference model, printing the text as it comes."""
    from expe_edge.runtime import Generator

    require_together(interactive, as_json, template, n, given["logprobs"], prompt_file)
    options, kept = request_options(given), window_of(window, sinks)
    nothing = interactive and prompt is None and prompt_file is None
    text = "" if nothing else read_prompt(prompt, prompt_file)
    if not text and not nothing:
        raise GenerationError("the prompt is empty; give --prompt, --prompt-file or text on standard input")
    began = time.perf_counter()
    generator = Generator.load(package, threads=threads, device=device, graph_cache=graph_cache, kernels=kernels)
    loaded = time.perf_counter() - began
    ids = require_possible(generator, text, n, options, kept)
    if package is None:
        say_reference([generator.session.package.path])

    def report(completion: Completion) -> None:
        if verbose:
            click.echo(summary(completion), err=True)

    if verbose:
        click.echo(f"loaded in {loaded:.2f} s; {machinery(generator.session)}", err=True)
    with kept_context(generator, prompt_cache, kept) as context:
        if interactive:
            context = generator.context(window=kept) if context is None else context
            chat = Chat(generator, context, text, template, options)
            converse(chat, lambda stream: report(stream.completion))
        else:
            options |= {"context": context, "window": kept}
            if n > 1:
                print_samples(generator, text, ids, n, options, as_json, report)
            else:
                print_text(generator, text, ids, options, as_json, report)


def require_together(
    interactive: bool, as_json: bool, template: str | None, n: int, logprobs: int | None, prompt_file: Path | None
) -> None:
    """Raise `GenerationError` where options are given that say nothing together."""
    if interactive:
        for flag, at_odds in (("--json", as_json), ("--samples", n != 1), ("--logprobs", logprobs is not None)):
            if at_odds:
                raise GenerationError(f"{flag} and --interactive do not go together; leave one of them out")
        if str(prompt_file) == "-":
            raise GenerationError("--prompt-file - and --interactive both read standard input; name a file")
    elif template is not None:
        raise GenerationError("--template is of turns; add --interactive")
    elif logprobs is not None and not as_json:
        raise GenerationError("--logprobs are shown in JSON alone; add --json")
    require_template(template)


def request_options(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `Generator.stream` for those of the command."""
    from expe_edge.runtime import Sampling

    options = dict(given)
    options["logit_bias"] = biases(options["logit_bias"])
    constraint = {name: options.pop(name) for name in ("json_schema", "regex", "grammar", "choices")}
    names = {field.name for field in dataclasses.fields(Sampling)}
    sampling = Sampling(**{name: options.pop(name) for name in list(options) if name in names})
    return {**options, "sampling": sampling, "constraint": constraint_of(**constraint)}


def require_possible(
    generator: Generator, text: str, n: int, options: dict[str, Any], window: Window | None
) -> list[int]:
    """Return the ids of the prompt.

    Raises:
        GenerationError: the model cannot do what is asked; before anything is said.
    """
    from expe_edge.runtime.request import Request

    request = Request(n=n, **options)
    row = generator.row(generator.encode(text) if text else [0], request)
    request.capacity(len(row.ids), window)
    ids: list[int] = row.ids.tolist()
    return ids


def print_text(
    generator: Generator,
    text: str,
    ids: list[int],
    options: dict[str, Any],
    as_json: bool,
    report: Callable[[Completion], None],
) -> None:
    """Print what follows a prompt, whose ids are given too, as it comes, or all there is to say of it as JSON."""
    with PromptBar() as bar:
        stream = generator.stream(ids, **options, on_prefill=bar)
        for piece in stream:
            if not as_json:
                write(piece)
    completion = stream.completion
    click.echo(json.dumps({"prompt": text, **dataclasses.asdict(completion)}, indent=2) if as_json else "")
    report(completion)


def print_samples(
    generator: Generator,
    text: str,
    ids: list[int],
    n: int,
    options: dict[str, Any],
    as_json: bool,
    report: Callable[[Completion], None],
) -> None:
    """Print several texts that follow a prompt, each behind a line with its number, or all as JSON."""
    with PromptBar() as bar:
        completions = generator.generate([ids], n=n, **options, on_prefill=bar)
    if as_json:
        listed = [dataclasses.asdict(completion) for completion in completions]
        click.echo(json.dumps({"prompt": text, "completions": listed}, indent=2))
    for number, completion in enumerate(completions, 1):
        if not as_json:
            click.echo(f"[{number}]\n{completion.text}")
        report(completion)


def machinery(session: PackageSession) -> str:
    """Say with how many threads a package runs, and with whose kernels; or on which device."""
    if session.device is not None:
        return f"on {session.device.kind}:{session.device.index}"
    whose = "onnxruntime" if session.kernels is None else "expe-edge"
    return f"{session.threads} thread{'s' * (session.threads > 1)}; kernels of {whose}"


def summary(completion: Completion) -> str:
    """Say in a line what was read and written, how fast, and why it ended."""
    before = f", {completion.reused_tokens:,} of them read before" if completion.reused_tokens else ""
    return (
        f"prompt: {completion.prompt_tokens:,} tokens{before}, {completion.prefill_seconds:.2f} s, "
        f"{completion.prefill_speed:,.0f} tokens/s; "
        f"new: {len(completion.tokens):,} tokens, {completion.decode_seconds:.2f} s, "
        f"{completion.decode_speed:,.0f} tokens/s; ended by {completion.finish_reason}"
    )
