"""Whether a text of any length streams through a window in the same memory and at the same speed.

    python -m benchmarks.window_stream expe_edge/reference/int8-dynamic --tokens 1000000

Reads random tokens, part by part, and decodes some behind each. Beside every part a new context reads a shorter text
and decodes behind it: the ratio of the two speeds leaves out how busy the machine is.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np

from expe_edge.runtime import Generator, Window
from expe_edge.runtime.context import Context
from expe_edge.speed.measuring import quartiles, resident_bytes

#: A new context's text, as a part of the stream's.
NEW = 0.25


@dataclass(frozen=True)
class Reader:
    """Reads random tokens into contexts, and decodes so many behind them."""

    generator: Generator
    random: np.random.Generator
    decoded: int

    def speeds(self, context: Context, tokens: int) -> tuple[float, float]:
        """Append so many tokens to a context and decode; return tokens a second of both."""
        text = self.random.integers(self.generator.session.contract.vocab_size, size=tokens).tolist()
        began = time.perf_counter()
        context.append(text)
        reading = time.perf_counter() - began
        stream = self.generator.stream(None, context=context, max_new_tokens=self.decoded)
        for _ in stream:
            pass
        return tokens / reading, self.decoded / stream.completion.decode_seconds


def change(values: np.ndarray) -> list[float]:
    """Return quartiles of the second half of `values` (n,) over the median of the first, less 1."""
    half = len(values) // 2
    return [round(value, 4) for value in quartiles(values[half:] / np.median(values[:half]) - 1)]


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
    generator = Generator.load(package, threads=threads)
    generator.end_of_text = None
    reader, kept = Reader(generator, np.random.default_rng(0), decoded), Window(window, sinks)
    context, found = generator.context(window=kept), []
    for _ in range(tokens // part):
        read, decode = reader.speeds(context, part)
        new_read, new_decode = reader.speeds(generator.context(window=kept), int(part * NEW))
        found.append((resident_bytes(), read / new_read, decode / new_decode))
        result = {"resident_bytes": found[-1][0], "read_per_second": read, "decoded_per_second": decode}
        ratios = {"reading_over_new": found[-1][1], "decoding_over_new": found[-1][2]}
        print(json.dumps({"tokens": len(context), **result, **ratios}), flush=True)
    resident, reading, decoding = map(change, np.array(found[1:]).T)
    print(json.dumps({"quartiles of the change": {"resident": resident, "reading": reading, "decoding": decoding}}))


if __name__ == "__main__":
    main()
