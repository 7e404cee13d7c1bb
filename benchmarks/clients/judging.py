"""Answers against the truth: equal, refused for a reason we know, different for a reason that holds, or wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.clients.cases import Task, Truth, text_of
from benchmarks.clients.clients import Client
from benchmarks.clients.reasons import REASONS, Difference
from benchmarks.clients.running import Answer, Case, Program, ask
from benchmarks.node.environment import MissingError
from expe_edge.quant.recipe import Recipe

#: Refusals that we know: what their messages say, and what there is to say of them.
REFUSALS = (
    (
        r"window_lengths\.0",
        "the graph asks for `window_lengths`, which our generator alone feeds: other clients keep no windows",
    ),
    (
        r"expe-with-windows-for-expe-edge-alone",
        "it knows no model of type `expe-with-windows-for-expe-edge-alone`: other clients keep no windows",
    ),
    (
        r"expe-with-int8-cache-for-expe-edge-or-onnxruntime-genai",
        "it knows no model of type `expe-with-int8-cache-for-expe-edge-or-onnxruntime-genai`: it would begin with a "
        "float cache whatever the graph asks for",
    ),
    (
        r"GroupQueryAttention:1\) has input size 14 not in range",
        "`… GroupQueryAttention … has input size 14 not in range …`: an int8 cache needs a newer onnxruntime, "
        "`requires_onnxruntime` of the package's `expe_edge.json`",
    ),
    (
        r"'tuple' object has no attribute 'crop'",
        "`'tuple' object has no attribute 'crop'`: Optimum's cache is a tuple, which transformers does not cut; no "
        "model of any kind can be assisted there",
    ),
    (
        r"OrtValue provided for output 'present\.0\.key'",
        "`The output OrtValue provided for output 'present.0.key' … has shape …`: a cache that grows has no place for "
        "the token that was generated last; rewind first, as below",
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What became of one task.

    result: equal, differs, refused, no call, not run, or wrong, which is all that has no reason. note: why, where it is
    not equal. measured: by the check of the reason.
    """

    client: str
    kind: str
    task: str
    result: str
    note: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Packages by their recipes, in `folder`, and what every client is asked of each. altered: for `Difference`."""

    folder: Path
    altered: Path
    recipes: Sequence[Recipe]
    tasks: Sequence[Task]
    special: Mapping[str, Task]

    @cached_property
    def truths(self) -> dict[str, Truth]:
        """Our generator with every package."""
        return {recipe.name: Truth(self.folder / recipe.name) for recipe in self.recipes}

    def try_client(self, client: Client) -> Iterator[Outcome]:
        """Yield what becomes of everything that a client is asked."""
        asked = [*self.tasks, *(self.special[name] for name in client.special)]
        pairs = [(recipe, task) for recipe in self.recipes for task in asked if task.name not in client.without]
        try:
            yield from self._judged(client.name, client.start(), pairs)
        except MissingError as error:
            for recipe, task in pairs:
                yield Outcome(client.name, recipe.name, task.name, "not run", str(error))
        for recipe in self.recipes:
            for name, why in client.without.items():
                yield Outcome(client.name, recipe.name, name, "no call", why)

    def _judged(self, name: str, program: Program, pairs: Sequence[tuple[Recipe, Task]]) -> Iterator[Outcome]:
        cases = [self._case(program, self.truths[recipe.name], task) for recipe, task in pairs]
        for (recipe, task), answer in zip(pairs, ask(program, cases), strict=True):
            result, note, measured = judge(answer, recipe, task, self.truths[recipe.name], self.altered)
            yield Outcome(name, recipe.name, task.name, result, note, measured)

    @staticmethod
    def _case(program: Program, truth: Truth, task: Task) -> Case:
        arguments = task.arguments
        if program.speaks_text:
            texts = [text_of(truth.generator, prompt) for prompt in arguments["prompts"]]
            arguments = {"texts": texts, "new": arguments["new"]}
        return Case(truth.package, task.call, arguments)


def judge(
    answer: Answer, recipe: Recipe, task: Task, truth: Truth, altered: Path
) -> tuple[str, str, Mapping[str, float]]:
    """Return the result of an answer, the note on it, and what the check of the note measured."""
    if "refused" in answer:
        known = [text for pattern, text in REFUSALS if re.search(pattern, answer["refused"])]
        return ("refused", known[0], {}) if known else ("wrong", f"refused, unexplained: {answer['refused']}", {})
    expected = truth.answer(task)
    tokens = answer["tokens"] if "tokens" in answer else _tokens(answer["texts"], expected, truth)
    if tokens == expected and not task.doubtful:
        return "equal", "", {}
    difference = Difference(recipe, task, tokens, truth, altered)
    for reason in REASONS:
        measured = reason.holds(difference)
        if measured is not None:
            return "differs", reason.text, measured
    return "wrong", f"other tokens, unexplained: {tokens}, not {expected}", {}


def _tokens(texts: Sequence[str], expected: Sequence[list[int]], truth: Truth) -> list[list[int]]:
    """Return the tokens of texts: those expected where they spell the same, which other tokens may."""
    tokenizer: Any = truth.generator.tokenizer
    return [
        tokens if tokenizer.decode(tokens) == text else tokenizer.encode(text, add_special_tokens=False).ids
        for text, tokens in zip(texts, expected, strict=True)
    ]
