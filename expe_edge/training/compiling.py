"""Compiled training: every block by itself, since all of them are one function with other weights, and the loss."""

from __future__ import annotations

import torch

from expe_edge.model.decoder import ExPEForCausalLM


def compile_model(model: ExPEForCausalLM, backend: str = "inductor") -> None:
    """Let `model` run compiled blocks and a compiled loss from now on; parameters and their names stay.

    One block is compiled and serves for all (regional compilation, as torch calls it), which takes a part of the time
    that the whole model would. On a GPU the many small kernels of norms, gates and bias become a few.
    """
    for block in model.blocks:
        block.compile(backend=backend, dynamic=False)
    model.loss_function = torch.compile(model.loss_function, backend=backend, dynamic=False)
