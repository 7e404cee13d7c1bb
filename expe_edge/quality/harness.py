"""Packages in lm-evaluation-harness (Gao et al., 2021, https://github.com/EleutherAI/lm-evaluation-harness).

Importing this module registers the model `expe-edge`; `expe-edge evaluate` does, and so may a program:

    import expe_edge.quality.harness
    lm_eval.simple_evaluate("expe-edge", {"package": "package/int8-dynamic"}, tasks=["lambada_openai"])
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from expe_edge.divergence import log_softmax
from expe_edge.errors import ConfigError, GenerationError, unknown_name
from expe_edge.progress import counted, note
from expe_edge.runtime.generator import Generator
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.runtime.sampling import Sampling
from expe_edge.runtime.session import Ids, Logits, PackageSession
from expe_edge.text.tokenization import END_OF_TEXT

Item = TypeVar("Item")
#: A text to score, as lm_eval has it: what it answers, the context's ids and the continuation's.
Request = tuple[Any, list[int], list[int]]
#: Rows of a batch where lm_eval is asked for `auto`. More are no faster on a CPU.
AUTO_BATCH = 16
SAMPLING = {setting.name for setting in dataclasses.fields(Sampling)}


@register_model("expe-edge")
class PackageLM(TemplateLM):  # type: ignore[misc]  # lm_eval publishes no types
    """A package in onnxruntime.

    A text is opened by the end-of-text token, once, as documents were in training; a text that spells it is text.

    Args:
        package: its directory.
        batch_size: rows of a batch. Texts of up to `PREFILL_CHUNK` tokens are scored a batch at a time, longer ones
            one by one; completions decode together whatever their length.
        max_batch_size: what `batch_size=auto` stands for.
        device: `cpu` or `cuda`.
        max_length: the most tokens to read at once; None for all that the encoding has positions for.
        max_gen_toks: the most tokens to generate where a task does not say.
        threads: threads within an operator; None lets onnxruntime choose.

    Raises:
        ConfigError: an unknown argument, or one out of range. PackageError, GenerationError: as `PackageSession.load`.
    """

    def __init__(
        self,
        package: str,
        *,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        threads: int | None = None,
        **unknown: object,
    ) -> None:
        super().__init__()
        if unknown:
            known = ("package", "max_length", "max_gen_toks", "threads")
            raise ConfigError(unknown_name("model argument", next(iter(unknown)), known))
        self.session = PackageSession.load(str(package), threads=threads, device=device or "cpu")
        self.generator = Generator(self.session)
        self.batch_size = _batch_size(batch_size, max_batch_size)
        self.max_length = self.session.reach if max_length is None else max_length
        self.max_gen_toks = max_gen_toks
        if not 1 <= self.max_length <= self.session.reach:
            raise ConfigError(f"max_length is {max_length}; from 1 to {self.session.reach}, the encoding's positions")

    @property
    def eot_token_id(self) -> int:
        """The token that opens a text and ends it; what is scored without a context follows it."""
        return int(self.generator.tokenizer.token_to_id(END_OF_TEXT))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text, opened by end-of-text unless `add_special_tokens` is False."""
        opened = add_special_tokens is not False
        return list(self.generator.tokenizer.encode(string, add_special_tokens=opened).ids)

    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Return for every request the continuation's nats, and whether greedy decoding would give it.

        Texts that differ in their last token alone, as one-token answers to a question, are read once.
        """
        texts: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise GenerationError(
                    f"a continuation of {len(continuation)} tokens exceeds max_length={self.max_length}; raise it"
                )
            if continuation:
                texts[tuple((context + continuation)[-self.max_length - 1 : -1])].append(index)
        self._note_cut([len(context) + len(continuation) - 1 for _, context, continuation in requests])
        results = [(0.0, True)] * len(requests)  # of no continuation
        with counted("scoring texts", len(texts)) as advance:
            for batch in _batches(sorted(texts, key=len, reverse=True), self.batch_size):
                scored = [max(len(requests[index][2]) for index in texts[text]) for text in batch]
                rows = [np.array(text, dtype=np.int64) for text in batch]
                for text, predicted in zip(batch, self._predictions(rows, scored), strict=True):
                    for index in texts[text]:
                        key, _, continuation = requests[index]
                        results[index] = predicted.score(continuation)
                        if key is not None:
                            self.cache_hook.add_partial("loglikelihood", key, results[index])
                    advance()
        return results

    def _predictions(self, rows: Sequence[Ids], scored: Sequence[int]) -> Iterator[Predictions]:
        """Yield what is predicted by the last `scored` tokens of each of `rows`, which fall in length."""
        long = [row for row in rows if len(row) > PREFILL_CHUNK]
        short = rows[len(long) :]
        for row, count in zip(long, scored, strict=False):
            yield predictions(self.session.prefill(self.session.new_cache(1, len(row)), row), row, count)
        logits = self.session.forward(short) if short else []
        for row, of_row, count in zip(short, logits, scored[len(long) :], strict=True):
            yield predictions([of_row], row, count)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the nats of whole texts, in windows of `max_length` tokens; each token but the opening one counts."""
        windows: list[Request] = []
        ends = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            pairs = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            ends.append(len(windows))
        nats = [score for score, _ in self._loglikelihood_tokens(windows)]
        totals = [sum(nats[begin:end]) for begin, end in zip([0, *ends], ends, strict=False)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what follows each context, up to one of its `until`; requests of the same settings go in batches."""
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        results = [""] * len(requests)
        with counted("completing requests", len(requests)) as advance:
            for indices in alike.values():
                indices.sort(key=lambda index: -len(prompts[index]))
                settings = requests[indices[0]].args[1]
                for batch in _batches(indices, self.batch_size):
                    texts = self._complete([prompts[index] for index in batch], settings)
                    for index, text in zip(batch, texts, strict=True):
                        results[index] = text
                        self.cache_hook.add_partial("generate_until", requests[index].args, text)
                    advance(len(batch))
        return results

    def _complete(self, prompts: Sequence[list[int]], settings: Mapping[str, Any]) -> list[str]:
        sampling, stop, new_tokens = generation(settings, self.max_gen_toks)
        room = self.max_length - new_tokens
        if room < 1:
            raise GenerationError(
                f"max_gen_toks is {new_tokens}; of max_length={self.max_length} it must leave room for a prompt"
            )
        self._note_cut([len(prompt) + new_tokens for prompt in prompts])
        completions = self.generator.generate(
            [prompt[-room:] for prompt in prompts], max_new_tokens=new_tokens, sampling=sampling, stop=stop
        )
        return [completion.text for completion in completions]

    def _note_cut(self, lengths: Sequence[int]) -> None:
        cut = sum(length > self.max_length for length in lengths)
        if cut:
            note(f"{cut} of {len(lengths)} texts exceed max_length={self.max_length} and lose tokens from the left")


@dataclass(frozen=True)
class Predictions:
    """What a model predicts of a text's last tokens and of the one to come.

    Attributes:
        nats: log probabilities of the text's last t tokens, (t,) float64. last: of every token to come, (V,) float64.
        greedy: the likeliest tokens in those t + 1 places, (t + 1,) int64.
    """

    nats: npt.NDArray[np.float64]
    last: npt.NDArray[np.float64]
    greedy: Ids

    def score(self, continuation: Sequence[int]) -> tuple[float, bool]:
        """Return the nats of `continuation`, whose last token is to come, and whether each is the likeliest."""
        given = self.nats[len(self.nats) - len(continuation) + 1 :]
        likeliest = np.array_equal(self.greedy[-len(continuation) :], continuation)
        return float(given.sum() + self.last[continuation[-1]]), likeliest


def predictions(chunks: Iterable[Logits], tokens: Ids, count: int) -> Predictions:
    """Gather what the last `count` of `tokens` (T,) predict from their logits (t, V), chunk by chunk."""
    nats, greedy = [], []
    begin, end = len(tokens) - count, 0
    for logits in chunks:
        end += len(logits)
        rows = log_softmax(logits[max(0, len(logits) - (end - begin)) :])
        targets = tokens[end - len(rows) + 1 : end + 1]
        nats.append(rows[np.arange(len(targets)), targets])
        greedy.append(rows.argmax(axis=-1))
    return Predictions(np.concatenate(nats), rows[-1], np.concatenate(greedy))


def generation(settings: Mapping[str, Any], max_gen_toks: int) -> tuple[Sampling, list[str], int]:
    """Return sampling, stop strings and the most new tokens of a request's generation settings.

    Where none is given, the seed is drawn from NumPy's generator, which `lm-eval --seed` sets.

    Raises:
        GenerationError: a setting that the generator does not have.
    """
    values = dict(normalize_gen_kwargs(dict(settings), max_gen_toks))
    stop, new_tokens = values.pop("until"), values.pop("max_gen_toks")
    values.pop("do_sample")  # lm_eval has set the temperature by it
    if values.get("num_beams") == 1:
        del values["num_beams"]
    unknown = sorted(values.keys() - SAMPLING)
    if unknown:
        raise GenerationError(unknown_name("generation setting", unknown[0], SAMPLING))
    seed = int(np.random.randint(2**31))
    return Sampling(**{"seed": seed, **values}), stop, new_tokens


def _batch_size(asked: int | str, most: int | None) -> int:
    """Return the rows of a batch for lm_eval's `--batch_size`: a number, or `auto`, which may say how often to look."""
    if str(asked).startswith("auto"):
        return most or AUTO_BATCH
    try:
        size = int(asked)
    except ValueError:
        size = 0
    if size < 1:
        raise ConfigError(f"batch_size is {asked}; at least 1, or auto")
    return size


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
