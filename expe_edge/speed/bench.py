"""Packages timed side by side, by depth of the cache and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from expe_edge.errors import ConfigError, GenerationError
from expe_edge.package.contract import GraphContract
from expe_edge.package.directory import Package, read_package
from expe_edge.results import Result
from expe_edge.runtime.device import Device
from expe_edge.runtime.memory import memory_shortage
from expe_edge.runtime.opening import checked_threads
from expe_edge.runtime.threads import default_threads
from expe_edge.speed.apart import Apart
from expe_edge.speed.bandwidth import read_bandwidth, weight_bytes
from expe_edge.speed.measuring import quartiles
from expe_edge.speed.timed import PhaseProfile, TimedPackage, Timing

#: First quartile, median and third quartile of the repetitions.
Quartiles = list[float]
#: Is called after each piece of work.
Advance = Callable[[], object]

PHASES = ("decode", "prefill")


@dataclass(frozen=True)
class BenchSettings:
    """What is measured.

    Attributes:
        depths: tokens that the cache holds before. prefill: tokens of a prompt. steps: of decoding, whose median is
            the time of one. turns: repetitions, of all packages in turn. threads: numbers of them, each measured.
        longest_prompt: no prompt of more tokens is read for the time to its first token. device: as of a session.
        kernels: directories of built kernels, `off`, or None, as of a session; each is measured.

    Raises:
        ConfigError: a number below 1, or a depth below 0. GenerationError: no threads, too many, or a device that is
            not there.
    """

    depths: tuple[int, ...] = (0, 1024, 4096, 16384)
    prefill: int = 512
    steps: int = 32
    turns: int = 5
    threads: tuple[int, ...] = field(default_factory=lambda: (default_threads(),))
    longest_prompt: int = 32768
    device: str = "cpu"
    kernels: tuple[str | None, ...] = (None,)

    def __post_init__(self) -> None:
        for name in ("prefill", "steps", "turns", "longest_prompt"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; at least 1")
        for threads in self.threads:
            checked_threads(threads)
        Device.parse(self.device)
        if min(self.depths) < 0:
            raise ConfigError(f"`depths` has {min(self.depths)}; at least 0")
        for name in ("depths", "threads"):
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest cache."""
        return self.depths[-1] + max(self.prefill, self.steps)


@dataclass(frozen=True)
class OpenedResult(Result):
    """A package with a number of threads, before anything is read.

    load_ms: in new processes, the file in the system's cache; hashes are verified. opened_bytes: the largest resident
    set of the process until then. own_kernels: whether it runs kernels that were built here. nodes: that a decode step
    runs, of the optimised graph. weight_bytes: that it reads.
    """

    package: str
    threads: int
    load_ms: Quartiles
    opened_bytes: int
    own_kernels: bool
    nodes: int
    weight_bytes: int
    package_bytes: int
    cache_dtype: str
    cache_bytes_per_token: int


@dataclass(frozen=True)
class DepthResult(Result):
    """A package with a number of threads at one depth.

    prefill, decode: tokens a second after `depth` tokens. step_ms: of decoding. first_token_ms: from a prompt of depth
    and prefill tokens and no cache to the choice of the first token; None for prompts beyond the longest.
    bandwidth: 1e9 bytes a second, of reading as many bytes as a step reads (weights and cache), with as many threads.
    read_share: of that, what a step reaches. node_us: a step's time over the graph's nodes. peak_bytes: the largest
    resident set at this depth or a lesser. cache_bytes: of a cache with room for depth and prefill tokens.
    """

    package: str
    threads: int
    depth: int
    prefill: Quartiles
    decode: Quartiles
    step_ms: Quartiles
    first_token_ms: Quartiles | None
    bandwidth: Quartiles
    read_share: Quartiles
    node_us: Quartiles
    peak_bytes: int
    cache_bytes: int


@dataclass(frozen=True)
class ProfileResult(Result):
    """Where the time of a package's decode step or prefill goes at one depth."""

    package: str
    threads: int
    depth: int
    phase: str
    profile: PhaseProfile


