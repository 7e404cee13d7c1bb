"""From a PyTorch model to plain arrays, positions folded out of the products (or left in, for comparison)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from expe_edge.errors import ExportError
from expe_edge.graph.weights import Float, FoldedPositions, LayerWeights, ModelWeights
from expe_edge.model.decoder import Block, ExPEForCausalLM
from expe_edge.model.encodings import Relative, relative_buckets
from expe_edge.model.expe import ExPE


def extract_weights(model: ExPEForCausalLM, *, folded: bool) -> ModelWeights:
    """Return the model's weights as float32 arrays.

    Raises:
        ExportError: a NaN or infinite weight.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ExportError(f"weight {name!r} holds NaN or infinite values; train again, or export an earlier step")
    return ModelWeights(
        config=model.config,
        folded=folded,
        embedding=_array(model.embedding.weight),
        layers=tuple(_layer_weights(block, model.positional if folded else None) for block in model.blocks),
        norm=_array(model.norm.weight),
        head=_array(model.head.weight.T),
        relative_table=_relative_table(model.positional) if isinstance(model.positional, Relative) else None,
    )


def _relative_table(positional: Relative) -> Float:
    """Unroll the buckets into one row for each distance up to the farthest."""
    distances = torch.arange(positional.spec.max_distance + 1)
    table: Tensor = positional.table.weight
    return _array(table[relative_buckets(distances, positional.spec)])


def _layer_weights(block: Block, positional: torch.nn.Module | None) -> LayerWeights:
    weight, positions = block.attention.qkv.weight.detach().double(), None
    if isinstance(positional, ExPE) and positional.spec.foldable:
        positions = fold_positions(positional, weight)
        weight = positional.fold(weight).content
    return LayerWeights(
        attention_norm=_array(block.attention_norm.weight),
        qkv=_array(weight.T),
        positions=positions,
        gate=None if block.attention.gate is None else _array(block.attention.gate.weight.T),
        out=_array(block.attention.out.weight.T),
        feed_forward_norm=_array(block.feed_forward_norm.weight),
        up=_array(block.feed_forward.up.weight.T),
        down=_array(block.feed_forward.down.weight.T),
    )


def fold_positions(positional: ExPE, weight: Tensor) -> FoldedPositions:
    """Fold the positions out of one fused weight (C_out, C), float64."""
    heads = positional.heads
    content, alpha, beta = positional.fold(weight)
    storage = _over_stored_limbs(positional, beta)  # (G, C_out)
    queries, values = slice(0, heads.query_rows), slice(heads.query_rows + heads.key_rows, None)

    sharpness = torch.tensor(positional.spec.sharpness(heads.queries) or (1.0,) * heads.queries, dtype=weight.dtype)
    scale = sharpness * torch.tensor(positional.content).logical_not() / heads.size**0.5  # (H,)

    def slope(rows: Tensor) -> Tensor:
        """Queries (n, H·D) to slopes (n, H·Gk), over √D, or to what enters their softplus."""
        query = rows.view(-1, heads.queries, heads.size).transpose(0, 1)  # (H, n, D)
        slopes: Tensor = positional.slopes(query, beta) * scale[:, None, None]  # (H, n, Gk)
        return slopes.transpose(0, 1).flatten(1)

    in_values, relative = positional.spec.where == "query_key_value", positional.spec.relative
    return FoldedPositions(
        query_start=_array(alpha[queries]),
        query_limbs=None if relative else _array(storage[:, queries]),
        value_start=_array(alpha[values]) if in_values else None,
        value_limbs=_array(storage[:, values]) if in_values else None,
        slope_weight=_array(slope(content[queries].T.contiguous())),
        slope_start=_array(slope(alpha[None, queries])[0]),
        slope_limbs=None if relative else _array(slope(storage[:, queries])),
    )


def _over_stored_limbs(positional: ExPE, beta: Tensor) -> Tensor:
    """Spread beta (C_out, G of the encoding) over the limbs the graph stores (G, C_out)."""
    if positional.code.limbs > 1:
        return beta.T
    weights = torch.tensor(positional.code.stored.weights, dtype=beta.dtype)
    return weights[:, None] * beta.T


def _array(tensor: Tensor) -> Float:
    """Copy a tensor: a view would keep the whole file of the checkpoint mapped."""
    return np.array(tensor.detach().cpu().float().numpy(), order="C")
