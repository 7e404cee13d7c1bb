"""From logits to the next token: greedy or drawn, by penalties, bias, filters or Mirostat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from expe_edge.errors import GenerationError
from expe_edge.runtime.filters import Scores, draw, left_in, likelihoods
from expe_edge.runtime.mirostat import Mirostat
from expe_edge.runtime.penalties import Penalties


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. What there is of these applies in the order of the attributes, as in transformers.

    Attributes:
        logit_bias: what is added to the logits of some tokens, by id; −100 is as good as a ban.
        repetition_penalty: divides positive scores, multiplies negative ones, of tokens already seen (Keskar et al.,
            2019); 1 for none.
        frequency_penalty: taken from a token's score for each time that it has been generated, as OpenAI's; 0 for none.
        presence_penalty: taken once from the score of every token that has been generated, as OpenAI's; 0 for none.
        temperature: 0 for greedy.
        top_k: keep the k best tokens; 0 for all.
        top_p: keep the fewest tokens whose probabilities reach p (Holtzman et al., 2020); 1 for all.
        min_p: keep tokens at least min_p times as likely as the best (Nguyen et al., 2024); 0 for all.
        typical_p: keep the fewest tokens, nearest to the entropy, that reach p (Meister et al., 2022); 1 for all.
        mirostat_tau: surprise to hold, in bits a token, by Mirostat 2 in place of the four filters (Basu et al., 2021);
            0 for none.
        mirostat_eta: how fast Mirostat follows.
        seed: of the random generator; None draws one.

    Raises:
        GenerationError: a setting out of range, or Mirostat without temperature or with a filter.
    """

    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    mirostat_tau: float = 0.0
    mirostat_eta: float = 0.1
    seed: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))
        checks = {
            "logit_bias": (all(map(_is_finite, self.logit_bias.values())), "of finite numbers"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "frequency_penalty": (_is_finite(self.frequency_penalty), "a finite number"),
            "presence_penalty": (_is_finite(self.presence_penalty), "a finite number"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "typical_p": (0 < self.typical_p <= 1, "above 0 and at most 1"),
            "mirostat_tau": (0 <= self.mirostat_tau < math.inf, "at least 0"),
            "mirostat_eta": (0 < self.mirostat_eta < math.inf, "above 0"),
            "seed": (self.seed is None or self.seed >= 0, "at least 0"),
        }
        for name, (holds, allowed) in checks.items():
            if not holds:
                raise GenerationError(f"`{name}` is {getattr(self, name)}; it must be {allowed}")
        if self.mirostat_tau > 0:
            self._require_mirostat_alone()

    def _require_mirostat_alone(self) -> None:
        if self.temperature == 0:
            raise GenerationError("`mirostat_tau` needs a `temperature` above 0; 1 leaves the model's probabilities")
        filters = {"top_k": 0, "top_p": 1, "min_p": 0, "typical_p": 1}
        given = [name for name, none in filters.items() if getattr(self, name) != none]
        if given:
            raise GenerationError(f"`mirostat_tau` takes the place of `{given[0]}`; leave one of them out")

    @property
    def counts_tokens(self) -> bool:
        """Whether it matters how often a token has been generated."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0


def _is_finite(number: float) -> bool:
    return -math.inf < number < math.inf  # of whole numbers, those too that no float holds


class Sampler:
    """Chooses tokens for one sequence and remembers which it has seen.

    Raises:
        GenerationError: a bias of a token outside the vocabulary.
    """

    def __init__(self, sampling: Sampling, prompt: npt.NDArray[np.int64], vocab_size: int) -> None:
        self.sampling = sampling
        self.random = np.random.default_rng(sampling.seed)
        self.penalties = Penalties(sampling, prompt, vocab_size)
        self.mirostat = Mirostat(sampling.mirostat_tau, sampling.mirostat_eta) if sampling.mirostat_tau > 0 else None

    def choose(self, logits: Scores, allowed: npt.NDArray[np.int64] | None = None) -> int:
        """Return the next token's id for `logits` (V,) float32; of `allowed` ids (n,) alone, where they are given."""
        scores = self.penalties.apply(logits)
        token = self._pick(scores) if allowed is None else int(allowed[self._pick(scores[allowed])])
        self.penalties.note(token)
        return token

    def _pick(self, scores: Scores) -> int:
        if self.sampling.temperature == 0:
            return int(scores.argmax())
        if self.mirostat is not None:
            return self.mirostat.draw(likelihoods(scores, self.sampling.temperature), self.random)
        ids, weights = left_in(scores, self.sampling)
        index = draw(weights, self.random)
        return index if ids is None else int(ids[index])
