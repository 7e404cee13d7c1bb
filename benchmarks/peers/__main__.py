"""Our runtime beside onnxruntime-genai, Optimum, llama.cpp, CTranslate2 and PyTorch on models of one shape, in turn.

    python -m benchmarks.peers --size large --depths 0,4k --threads 2

Every contender is a process of its own; all measure once in every turn, one after another, so that a busy machine slows
all of them, and ratios are taken within turns. What is not installed is left out, with a line. llama-cpp-python must be
built on the machine itself: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python 'expe-edge[peers]'.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.models import KEEPS, SIZES, WEIGHTS, Models
from benchmarks.peers.report import Timings, ratio_table, speed_table
from benchmarks.peers.runtimes import CLOCKS, CTranslate2, GenAI, LlamaCpp, Optimum, Ours, Runtime, Torch
from expe_edge.cli.bench import parse_tokens
from expe_edge.cli.output import write_json
from expe_edge.errors import reason_of
from expe_edge.progress import counted
from expe_edge.quant.recipe import WEIGHT_BITS
from expe_edge.runtime.threads import default_threads
from expe_edge.runtime.user_caches import OFF
from expe_edge.speed.apart import Apart
from expe_edge.speed.machine import LIBRARIES, processor, versions

COMPARED = (*LIBRARIES, "onnxruntime-genai", "optimum-onnx", "llama-cpp-python", "ctranslate2")
SAID = dict(zip(KEEPS, ("", ", int8 cache", ", windows", ", windows, int8 cache"), strict=True))
#: Precisions of ours that genai is timed on, and Optimum.
GENAI, OPTIMUM = ("int8-dynamic", "int8-weight", "int4-weight"), ("int8-dynamic", "int8-weight")
#: Those that kernels of our own are for.
BLOCKS = tuple(name for name, (precision, _) in WEIGHTS.items() if precision != "int8-dynamic")
BITS = {"Q8_0": 8, "Q4_0": 4} | {name: WEIGHT_BITS[precision] for name, (precision, _) in WEIGHTS.items()}


@dataclass(frozen=True)
class Contender:
    """A runtime and a model for it.

    bits: of the weights. needs: modules. open: of the models; gives what `kind` is made of, before the vocabulary's
    size and the threads.
    """

    name: str
    bits: int
    kind: type[Runtime]
    needs: tuple[str, ...]
    open: Callable[[Models], tuple[Any, ...]]

    @property
    def missing(self) -> str | None:
        """The first module that is not installed."""
        return next((module for module in self.needs if find_spec(module) is None), None)  # a package before its parts


def contenders() -> list[Contender]:
    """Return all, ours first."""

    def package(weights: str, keeps: str = "") -> Callable[[Models], tuple[Any, ...]]:
        return lambda models: (models.package(weights, keeps),)

    def ours(weights: str, keeps: str, *, built: bool) -> Contender:
        label = f"ours, {weights}{SAID[keeps]}{', own kernels' if built else ''}"

        def opened(models: Models) -> tuple[Any, ...]:
            return models.package(weights, keeps), models.kernels if built else OFF

        return Contender(label, BITS[weights], Ours, (), opened)

    found = [ours(weights, keeps, built=False) for weights, keeps in product(WEIGHTS, KEEPS)]
    found += [ours(weights, keeps, built=True) for weights, keeps in product(BLOCKS, KEEPS)]
    found += [
        Contender(f"onnxruntime-genai, {name}", BITS[name], GenAI, ("onnxruntime_genai",), package(name))
        for name in GENAI
    ]
    found += [
        Contender(f"Optimum, {name}", BITS[name], Optimum, ("optimum", "optimum.onnxruntime"), package(name))
        for name in OPTIMUM
    ]
    for weights in ("Q8_0", "Q4_0"):
        for cache in ("f16", "q8_0"):

            def llama(models: Models, weights: str = weights, cache: str = cache) -> tuple[Any, ...]:
                return models.gguf(weights), cache

            name = f"llama.cpp {weights}, {cache} cache"
            found.append(Contender(name, BITS[weights], LlamaCpp, ("llama_cpp", "gguf"), llama))
    found.append(
        Contender("CTranslate2, int8", 8, CTranslate2, ("ctranslate2",), lambda models: (models.ctranslate2(),))
    )
    for name, compiled in (("eager", False), ("compiled", True)):

        def torch(models: Models, compiled: bool = compiled) -> tuple[Any, ...]:
            return models.llama(), compiled

        found.append(Contender(f"PyTorch bfloat16, {name}", 16, Torch, ("torch",), torch))
    return found


@dataclass(frozen=True)
class Settings:
    """What is measured. threads: of every contender. turns: that count, after one that does not. clock: of `CLOCKS`."""

    size: str
    depths: tuple[int, ...]
    prefill: int
    steps: int
    turns: int
    threads: int
    clock: str


class Race:
    """Contenders in processes of their own. One that fails is named with the reason, and runs no more."""

    def __init__(self, chosen: Sequence[Contender], models: Models, settings: Settings) -> None:
        self.settings = settings
        self.stack = ExitStack()
        self.running: dict[Contender, Apart] = {}
        for each in chosen:
            with self._dropping(each):
                process = Apart(
                    each.kind, *each.open(models), models.config.vocab_size, settings.threads, settings.clock
                )
                self.running[each] = self.stack.enter_context(process)

    def __enter__(self) -> Race:
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @contextmanager
    def _dropping(self, contender: Contender) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a library raises, the others go on
            click.echo(f"{contender.name}: {reason_of(error)}", err=True)
            self.running.pop(contender, None)

    def at_depth(self, depth: int, advance: Callable[[], object]) -> list[Timings]:
        """Measure all in turn; those that are not taken so deep are named with the reason."""
        settings = self.settings
        seconds: dict[Contender, list[tuple[float, float]]] = {each: [] for each in self.running}
        for _ in range(settings.turns + 1):
            for each in [each for each in seconds if each in self.running]:
                with self._dropping(each):
                    answer = self.running[each].call("measure", depth, settings.prefill, settings.steps)
                    if isinstance(answer, str):
                        click.echo(f"{each.name} at {depth:,}: {answer}", err=True)
                        del seconds[each]
                    else:
                        seconds[each].append(answer)
            advance()
        return [self._timings(each, depth, seconds[each][1:]) for each in seconds if each in self.running]

    def _timings(self, of: Contender, depth: int, seconds: Sequence[tuple[float, float]]) -> Timings:
        prefill = tuple(self.settings.prefill / read for read, _ in seconds)
        return Timings(of.name, of.bits, of.kind is Ours, depth, prefill, tuple(1 / step for _, step in seconds))


def measure(chosen: Sequence[Contender], models: Models, settings: Settings) -> Iterator[list[Timings]]:
    """Measure contenders; yield what has been found after every depth."""
    found: list[Timings] = []
    with (
        Race(chosen, models, settings) as race,
        counted("timing", len(settings.depths) * (settings.turns + 1)) as advance,
    ):
        for depth in settings.depths:
            found += race.at_depth(depth, advance)
            yield found


@click.command(help=__doc__)
@click.option("--size", type=click.Choice(list(SIZES)), default="large", show_default=True)
@click.option("--depths", default="0,4k,16k", show_default=True, help="Tokens in the cache before; 1k is 1024.")
@click.option("--prefill", default="512", show_default=True, help="Tokens of a prompt; 1k is 1024.")
@click.option("--steps", default=32, show_default=True, help="Steps of decoding, whose median is the time of one.")
@click.option("--turns", default=5, show_default=True)
@click.option("--threads", type=int, default=default_threads, show_default="one for each core that may be used")
@click.option(
    "--clock", type=click.Choice(list(CLOCKS)), default="wall", show_default=True, help="cpu: processor time."
)
@click.option("--only", default="", help="Contenders whose name this regular expression finds.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/peers"), show_default=True)
def main(
    size: str, depths: str, prefill: str, steps: int, turns: int, threads: int, clock: str, only: str, out: Path
) -> None:
    chosen = []
    for each in contenders():
        if not re.search(only, each.name):
            continue
        if each.missing is not None:
            click.echo(f"{each.name}: {each.missing} is not installed; left out", err=True)
        else:
            chosen.append(each)
    (prompt,) = parse_tokens("--prefill", prefill)
    settings = Settings(size, tuple(parse_tokens("--depths", depths)), prompt, steps, turns, threads, clock)
    record = {"processor": processor(), "versions": versions(COMPARED), "settings": vars(settings)}
    for timings in measure(chosen, Models(out, size), settings):
        write_json(out / f"{size}.json", {**record, "timings": [each.to_dict() for each in timings]})
        page = f"{speed_table(timings, prompt)}\n\n{ratio_table(timings)}\n"
        (out / f"{size}.md").write_text(page, encoding="utf-8")
    click.echo(page)


if __name__ == "__main__":
    main()
