"""Quality by length: the same long held-out documents through several models, measured bucket by bucket."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from expe_edge.divergence import Double, Float, log_divergence, log_softmax, ratio_of_sums
from expe_edge.errors import ConfigError, CorpusError
from expe_edge.progress import counted, note
from expe_edge.quality.scoring import Ids, Scorer, tokenizer_path
from expe_edge.results import Result
from expe_edge.runtime.memory import PREFILL_CHUNK
from expe_edge.text.corpus import load_corpus
from expe_edge.text.tokenization import encode_documents, load_tokenizer, token_byte_lengths


@dataclass(frozen=True)
class BucketResult(Result):
    """One model's quality over the tokens predicted at positions [bucket_start, bucket_end).

    nll: nats per token. perplexity_change: against the reference, relative; its error is that of the paired
    difference. kl: KL(reference ‖ model), nats per token. top1: share of tokens whose likeliest prediction is the
    reference's; top1_clear: the same where the reference itself is not nearly undecided. Each with its standard error
    over documents. NaN and infinity, as of a perplexity that no number holds, are written as null. near_ties: share of
    tokens where the reference is undecided: its two likeliest predictions are less than `NEAR_TIE` nats apart.
    """

    model: str
    bucket_start: int
    bucket_end: int
    documents: int
    tokens: int
    nll: float
    nll_stderr: float
    perplexity: float
    perplexity_stderr: float
    perplexity_change: float
    perplexity_change_stderr: float
    bits_per_byte: float
    bits_per_byte_stderr: float
    kl: float
    kl_stderr: float
    top1: float
    top1_stderr: float
    top1_clear: float
    top1_clear_stderr: float
    near_ties: float


@dataclass(frozen=True)
class Comparison(Result):
    """Results of every model and bucket; the first model is the reference."""

    models: tuple[str, ...]
    training_length: int
    lengths: tuple[int, ...]
    results: tuple[BucketResult, ...]

    def of(self, model: str) -> list[BucketResult]:
        """The buckets of one model, shortest first."""
        return [result for result in self.results if result.model == model]


def compare_by_length(
    scorers: Sequence[Scorer],
    lengths: Sequence[int],
    documents: int,
    *,
    sources: Sequence[str] = (),
    text_field: str = "text",
    at_once: int = 1,
) -> Comparison:
    """Compare on a sample of `documents` documents as long as the last bucket needs, with a progress bar.

    Arguments and errors as for `long_documents` and `compare`.
    """
    tokens = lengths[-1] * scorers[0].training_length
    chosen, byte_lengths = long_documents(scorers[0], sources, text_field, tokens + 1, documents)
    with counted("comparing tokens", len(chosen) * tokens) as advance:
        return compare(scorers, chosen, byte_lengths, lengths, at_once=at_once, advance=advance)


def compare(
    scorers: Sequence[Scorer],
    documents: Sequence[Ids],
    byte_lengths: npt.NDArray[np.int64],
    lengths: Sequence[int],
    *,
    at_once: int = 1,
    advance: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Score `documents` with every model and gather the results by length.

    Args:
        scorers: the reference first; all of one vocabulary.
        documents: token ids (T,), each at least max(lengths)·N + 1 long (see `long_documents`).
        byte_lengths: bytes of each token id, (V,).
        lengths: ends of the buckets in units of the reference's N, rising.
        at_once: models that are computed side by side.
        advance: called with the number of tokens that every model has just scored.
    """
    names, training_length = unique_names([scorer.path for scorer in scorers]), scorers[0].training_length
    ends = np.array(lengths, dtype=np.int64) * training_length
    sums = np.zeros((len(scorers), len(documents), len(ends), len(_MEASURES)))
    with ThreadPoolExecutor(at_once) as pool:
        for index, document in enumerate(documents):
            tokens, targets = document[: ends[-1]], document[1 : ends[-1] + 1]
            buckets = np.searchsorted(ends, np.arange(len(tokens)), side="right")
            chunks = _abreast(scorers, tokens, pool)
            for model, measured in enumerate(_measure(chunks, targets, advance)):
                measured["bytes"] = byte_lengths[targets].astype(np.float64)
                for column, name in enumerate(_MEASURES):
                    np.add.at(sums[model, index, :, column], buckets, measured[name])
    results = [
        _result(name, int(start), int(end), sums[model, :, bucket])
        for model, name in enumerate(names)
        for bucket, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True))
    ]
    return Comparison(tuple(names), training_length, tuple(lengths), tuple(results))


#: What is summed over the tokens of a document and bucket.
_MEASURES = ("tokens", "bytes", "nll", "change", "kl", "top1", "clear", "clear_top1")
#: Two predictions closer than this, in nats, are as good as tied: the order of them is no one's merit.
NEAR_TIE = 0.05


def _abreast(scorers: Sequence[Scorer], tokens: Ids, pool: Executor) -> Iterator[list[Float]]:
    """Yield the logits (t, V) of every model for chunk after chunk of the tokens (T,), computed side by side."""
    streams = [scorer.logits(tokens) for scorer in scorers]
    for _ in range(0, len(tokens), PREFILL_CHUNK):
        yield list(pool.map(next, streams))


def _measure(chunks: Iterable[list[Float]], targets: Ids, advance: Callable[[int], None]) -> list[dict[str, Double]]:
    """Return for every model the measures of every token, each (T,), from the logits of all models chunk by chunk."""
    measured: list[list[dict[str, Double]]] = []
    begin = 0
    for logits in chunks:
        end = begin + len(logits[0])
        measured.append(measure_chunk(logits, targets[begin:end]))
        advance(end - begin)
        begin = end
    return [{name: np.concatenate([part[name] for part in of]) for name in of[0]} for of in zip(*measured, strict=True)]


