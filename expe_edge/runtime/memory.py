"""How much memory a package needs for a context of some length, and how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from expe_edge.package.contract import FLOAT_HEADS, GraphContract
from expe_edge.package.directory import Package
from expe_edge.package.manifest import Manifest
from expe_edge.runtime.control_groups import control_groups

#: The most tokens per prefill step: enough to fill the matrix kernels.
PREFILL_CHUNK = 256
#: The most numbers in a step's (H, T, S) position bias, which makes it shorter, in multiples of the least tokens: fewer
#: are slower at any depth (python -m benchmarks.prefill_chunks).
LEAST_CHUNK, MOST_SCORES = 64, 2**24
#: The same on a GPU, which has the memory, and starts a kernel for every node of a step.
DEVICE_CHUNK, DEVICE_SCORES = 1024, 2**28
#: Tokens beyond its window that a head keeps, so that as many can be taken back.
SPARE = 64
#: What Python, the libraries and a session take beside weights, and bytes of memory for a byte of `tokenizer.json`.
RUNTIME_BYTES, TOKENIZER_COPIES = 70 * 2**20, 12
#: Bytes of memory for a stored byte, by format, where it is not one: numbers of 2 bytes are computed with in 4, and
#: codes of 4 bits are packed with their sums.
HELD = {"float16": 2.0, "bfloat16": 2.0, "int4-weight": 1.5}
#: The same with kernels that are built here: they take codes as they are stored, and copy them into large pages.
HELD_BY_OWN = {**HELD, "int4-weight": 2.0, "int8-weight": 2.0}
#: Times the weights that are resident at most while onnxruntime opens them.
OPENING = 1.5
#: Bytes of the weights of models whose steps go to nodes as much as to weights.
PLANNED_WEIGHTS = 32 << 20
#: Buffers of (H, T, S) and of (T, S) float32 that are alive at once: in GroupQueryAttention, over a cache that is read
#: as floats, in attention written out.
FUSED_BUFFERS, FLOATS_BUFFERS, PORTABLE_BUFFERS = (2, 1), (2, 3), (6, 3)
#: Where a control group of each version says its limit, what is used, and in `memory.stat` what can be taken back.
GROUP_FILES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def reads_floats(manifest: Manifest) -> bool:
    """Say whether prefill reads an int8 cache as floats, a few heads at a time; graphs of earlier releases do not."""
    return "MultiHeadAttention" in manifest.operators and not manifest.contract.whole_buffer


def far_heads(manifest: Manifest) -> int:
    """Return how many query heads that see the whole text have scores and biases at once, which grow with it."""
    contract = manifest.contract
    return int(manifest.model["num_attention_heads"]) * _far_at_once(manifest) // contract.key_value_heads


def _far_at_once(manifest: Manifest) -> int:
    """The key/value heads that those share."""
    far = sum(group.heads for group in manifest.contract.groups if not group.window)
    return min(far, FLOAT_HEADS) if reads_floats(manifest) else far


def _biased_heads(manifest: Manifest) -> int:
    """Return how many of the query heads that see the whole text have biases: content heads, the last, have none."""
    contract, heads = manifest.contract, int(manifest.model["num_attention_heads"])
    content = int(manifest.model["positional_parameters"].get("content_heads", 0))
    shared = heads // contract.key_value_heads
    far = (group for group in contract.groups if not group.window)
    return shared * sum(group.heads for group in far if group.begin * shared < heads - content)


def near_tokens(contract: GraphContract) -> int:
    """Return the most tokens that heads with a window of their own keep; 0 where there are none."""
    return max(contract.windows) + SPARE + PREFILL_CHUNK if contract.windows else 0


def bounded_chunk(heads: int, depth: int, on_device: bool = False) -> int:
    """Return how many tokens to read at once behind `depth` others, so that the scores of `heads` stay bounded."""
    chunk, scores = (DEVICE_CHUNK, DEVICE_SCORES) if on_device else (PREFILL_CHUNK, MOST_SCORES)
    most = scores // (heads * (depth + chunk)) // LEAST_CHUNK * LEAST_CHUNK
    return min(chunk, max(LEAST_CHUNK, most))


@dataclass(frozen=True)
class MemoryPlan:
    """What a process takes that opens a package and fills a cache, in bytes.

    Attributes:
        tokens: held by each of the `rows`. chunk: tokens of the largest prefill step.
        opening: the most that is taken of weights while the package is opened. weights: of the graph, once it is open,
            with their copies in kernels. cache: keys and values of all rows. scores: position bias and attention
            scores of a prefill step at full depth, and the floats that it makes of an int8 cache. activations: its
            other tensors, logits included, and where runs are planned as much once more. runtime: all else.
    """

    tokens: int
    rows: int
    chunk: int
    opening: int
    weights: int
    cache: int
    scores: int
    activations: int
    runtime: int

    @property
    def peak(self) -> int:
        """The most that is resident at once: while the package is opened, or when all is filled."""
        return self.runtime + max(self.opening, self.weights + self.needed)

    @property
    def needed(self) -> int:
        """What is taken once the package is open."""
        return self.cache + self.scores + self.activations


def plan_memory(
    package: Package, tokens: int, *, rows: int = 1, chunk: int | None = None, own_kernels: bool = False
) -> MemoryPlan:
    """Predict what a cache of `rows` × `tokens` and the steps that fill it take.

    chunk: as of `PackageSession.prefill`. own_kernels: whether those run that are built here, which copy weights, but
        keep no scores and read an int8 cache as it is.
    """
    manifest = package.manifest
    model, contract, far = manifest.model, manifest.contract, far_heads(manifest)
    windowed = sum(group.heads for group in contract.groups if group.window)
    near = int(model["num_attention_heads"]) * windowed // contract.key_value_heads
    read = min(tokens, chunk or bounded_chunk(far, 0))
    deepest = min(read, chunk or bounded_chunk(far, max(0, tokens - PREFILL_CHUNK)))
    floats = reads_floats(manifest) and not own_kernels
    by_head, by_pair = PORTABLE_BUFFERS if contract.growing_cache else FLOATS_BUFFERS if floats else FUSED_BUFFERS
    restored = 2 * _far_at_once(manifest) * contract.head_size * tokens if floats else 0
    scored = _biased_heads(manifest) if own_kernels else far
    pairs = deepest * tokens
    if chunk is None and deepest < PREFILL_CHUNK <= tokens:  # chunks grew shorter on the way, and were larger between
        pairs = max(pairs, MOST_SCORES // far)
    width = 6 * int(model["hidden_size"]) + 3 * int(model["intermediate_size"]) + 2 * contract.vocab_size
    return MemoryPlan(
        tokens=tokens,
        rows=rows,
        chunk=deepest,
        opening=int(OPENING * held_bytes(manifest)),
        weights=held_bytes(manifest, own_kernels=own_kernels),
        cache=rows * contract.row_bytes(tokens, SPARE + PREFILL_CHUNK) * _copies(contract, rows),
        scores=4 * (pairs * (by_head * scored + by_pair) + deepest * near_tokens(contract) * by_head * near + restored),
        activations=4 * max(read, rows) * width * (2 if plans_runs(manifest) else 1),
        runtime=RUNTIME_BYTES + TOKENIZER_COPIES * package.tokenizer_path.stat().st_size,
    )


def held_bytes(manifest: Manifest, *, own_kernels: bool = False) -> int:
    """Return the bytes of a graph's weights in memory, as the kernels want them."""
    held = HELD_BY_OWN if own_kernels else HELD
    return int(sum(part["bytes"] * held.get(part["format"], 1.0) for part in manifest.parts))


