"""Checkpoints in lm-evaluation-harness: importing this registers the model `expe-edge-checkpoint`, and the classes."""

from __future__ import annotations

from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

import expe_edge.training.checkpoint  # noqa: F401  # registers the model's classes with transformers


@register_model("expe-edge-checkpoint")
class CheckpointLM(HFLM):  # type: ignore[misc]  # lm_eval publishes no types
    """lm_eval's `hf`, with the same arguments, whose rolling requests are opened by end-of-text once.

    `hf` puts that token before a text which the tokenizer has opened with it already, and counts the second.
    """

    add_bos_token: bool | None  # what `tok_encode` adds; None for what the tokenizer does

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the nats of whole texts, as `PackageLM.loglikelihood_rolling` does."""
        given, self.add_bos_token = self.add_bos_token, False
        try:
            return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))
        finally:
            self.add_bos_token = given
