"""The model in float64 NumPy, written the plain way: one sequence, one head at a time, no rewrite of any kind.

ExPE really overrides the first dimensions by p_n, keys carry their positions, nothing is folded, cached or blocked.
Nothing here is shared with the package but the names of weights and settings.

Notation: T tokens · C hidden size · H heads · Hkv key/value heads · D head size · V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM

Double = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Weights = Mapping[str, Double]


def model_weights(model: ExPEForCausalLM) -> dict[str, Double]:
    """The state dict as float64."""
    return {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}


def reference_logits(
    config: ExPEConfig,
    weights: Weights,
    tokens: Ids,
    positions: Ids | None = None,
    windows: Sequence[int] | None = None,
) -> Double:
    """Logits (T, V) of one sequence (T,), at `positions` (T,), by default 0, 1, 2, …

    windows: how many tokens each key/value head's queries see, their own included; 0 for all.
    """
    positions = np.arange(len(tokens)) if positions is None else positions
    hidden = embed(config, weights["embedding.weight"][tokens], positions)
    for layer in range(config.num_hidden_layers):
        block = {name.split(".", 2)[2]: w for name, w in weights.items() if name.startswith(f"blocks.{layer}.")}
        normed = rms_norm(hidden, block["attention_norm.weight"], config.rms_norm_eps)
        mixed = attention(config, weights, block["attention.qkv.weight"], normed, positions, windows)
        if config.output_gate:
            opened = 1 / (1 + np.exp(-normed @ block["attention.gate.weight"].T))
            mixed = mixed * opened.repeat(config.head_dim, axis=1)
        hidden = hidden + mixed @ block["attention.out.weight"].T
        normed = rms_norm(hidden, block["feed_forward_norm.weight"], config.rms_norm_eps)
        hidden = hidden + feed_forward(config, block, normed)
    logits: Double = rms_norm(hidden, weights["norm.weight"], config.rms_norm_eps) @ weights["head.weight"].T
    return logits


def rms_norm(hidden: Double, gain: Double, epsilon: float) -> Double:
    normed: Double = hidden / np.sqrt((hidden**2).mean(axis=-1, keepdims=True) + epsilon) * gain
    return normed


def feed_forward(config: ExPEConfig, block: Weights, hidden: Double) -> Double:
    wide = hidden @ block["feed_forward.up.weight"].T
    if config.hidden_act == "gelu":
        active = wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2))) / 2
    else:
        gate, up = np.split(wide, 2, axis=-1)
        active = gate / (1 + np.exp(-gate)) * up
    written: Double = active @ block["feed_forward.down.weight"].T
    return written


def softmax(scores: Double) -> Double:
    powers: Double = np.exp(scores - scores.max(axis=-1, keepdims=True))
    total: Double = powers.sum(axis=-1, keepdims=True)
    return powers / total


def attention(
    config: ExPEConfig,
    weights: Weights,
    fused: Double,
    hidden: Double,
    positions: Ids,
    windows: Sequence[int] | None = None,
) -> Double:
    """Causal attention of (T, C) with the fused weight (H·D + 2·Hkv·D, C): (T, H·D)."""
    heads, shared, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    value_weight = fused[(heads + shared) * size :]
    values = attention_inputs(config, hidden, positions)[2] @ value_weight.T
    mixed = [
        attended @ values[:, _head(head * shared // heads, size)]
        for head, attended in enumerate(attention_weights(config, weights, fused, hidden, positions, windows))
    ]
    return np.concatenate(mixed, axis=-1)


def attention_weights(
    config: ExPEConfig,
    weights: Weights,
    fused: Double,
    hidden: Double,
    positions: Ids,
    windows: Sequence[int] | None = None,
) -> Double:
    """What every query gives to every key, (H, T, T); arguments as of `attention`."""
    heads, shared, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    query_weight, key_weight, _ = np.split(fused, [heads * size, (heads + shared) * size])
    query_input, key_input, _ = attention_inputs(config, hidden, positions)
    queries, keys = query_input @ query_weight.T, key_input @ key_weight.T
    hidden_future = np.triu(np.full((len(hidden), len(hidden)), -np.inf), k=1)
    attended = []
    for head in range(heads):
        query, key = queries[:, _head(head, size)], keys[:, _head(head * shared // heads, size)]
        if config.positional == "rotary":
            query, key = rotate(config, query, positions), rotate(config, key, positions)
        if has_shaped_slopes(config):
            own, group = query_weight[_head(head, size)], key_weight[_head(head * shared // heads, size)]
            scores = shaped_scores(config, head, query_input, hidden, own, group, positions)
        else:
            scores = query @ key.T / math.sqrt(size) + score_bias(config, weights, head, positions)
        window = windows[head * shared // heads] if windows else 0
        hidden_past = np.tril(np.full_like(scores, -np.inf), k=-window) if window else 0.0
        attended.append(softmax(scores + hidden_future + hidden_past))
    return np.stack(attended)


def has_shaped_slopes(config: ExPEConfig) -> bool:
    parameters = config.positional_parameters
    return bool(parameters.get("softplus") or parameters.get("content_heads"))


def shaped_scores(
    config: ExPEConfig,
    head: int,
    inputs: Double,
    hidden: Double,
    query_weight: Double,
    key_weight: Double,
    positions: Ids,
) -> Double:
    """Scores (T, T) of one head where slopes are more than products: content, and a slope times what codes differ by.

    The key of a position is what its input gives; its part that grows is what the steps alone give.
    """
    parameters, size, heads = config.positional_parameters, config.head_dim, config.num_attention_heads
    content_heads = parameters.get("content_heads", 0)
    queries = inputs @ query_weight.T
    without = with_vectors(config, hidden, np.zeros(parameters["dims"]))
    scores = queries @ (without @ key_weight.T).T / math.sqrt(size)
    if head >= heads - content_heads:
        seen = np.arange(1, len(positions) + 1)
        heat: Double = 1 + parameters.get("temperature", 0.0) * np.log(seen / config.training_length)
        tempered: Double = scores * heat[:, None]
        return tempered
    limbs = parameters.get("limbs", 1)
    codes = np.array([digits(int(n), parameters.get("limb_bits", 24), limbs) for n in positions], dtype=np.float64)
    steps, group = spread(config, "step", half=1), parameters["dims"] // limbs
    for limb in range(limbs):
        own = slice(limb * group, (limb + 1) * group)
        slope = queries @ (key_weight[:, own] @ steps[own]) / math.sqrt(size)
        if parameters.get("softplus"):
            asked = parameters["slopes"]
            begun = press_slopes(heads - content_heads)[head] if asked == "alibi" else asked[head]
            slope = np.log1p(np.exp(4 * slope / begun)) * begun / 4
        scores = scores + slope[:, None] * (codes[None, :, limb] - codes[:, None, limb])
    return scores


def _head(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


def embed(config: ExPEConfig, embeddings: Double, positions: Ids) -> Double:
    """The embeddings (T, C) with what an encoding does to them."""
    if config.positional == "sinusoidal":
        return embeddings + waves(config.hidden_size, positions)
    if config.positional in ("expe", "exqpe") and config.positional_parameters["where"] == "embedding":
        return with_positions(config, embeddings, positions)
    return embeddings


def attention_inputs(config: ExPEConfig, hidden: Double, positions: Ids) -> tuple[Double, Double, Double]:
    """What enters the query, key and value products, each (T, C)."""
    where = config.positional_parameters.get("where")
    if where not in ("key", "query_key", "query_key_value"):
        return hidden, hidden, hidden
    positioned = with_positions(config, hidden, positions)
    if where == "key":  # the queries' input gets what p_n is without its steps
        return with_vectors(config, hidden, starts(config)), positioned, hidden
    return positioned, positioned, positioned if where == "query_key_value" else hidden


def with_positions(config: ExPEConfig, hidden: Double, positions: Ids) -> Double:
    """Override, or add to, the first l dimensions of (T, C) by their position vectors."""
    return with_vectors(config, hidden, position_vectors(config, positions))


def with_vectors(config: ExPEConfig, hidden: Double, vectors: Double) -> Double:
    """Override, or add to, the first l dimensions of (T, C) by (T, l) or (l,)."""
    changed = hidden.copy()
    dims = vectors.shape[-1]
    if config.positional_parameters["how"] == "override":
        changed[:, :dims] = vectors
    else:
        changed[:, :dims] += vectors
    return changed


def position_vectors(config: ExPEConfig, positions: Ids) -> Double:
    """p_n = start + step·n (T, l); for ExQPE n is replaced, in each group of dimensions, by a digit of n."""
    parameters = config.positional_parameters
    dims = parameters["dims"]
    start, step = starts(config), spread(config, "step", half=1)
    counts = np.broadcast_to(positions[:, None], (len(positions), dims))
    if config.positional == "exqpe":
        counts = np.array([digits(int(n), parameters["limb_bits"], parameters["limbs"]) for n in positions])
        counts = counts.repeat(dims // parameters["limbs"], axis=1)
    return start + step * counts


def starts(config: ExPEConfig) -> Double:
    """`start` for each dimension, (l,)."""
    return spread(config, "start", half=0)


def spread(config: ExPEConfig, name: str, half: int) -> Double:
    """A setting for each dimension, (l,). In the relative form one number is for a half of every limb's dimensions."""
    parameters = config.positional_parameters
    value, dims, limbs = parameters[name], parameters["dims"], parameters.get("limbs", 1)
    halved = parameters["where"] == "key" or parameters.get("slopes", "random") != "random"
    if not halved or not isinstance(value, float | int):
        return np.broadcast_to(np.array(value, dtype=np.float64), dims)
    group = dims // limbs
    first = -(-group // 2)
    one = [value] * first + [0.0] * (group - first) if half == 0 else [0.0] * first + [value] * (group - first)
    return np.array(one * limbs, dtype=np.float64)


def digits(number: int, bits: int, limbs: int) -> list[int]:
    """Digits in base 2^bits, low first; what is left over stays in the last."""
    found = []
    for _ in range(limbs - 1):
        number, digit = divmod(number, 2**bits)
        found.append(digit)
    return [*found, number]


def waves(width: int, positions: Ids) -> Double:
    """Sines, then cosines, at the wavelengths of Vaswani et al.; for an odd width the last cosine is dropped."""
    angles = np.outer(positions, [10000.0 ** (-2 * pair / width) for pair in range((width + 1) // 2)])
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]


def rotate(config: ExPEConfig, states: Double, positions: Ids) -> Double:
    """Turn (T, D): dimension k and k + D/2 are one complex number."""
    size, theta = config.head_dim, config.positional_parameters["theta"]
    first, second = np.split(states, 2, axis=-1)
    angles = np.outer(positions, [theta ** (-2 * pair / size) for pair in range(size // 2)])
    turned = (first + 1j * second) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def score_bias(config: ExPEConfig, weights: Weights, head: int, positions: Ids) -> Double | float:
    """What is added to the scores (T, T) of one head."""
    back = positions[:, None] - positions[None, :]
    if config.positional == "alibi":
        penalty: Double = back * np.float64(-press_slopes(config.num_attention_heads)[head])
        return penalty
    if config.positional == "relative":
        parameters = config.positional_parameters
        buckets = [
            t5_bucket(distance, parameters["buckets"], parameters["max_distance"]) for distance in range(back.max() + 1)
        ]
        rows = np.array(buckets)[back.clip(min=0)]
        bias: Double = weights["positional.table.weight"][rows, head]
        return bias
    return 0.0


def press_slopes(heads: int) -> list[float]:
    """ALiBi's slopes by the recursion its authors published."""
    if math.log2(heads).is_integer():
        ratio = 2 ** (-8 / heads)
        return [ratio ** (head + 1) for head in range(heads)]
    closest = 2 ** int(math.log2(heads))
    return press_slopes(closest) + press_slopes(2 * closest)[::2][: heads - closest]


def t5_bucket(back: int, buckets: int, farthest: int) -> int:
    """T5's causal bucket of a distance back: half exact, half logarithmic."""
    exact = buckets // 2
    if back < exact:
        return back
    part = math.log(back / exact) / math.log(farthest / exact)
    return min(exact + int(part * (buckets - exact)), buckets - 1)
