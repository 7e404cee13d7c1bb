"""`expe-edge web`."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from expe_edge.cli.output import PATH, is_given
from expe_edge.cli.reference import say_reference
from expe_edge.errors import ConfigError


@click.command(short_help="Write a web page that runs packages in the browser.")
@click.argument("packages", metavar="[PACKAGE …]", nargs=-1, type=PATH)
@click.option("--out", type=PATH, help="Directory of the site; with --serve it may be left away.")
@click.option("--title", default="expe-edge", show_default=True, help="What the page is called.")
@click.option(
    "--webgpu/--no-webgpu",
    default=None,
    help="Bring onnxruntime's WebGPU build, 27 MB; by default for portable packages alone, which it runs.",
)
@click.option("--serve", is_flag=True, help="Serve the site on this machine until Ctrl-C.")
@click.option("--port", default=8000, show_default=True, help="Where; 0 takes one that is free.")
@click.option("--force", is_flag=True, help="Replace an earlier site.")
def web(
    packages: tuple[Path, ...],
    out: Path | None,
    title: str,
    webgpu: bool | None,
    serve: bool,
    port: int,
    force: bool,
) -> None:
    """Write a static site that runs PACKAGEs, or the reference model's, in the browser: any web server can host it.

    Node.js and npm build the page, the first time from the npm registry; it is kept among the user's caches. Threads
    need the headers that --serve sends, or a second visit, when the page's own service worker has set them.
    """
    from expe_edge.package.reference import REFERENCE_PRECISIONS, reference_package
    from expe_edge.quality.comparison import unique_names
    from expe_edge.web.serving import HOST, site_server
    from expe_edge.web.site import write_site

    if not serve and is_given("port"):
        raise ConfigError("--port is where the site is served; give --serve too, or drop it")
    if out is None and not serve:
        raise ConfigError("there is no place for the site; give --out, or --serve to look at it only")
    paths = packages or tuple(map(reference_package, REFERENCE_PRECISIONS))
    if not packages:
        say_reference(paths)
    with ExitStack() as stack:
        place = out or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expe-edge-")), "site")
        listed = write_site(
            paths,
            unique_names(paths),
            place,
            title=title,
            webgpu=webgpu,
            force=force,
            progress=lambda line: click.echo(line, err=True),
        )
        for info in listed:
            size = sum(file["bytes"] for file in info["files"].values())
            click.echo(f"{info['name']}: {size / 1e6:.1f} MB, {info['note']}", err=True)
        if out is not None:
            click.echo(f"wrote {out}", err=True)
        if serve:
            server = stack.enter_context(site_server(place, port))
            click.echo(f"http://{HOST}:{server.server_address[1]}/")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                click.echo("", err=True)
