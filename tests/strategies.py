"""Shared Hypothesis strategies: positions, integer codes, encodings' settings, and small models with random weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.model.expe import ExPE
from expe_edge.positions.codes import FLOAT32_EXACT, PositionCode
from expe_edge.positions.expe import HOW, WHERE, ExPEParameters

#: Both sides of every carry of a byte-wise and of a 4-bit code, and the last position that float32 holds.
BOUNDARIES = tuple(
    sorted({n for power in (4, 7, 8, 12, 15, 16, 20, 23, 24) for n in (2**power - 1, 2**power) if n < FLOAT32_EXACT})
)
#: Positions below this are exact for every setting that `expe_parameters` makes.
REACH = 2**16

#: Any position that float32 can hold, with carries more often than chance would draw them.
positions = st.integers(0, FLOAT32_EXACT - 1) | st.sampled_from((0, 1, *BOUNDARIES))
#: Positions below `REACH`.
near_positions = st.integers(0, REACH - 1) | st.sampled_from((0, 1, 255, 256, 4095, 4096, REACH - 1))
#: Seeds of random weights and states, so that a failing example names its arrays in one number.
seeds = st.integers(0, 2**16)


@st.composite
def codes(draw: st.DrawFn, widest: int = 24) -> PositionCode:
    """Codes whose limbs lie within the 24 bits of a position."""
    bits = draw(st.integers(1, widest))
    return PositionCode(bits, draw(st.integers(1, min(24, 1 + 24 // bits))))


def _scalar_or_each(values: st.SearchStrategy[float], dims: int) -> st.SearchStrategy[float | tuple[float, ...]]:
    return values | st.lists(values, min_size=dims, max_size=dims).map(tuple)


#: Steps and starts are multiples of 2^-7 and small, so that all of `REACH` is exact in float32.
_steps = st.sampled_from([sign * 2.0**-power for power in range(8) for sign in (1, -1)])
_starts = st.integers(-4 * 128, 4 * 128).map(lambda units: units / 128)


def _least_dims(where: str) -> int:
    """Dimensions that a limb needs: in the relative form one that is constant and one that counts."""
    return 2 if where == "key" else 1


@st.composite
def expe_parameters(draw: st.DrawFn, hidden_size: int, *, where: tuple[str, ...] = WHERE) -> dict[str, Any]:
    """Settings of ExPE: scalar and per-dimension start and step, up to all dimensions, every `where` and `how`."""
    place = draw(st.sampled_from(where))
    dims = draw(st.integers(_least_dims(place), hidden_size))
    return {
        "dims": dims,
        "start": draw(_scalar_or_each(_starts, dims)),
        "step": draw(_scalar_or_each(_steps, dims)),
        "where": place,
        "how": draw(st.sampled_from(HOW)),
        "slopes": "random",
    }


@st.composite
def exqpe_parameters(draw: st.DrawFn, hidden_size: int, *, where: tuple[str, ...] = WHERE) -> dict[str, Any]:
    """Settings of ExQPE: the same, with one to four limbs of up to seven bits."""
    place = draw(st.sampled_from(where))
    least = _least_dims(place)
    limbs = draw(st.integers(1, min(4, hidden_size // least)))
    dims = limbs * draw(st.integers(least, hidden_size // limbs))
    return {
        **draw(expe_parameters(dims, where=(place,))),
        "dims": dims,
        "start": draw(_scalar_or_each(_starts, dims)),
        "step": draw(_scalar_or_each(_steps, dims)),
        "limb_bits": draw(st.integers(1, 7)),
        "limbs": limbs,
    }


@st.composite
def expe_configs(draw: st.DrawFn, *, where: tuple[str, ...] = WHERE) -> ExPEConfig:
    """Small models with ExPE or ExQPE, grouped key/value heads included."""
    keys = draw(st.sampled_from((1, 2)))
    heads = keys * draw(st.sampled_from((1, 2, 3)))
    hidden = heads * draw(st.sampled_from((2, 4, 8)))
    name = draw(st.sampled_from(("expe", "exqpe")))
    parameters = draw((expe_parameters if name == "expe" else exqpe_parameters)(hidden, where=where))
    reach = REACH
    if name == "exqpe":
        reach = min(reach, PositionCode(parameters["limb_bits"], parameters["limbs"]).int8_reach)
    return small_config(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        positional=name,
        positional_parameters=parameters,
        max_position_embeddings=reach,
    )


@st.composite
def placed_configs(draw: st.DrawFn, /, length: int, **changes: Any) -> tuple[ExPEConfig, np.ndarray]:
    """A config of `expe_configs` and `length` rising positions within its reach, with gaps, near 0 or far from it."""
    config = draw(expe_configs(**changes))
    reach = config.max_position_embeddings
    drawn = draw(st.lists(st.integers(0, reach - 1), min_size=length, max_size=length, unique=True))
    run = draw(st.integers(0, reach - length)) + np.arange(length)
    return config, np.array(draw(st.sampled_from((sorted(drawn), run.tolist()))), dtype=np.int64)


def small_config(**changes: Any) -> ExPEConfig:
    """A config of two layers and grouped key/value heads whose random weights give far from uniform predictions."""
    values: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "training_length": 16,
        "initializer_range": 0.25,
        "eos_token_id": None,  # random predictions should not end a text
    }
    return ExPEConfig(**{**values, **changes})


def random_model(config: ExPEConfig, seed: int = 0) -> ExPEForCausalLM:
    """A model with random weights, its gains included: at their initial value of 1 a forgotten gain would not show."""
    torch.manual_seed(seed)
    model: ExPEForCausalLM = ExPEForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
    return model


def expe_of(model: ExPEForCausalLM) -> ExPE:
    """The encoding of a model with ExPE or ExQPE."""
    assert isinstance(model.positional, ExPE)
    return model.positional


def expe_parameters_of(config: ExPEConfig) -> ExPEParameters:
    """The settings of ExPE or ExQPE."""
    assert isinstance(config.encoding_parameters, ExPEParameters)
    return config.encoding_parameters


def random_tokens(config: ExPEConfig, length: int, *, batch: int = 1, seed: int = 0) -> np.ndarray:
    """Token ids (batch, length), int64; never the padding's."""
    return np.random.default_rng(seed).integers(1, config.vocab_size, size=(batch, length))
