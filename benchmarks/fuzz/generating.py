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
    return Generator.load(package, threads=1, graph_cache="off")


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
        "typical_p": odd_number(random, 0, 1, whole=False),
        "mirostat_tau": random.choice((0.0, 0.0, odd_number(random, 0, 9, whole=False))),
        "mirostat_eta": odd_number(random, 0, 1, whole=False),
        "repetition_penalty": odd_number(random, 0, 3, whole=False),
        "frequency_penalty": odd_number(random, -2, 2, whole=False),
        "presence_penalty": odd_number(random, -2, 2, whole=False),
        "seed": odd_number(random, 0, 10, whole=True),
    }


def odd_wishes(random: Random) -> dict[str, Any]:
    """Draw some of what else may be asked for."""
    number = odd_number(random, 0, 9, whole=True)
    wishes = {
        "n": min(number, 9),
        "min_new_tokens": odd_number(random, 0, 9, whole=True),
        "stop_tokens": [odd_number(random, 0, 299, whole=True) for _ in range(random.randint(0, 3))],
        "logprobs": odd_number(random, 0, 9, whole=True),
    }
    return {name: wishes[name] for name in random.sample(list(wishes), random.randint(0, 3))}


def sampling(trial: Trial) -> None:
    """Settings of sampling and cache lengths, by the library."""
    generator = opened(trial.materials.package(trial.random.choice(PACKAGES)))
    names = trial.random.sample(list(odd_sampling(trial.random)), trial.random.randint(0, 6))
    drawn = odd_sampling(trial.random)
    settings = trial.given["sampling"] = {name: drawn[name] for name in names}
    if trial.random.random() < 0.3:
        token = odd_number(trial.random, 0, 299, whole=True)
        settings["logit_bias"] = {token: odd_number(trial.random, -100, 100, whole=False)}
    stop = trial.given["stop"] = trial.random.choice(((), "", "e", ("", "th"), ODD_TEXTS))
    room = trial.given["cache_length"] = trial.random.choice((None, odd_number(trial.random, 1, 64, whole=True)))
    count = trial.given["max_new_tokens"] = odd_number(trial.random, 1, 8, whole=True)
    if isinstance(count, int) and 100 < count < 2**24:
        count = 8  # may be asked for, and takes as long as it takes
    prompts = trial.random.choice((["the"], ["the", "a tree"], [[1, 2], [0]]))
    asked = trial.given["asked"] = odd_wishes(trial.random)
    done = generator.generate(
        prompts, max_new_tokens=count, sampling=Sampling(**settings), stop=stop, cache_length=room, **asked
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


#: What constraints are made of by chance: well-formed pieces, and such as meet badly.
EXPRESSIONS = (
    *("a", "[a-z]+", r"\d{3}", "(", ")", "|", "*", "{2,99999}", r"[^\s\S]", "\\", "/", "(?i)é", r"\b", "^$", "(a|b)*c"),
)
RULES = (
    *(
        "start: a\n",
        "a: ",
        '"x"',
        "/[0-9]+/",
        " | ",
        "a",
        "start",
        "+",
        "\n",
        "%ignore /x/\n",
        "<0>",
        "%json {}",
        "[1]",
    ),
)
SCHEMAS = (
    *(
        '{"type": "object"}',
        '{"type": "string", "pattern": "a+"}',
        '{"enum": []}',
        '{"$ref": "#"}',
        '{"type": "color"}',
    ),
    *('{"allOf": [{"type": "integer"}, {"minimum": 9, "maximum": 3}]}', '{"const": {"a": [1e999]}}', "true", "[", "{"),
)


def constraints(trial: Trial) -> None:
    """Expressions, grammars, schemas and choices, by the command line."""
    random = trial.random
    pieces = {"--regex": EXPRESSIONS, "--grammar": RULES, "--json-schema": SCHEMAS, "--choice": ODD_TEXTS}
    flag = random.choice(list(pieces))
    joined = "".join(
        random.choices(pieces[flag], k=1 if flag in ("--json-schema", "--choice") else random.randint(1, 6))
    )
    content = joined.encode(errors="surrogatepass")
    if random.random() < 0.3:
        content = bytes_changed(content, random)
    if flag in ("--grammar", "--json-schema"):
        trial.replace(trial.folder / "rules", content)
        value: object = trial.folder / "rules"
    else:
        value = content.decode(errors="surrogateescape")
    package = trial.materials.package(random.choice(PACKAGES))
    trial.run("generate", package, "--prompt", "the", "--max-new-tokens", 6, "--threads", 1, f"{flag}={value}")


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
