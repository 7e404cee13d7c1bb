"""Why a client gives other tokens: each reason is believed only where its check holds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from benchmarks.clients.cases import Completed, Task, Truth
from benchmarks.clients.environments import python_command
from benchmarks.clients.running import Case, Program, ask
from expe_edge.divergence import log_softmax
from expe_edge.graph.nodes import every_node
from expe_edge.graph.run import logits_of, open_model
from expe_edge.package.directory import MODEL_FILE
from expe_edge.quant.recipe import BLOCKWISE, Recipe

#: A loop over onnxruntime that runs altered graphs.
LOOP = Program(python_command(sys.executable, "onnxruntime_loop"), "")


@dataclass(frozen=True)
class Difference:
    """An answer with other tokens than ours. altered: a folder for graphs that are altered to show why."""

    recipe: Recipe
    task: Task
    tokens: Sequence[list[int]]
    truth: Truth
    altered: Path


#: What a check that holds has measured, for the records.
Measured = Mapping[str, float]


@dataclass(frozen=True)
class Reason:
    """A difference explained. holds: returns None where the explanation is not that of the difference."""

    text: str
    holds: Callable[[Difference], Measured | None]


def _shared_range(difference: Difference) -> Measured | None:
    """Whether tokens are the likeliest but for what one range for other rows and tokens does to logits.

    Our logits, token by token, are compared with those of one run of all texts of the task.
    """
    if difference.recipe.precision != "int8-dynamic":
        return None
    completions = difference.task.completions(difference.tokens)
    together = difference.truth.generator.session.forward([np.array(text + tokens) for text, tokens in completions])
    return _within(difference, together)


def _rounded_activations(difference: Difference) -> Measured | None:
    """Whether tokens are the likeliest but for what rounding activations to int8 does to logits."""
    if difference.recipe.precision not in BLOCKWISE:
        return None
    session, contract = open_model(_level_0(difference) / MODEL_FILE), difference.truth.generator.session.contract
    texts = [np.array(text + tokens) for text, tokens in difference.task.completions(difference.tokens)]
    return _within(difference, [np.concatenate(list(logits_of(session, contract, text))) for text in texts])


def _within(difference: Difference, others: Sequence[np.ndarray]) -> Measured | None:
    """Tell how far a token is below the likeliest at most, and how far `others`, logits (T, V) of texts, are from ours.

    None where the first is more than twice the second, so that it is no cause.
    """
    completions = difference.task.completions(difference.tokens)
    own = [_decoded(difference.truth, completed) for completed in completions]
    shift = max(
        float(np.abs(rows[len(text) - 1 : -1] - logits).max())
        for (text, _), rows, logits in zip(completions, others, own, strict=True)
    )
    if difference.task.name == "beams":
        gap = _below_our_beam(difference)
    else:
        gap = max(_below_likeliest(logits, tokens) for logits, (_, tokens) in zip(own, completions, strict=True))
    return {"gap": gap, "shift": shift} if gap <= 2 * shift else None


def _decoded(truth: Truth, completed: Completed) -> np.ndarray:
    """Logits (t, V) behind a text and behind all but the last of its tokens, which are read one by one."""
    session = truth.generator.session
    cache = session.new_cache(1, len(completed.text) + len(completed.tokens))
    *_, first = session.prefill(cache, np.array(completed.text), last=True)
    rows = [first[-1].copy()]
    for token in completed.tokens[:-1]:
        (logits,) = session.prefill(cache, np.array([token]), last=True)
        rows.append(logits[-1].copy())
    return np.stack(rows)


def _below_likeliest(logits: np.ndarray, tokens: Sequence[int]) -> float:
    """The most that a token's logit is below the largest of its row of logits (t, V)."""
    return float((logits.max(axis=-1) - logits[np.arange(len(tokens)), tokens]).max())


def _below_our_beam(difference: Difference) -> float:
    """The nats a token by which the beam that was found is below ours."""
    found = difference.task.completions(difference.tokens)
    best = difference.task.completions(difference.truth.answer(difference.task))
    return (_nats(difference.truth, best[0]) - _nats(difference.truth, found[0])) / len(found[0].tokens)


def _nats(truth: Truth, completed: Completed) -> float:
    logits = log_softmax(_decoded(truth, completed))
    return float(logits[np.arange(len(completed.tokens)), completed.tokens].sum())


def _float_activations(difference: Difference) -> Measured | None:
    """Whether the tokens are those of the same weights with activations that stay in float32."""
    if difference.recipe.precision not in BLOCKWISE or difference.task.call not in ("complete", "go_on"):
        return None
    return _same(difference, _level_0(difference), difference.task.call)


def _level_0(difference: Difference) -> Path:
    """Return a folder with the ordinary graph of these weights at MatMulNBits' accuracy level 0."""
    ordinary = difference.truth.package.with_name(difference.truth.package.name.removesuffix("-portable"))
    folder = difference.altered / f"{ordinary.name}-level-0"
    if not folder.exists():
        folder.mkdir(parents=True)
        model = onnx.load(ordinary / MODEL_FILE)
        for node in every_node(model.graph):
            for attribute in [each for each in node.attribute if each.name == "accuracy_level"]:
                node.attribute.remove(attribute)
        onnx.save(model, folder / MODEL_FILE)
    return folder


def _empty_place(difference: Difference) -> Measured | None:
    """Whether the tokens are those behind a cache with zeros in the place of the token that was generated last."""
    if difference.task.name != "append twice":
        return None
    return _same(difference, difference.truth.package, "go_on_behind_zeros")


def _padding_is_text(difference: Difference) -> Measured | None:
    """Whether the tokens are those behind prompts that begin with as many end-of-text tokens as padding had."""
    if difference.task.name != "left padding":
        return None
    prompts = difference.task.arguments["prompts"]
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    task = Task("batch", "complete", {"prompts": padded, "new": difference.task.arguments["new"]})
    as_text = replace(difference, task=task)
    if difference.truth.answer(task) == difference.tokens:
        return {}
    return _shared_range(as_text) or _rounded_activations(as_text)


def _same(difference: Difference, package: Path, call: str) -> Measured | None:
    """{} where the loop gives the same tokens with another package or by another call, else None."""
    (answer,) = ask(LOOP, [Case(package, call, difference.task.arguments)])
    return {} if answer.get("tokens") == difference.tokens else None


#: In the order in which they are tried.
REASONS = (
    Reason(
        "the token that was generated last is not in the cache when more is appended, and its place stays zero: rewind "
        "first, as below. Tokens may agree by luck. Checked: they are those behind a cache with zeros there",
        _empty_place,
    ),
    Reason(
        "it reads padding on the left as text, and says nothing: pad on the right, as its tokenizer does. Checked: the "
        "tokens are those behind prompts that begin so",
        _padding_is_text,
    ),
    Reason(
        "int8-dynamic has one range of activations for all that a run holds, other rows and padding included, so "
        "tokens depend on how text is cut into runs; int8-static has fixed ranges. Checked: every token is the "
        "likeliest within twice what another cut does to our own logits",
        _shared_range,
    ),
    Reason(
        "this onnxruntime has no kernel for products of int8 activations with weights in blocks, or not for so many "
        "rows; it computes in float32, which is nearer to the float model. Checked: the tokens are those of the same "
        "graph at accuracy level 0",
        _float_activations,
    ),
    Reason(
        "activations that meet weights in blocks are rounded to int8, and a value midway between two levels goes "
        "either way with its last bit, which depends on the rows of a run. Checked: every token is the likeliest "
        "within twice what rounding activations does to our own logits",
        _rounded_activations,
    ),
)