def plans_runs(manifest: Manifest) -> bool:
    """Tell whether onnxruntime is to plan the memory of a package's runs.

    What a run holds may then be taken twice, and of larger models weights take the time. A growing cache has other
    shapes at every step, whose plans would all be kept.
    """
    return held_bytes(manifest) <= PLANNED_WEIGHTS and not manifest.contract.growing_cache


def _copies(contract: GraphContract, rows: int) -> int:
    """Of the keys and values: past and present where a step copies them, and once more where rows join."""
    if not contract.growing_cache:
        return 1
    return 2 if rows == 1 else 3


def most_tokens(
    package: Package, memory: int, *, rows: int = 1, chunk: int | None = None, own_kernels: bool = False, limit: int
) -> int:
    """Return for how many tokens, up to `limit`, `MemoryPlan.needed` stays within `memory` bytes."""
    least, most = 0, limit
    while least < most:
        middle = (least + most + 1) // 2
        fits = plan_memory(package, middle, rows=rows, chunk=chunk, own_kernels=own_kernels).needed <= memory
        least, most = (middle, most) if fits else (least, middle - 1)
    return least


def memory_shortage(
    package: Package,
    tokens: int,
    *,
    rows: int = 1,
    chunk: int | None = None,
    own_kernels: bool = False,
    held: int = 0,
) -> str | None:
    """Say what a cache of `rows` × `tokens` and the steps that fill it lack, and how many fit; None where it has room.

    chunk, own_kernels: as of `plan_memory`. held: bytes of the cache that there are already.
    """
    plan = plan_memory(package, tokens, rows=rows, chunk=chunk, own_kernels=own_kernels)
    free = available_memory()
    if free is None or plan.needed - held <= free:
        return None
    fitting = most_tokens(package, free + held, rows=rows, chunk=chunk, own_kernels=own_kernels, limit=tokens)
    return (
        f"{rows} × {tokens:,} tokens need {gigabytes(plan.cache)} of keys and values and "
        f"{gigabytes(plan.needed - plan.cache)} to read them, but {gigabytes(free + held)} are free; "
        f"at most {fitting:,} tokens fit"
    )


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that this process may still take: of the machine, and of its control groups where they say so.

    None where the system does not say. root: of the file system that `proc` and `sys` are looked for in.
    """
    rooms = [*_machine_room(root), *_group_rooms(root)]
    return max(0, min(rooms)) if rooms else None


def _machine_room(root: Path) -> Iterator[int]:
    for name, value in _entries(root / "proc/meminfo"):
        if name == "MemAvailable:":
            yield value * 1024


def _group_rooms(root: Path) -> Iterator[int]:
    """What each control group above this process leaves, of both versions; pages of files can be taken back."""
    for version, directory in control_groups("memory", root):
        yield from _group_room(directory, *GROUP_FILES[version])


def _group_room(directory: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        most, used = int((directory / limit).read_text()), int((directory / usage).read_text())
    except (OSError, ValueError):  # not there, or "max"
        return
    yield most - used + dict(_entries(directory / "memory.stat")).get(reclaimable, 0)


def _entries(path: Path) -> Iterator[tuple[str, int]]:
    """The names and numbers that begin the lines of a file; none where it is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        words = line.split()
        if len(words) > 1 and words[1].isdigit():
            yield words[0], int(words[1])


def gigabytes(count: int) -> str:
    """Write a number of bytes for people."""
    return f"{count / 1e9:.3g} GB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
