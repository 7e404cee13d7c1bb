"""What generating is given: settings of sampling, options of the command line, prompts."""

from __future__ import annotations

import functools
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.mutations import ODD_NUMBERS, ODD_TEXTS, bytes_changed, odd_text
from benchmarks.fuzz.trial import PACKAGES, Trial
from expe_edge.runtime import Generator, Sampling

#: Longer prompts are not drawn: that they take memory and time is no fault.
LONGEST_PROMPT = 4000


@functools.cache
def opened(package: Path) -> Generator:
    """Return an unchanged package, opened once a process."""
    return Generator.load(package, threads=1)


def odd_number(random: Random, low: float, high: float, *, whole: bool) -> Any:
    """Draw a number of these bounds, or now and then an odd one of the same type."""
    if random.random() < 0.3:
        return random.choice([number for number in ODD_NUMBERS if isinstance(number, int) or not whole])
    return random.randint(int(low), int(high)) if whole else random.uniform(low, high)


def odd_sampling(random: Random) -> dict[str, Any]:
    """Draw settings of `Sampling`."""
    return {
        "temperature": odd_number(random, 0, 3, whole=False),
        "top_k": odd_number(random, 0, 400, whole=True),
        "top_p": odd_number(random, 0, 1, whole=False),
        "min_p": odd_number(random, 0, 1, whole=False),
        "repetition_penalty": odd_number(random, 0, 3, whole=False),
        "seed": odd_number(random, 0, 10, whole=True),
    }


def sampling(trial: Trial) -> None:
    """Settings of sampling and cache lengths, by the library."""
    generator = opened(trial.materials.package(trial.random.choice(PACKAGES)))
    names = trial.random.sample(list(odd_sampling(trial.random)), trial.random.randint(0, 6))
    drawn = odd_sampling(trial.random)
    settings = trial.given["sampling"] = {name: drawn[name] for name in names}
    stop = trial.given["stop"] = trial.random.choice(((), "", "e", ("", "th"), ODD_TEXTS))
    room = trial.given["cache_length"] = trial.random.choice((None, odd_number(trial.random, 1, 64, whole=True)))
    count = trial.given["max_new_tokens"] = odd_number(trial.random, 1, 8, whole=True)
    if isinstance(count, int) and 100 < count < 2**24:
        count = 8  # may be asked for, and takes as long as it takes
    prompts = trial.random.choice((["the"], ["the", "a tree"], [[1, 2], [0]]))
    done = generator.generate(
        prompts, max_new_tokens=count, sampling=Sampling(**settings), stop=stop, cache_length=room
    )
    assert all(completion.tokens for completion in done)


def generate_options(trial: Trial) -> None:
    """The same by the command line, with the options that the library has no words for."""
    options = {**odd_sampling(trial.random), "max_new_tokens": odd_number(trial.random, 1, 4, whole=True)}
    options |= {
        "threads": trial.random.choice((1, 1, 0, -1, 2**31, 10**30)),
        "device": trial.random.choice(("cpu", "", "x")),
    }
    options |= {"stop": trial.random.choice(ODD_TEXTS), "cache_length": odd_number(trial.random, 1, 2000, whole=True)}
    if options["max_new_tokens"] > 100 and options["max_new_tokens"] < 2**24:
        options["max_new_tokens"] = 4
    chosen = trial.random.sample(list(options), trial.random.randint(0, 4))
    flags = [f"--{name.replace('_', '-')}={options[name]}" for name in {*chosen, "max_new_tokens", "threads"}]
    package = trial.materials.package(trial.random.choice(PACKAGES))
    trial.run("generate", package, "--prompt", "the", *sorted(flags))


def prompts(trial: Trial) -> None:
    """Prompts as an option, a file, standard input, a text and ids."""
    text = trial.given["prompt"] = odd_text(trial.random, trial.materials.sample)[:LONGEST_PROMPT]
    content = bytes_changed(text.encode(errors="surrogatepass"), trial.random)[:LONGEST_PROMPT]
    package = trial.materials.package(trial.random.choice(PACKAGES))
    way = trial.given["used by"] = trial.random.choice(("option", "file", "stdin", "library", "ids"))
    command = ("generate", package, "--max-new-tokens", 2, "--threads", 1)
    if way == "option":
        trial.run(*command, "--json", f"--prompt={text}")
    elif way == "file":
        trial.replace(trial.folder / "prompt", content)
        trial.run(*command, "--prompt-file", trial.folder / "prompt")
    elif way == "stdin":
        trial.given["stdin"] = content
        trial.run(*command, stdin=content)
    elif way == "library":
        opened(package).generate([text], max_new_tokens=2)
    else:
        ids = trial.given["ids"] = [odd_number(trial.random, 0, 299, whole=True) for _ in range(3)]
        "".join(opened(package).stream(ids, max_new_tokens=2))
