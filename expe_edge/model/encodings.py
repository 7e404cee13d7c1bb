"""The registry of positional encodings, and those that ExPE is judged against.

Notation as in `encoding`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from expe_edge.model.config import ExPEConfig
from expe_edge.model.encoding import PositionalEncoding, Projected
from expe_edge.model.expe import ExPE
from expe_edge.positions.codes import WHOLE
from expe_edge.positions.expe import alibi_slopes
from expe_edge.positions.parameters import RelativeParameters, RotaryParameters


class Sinusoidal(PositionalEncoding):
    """Sines and cosines of the position added to the embeddings (Vaswani et al., 2017)."""

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__(config)
        self.width = config.hidden_size

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1).float() * inverse_frequencies(self.width, 10000.0).to(hidden.device)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)[..., : self.width]
        return hidden + waves.to(hidden.dtype)


class Rotary(PositionalEncoding):
    """Rotary embedding, halves convention (Su et al., 2021)."""

    spec: RotaryParameters

    def rotate(self, states: Tensor, positions: Tensor) -> Tensor:
        angles = positions[:, None, :, None].float() * inverse_frequencies(self.heads.size, self.spec.theta).to(
            states.device
        )
        cos, sin = angles.cos(), angles.sin()  # (B, 1, T, D/2)
        first, second = states.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Relative(PositionalEncoding):
    """T5's learned bias for each head and logarithmic bucket of the distance back (Raffel et al., 2020)."""

    spec: RelativeParameters
    table_bias = True

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(self.spec.buckets, config.num_attention_heads)

    def bias(self, query_positions: Tensor, key_positions: Tensor) -> Tensor | None:
        distance = (query_positions[:, :, None] - key_positions[:, None, :]).clamp(min=0)
        table: Tensor = self.table(relative_buckets(distance, self.spec))
        return table.permute(0, 3, 1, 2).float()


class ALiBi(PositionalEncoding):
    """A linear penalty on distance, one fixed slope a head (Press et al., 2022)."""

    code = WHOLE
    linear_bias = True

    def project(self, weight: Tensor, hidden: Tensor, positions: Tensor) -> Projected:
        query, key, value, _ = super().project(weight, hidden, positions)
        slopes = query.new_tensor(alibi_slopes(self.heads.queries), dtype=torch.float32) * math.sqrt(self.heads.size)
        return Projected(query, key, value, slopes[None, :, None, None].expand(*query.shape[:3], 1))


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """Return theta^(−2i/width) for i in [0, width/2), float32."""
    return float(theta) ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)


def relative_buckets(distance: Tensor, parameters: RelativeParameters) -> Tensor:
    """Return T5's bucket for each distance back (…) int64 >= 0: half exact, half logarithmic up to max_distance."""
    exact = parameters.buckets // 2
    scale = (parameters.buckets - exact) / math.log(parameters.max_distance / exact)
    far = exact + (torch.log(distance.clamp(min=1).float() / exact) * scale).long()
    return torch.where(distance < exact, distance, far.clamp(max=parameters.buckets - 1))


#: Name to module; `positions.parameters.POSITIONAL_PARAMETERS` has their settings under the same names.
POSITIONAL_ENCODINGS: dict[str, type[PositionalEncoding]] = {
    "expe": ExPE,
    "exqpe": ExPE,
    "rotary": Rotary,
    "sinusoidal": Sinusoidal,
    "relative": Relative,
    "alibi": ALiBi,
    "none": PositionalEncoding,
}


def make_encoding(config: ExPEConfig) -> PositionalEncoding:
    """Return the encoding that `config` names; the config has checked the name."""
    return POSITIONAL_ENCODINGS[config.positional](config)
