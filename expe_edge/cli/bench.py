"""`expe-edge bench`."""

from __future__ import annotations

from pathlib import Path

import click

from expe_edge.cli.output import PATH, report_written, require_plot, require_writable, write_json
from expe_edge.cli.reference import say_reference
from expe_edge.errors import ConfigError

#: What `k` behind a number of tokens stands for.
THOUSAND = 1024
#: The value of --kernels for the user's kernels and onnxruntime's side by side.
BOTH = "both"


@click.command(short_help="Measure speed and memory by length.")
@click.argument("packages", nargs=-1, type=PATH, metavar="[PACKAGE …]")
@click.option("--depths", default="0,1k,4k,16k", show_default=True, help="Tokens in the cache before; 1k is 1024.")
@click.option("--prefill", default=512, show_default=True, help="Tokens of a prompt.")
@click.option("--steps", default=32, show_default=True, help="Steps of decoding, whose median is the time of one.")
@click.option("--turns", default=5, show_default=True, help="Repetitions, of all packages in turn.")
@click.option("--threads", help="Numbers of threads, such as 1,2.  [default: one for each core that may be used]")
@click.option("--longest-prompt", default="32k", show_default=True, help="Longest to be read for its first token.")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda")
@click.option("--kernels", metavar="DIRECTORY|off|both", help="Where build-kernels has kept kernels; both: beside off.")
@click.option("--profile", is_flag=True, help="Say which operators the time goes to.")
@click.option("--json", "json_file", type=PATH, help="Write all figures there.")
@click.option("--plot", "plot_file", type=PATH, help="Draw speed and memory by depth there (.png, .svg).")
def bench(
    packages: tuple[Path, ...],
    depths: str,
    prefill: int,
    steps: int,
    turns: int,
    threads: str | None,
    longest_prompt: str,
    device: str,
    kernels: str | None,
    profile: bool,
    json_file: Path | None,
    plot_file: Path | None,
) -> None:
    """Time PACKAGEs side by side, or the reference model: prefill and decode after DEPTHS tokens, the first token of a
    prompt as long as both, loading, memory, and how near a decode step comes to reading its weights and cache as fast
    as the machine reads so many bytes.

    Packages take turns, so that a busy machine slows all of them; figures are medians, with first and third quartile.
    What is in the cache before is random: speed does not depend on it.
    """
    require_writable(json_file)
    require_plot(plot_file)
    from rich.console import Console

    from expe_edge.cli.bench_plots import plot_bench
    from expe_edge.cli.bench_tables import bench_tables
    from expe_edge.cli.tables import print_whole
    from expe_edge.package.reference import reference_package
    from expe_edge.progress import counted
    from expe_edge.quality.comparison import unique_names
    from expe_edge.runtime.threads import cores, default_threads, usable
    from expe_edge.runtime.user_caches import OFF
    from expe_edge.speed import bench as speed
    from expe_edge.speed.machine import processor, versions

    settings = speed.BenchSettings(
        depths=tuple(parse_tokens("--depths", depths)),
        prefill=prefill,
        steps=steps,
        turns=turns,
        threads=tuple(parse_tokens("--threads", threads)) if threads else (default_threads(),),
        longest_prompt=max(parse_tokens("--longest-prompt", longest_prompt)),
        device=device,
        kernels=(None, OFF) if kernels == BOTH else (kernels,),
    )
    paths = packages or (reference_package(),)
    names = unique_names(paths)
    if not packages:
        say_reference(paths)
    result = speed.bench(
        paths, names, settings, with_profile=profile, progress=lambda pieces: counted("timing", pieces)
    )
    console = Console()
    for table in bench_tables(result, settings):
        print_whole(table, console)
    write_json(
        json_file,
        {"processor": processor(), "cores": cores(usable()), "versions": versions(), "settings": vars(settings)}
        | result.to_dict(),
    )
    if plot_file is not None:
        plot_bench(result, plot_file)
    report_written(json_file, plot_file)


def parse_tokens(flag: str, text: str) -> list[int]:
    """Parse comma-separated numbers of tokens, the value of an option; 4k is 4096.

    Raises:
        ConfigError: they are none.
    """
    try:
        return [int(part.removesuffix("k")) * (THOUSAND if part.endswith("k") else 1) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{flag} {text}: expected comma-separated whole numbers, such as 0,512,4k") from error
