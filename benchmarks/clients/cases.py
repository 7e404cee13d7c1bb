"""What clients are asked, and the truth: what our generator answers to every text by itself, from its first token."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from expe_edge.divergence import log_softmax
from expe_edge.errors import CorpusError
from expe_edge.runtime import Generator

#: Tokens of the short prompt, and of what is read after something was generated.
SHORT, MORE = 12, 12
#: Least share of different tokens in what is generated: less is a loop, whose tokens tell nothing.
LEAST_VARIETY = 0.4
BEAMS = 3


class Texts(NamedTuple):
    """Ids of prompts, opened by end-of-text, and of what follows the long one in its document.

    long: reaches beyond the training length. short: of another document.
    """

    long: list[int]
    short: list[int]
    more: list[int]


class Completed(NamedTuple):
    """What a client generated behind a text: ids of both."""

    text: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Task:
    """Something that a client is asked for.

    call: the name that the programs know it by. arguments: as JSON; `new` tokens are generated, twice where it goes on.
    doubtful: the right tokens would be luck, so that reasons for others are tried first.
    """

    name: str
    call: str
    arguments: dict[str, Any]
    doubtful: bool = False

    def completions(self, answers: Sequence[list[int]]) -> list[Completed]:
        """Return what was completed in an answer: every prompt, or a prompt and then what was read behind it."""
        if "prompts" in self.arguments:
            return [
                Completed(prompt, tokens) for prompt, tokens in zip(self.arguments["prompts"], answers, strict=True)
            ]
        first, second = answers
        prompt, keep, more = (self.arguments[name] for name in ("prompt", "keep", "more"))
        return [Completed(prompt, first), Completed([*prompt, *first][:keep] + more, second)]


def tasks(texts: Texts, training_length: int, new: int) -> list[Task]:
    """Return what every client is asked."""
    behind = {"prompt": texts.long, "new": new, "more": texts.more}
    return [
        Task("greedy", "complete", {"prompts": [texts.long], "new": new}),
        Task("batch", "complete", {"prompts": [texts.long, texts.short], "new": new}),
        Task("continue", "go_on", {**behind, "keep": len(texts.long) + new}),
        Task("rewind", "go_on", {**behind, "keep": len(texts.long) - training_length // 8}),
    ]


class Truth:
    """What our generator answers with a package; every text by itself and from its first token on."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self._answers: dict[str, list[list[int]]] = {}

    @cached_property
    def generator(self) -> Generator:
        """The package, opened when it is first needed."""
        return Generator.load(self.package, threads=1, graph_cache="off", kernels="off")

    def answer(self, task: Task) -> list[list[int]]:
        """Return the tokens of every completion that a task asks for, computed once for each."""
        asked = json.dumps(task.arguments)
        if asked not in self._answers:
            self._answers[asked] = self._answer(task)
        return self._answers[asked]

    def _answer(self, task: Task) -> list[list[int]]:
        new = task.arguments["new"]
        if "num_beams" in task.arguments:
            return [self.beams(prompt, new) for prompt in task.arguments["prompts"]]
        if "prompts" in task.arguments:
            return [self.greedy(prompt, new) for prompt in task.arguments["prompts"]]
        first = self.greedy(task.arguments["prompt"], new)
        _, behind = task.completions([first, []])
        return [first, self.greedy(behind.text, new)]

    def greedy(self, text: list[int], new: int) -> list[int]:
        """Return the likeliest tokens behind a text, one after the other."""
        return self.generator.generate([text], max_new_tokens=new)[0].tokens

    def beams(self, text: list[int], new: int) -> list[int]:
        """Return the likeliest of `BEAMS` continuations that are kept at every step; every step reads all anew."""
        kept: list[tuple[float, list[int]]] = [(0.0, [])]
        for _ in range(new):
            logits = self.generator.session.forward([np.array(text + tokens) for _, tokens in kept])
            longer = [
                (nats + float(nats_of_token[token]), [*tokens, int(token)])
                for (nats, tokens), rows in zip(kept, logits, strict=True)
                for nats_of_token in [log_softmax(rows[-1])]
                for token in np.argsort(nats_of_token)[-BEAMS:]
            ]
            kept = sorted(longer, reverse=True)[:BEAMS]
        return kept[0][1]


def choose_texts(truth: Truth, documents: Sequence[str], new: int) -> Texts:
    """Return texts of documents that greedy decoding neither ends nor circles in.

    Raises:
        CorpusError: there are none.
    """
    length = truth.generator.session.package.manifest.training_length
    for texts in _candidates(truth.generator, documents, length + length // 4):
        everything = [tokens for task in tasks(texts, length, new) for tokens in truth.answer(task)]
        if all(len(tokens) == new and len(set(tokens)) >= LEAST_VARIETY * new for tokens in everything):
            return texts
    raise CorpusError("no held-out documents that greedy decoding continues without end or circle")


def _candidates(generator: Generator, documents: Sequence[str], long: int) -> Iterator[Texts]:
    encoded = (generator.encode(document[: 16 * long]).tolist() for document in documents)
    whole = (ids for ids in encoded if len(ids) >= long + MORE)
    for ids, others in pairwise(whole):
        texts = Texts(ids[:long], others[:SHORT], ids[long : long + MORE])
        if all(generator.encode(text_of(generator, prompt)).tolist() == prompt for prompt in (texts.long, texts.short)):
            yield texts


def text_of(generator: Generator, prompt: list[int]) -> str:
    """Return the text of a prompt that end-of-text opens."""
    text: str = generator.tokenizer.decode(prompt[1:])
    return text
