"""Running a graph: its feeds, a sequence by prefill and decode; and whether it follows its `GraphContract`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from expe_edge.errors import ExportError
from expe_edge.package.contract import GraphContract, HeadGroup
from expe_edge.quiet import ERRORS

Float = npt.NDArray[np.float32]

#: Tokens decoded one at a time at the end of the sequence.
DECODED = 16
PREFILL_CHUNK = 256


def graph_feeds(
    contract: GraphContract, tokens: npt.NDArray[np.int64], cache: Sequence[npt.NDArray[Any]] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs for `tokens` (B, T) after `cache`, in the order of `contract.past_names`; None for empty.

    Some heads of the contract see all tokens: by them those before are counted. An int8 cache has room for what is new,
    as one of a single buffer has: without it, runs of many tokens would not take the way that they take there. So has
    one whose attention reads the whole buffer.
    """
    batch, length = tokens.shape
    groups = contract.cache_groups
    if cache is None:
        sizes = [(batch, group.heads, 0, contract.head_size) for group in groups]
        cache = [np.zeros(size, dtype=contract.cache_dtype) for size in sizes]
    past = max(part.shape[2] for part in cache)
    room = length if contract.whole_buffer or contract.cache_dtype == "int8" else 0
    kept = [_kept(part, group) for part, group in zip(cache, groups, strict=True)]
    lengths = {
        name: np.full(batch, part.shape[2], dtype=np.int64)
        for name, part in zip(contract.window_lengths, kept[::2], strict=False)
        if name
    }
    return {
        "input_ids": tokens,
        "attention_mask": np.ones((batch, past + length), dtype=np.int64),
        "position_ids": np.arange(past, past + length, dtype=np.int64)[None].repeat(batch, axis=0),
        **lengths,
        **dict(zip(contract.past_names, (_with_room(part, room) for part in kept), strict=True)),
    }


def _with_room(part: npt.NDArray[Any], tokens: int) -> npt.NDArray[Any]:
    """Return a part of the cache (B, heads, past, D) with columns for so many tokens more."""
    return np.pad(part, ((0, 0), (0, 0), (0, tokens), (0, 0))) if tokens else part


def _kept(part: npt.NDArray[Any], group: HeadGroup) -> npt.NDArray[Any]:
    """Return what the next token sees of a part of the cache (B, heads, past, D)."""
    return part[:, :, max(part.shape[2] - group.window + 1, 0) :] if group.window else part


def check_contract(session: ort.InferenceSession, contract: GraphContract) -> None:
    """Raise `ExportError` unless the session's inputs and outputs are the contract's: names, dtypes and axes."""
    difference = contract.difference(session.get_inputs(), session.get_outputs())
    if difference is not None:
        raise ExportError(f"the graph is not what its contract says: {difference}")


def open_graph(model: onnx.ModelProto) -> ort.InferenceSession:
    """Open a graph for a few large runs, with as little memory as that takes.

    It goes by way of a file, so that its bytes are not held beside it and the session; and what a run has taken is
    given back, where onnxruntime's arena would keep up to twice as much.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.onnx")
        onnx.save(model, path)
        return open_model(path)


def open_model(path: Path) -> ort.InferenceSession:
    """Open a graph in a file; what a run has taken is given back, as by `open_graph`."""
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS  # it warns of an input that may be left away
    options.enable_cpu_mem_arena = False
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def parts_of(length: int, decoded: int = DECODED) -> Iterator[slice]:
    """Yield the runs of a sequence of `length` tokens: all but the last `decoded` in chunks, the rest one by one."""
    prefilled = max(length - decoded, 0)
    for begin in range(0, prefilled, PREFILL_CHUNK):
        yield slice(begin, min(begin + PREFILL_CHUNK, prefilled))
    for index in range(prefilled, length):
        yield slice(index, index + 1)


def logits_of(
    session: ort.InferenceSession | ReferenceEvaluator,
    contract: GraphContract,
    tokens: npt.NDArray[np.int64],
    decoded: int = DECODED,
) -> Iterator[Float]:
    """Yield the logits (t, V) of each of `parts_of` the tokens (T,), every run going on from the cache of the last."""
    cache = None
    for part in parts_of(len(tokens), decoded):
        logits, *cache = session.run(None, graph_feeds(contract, tokens[None, part], cache))
        yield logits[0]


def run_graph(
    session: ort.InferenceSession | ReferenceEvaluator,
    contract: GraphContract,
    tokens: npt.NDArray[np.int64],
    decoded: int = DECODED,
) -> Float:
    """Return the logits (T, V) of all of `logits_of` at once."""
    return np.concatenate([*logits_of(session, contract, tokens, decoded)])
