"""From logits to the next token: greedy, temperature, top-k, top-p, min-p and repetition penalty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expe_edge.errors import GenerationError

Scores = npt.NDArray[np.float32]
#: Penalties beyond act as these, so that no penalized score leaves float32.
LEAST_PENALTY, MOST_PENALTY = 1e-30, 1e30
#: A temperature beyond acts as this, at which all tokens are as likely.
MOST_TEMPERATURE = 1e38
#: Best tokens that top-p looks among before it sorts them all.
NUCLEUS_GUESS = 64


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The filters apply in the order of the attributes, as in transformers.

    Attributes:
        repetition_penalty: divides positive scores, multiplies negative ones, of tokens already seen (Keskar et al.,
            2019); 1 for none.
        temperature: 0 for greedy.
        top_k: keep the k best tokens; 0 for all.
        top_p: keep the fewest tokens whose probabilities reach p (Holtzman et al., 2020); 1 for all.
        min_p: keep tokens at least min_p times as likely as the best (Nguyen et al., 2024); 0 for all.
        seed: of the random generator; None draws one.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "seed": (self.seed is None or self.seed >= 0, "at least 0"),
        }
        for name, (holds, allowed) in checks.items():
            if not holds:
                raise GenerationError(f"`{name}` is {getattr(self, name)}; it must be {allowed}")


class Sampler:
    """Chooses tokens for one sequence and remembers which it has seen."""

    def __init__(self, sampling: Sampling, prompt: npt.NDArray[np.int64], vocab_size: int) -> None:
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed)
        self.seen = np.zeros(vocab_size, dtype=np.bool_)
        self.seen[prompt] = True

    def choose(self, logits: Scores) -> int:
        """Return the next token's id for `logits` (V,) float32."""
        if self.sampling.repetition_penalty != 1:
            logits = penalize(logits, self.seen, self.sampling.repetition_penalty)
        token = self._draw(logits) if self.sampling.temperature > 0 else int(logits.argmax())
        self.seen[token] = True
        return token

    def _draw(self, logits: Scores) -> int:
        scores = filter_scores(cooled(logits, self.sampling.temperature), self.sampling)
        kept = np.flatnonzero(scores > -np.inf)
        reached = np.cumsum(softmax(scores[kept]), dtype=np.float64)
        return int(kept[np.searchsorted(reached, self.random.random() * reached[-1], side="right")])


def cooled(logits: Scores, temperature: float) -> Scores:
    """Return `logits` (V,) over a temperature above 0; less the best of them where float32 could not hold it."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scores: Scores = logits / np.float32(min(temperature, MOST_TEMPERATURE))
        if not np.isfinite(scores).all():
            scores = ((logits.astype(np.float64) - logits.max()) / temperature).astype(np.float32)
    return scores


def penalize(logits: Scores, seen: npt.NDArray[np.bool_], penalty: float) -> Scores:
    """Return `logits` (V,) with the scores of `seen` tokens lowered."""
    penalty = min(max(penalty, LEAST_PENALTY), MOST_PENALTY)
    return np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_scores(scores: Scores, sampling: Sampling) -> Scores:
    """Return `scores` (V,) with −inf for every token that top-k, top-p or min-p leaves out."""
    if 0 < sampling.top_k < len(scores):
        threshold = np.partition(scores, -sampling.top_k)[-sampling.top_k]
        scores = np.where(scores < threshold, -np.inf, scores)
    if sampling.top_p < 1:
        scores = np.where(scores < nucleus_threshold(scores, sampling.top_p), -np.inf, scores)
    if sampling.min_p > 0:
        scores = np.where(scores < scores.max() + np.log(sampling.min_p), -np.inf, scores)
    return scores


def nucleus_threshold(scores: Scores, top_p: float) -> np.float32:
    """Return the score of the last of the fewest best tokens whose probabilities reach `top_p`."""
    probabilities = softmax(scores)
    for candidates in (NUCLEUS_GUESS, len(scores)):  # sorting all is the cost; most nuclei are small
        best = -np.sort(-np.partition(probabilities, -min(candidates, len(scores)))[-candidates:])
        reached = np.cumsum(best, dtype=np.float64)
        if reached[-1] >= top_p:
            break
    last = best[min(int(np.searchsorted(reached, top_p)), len(best) - 1)]
    threshold: np.float32 = scores[probabilities >= last].min()
    return threshold


def softmax(scores: Scores) -> Scores:
    """Return the probabilities of `scores` (V,)."""
    exponentials: Scores = np.exp(scores - scores.max())
    exponentials /= exponentials.sum()
    return exponentials
