"""The exact rewrites of docs/design.md as identities in float64, and precision by position in float32 and bfloat16.

In float64 a rewrite agrees with the plain override up to the rounding of sums in another order; everything is
compared in units of the largest term, so that far positions are held to the same standard as near ones.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from hypothesis import given, settings
from hypothesis import strategies as st

from expe_edge.export.fold import fold_positions
from expe_edge.model.attention import AttentionContext
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.model.encoding import Projected
from expe_edge.model.expe import ExPE
from tests import reference, strategies
from tests.strategies import (
    expe_of,
    expe_parameters_of,
    placed_configs,
    random_model,
    random_tokens,
    small_config,
)

LENGTH = 5
#: Where positions enter the projections, and so where the rewrites act.
PROJECTED = ("key", "query_key", "query_key_value")
#: float64 keeps 2^-53 of the largest term; sums of some tens of terms and their cancellation cost three digits.
DOUBLE = 1e-12
#: The same for float32 (2^-24), in which folded weights are stored.
SINGLE = 1e-5

#: A config, and the positions of `LENGTH` tokens within its reach.
Case = tuple[ExPEConfig, np.ndarray]

cases = placed_configs(LENGTH, where=PROJECTED)


def close(found: np.ndarray, expected: np.ndarray, tolerance: float, scale: np.ndarray | float = 0.0) -> None:
    """Assert agreement to `tolerance` of the largest magnitude in `expected`, or in `scale` where terms cancel."""
    assert found.shape == expected.shape
    largest = max(1.0, float(np.abs(expected).max()), float(np.abs(scale).max()))
    assert float(np.abs(found - expected).max()) <= tolerance * largest


class Layer:
    """One projection at work: the module's way, and the plain way, per head."""

    def __init__(self, config: ExPEConfig, positions: np.ndarray, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.config, self.positions = config, positions
        self.positional = ExPE(config)
        heads = self.positional.heads
        self.weight = random.normal(size=(heads.rows, config.hidden_size)) / 4
        self.hidden = random.normal(size=(len(positions), config.hidden_size))
        self.size, self.groups = heads.size, heads.queries // heads.keys
        self.spec = expe_parameters_of(config)

    def rewritten(self) -> Projected:
        hidden, positions = torch.from_numpy(self.hidden)[None], torch.from_numpy(self.positions)[None]
        return self.positional.project(torch.from_numpy(self.weight), hidden, positions)

    def plain(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Queries, keys with their positions and values, (H, T, D) and (Hkv, T, D)."""
        heads = self.positional.heads
        split = [heads.query_rows, heads.query_rows + heads.key_rows]
        query_weight, key_weight, value_weight = np.split(self.weight, split)
        inputs = reference.attention_inputs(self.config, self.hidden, self.positions)
        query, key, value = (
            self._by_head(states @ weight.T)
            for states, weight in zip(inputs, (query_weight, key_weight, value_weight), strict=True)
        )
        return query, key, value

    def _by_head(self, states: np.ndarray) -> np.ndarray:
        """(T, heads·D) to (heads, T, D)."""
        return states.reshape(len(states), -1, self.size).transpose(1, 0, 2)

    def slopes(self) -> np.ndarray:
        """The slopes of every query, (H, T, G)."""
        slopes = self.rewritten().slopes
        assert slopes is not None
        return slopes[0].numpy()

    def codes(self) -> np.ndarray:
        """The positions' integer codes, (T, G)."""
        code = self.positional.code
        return np.array([reference.digits(int(n), code.bits, code.limbs) for n in self.positions], dtype=np.float64)

    def key_terms(self) -> np.ndarray:
        """What positions add to every key, α_k + Σ_g c_g(j)·β_g, (Hkv, T, D), from the module's own α and β."""
        heads = self.positional.heads
        rows = slice(heads.query_rows, heads.query_rows + heads.key_rows)
        _, alpha, beta = self.positional.fold(torch.from_numpy(self.weight))
        return self._by_head(alpha[rows].numpy() + self.codes() @ beta[rows].numpy().T)

    def stored_codes(self) -> np.ndarray:
        """The positions' codes as an export stores them, (T, G)."""
        return np.stack(self.positional.code.stored.split(self.positions), axis=-1).astype(np.float64)


@given(cases, strategies.seeds)
def test_folding_gives_the_queries_keys_and_values_of_the_plain_override(case: Case, seed: int) -> None:
    layer = Layer(*case, seed)
    projected = layer.rewritten()
    query, key, value = layer.plain()
    close(projected.query[0].numpy(), query, DOUBLE)
    close(projected.key[0].numpy() + layer.key_terms(), key, DOUBLE)
    close(projected.value[0].numpy(), value, DOUBLE)


@given(cases, strategies.seeds, st.integers(1, 1000))
def test_keys_hold_no_position(case: Case, seed: int, offset: int) -> None:
    config, positions = case
    moved = (positions + offset) % config.max_position_embeddings
    here, there = Layer(config, positions, seed).rewritten(), Layer(config, moved, seed).rewritten()
    assert torch.equal(here.key, there.key)
    if config.positional_parameters["where"] == "key":  # then nothing does
        assert torch.equal(here.query, there.query)
        assert here.slopes is not None
        assert there.slopes is not None
        assert torch.equal(here.slopes, there.slopes)
    else:
        assert not torch.equal(here.query, there.query) or np.array_equal(positions, moved)


@given(cases, strategies.seeds)
def test_slopes_are_the_product_of_queries_with_the_keys_beta(case: Case, seed: int) -> None:
    layer = Layer(*case, seed)
    query, _, _ = layer.plain()
    # β_g is what the key of a zero input gains from one unit of limb g alone, by the definition of p_n.
    heads = layer.positional.heads
    key_weight = layer.weight[heads.query_rows : heads.query_rows + heads.key_rows, : layer.spec.dims]
    beta = (key_weight @ np.array(layer.spec.limb_steps).T).reshape(heads.keys, heads.size, -1)
    expected = np.stack([query[head] @ beta[head // layer.groups] for head in range(heads.queries)])
    close(layer.slopes(), expected, DOUBLE)


@given(cases, strategies.seeds)
def test_position_free_scores_with_a_linear_bias_have_the_softmax_of_plain_scores(case: Case, seed: int) -> None:
    layer = Layer(*case, seed)
    projected, every_slope, codes = layer.rewritten(), layer.slopes(), layer.codes()
    query, key, _ = layer.plain()
    for head in range(len(query)):
        group = head // layer.groups
        plain = query[head] @ key[group].T
        slopes = every_slope[head]
        relative = codes[None, :, :] - codes[:, None, :]  # c(j) − c(i), (T, T, G)
        content = projected.query[0, head].numpy() @ projected.key[0, group].numpy().T
        rewritten = content + (slopes[:, None, :] * relative).sum(axis=-1)
        # They differ by what is constant in j, which is what softmax does not see.
        found, expected = (scores - scores.mean(axis=-1, keepdims=True) for scores in (rewritten, plain))
        close(found, expected, DOUBLE, scale=plain)
        if np.abs(plain).max() < 1e3:  # beyond, float64 itself has lost the softmax of the plain scores
            close(reference.softmax(rewritten), reference.softmax(plain), 1e3 * DOUBLE)


@given(cases, strategies.seeds)
def test_blocked_attention_with_position_codes_mixes_values_as_plain_attention_does(case: Case, seed: int) -> None:
    layer = Layer(*case, seed)
    query, key, value = layer.plain()
    largest = max(np.abs(query[head] @ key[head // layer.groups].T).max() for head in range(len(query)))
    projected, positions = layer.rewritten(), torch.from_numpy(layer.positions)[None]
    context = AttentionContext(layer.positional, positions, None, None)
    found = context.attend(*projected)[0].numpy()
    future = np.triu(np.full((LENGTH, LENGTH), -np.inf), k=1)
    for head in range(len(query)):
        group = head // layer.groups
        scores = query[head] @ key[group].T / np.sqrt(layer.size)
        expected = reference.softmax(scores + future) @ value[group]
        # A softmax turns the absolute error of its scores into a relative one of its weights.
        close(found[head], expected, DOUBLE * max(1.0, float(largest)))


@given(cases, strategies.seeds)
def test_stored_limbs_rebuild_what_positions_add_to_queries_and_values(case: Case, seed: int) -> None:
    layer = Layer(*case, seed)
    folded = fold_positions(layer.positional, torch.from_numpy(layer.weight))
    codes = layer.stored_codes()
    layer.hidden = np.zeros_like(layer.hidden)  # leaves what positions add, under `override` and `add` alike
    query, _, value = (states.transpose(1, 0, 2).reshape(LENGTH, -1) for states in layer.plain())
    grown = 0.0 if folded.query_limbs is None else codes @ folded.query_limbs
    assert (folded.query_limbs is None) == layer.spec.relative
    close(folded.query_start + np.broadcast_to(grown, query.shape), query, SINGLE)
    if layer.config.positional_parameters["where"] == "query_key_value":
        assert folded.value_start is not None
        assert folded.value_limbs is not None
        close(folded.value_start + codes @ folded.value_limbs, value, SINGLE)
    else:
        assert folded.value_start is None
        assert folded.value_limbs is None


@given(cases, strategies.seeds)
def test_folded_slopes_are_queries_times_beta_over_the_root_of_the_head_size(case: Case, seed: int) -> None:
    layer = Layer(*case, seed)
    folded = fold_positions(layer.positional, torch.from_numpy(layer.weight))
    codes = layer.stored_codes()
    found = layer.hidden @ folded.slope_weight + folded.slope_start
    assert (folded.slope_limbs is None) == layer.spec.relative
    if folded.slope_limbs is not None:
        found = found + codes @ folded.slope_limbs
    slopes = layer.slopes() / np.sqrt(layer.size)  # (H, T, G)
    close(found, slopes.transpose(1, 0, 2).reshape(LENGTH, -1), SINGLE)


def test_limbs_of_a_whole_number_are_exact_multiples_of_its_beta() -> None:
    config = small_config(positional_parameters={"where": "query_key"})
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    folded = fold_positions(ExPE(config), weight)
    assert folded.query_limbs is not None
    assert folded.query_limbs.shape == (3, 32)
    np.testing.assert_array_equal(folded.query_limbs, folded.query_limbs[0] * np.array([[1], [256], [65536]]))


@settings(max_examples=60)  # whole models
@given(placed_configs(24), strategies.seeds)
def test_the_whole_model_in_float64_is_the_plain_reference_at_any_positions(case: Case, seed: int) -> None:
    config, positions = case
    model = random_model(config, seed)
    weights, tokens = reference.model_weights(model), random_tokens(config, len(positions), seed=seed)[0]
    expected = reference.reference_logits(config, weights, tokens, positions)
    single = {"input_ids": torch.from_numpy(tokens)[None], "position_ids": torch.from_numpy(positions)[None]}
    found = model.double()(**single).logits[0].numpy()
    # Scores reach (step·n)² before softmax; far out both ways are float64 noise over a hard maximum.
    furthest = max(1.0, float(np.abs(reference.position_vectors(config, positions)).max()))
    close(found, expected, DOUBLE * furthest**2)


# Precision by position. The float64 model, judged by the test above, is what the others are compared with.

N = 16
#: Far position at which the paper's formula, taken literally in half precision, no longer tells neighbours apart.
FAR = 8000
#: Largest difference of float32 logits from float64 ones, logits being of order 1: ten times what is seen at any
#: offset, and a sixth of what the plain override shows at `FAR`.
FLOAT32_LIMIT = 1e-4
#: How much larger the error of bfloat16 may be far out. Content is rounded to 8 bits before queries, which grow with n,
#: multiply it; that costs 2.5 times (4 where weights are rounded too), where the plain override is 50 times as far off.
BFLOAT16_GROWTH = 8.0
PLAIN_GROWTH = 20.0


class PlainExPE(ExPE):
    """The paper's formula taken literally: p_n inside the products, positions in the keys."""

    def __init__(self, config: ExPEConfig) -> None:
        super().__init__(config)
        self.linear_bias = False

    def project(self, weight: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> Projected:
        rows, dims = self.positioned_rows, self.spec.dims
        positioned = torch.cat([self.vectors(positions).to(hidden.dtype), hidden[..., dims:]], dim=-1)
        fused = torch.cat([functional.linear(positioned, weight[:rows]), functional.linear(hidden, weight[rows:])], -1)
        return Projected(*self.heads.split(fused), None)


def positioned_config(name: str, where: str) -> ExPEConfig:
    parameters = {"positional_parameters": {"step": 2.0**-7, "where": where}}
    return small_config(positional=name, training_length=N, initializer_range=0.15, **parameters)


every_form = pytest.mark.parametrize("where", ["key", "query_key"])


def logits_at(model: torch.nn.Module, tokens: np.ndarray, offset: int) -> np.ndarray:
    ids, positions = torch.from_numpy(tokens), torch.arange(offset, offset + tokens.shape[1])[None]
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    return logits[0].double().numpy()


@every_form
@pytest.mark.parametrize("name", ["expe", "exqpe"])
@pytest.mark.parametrize("offset", [0, FAR, 30000])
def test_float32_logits_stay_close_to_float64_over_16_training_lengths_from_any_offset(
    name: str, offset: int, where: str
) -> None:
    config = positioned_config(name, where)
    tokens = random_tokens(config, 16 * N)
    exact = logits_at(random_model(config).double(), tokens, offset)
    assert exact.std() > 0.5  # far from a model that predicts nothing
    assert np.abs(logits_at(random_model(config), tokens, offset) - exact).max() < FLOAT32_LIMIT


half_precision = pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16 weights"])


def half_precision_error(model: ExPEForCausalLM, offset: int, *, autocast: bool = True) -> float:
    """Root mean square difference of bfloat16 logits from those of the same weights in float64."""
    tokens = random_tokens(model.config, 40 * N)
    exact = logits_at(copy.deepcopy(model).double(), tokens, offset)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        rounded = logits_at(model, tokens, offset)
    return float(np.sqrt(((rounded - exact) ** 2).mean()))


@every_form
@half_precision
@pytest.mark.parametrize("name", ["expe", "exqpe"])
def test_bfloat16_is_about_as_close_far_out_as_at_the_start(name: str, autocast: bool, where: str) -> None:
    model = random_model(positioned_config(name, where))
    model = model if autocast else model.bfloat16()
    near, far = (half_precision_error(model, offset, autocast=autocast) for offset in (0, FAR))
    assert 0 < far < BFLOAT16_GROWTH * near


def test_the_plain_override_collapses_in_bfloat16_where_the_rewrite_does_not() -> None:
    """That the case above is one in which something can be lost."""
    model = random_model(positioned_config("expe", "query_key"))
    model.positional = PlainExPE(model.config)
    near, far = (half_precision_error(model, offset) for offset in (0, FAR))
    assert far > PLAIN_GROWTH * near


def positions_alone(name: str, *, autocast: bool, step: float) -> ExPEForCausalLM:
    """A model whose queries and keys are made of positions alone, so that nothing of them may be rounded to 8 bits."""
    model = random_model(small_config(positional=name, positional_parameters={"step": step, "where": "query_key"}))
    positional = expe_of(model)
    for block in model.blocks:
        block.attention.qkv.weight[: positional.positioned_rows, positional.spec.dims :] = 0
    return model if autocast else model.bfloat16()


@half_precision
@pytest.mark.parametrize("name", ["expe", "exqpe"])
def test_what_positions_add_under_bfloat16_is_as_exact_as_in_float32(name: str, autocast: bool) -> None:
    model = positions_alone(name, autocast=autocast, step=2.0**-7)
    positional, weight = model.positional, model.blocks[0].attention.qkv.weight
    hidden, positions = torch.ones(1, 3, model.config.hidden_size), torch.arange(FAR, FAR + 3)[None]
    exact = positional.project(weight.double(), hidden.double(), positions)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = positional.project(weight, hidden.to(weight.dtype), positions)
    for part in ("query", "slopes"):
        wanted = getattr(exact, part)
        assert (getattr(found, part).double() - wanted).abs().max() < SINGLE * wanted.abs().max()
    assert (exact.query[..., 1, :] - exact.query[..., 0, :]).abs().max() > 0  # neighbours do differ


@half_precision
def test_attention_by_position_alone_loses_only_the_rounding_of_values_under_bfloat16(autocast: bool) -> None:
    """Beyond 256 tokens, so that distances themselves would be rounded in a half-precision product."""
    model = positions_alone("expe", autocast=autocast, step=2.0**-5)
    attention, positions = model.blocks[0].attention, torch.arange(40 * N)[None]
    hidden = torch.randn(1, 40 * N, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = hidden.to(attention.qkv.weight.dtype)

    def mixed(module: torch.nn.Module, states: torch.Tensor) -> torch.Tensor:
        written: torch.Tensor = module(states, AttentionContext(model.positional, positions, None, None))
        return written.double()

    exact = mixed(copy.deepcopy(attention).double(), hidden.double())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = mixed(attention, hidden)
    assert (found - exact).abs().max() < 0.02 * exact.abs().max()
