"""Running a graph: its feeds, a sequence by prefill and decode; and whether it follows its `GraphContract`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from expe_edge.errors import ExportError
from expe_edge.package.contract import GraphContract

Float = npt.NDArray[np.float32]

#: Tokens decoded one at a time at the end of the sequence.
DECODED = 16
PREFILL_CHUNK = 256


def graph_feeds(
    contract: GraphContract, tokens: npt.NDArray[np.int64], cache: Sequence[npt.NDArray[Any]] | None = None
) -> dict[str, npt.NDArray[Any]]:
    """Return the inputs for `tokens` (B, T) after `cache`, in the order of `contract.past_names`; None for empty."""
    batch, length = tokens.shape
    if cache is None:
        empty = np.zeros((batch, contract.key_value_heads, 0, contract.head_size), dtype=contract.cache_dtype)
        cache = [empty] * len(contract.past_names)
    past = cache[0].shape[2]
    return {
        "input_ids": tokens,
        "attention_mask": np.ones((batch, past + length), dtype=np.int64),
        "position_ids": np.arange(past, past + length, dtype=np.int64)[None].repeat(batch, axis=0),
        **dict(zip(contract.past_names, cache, strict=True)),
    }


def check_contract(session: ort.InferenceSession, contract: GraphContract) -> None:
    """Raise `ExportError` unless the session's inputs and outputs are the contract's: names, dtypes and axes."""
    difference = contract.difference(session.get_inputs(), session.get_outputs())
    if difference is not None:
        raise ExportError(f"the graph is not what its contract says: {difference}")


def run_graph(
    session: ort.InferenceSession | ReferenceEvaluator,
    contract: GraphContract,
    tokens: npt.NDArray[np.int64],
    decoded: int = DECODED,
) -> Float:
    """Prefill all but the last `decoded` tokens in chunks, decode the rest one by one; return logits (T, V)."""
    prefilled = max(len(tokens) - decoded, 0)
    parts = [tokens[begin : min(begin + PREFILL_CHUNK, prefilled)] for begin in range(0, prefilled, PREFILL_CHUNK)]
    parts += [tokens[index : index + 1] for index in range(prefilled, len(tokens))]
    cache, logits = None, []
    for part in parts:
        outputs = session.run(None, graph_feeds(contract, part[None], cache))
        logits.append(outputs[0][0])
        cache = outputs[1:]
    return np.concatenate(logits)
