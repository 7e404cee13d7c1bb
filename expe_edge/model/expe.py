"""ExPE and ExQPE, folded, with position-free keys.

Notation: B batch · T query tokens · S keys · C hidden size · H heads · Hkv key/value heads · D head size ·
l overridden dimensions · G limbs of a position's integer code.

ExPE overrides the first l dimensions of what enters the query and key products by p_n = start + step·n. It is never
computed that way here. Two exact rewrites take its place (docs/design.md derives them):

    folding             W·[p_n ; u_l:] = W[:, l:]·u_l: + α + n·β      α = W[:, :l]·start, β = W[:, :l]·step
    position-free keys  softmax_j(q_i·k_j) = softmax_j(q_i·κ_j + (j − i)·(q_i·β_k))

so ExPE attention is content attention plus a linear bias whose slope depends on the query, ALiBi being the case of
a constant slope; and positions never pass through a half-precision product. ExQPE is the same with one α-β pair of
slopes for each limb of its code in place of the one for n. In the relative form, `where: key`, queries get `start` in
place of p_n, so that their β is 0 and nothing but the distance j − i is left of any position.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from expe_edge.model.config import ExPEConfig
from expe_edge.model.encoding import PositionalEncoding, Projected
from expe_edge.positions.codes import PositionCode
from expe_edge.positions.expe import ExPEParameters

#: How much longer a query's constant part begins than its content along it: slopes vary by a sixth from query to query.
SLOPE_MARGIN = 6.0


class FoldedProjection(NamedTuple):
    """A fused query/key/value weight with its positions taken out, exactly.

    content: (C_out, C), acts on the content alone.
    alpha: (C_out,), what `start` adds. beta: (C_out, G), what one unit of each limb adds.
    """

    content: Tensor
    alpha: Tensor
    beta: Tensor


class ExPE(PositionalEncoding):
    """ExPE and, with a code of several limbs, ExQPE; folded, with position-free keys."""

    spec: ExPEParameters
    code: PositionCode

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__(config)
        self.training_length = config.training_length
        self.code = self.spec.code
        self.linear_bias = self.spec.foldable

    @property
    def positioned_rows(self) -> int:
        """Rows of the fused weight whose input carries positions: queries and keys, or all."""
        return self.heads.rows if self.spec.where == "query_key_value" else self.heads.query_rows + self.heads.key_rows

    def start_and_steps(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return start (l,) and limb steps (G, l), exact: made anew, since a cast of the model would round a buffer."""
        return like.new_tensor(self.spec.starts), like.new_tensor(self.spec.limb_steps)

    def vectors(self, positions: Tensor) -> Tensor:
        """Return the exact position vectors p_n, (…, l) float32, for `positions` (…)."""
        codes = self.limbs(positions).float()
        start, steps = self.start_and_steps(codes)
        return start + codes @ steps

    def embed(self, hidden: Tensor, positions: Tensor) -> Tensor:
        if self.spec.foldable:
            return hidden
        dims = self.spec.dims
        vectors = self.vectors(positions).to(hidden.dtype)
        if self.spec.how == "add":
            vectors = hidden[..., :dims] + vectors
        return torch.cat([vectors, hidden[..., dims:]], dim=-1)

    def fold(self, weight: Tensor) -> FoldedProjection:
        """Take the positions out of the fused weight (C_out, C). Exact; α and β in float32 or wider.

        Of the relative form the queries' β is 0, as their input has the start alone.
        """
        rows, dims = self.positioned_rows, self.spec.dims
        position = weight[:, :dims].to(torch.promote_types(weight.dtype, torch.float32))
        position = F.pad(position[:rows], (0, 0, 0, len(weight) - rows))  # zero where no position enters
        content = weight
        if self.spec.how == "override":
            kept = torch.ones_like(weight)
            kept[:rows, :dims] = 0
            content = weight * kept
        start, steps = self.start_and_steps(position)
        beta = position @ steps.T
        if self.spec.relative:
            beta = F.pad(beta[self.heads.query_rows :], (0, 0, self.heads.query_rows, 0))
        return FoldedProjection(content, position @ start, beta)

    def project(self, weight: Tensor, hidden: Tensor, positions: Tensor) -> Projected:
        if not self.spec.foldable:
            return super().project(weight, hidden, positions)
        with torch.autocast(hidden.device.type, enabled=False):  # α and β must not be rounded to half precision
            content, alpha, beta = self.fold(weight)
        query, key, value = self.heads.split(F.linear(hidden, self.stored(content)))
        with torch.autocast(hidden.device.type, enabled=False):
            query_term, _, value_term = self.heads.split(self._terms(alpha, beta, positions))
            query = query.to(beta.dtype) + query_term
            if self.spec.where == "query_key_value":
                value = value.to(beta.dtype) + value_term
            exact = query
            if self.quantizer is not None:  # an export takes slopes, which distances multiply, from float weights
                exact = self._float_queries(content.to(beta.dtype), hidden.to(beta.dtype)) + query_term
            return Projected(query, key, value, self.shaped(self.slopes(exact, beta)))

    def _terms(self, alpha: Tensor, beta: Tensor, positions: Tensor) -> Tensor:
        """Return what positions add to every row of the product, (B or 1, T or 1, C_out)."""
        if self.spec.relative:  # nothing that grows: the queries have the start alone, and keys hold no position
            return alpha[None, None]
        return alpha + self.limbs(positions).to(beta.dtype) @ beta.T

    def _float_queries(self, content: Tensor, hidden: Tensor) -> Tensor:
        """Return the queries (B, H, T, D) without their positions, by unrounded weights."""
        rows = F.linear(hidden, content[: self.heads.query_rows])
        return torch.unflatten(rows, -1, (-1, self.heads.size)).transpose(1, 2)

    @torch.no_grad()
    def begin(self, weight: Tensor) -> None:
        """Let the slopes begin as the settings say, in the first dimension of each head; all of it trains on.

        There W_q·start = a and W_k·step = b, and so the slope is (a + q)·b/√D for a query's content q in it: the spread
        over queries is 1/a of that content's, and what a adds to the scores of contents grows with a. So a is
        `SLOPE_MARGIN` times the content, whatever the slope, and b makes the slope. Heads that share keys share the
        steepest's b, and both a and q of the others are smaller, as their slopes are.

        Any direction would give the same slopes, but Adam scales each weight's gradient by itself: the slopes' own,
        large since distances multiply it, is kept to one row of a head, and the others learn content undisturbed.
        """
        slopes, readings = self.spec.head_slopes(self.heads.queries), self.spec.readings()
        if slopes is None:
            return
        heads, dims = self.heads, self.spec.dims
        rows = weight[: heads.query_rows].view(heads.keys, -1, heads.size, weight.shape[1])  # (Hkv, H/Hkv, D, C)
        queries = rows[..., :dims]
        keys = weight[heads.query_rows : heads.query_rows + heads.key_rows, :dims].view(heads.keys, heads.size, dims)
        content = weight[: heads.query_rows].norm(dim=1).mean()  # what a normed vector gives in any dimension
        queries.zero_()
        keys.zero_()
        if readings is None or not any(slopes):
            return
        asked = weight.new_tensor(slopes).view(heads.keys, -1)
        steepest = asked.abs().amax(dim=1, keepdim=True)
        share = asked / steepest.where(steepest > 0, 1.0)  # (Hkv, H/Hkv)
        sloped = torch.tensor(self.content).logical_not().to(weight.device).view_as(asked) & (steepest > 0)
        own = SLOPE_MARGIN * content * share  # a
        shared = math.sqrt(heads.size) * steepest / (SLOPE_MARGIN * content)  # b, (Hkv, 1)
        constant, unit = weight.new_tensor(readings[0]), self.unit_reading(weight.new_tensor(readings[1:]))
        rows[:, :, 0] *= share.abs().where(sloped, 1.0)[..., None]
        queries[:, :, 0] = own[..., None] * constant
        keys[:, 0] = shared * unit

    def unit_reading(self, limbs: Tensor) -> Tensor:
        """Return what reads the position itself of p_n, (l,), from what reads each limb, (G, l)."""
        return limbs.new_tensor(self.code.weights) @ limbs

    def slopes(self, query: Tensor, beta: Tensor) -> Tensor:
        """Return q_i·β_k for every limb: (B, H, T, G) from queries (B, H, T, D) and beta (C_out, G)."""
        start = self.heads.query_rows
        key_beta = torch.unflatten(beta[start : start + self.heads.key_rows], 0, (self.heads.keys, self.heads.size))
        shared = key_beta.repeat_interleave(self.heads.queries // self.heads.keys, dim=0)
        return query @ shared

    def shaped(self, slopes: Tensor) -> Tensor:
        """Return slopes (B, H, T, G) as scores take them: kept above 0 by the softplus, if any; 0 in content heads."""
        if not self.spec.shaped:
            return slopes
        sharpness = self.spec.sharpness(self.heads.queries)
        if sharpness is not None:
            steep = slopes.new_tensor(sharpness)[:, None, None] / math.sqrt(self.heads.size)
            slopes = F.softplus(slopes * steep) / steep
        return slopes * slopes.new_tensor([float(not content) for content in self.content])[:, None, None]

    @property
    def content(self) -> tuple[bool, ...]:
        """Which heads see content alone."""
        return self.spec.content(self.heads.queries)

    def temper(self, query: Tensor, seen: Tensor) -> Tensor:
        """Multiply the queries of content heads by 1 + c·ln(n/N), where they see n keys."""
        if not self.spec.temperature:
            return query
        strength = query.new_tensor([self.spec.temperature * content for content in self.content])
        growth = torch.log(seen.to(query.dtype) / self.training_length)
        return query * (1 + strength[:, None, None] * growth[:, None, :, None])
