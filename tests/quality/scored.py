"""What PyTorch makes of a continuation: the figures that lm-evaluation-harness must come to."""

from __future__ import annotations

import torch

from expe_edge.training.checkpoint import Checkpoint

#: Nats that a sum over a few hundred tokens may differ by, float32 in two engines.
NATS = 1e-4
#: Of long texts, whose sums float32 no longer holds to that.
SHARE = 1e-6


def torch_scores(trained: Checkpoint, context: str, continuation: str) -> tuple[float, bool]:
    """Nats of `continuation` and whether it is greedy, from PyTorch's logits of the whole text."""
    ids, scored = split(trained, context, continuation)
    with torch.inference_mode():
        logits = trained.model(torch.tensor([ids[:-1]])).logits[0, -scored:].double()
    targets = torch.tensor(ids[-scored:])
    nats = logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return float(nats), bool((logits.argmax(-1) == targets).all())


def split(trained: Checkpoint, context: str, continuation: str) -> tuple[list[int], int]:
    """The text's ids, opened as training opened documents, and how many are the continuation's: spaces go to it."""
    ids = trained.tokenizer.encode(context + continuation).ids
    return ids, len(ids) - len(trained.tokenizer.encode(context.rstrip()).ids)