def measure_chunk(logits: list[Float], targets: Ids) -> list[dict[str, Double]]:
    """Return for every model, the reference first, what its logits (t, V) make of the tokens (t,) that they predict.

    These are, by name, what `compare` sums over a bucket: `tokens`, `nll`, `kl`, `top1` and others, each (t,).
    """
    reference, every = log_softmax(logits[0]), np.arange(len(targets))
    best = reference.argmax(axis=-1)
    second, first = np.sort(np.partition(reference, -2, axis=-1)[:, -2:], axis=-1).T
    clear = (first - second >= NEAR_TIE).astype(np.float64)
    measured = []
    for predicted in (reference, *map(log_softmax, logits[1:])):
        agreed = (predicted.argmax(axis=-1) == best).astype(np.float64)
        measured.append(
            {
                "tokens": np.ones(len(targets)),
                "nll": -predicted[every, targets],
                "change": reference[every, targets] - predicted[every, targets],
                "kl": log_divergence(reference, predicted),
                "top1": agreed,
                "clear": clear,
                "clear_top1": clear * agreed,
            }
        )
    return measured


def _result(model: str, start: int, end: int, sums: Double) -> BucketResult:
    """Reduce sums (documents, measures) to one bucket's figures."""
    tokens, size, nll, change, kl, top1, clear, clear_top1 = sums.T
    mean_nll, nll_error = ratio_of_sums(nll, tokens)
    bits, bits_error = ratio_of_sums(nll / math.log(2), size)
    mean_change, change_error = ratio_of_sums(change, tokens)
    mean_kl, kl_error = ratio_of_sums(kl, tokens)
    mean_top1, top1_error = ratio_of_sums(top1, tokens)
    mean_clear, clear_error = ratio_of_sums(clear_top1, clear)
    perplexity, factor = _exp(mean_nll), _exp(mean_change)
    return BucketResult(
        model=model,
        bucket_start=start,
        bucket_end=end,
        documents=len(sums),
        tokens=int(tokens.sum()),
        nll=mean_nll,
        nll_stderr=nll_error,
        perplexity=perplexity,
        perplexity_stderr=perplexity * nll_error,
        perplexity_change=math.expm1(mean_change) if math.isfinite(factor) else factor,
        perplexity_change_stderr=factor * change_error,
        bits_per_byte=bits,
        bits_per_byte_stderr=bits_error,
        kl=mean_kl,
        kl_stderr=kl_error,
        top1=mean_top1,
        top1_stderr=top1_error,
        top1_clear=mean_clear,
        top1_clear_stderr=clear_error,
        near_ties=1 - ratio_of_sums(clear, tokens)[0],
    )


def _exp(value: float) -> float:
    """Return e to the power of `value`: infinity where that is too large for a number."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def long_documents(
    reference: Scorer, sources: Sequence[str], text_field: str, tokens: int, most: int
) -> tuple[list[Ids], npt.NDArray[np.int64]]:
    """Return up to `most` documents of at least `tokens` tokens (T,), and the byte length of each token id.

    Without `sources` these are the held-out documents of the reference's training text; given sources are taken
    whole. They are a sample of those that are long enough, the same on every machine: the order of a document's digest
    has nothing to do with its subject or its place in the source.

    Raises:
        CorpusError: no document is that long, or none is left of those that were held out.
    """
    tokenizer = load_tokenizer(reference.path)
    corpus = load_corpus(sources, text_field) if sources else load_corpus(**reference.corpus)
    candidates = corpus.training + corpus.held_out if sources else corpus.held_out
    if corpus.missing:
        missing = f"{corpus.missing} of the documents held out when {reference.path} was trained are not there"
        if not candidates:
            raise CorpusError(f"{missing}, none is; bring its text back, or give other with `sources`")
        note(f"{missing}: {len(candidates)} are left")
    # A token is at least one byte, so shorter texts need not be encoded.
    worth = [document for document in candidates if len(document.text.encode()) >= tokens - 1]
    worth.sort(key=lambda document: document.digest)
    chosen: list[Ids] = []
    longest = 0
    for begin in range(0, len(worth), most):
        encoded = [ids.astype(np.int64) for ids in encode_documents(tokenizer, worth[begin : begin + most])]
        longest = max(longest, *map(len, encoded))
        chosen += [ids for ids in encoded if len(ids) >= tokens]
        if len(chosen) >= most:
            break
    if not chosen:
        raise CorpusError(
            f"no document of {tokens} tokens (the longest has {longest or 'fewer'}); lower `lengths`, or give longer "
            "text with `sources`"
        )
    return chosen[:most], token_byte_lengths(tokenizer)


def require_same_vocabulary(scorers: Sequence[Scorer]) -> None:
    """Raise `ConfigError` unless all models read text by the same tokenizer."""
    first = tokenizer_path(scorers[0]).read_bytes()
    for scorer in scorers[1:]:
        if tokenizer_path(scorer).read_bytes() != first:
            raise ConfigError(
                f"{scorer.path} has another tokenizer than {scorers[0].path}; only models of one vocabulary compare"
            )


def require_rising(lengths: Sequence[int]) -> None:
    """Raise `ConfigError` unless `lengths` are positive and strictly rising."""
    if not lengths or any(b <= a for a, b in zip([0, *lengths], lengths, strict=False)):
        raise ConfigError(f"`lengths` {','.join(map(str, lengths))}: expected rising positive integers, as 1,2,4,8,16")


def unique_names(paths: Sequence[Path]) -> list[str]:
    """Name each path by as few of its last parts as tell it from the others."""
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise ConfigError("the same model is given twice")
    depth = next(
        depth for depth in range(1, max(map(len, parts)) + 1) if len({part[-depth:] for part in parts}) == len(parts)
    )
    return ["/".join(part[-depth:]) for part in parts]
