"""Losses of a run by length and document, kept beside it, and how those of two variants differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expe_edge.divergence import Double
from expe_edge.quality.comparison import long_documents
from expe_edge.quality.scoring import Ids, Scorer
from expe_edge.study.records import read_record, write_record

#: The losses of a run's documents, in its directory; those of an unfinished scoring are in a hidden file beside.
SCORES_FILE = "losses.json"
PARTIAL_SCORES_FILE = f".{SCORES_FILE}"


def score(scorer: Scorer, lengths: Sequence[int], documents: int, texts: Sequence[str] = ()) -> None:
    """Write the losses of so many documents up to `lengths` times the training length; go on where it was stopped.

    texts: sources of the documents; the held-out part of the training text where there are none.

    Raises:
        CorpusError: no document is long enough.
    """
    asked, run = asked_for(lengths, documents, texts), scorer.path
    if read_losses(run / SCORES_FILE, asked):
        return
    ends = [length * scorer.training_length for length in lengths]
    chosen, _ = long_documents(scorer, texts, "text", ends[-1] + 1, documents)
    losses = read_losses(run / PARTIAL_SCORES_FILE, asked)
    for document in chosen[len(losses) :]:
        losses.append(losses_by_length(scorer, document, ends))
        write_record(run / PARTIAL_SCORES_FILE, asked, losses=losses)
    (run / PARTIAL_SCORES_FILE).replace(run / SCORES_FILE)


def asked_for(lengths: Sequence[int], documents: int, texts: Sequence[str]) -> dict[str, Any]:
    """Return what tells one scoring of a run from another."""
    return {"lengths": list(lengths), "documents": documents, "texts": list(texts)}


def read_losses(path: Path, asked: Mapping[str, Any]) -> list[list[float]]:
    """Return the losses in a file, (documents, buckets), if it answers what is asked; none otherwise."""
    record = read_record(path)
    return list(record["losses"]) if record is not None and {"texts": [], **record["asked"]} == asked else []


def losses_by_length(scorer: Scorer, document: Ids, ends: Sequence[int]) -> list[float]:
    """Return the mean loss, nats per token, in every bucket that `ends`, in tokens, close.

    document: token ids (T,), more than the last of `ends`.
    """
    losses = scorer.predictions(document[: ends[-1] + 1], 1).nll
    return [float(bucket.mean()) for bucket in np.split(losses, ends[:-1])]


def paired_difference(losses: Double, others: Double) -> tuple[Double, Double]:
    """Return the mean difference of losses (seeds, documents, buckets) and its standard error, (buckets,) each.

    Both seeds and documents are samples, crossed: the variance of the mean is that of a two-way random-effects
    analysis of variance without replication. With one seed it is that over documents alone; with one document, NaN.
    """
    difference = losses - others
    seeds, documents, _ = difference.shape
    mean = difference.mean(axis=(0, 1))
    by_document, by_seed = difference.mean(axis=0), difference.mean(axis=1)
    if documents < 2:
        return mean, np.full_like(mean, math.nan)
    variance = by_document.var(axis=0, ddof=1) / documents
    if seeds > 1:
        residual = difference - by_document[None] - by_seed[:, None] + mean
        noise = (residual**2).sum(axis=(0, 1)) / ((seeds - 1) * (documents - 1))
        variance = np.maximum(variance + by_seed.var(axis=0, ddof=1) / seeds - noise / (seeds * documents), 0)
    return mean, np.sqrt(variance)
