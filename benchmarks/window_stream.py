"""Whether a text of any length streams through a window in the same memory and at the same speed.

    python -m benchmarks.window_stream expe_edge/reference/int8-dynamic --tokens 1000000

Reads random tokens, part by part, and decodes some behind each.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import numpy as np

from expe_edge.runtime import Generator, Window
from expe_edge.speed.measuring import resident_bytes


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--tokens", default=1_000_000, show_default=True, help="Tokens of the text.")
@click.option("--window", default=1024, show_default=True)
@click.option("--sinks", default=4, show_default=True)
@click.option("--part", default=20_000, show_default=True, help="Tokens between two measurements.")
@click.option("--decoded", default=64, show_default=True, help="Tokens generated behind each part, not counted.")
@click.option("--threads", default=1, show_default=True)
def main(package: Path, tokens: int, window: int, sinks: int, part: int, decoded: int, threads: int) -> None:
    """Print, as JSON lines, resident memory and tokens per second by tokens read; last, how much they changed.

    The first part is not compared: caches and arenas fill then.
    """
    generator, random = Generator.load(package, threads=threads), np.random.default_rng(0)
    generator.end_of_text = None
    context = generator.context(window=Window(window, sinks))
    found = []
    for _ in range(tokens // part):
        began = time.perf_counter()
        context.append(random.integers(generator.session.contract.vocab_size, size=part).tolist())
        reading = time.perf_counter() - began
        stream = generator.stream(None, context=context, max_new_tokens=decoded)
        for _ in stream:
            pass
        speeds = part / reading, decoded / stream.completion.decode_seconds
        found.append((resident_bytes(), *speeds))
        result = dict(zip(("resident_bytes", "read_per_second", "decoded_per_second"), found[-1], strict=True))
        print(json.dumps({"tokens": len(context), **result}), flush=True)
    table = np.array(found[1:])
    change = table[-5:].mean(axis=0) / table[:5].mean(axis=0) - 1
    print(
        json.dumps({"resident": round(change[0], 4), "reading": round(change[1], 4), "decoding": round(change[2], 4)})
    )


if __name__ == "__main__":
    main()
