"""Weights as fine-tuning rounds them, as an export stores them, and as a model computes with them."""

from __future__ import annotations

import copy
import dataclasses

import torch

from expe_edge.export.fold import extract_weights
from expe_edge.graph.build import HEAD
from expe_edge.graph.linears import FormatOptions, make_format
from expe_edge.graph.matrices import EMBEDDING_FORMATS
from expe_edge.graph.weights import ModelWeights
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.model.expe import ExPE
from expe_edge.quant.recipe import WeightRounding
from expe_edge.quant.solvers import WeightQuantizer
from expe_edge.training.rounding import round_weights

#: A rounding of each kind; the small models' rows end inside a block.
ROUNDINGS = (
    *(WeightRounding("int4-weight", size) for size in (16, 64)),
    WeightRounding("int8-weight", 128),
    WeightRounding("int8-dynamic"),
    WeightRounding("int8-static"),
)


def rounded(model: ExPEForCausalLM, rounding: WeightRounding) -> ExPEForCausalLM:
    """A copy of the model that computes with its weights rounded."""
    model = copy.deepcopy(model)
    round_weights(model, rounding)
    return model


def stored(weights: ModelWeights, rounding: WeightRounding) -> ModelWeights:
    """The weights that `export --solver rtn` stores, restored."""
    kind = make_format(rounding.precision, FormatOptions(quantizer=WeightQuantizer("rtn", rounding.block_size)))
    layers = [
        dataclasses.replace(
            layer,
            qkv=kind.store(f"{index}.qkv", layer.qkv).restored(),
            out=kind.store(f"{index}.out", layer.out).restored(),
            up=kind.store(f"{index}.up", layer.up).restored(),
            down=kind.store(f"{index}.down", layer.down).restored(),
        )
        for index, layer in enumerate(weights.layers)
    ]
    tied = weights.config.tie_word_embeddings
    head = kind.store(HEAD, weights.head).restored()
    embedding = head if tied else EMBEDDING_FORMATS[kind.embedding](weights.embedding, None).restored()
    return dataclasses.replace(weights, layers=tuple(layers), head=head, embedding=embedding.T)


def seen(model: ExPEForCausalLM) -> ModelWeights:
    """The weights that a model computes with, rounded or not; what it adds for positions beside them."""
    weights, positional = extract_weights(model, folded=True), model.positional
    layers = []
    for block, layer in zip(model.blocks, weights.layers, strict=True):
        content = block.attention.qkv.weight
        if isinstance(positional, ExPE):
            content = positional.fold(content).content
        products = (block.attention.out, block.feed_forward.up, block.feed_forward.down)
        out, up, down = (product(torch.eye(product.in_features)).numpy() for product in products)
        layers.append(dataclasses.replace(layer, qkv=positional.stored(content).T.numpy(), out=out, up=up, down=down))
    head = model.head(torch.eye(model.head.in_features)).numpy()
    embedding = model.embedding(torch.arange(model.config.vocab_size)).numpy()
    return dataclasses.replace(weights, layers=tuple(layers), head=head, embedding=embedding)
