"""`expe-edge serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from expe_edge.cli.flags import Setting
from expe_edge.cli.output import PATH
from expe_edge.cli.reference import say_reference


@click.command(short_help="Answer OpenAI's completions over HTTP.")
@click.argument("package", type=PATH, required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; by default this machine's.")
@click.option("--port", default=8000, show_default=True, help="0 for any that is free.")
@click.option("--model-name", metavar="NAME", help="What clients call the model; by default its directory's name.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="EXPE_EDGE_API_KEY",
    metavar="KEY",
    help="Key that requests must bring; repeatable. $EXPE_EDGE_API_KEY is seen by fewer than an argument.",
)
@click.option("--cors-origin", "cors_origins", multiple=True, metavar="ORIGIN", help="Pages that may ask; repeatable.")
@click.option(
    "--host-name",
    "host_names",
    multiple=True,
    metavar="NAME",
    help="Name that a proxy on this machine asks for; repeatable.",
)
@click.option("--rows", default=16, show_default=True, help="Completions that run at once.")
@click.option("--context", default=4096, show_default=True, metavar="TOKENS", help="Prompt and new tokens together.")
@click.option("--queue", default=128, show_default=True, help="Completions that may wait.")
@click.option(
    "--prompt-cache", default=16384, show_default=True, metavar="TOKENS", help="Beginnings of prompts to keep."
)
@click.option(
    "--prefill-chunk", default=32, show_default=True, metavar="TOKENS", help="Of a prompt, between two steps of others."
)
@click.option(
    "--together/--one-by-one",
    default=None,
    help="Decode all rows in one run, or each in its own; by default together where that changes no bit.",
)
@click.option(
    "--body-limit", "body_bytes", cls=Setting, setting="body_bytes", default=2**20, show_default=True, metavar="BYTES"
)
@click.option("--timeout", default=300.0, show_default=True, metavar="SECONDS", help="That a request may take.")
@click.option("--grace", default=20.0, show_default=True, metavar="SECONDS", help="To end what runs, after SIGTERM.")
@click.option("--connections", default=512, show_default=True, help="Open at once.")
@click.option("--threads", type=int, help="By default one less than cores that may be used.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda")
@click.option("--graph-cache", metavar="DIRECTORY|off", help="Where optimised graphs are kept; by default the user's.")
@click.option("--kernels", metavar="DIRECTORY|off", help="Where build-kernels has kept kernels; by default the user's.")
@click.option("-v", "--verbose", is_flag=True, help="Write a line on standard error for every answer.")
def serve(
    package: Path | None,
    threads: int | None,
    device: str,
    graph_cache: str | None,
    kernels: str | None,
    verbose: bool,
    **given: Any,
) -> None:
    """Serve PACKAGE, or the reference model, as OpenAI's /v1/completions, until Ctrl-C or SIGTERM."""
    from expe_edge.runtime import Generator
    from expe_edge.serve.run import listen, make_server, serve_here, server_threads
    from expe_edge.serve.settings import ServerSettings

    settings = ServerSettings(**given)
    threads = server_threads() if threads is None else threads
    with listen(settings.host, settings.port) as bound:
        generator = Generator.load(package, threads=threads, device=device, graph_cache=graph_cache, kernels=kernels)
        if package is None:
            say_reference([generator.session.package.path])

        def ready(address: str) -> None:
            how = "together" if server.service.together else "one by one"
            click.echo(f"{server.service.model} at {address}/v1; rows decode {how}", err=True)

        server = make_server(generator, settings, ready, access_log=verbose)
        if not (settings.is_local or settings.api_keys):
            click.echo("whoever reaches this address can ask; give --api-key, or let a proxy ask for one", err=True)
        serve_here(server, bound)