@dataclass(frozen=True)
class BenchResult(Result):
    """All that was measured. profiles: only where they were asked for."""

    opened: tuple[OpenedResult, ...]
    depths: tuple[DepthResult, ...]
    profiles: tuple[ProfileResult, ...]


@dataclass(frozen=True)
class Contender:
    """A package with a number of threads and kernels."""

    name: str
    package: Package
    threads: int
    kernels: str | None

    def start(self, device: str) -> Apart:
        """Open the package in a process of its own, as a `TimedPackage`."""
        return Apart(TimedPackage, self.package.path, self.threads, device, self.kernels)


@dataclass(frozen=True)
class Running:
    """A contender that is open, in a process of its own."""

    process: Apart
    of: OpenedResult
    contract: GraphContract

    def step_bytes(self, depth: int) -> int:
        """Bytes that a decode step reads: the weights, and what heads still see of a cache of `depth` tokens."""
        return self.of.weight_bytes + self.contract.row_bytes(depth)


@dataclass(frozen=True)
class Turn:
    """One repetition of a contender at a depth. first_token: seconds. bandwidth: bytes a second."""

    decode: Timing
    prefill: Timing
    first_token: float | None
    bandwidth: float


def bench(
    paths: Sequence[Path],
    names: Sequence[str],
    settings: BenchSettings,
    *,
    with_profile: bool = False,
    progress: Callable[[int], AbstractContextManager[Advance]] = lambda _: nullcontext(lambda: None),
) -> BenchResult:
    """Time packages by depth and threads, one after another in every turn, so that a busy machine slows all of them.

    Every package with every number of threads has a process of its own. A first turn at every depth is not counted.

    Args:
        names: of the packages. progress: is given how many pieces of work there are; yields what is called after each.

    Raises:
        PackageError, GenerationError: a package that cannot be opened, depths beyond what an encoding has positions
            for or than memory has room for.
    """
    packages = [read_package(path) for path in paths]
    for package, name in zip(packages, names, strict=True):
        _require_room(package, name, settings)
    ways = product(zip(names, packages, strict=True), settings.threads, settings.kernels)
    contenders = [
        Contender(_label(name, kernels, settings), package, threads, kernels)
        for (name, package), threads, kernels in ways
    ]
    phases = PHASES if with_profile else ()
    pieces = 1 + settings.turns + len(settings.depths) * (1 + settings.turns + len(phases))
    with progress(len(contenders) * pieces) as advance, ExitStack() as stack:
        nodes = [_count_nodes(contender, settings, advance) for contender in contenders]
        processes, loads = _load(contenders, settings, stack, advance)
        own = [process.call("own_kernels") for process in processes]
        opened = tuple(_opened(*each) for each in zip(contenders, nodes, loads, own, strict=True))
        contracts = [contender.package.manifest.contract for contender in contenders]
        running = [Running(*each) for each in zip(processes, opened, contracts, strict=True)]
        depths = [result for depth in settings.depths for result in _at_depth(running, depth, settings, advance)]
        profiles = [
            _profile(each.process, each.of, depth, phase, settings, advance)
            for each in running
            for phase in phases
            for depth in settings.depths
        ]
    return BenchResult(opened, tuple(depths), tuple(profiles))


def _label(name: str, kernels: str | None, settings: BenchSettings) -> str:
    """Return a package's name, with where its kernels come from if others are measured too."""
    return name if len(settings.kernels) == 1 else f"{name}, kernels {kernels or 'built'}"


def _require_room(package: Package, name: str, settings: BenchSettings) -> None:
    """Raise `GenerationError` where an encoding has no positions for the longest cache, or memory no room."""
    tokens, reach = settings.most_tokens, int(package.manifest.model["max_position_embeddings"])
    if tokens > reach:
        raise GenerationError(f"{name}: {tokens} tokens exceed the {reach} positions of its encoding; lower `depths`")
    shortage = memory_shortage(package, tokens)
    if shortage is not None:
        raise GenerationError(f"{name}: {shortage}; lower `depths`")


