"""How much sooner prompt lookup is done, where a package goes on with real Python source.

    python -m benchmarks.prompt_lookup expe_edge/reference/int8-dynamic --module argparse --module csv …

Both decode the same prompt in turn, so that a busy machine slows both; a ratio is of tokens per second, with quartiles
over modules.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import click
import numpy as np

from expe_edge.runtime import Completion, Generator, Sampling
from expe_edge.speed.measuring import quartiles

#: Modules of Python's library, none longer than a prompt would want.
MODULES = (
    "argparse",
    "ast",
    "bisect",
    "calendar",
    "configparser",
    "csv",
    "dis",
    "fractions",
    "gzip",
    "heapq",
    "shutil",
)


def completed(generator: Generator, prompt: list[int], tokens: int, temperature: float, *, lookup: bool) -> Completion:
    """Return what follows a prompt."""
    sampling = Sampling(temperature=temperature, seed=1)
    (found,) = generator.generate([prompt], max_new_tokens=tokens, sampling=sampling, prompt_lookup=lookup)
    return found


@click.command()
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--module", "modules", multiple=True, default=MODULES, help="Module whose source is the prompt.")
@click.option("--prompt-tokens", default=1500, show_default=True)
@click.option("--tokens", default=256, show_default=True, help="Tokens to generate.")
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
def main(
    package: Path,
    modules: tuple[str, ...],
    prompt_tokens: int,
    tokens: int,
    temperature: float,
    turns: int,
    threads: int,
) -> None:
    """Print, as JSON lines, tokens per second without and with, their ratio, and what was drafted and accepted."""
    generator, ratios = Generator.load(package, threads=threads), []
    generator.end_of_text = None
    for module in modules:
        found = importlib.util.find_spec(module)
        assert found is not None
        assert found.origin is not None
        prompt = generator.encode(Path(found.origin).read_text(encoding="utf-8"))[:prompt_tokens].tolist()
        speeds, completions = np.zeros((turns, 2)), []
        for turn in range(turns):
            completions = [completed(generator, prompt, tokens, temperature, lookup=lookup) for lookup in (False, True)]
            speeds[turn] = [tokens / completion.decode_seconds for completion in completions]
        plain, drafted = completions
        ratios.append(float(np.median(speeds[:, 1] / speeds[:, 0])))
        result = {
            "module": module,
            "tokens_per_second": np.median(speeds, axis=0).round(1).tolist(),
            "ratio": round(ratios[-1], 2),
            "drafted": drafted.drafted_tokens,
            "accepted": drafted.accepted_tokens,
            "same_tokens": plain.tokens == drafted.tokens,
        }
        print(json.dumps(result), flush=True)
    print(json.dumps({"ratio": quartiles(ratios)}))


if __name__ == "__main__":
    main()
