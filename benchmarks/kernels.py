"""How much faster kernels built here are than onnxruntime's: products by rows, attention by depth, whole packages.

    python -m benchmarks.kernels --threads 2 package/int8-weight package/int4-weight

Ratios are onnxruntime's time over ours, with median and quartiles over rounds, in each of which both run one after the
other. Products have as many copies of their weights as are needed to be larger than any cache, as the layers of a
model are. Attention over an int8 cache is compared with onnxruntime's over the same cache, though without these kernels
packages restore floats for many tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

from expe_edge.runtime.kernels import Kernels
from expe_edge.runtime.threads import default_threads
from expe_edge.speed.measuring import quartiles
from expe_edge.speed.timed import TimedPackage
from tests.attentions import Attention, Bound
from tests.products import Product

#: Those of 12 layers of 768 with 32,000 tokens, and of a small model.
PRODUCTS = [
    Product(k, n, bits, block, bias=True)
    for k, n in ((768, 2304), (2048, 768), (768, 32000), (320, 960))
    for bits, block in ((8, 128), (4, 32), (4, 256))
]
#: Rows of a step, of batches, of drafts, and of a prefill.
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
#: Heads that see everything, and heads with slopes and a window, of 12 layers of 768.
ATTENTIONS = [
    replace(each, dtype=dtype)
    for dtype in ("int8", "float32")
    for each in (Attention(4, 4, 64), Attention(8, 8, 64, window=512, bias=("one", "heads")))
]
#: Tokens of a run, and those before it that heads without a window see.
TOKENS, DEPTHS = (1, 4, 8, 12, 256), (512, 4096, 16384)
#: How often a prefill of fewer than `MANY` tokens is run in a round.
REPEATS, MANY = 15, 128
#: Bytes of all copies of a product's weights.
WEIGHTS = 64e6


def ratios(theirs: Callable[[], float], ours: Callable[[], float], rounds: int) -> dict[str, list[float]]:
    """Return quartiles of the milliseconds of `theirs`, which says its seconds, and of their ratio to those of `ours`.

    A first round does not count.
    """
    times = np.array([[theirs(), ours()] for _ in range(1 + rounds)])[1:]
    return {"onnxruntime_ms": quartiles(times[:, 0] * 1e3), "ratio": quartiles(times[:, 0] / times[:, 1])}


def time_product(product: Product, library: Path, threads: int, rounds: int) -> None:
    """Print, as JSON lines, the ratios of a product by rows."""
    copies = max(1, round(WEIGHTS / (product.k * product.n * product.bits / 8)))
    sessions = {of: [product.session(threads, of) for _ in range(min(copies, 40))] for of in (None, library)}
    shown = {name: getattr(product, name) for name in ("k", "n", "bits", "block")}
    for rows in ROWS:
        x = {"x": np.random.default_rng(0).standard_normal((1, rows, product.k)).astype(np.float32)}

        def seconds(of: Path | None, x: dict[str, np.ndarray] = x) -> float:
            began = time.perf_counter()
            for session in sessions[of]:
                session.run(None, x)
            return (time.perf_counter() - began) / len(sessions[of])

        some = rounds if rows < MANY else max(2, rounds // 4)
        print(
            json.dumps(shown | {"rows": rows} | ratios(partial(seconds, None), partial(seconds, library), some)),
            flush=True,
        )


def time_attention(attention: Attention, library: Path, threads: int, rounds: int) -> None:
    """Print, as JSON lines, the ratios of attention by tokens and depth."""
    shown = {name: getattr(attention, name) for name in ("dtype", "heads", "size", "window")}
    for depth in DEPTHS[:1] if attention.window else DEPTHS:
        for tokens in TOKENS:
            feeds = attention.feeds(tokens, [depth], depth + tokens)
            theirs, ours = (
                partial(median_run, Bound(attention.session(threads, of), feeds), max(1, 64 // tokens))
                for of in (None, library)
            )
            print(json.dumps(shown | {"depth": depth, "tokens": tokens} | ratios(theirs, ours, rounds)), flush=True)


def median_run(run: Callable[[], object], repeats: int) -> float:
    """The median seconds of runs one after the other."""
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds))


def time_package(path: Path, kernels: Path, threads: int, rounds: int, depths: Sequence[int]) -> None:
    """Print, as JSON lines, the ratios of a package's decode steps and prefills, of few tokens at depth 0 alone."""
    theirs, ours = (TimedPackage(path, threads, "cpu", kernels=where) for where in ("off", str(kernels)))
    if not ours.own_kernels():
        raise click.ClickException(f"{path} has no products that the kernels are for")
    for depth in depths:
        for tokens in ROWS[1:] if depth == 0 else ROWS[-1:]:
            repeats = REPEATS if tokens < MANY else 1
            prefill = [partial(median_prefill, of, depth, tokens, repeats) for of in (theirs, ours)]
            measured = ratios(prefill[0], prefill[1], rounds)
            print(json.dumps({"package": str(path), "depth": depth, "prefill": tokens} | measured), flush=True)
        decode = ratios(partial(decode_step, theirs, depth), partial(decode_step, ours, depth), rounds)
        print(json.dumps({"package": str(path), "depth": depth, "decode": 1} | decode), flush=True)


def median_prefill(package: TimedPackage, depth: int, tokens: int, repeats: int) -> float:
    """The median seconds of prefills one after the other, while the threads of another session come to rest."""
    return float(np.median([package.prefill(depth, tokens).seconds for _ in range(repeats)]))


def decode_step(package: TimedPackage, depth: int) -> float:
    return package.decode(depth, 32).seconds


@click.command()
@click.argument("packages", nargs=-1, type=click.Path(path_type=Path))
@click.option("--threads", default=default_threads, type=int, show_default="one for each core that may be used")
@click.option("--rounds", default=15, show_default=True)
@click.option("--products/--no-products", default=True, show_default=True)
@click.option("--attention/--no-attention", default=True, show_default=True)
@click.option("--depths", "depths", multiple=True, type=int, default=(0,), show_default=True, help="Of packages.")
def main(
    packages: tuple[Path, ...], threads: int, rounds: int, products: bool, attention: bool, depths: tuple[int, ...]
) -> None:
    """Build the kernels, and print ratios of onnxruntime's time to theirs."""
    with TemporaryDirectory() as directory:
        library = Kernels(Path(directory)).build()
        for product in PRODUCTS if products else ():
            time_product(product, library, threads, rounds)
        for each in ATTENTIONS if attention else ():
            time_attention(each, library, threads, rounds)
        for path in packages:
            time_package(path, Path(directory), threads, rounds, depths)


if __name__ == "__main__":
    main()