def _count_nodes(contender: Contender, settings: BenchSettings, advance: Advance) -> int:
    """Count the nodes of a decode step, in a process of its own, since a profile takes memory."""
    with contender.start(settings.device) as process:
        profile: PhaseProfile = process.call("profile_decode", 0, 1)
    advance()
    return profile.kernels.nodes


def _load(
    contenders: Sequence[Contender], settings: BenchSettings, stack: ExitStack, advance: Advance
) -> tuple[list[Apart], list[list[tuple[float, int]]]]:
    """Open all packages in new processes, in turn, and keep those of the last turn.

    Returns:
        the processes, and for each contender what `TimedPackage.opened` said in every turn.
    """
    loads: list[list[tuple[float, int]]] = [[] for _ in contenders]
    for turn in range(settings.turns):
        processes = []
        for contender, found in zip(contenders, loads, strict=True):
            process = contender.start(settings.device)
            found.append(process.call("opened"))
            if turn < settings.turns - 1:
                process.close()
            else:
                processes.append(stack.enter_context(process))
            advance()
    return processes, loads


def _opened(contender: Contender, nodes: int, loads: Sequence[tuple[float, int]], own_kernels: bool) -> OpenedResult:
    manifest = contender.package.manifest
    return OpenedResult(
        package=contender.name,
        threads=contender.threads,
        load_ms=quartiles([seconds * 1e3 for seconds, _ in loads]),
        opened_bytes=loads[-1][1],
        own_kernels=own_kernels,
        nodes=nodes,
        weight_bytes=weight_bytes(manifest),
        package_bytes=contender.package.size,
        cache_dtype=manifest.contract.cache_dtype,
        cache_bytes_per_token=manifest.contract.cache_bytes,
    )


def _at_depth(running: Sequence[Running], depth: int, settings: BenchSettings, advance: Advance) -> list[DepthResult]:
    """Measure all contenders at a depth, in turn."""
    turns: list[list[Turn]] = [[] for _ in running]
    for _ in range(1 + settings.turns):
        for each, found in zip(running, turns, strict=True):
            found.append(_turn(each, depth, settings))
            advance()
    return [_summed_up(each, depth, found[1:], settings) for each, found in zip(running, turns, strict=True)]


def _turn(running: Running, depth: int, settings: BenchSettings) -> Turn:
    process, prompt = running.process, depth + settings.prefill
    return Turn(
        bandwidth=read_bandwidth(running.step_bytes(depth), running.of.threads),
        decode=process.call("decode", depth, settings.steps),
        prefill=process.call("prefill", depth, settings.prefill),
        first_token=process.call("first_token", prompt) if prompt <= settings.longest_prompt else None,
    )


def _summed_up(running: Running, depth: int, turns: Sequence[Turn], settings: BenchSettings) -> DepthResult:
    of, size = running.of, running.step_bytes(depth)
    firsts = [turn.first_token * 1e3 for turn in turns if turn.first_token is not None]
    return DepthResult(
        package=of.package,
        threads=of.threads,
        depth=depth,
        prefill=quartiles([settings.prefill / turn.prefill.seconds for turn in turns]),
        decode=quartiles([1 / turn.decode.seconds for turn in turns]),
        step_ms=quartiles([turn.decode.seconds * 1e3 for turn in turns]),
        first_token_ms=quartiles(firsts) if firsts else None,
        bandwidth=quartiles([turn.bandwidth / 1e9 for turn in turns]),
        read_share=quartiles([size / turn.decode.seconds / turn.bandwidth for turn in turns]),
        node_us=quartiles([turn.decode.seconds * 1e6 / of.nodes for turn in turns]),
        peak_bytes=max(turn.prefill.peak_bytes for turn in turns),
        cache_bytes=turns[-1].prefill.cache_bytes,
    )


def _profile(
    process: Apart, of: OpenedResult, depth: int, phase: str, settings: BenchSettings, advance: Advance
) -> ProfileResult:
    amount: Any = settings.steps if phase == "decode" else settings.prefill
    profile: PhaseProfile = process.call(f"profile_{phase}", depth, amount)
    advance()
    return ProfileResult(of.package, of.threads, depth, phase, profile)
