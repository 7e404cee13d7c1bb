"""Scores one checkpoint of `benchmarks.extrapolation`: the loss of every held-out document by length.

    python -m benchmarks.extrapolation_scores RUN 1,2,4 12 [TEXT…]

Goes on where it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.extrapolation import SCORES_FILE
from expe_edge.quality.comparison import long_documents
from expe_edge.quality.losses import predictions
from expe_edge.quality.scoring import Ids, Scorer, open_scorer


def losses_by_length(scorer: Scorer, document: Ids, ends: Sequence[int]) -> list[float]:
    """Return the mean loss in every bucket that `ends`, in tokens, close, of a document (T,) longer than the last."""
    losses = predictions(scorer, document[: ends[-1] + 1], 1).nll
    return [float(bucket.mean()) for bucket in np.split(losses, ends[:-1])]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("lengths")
@click.argument("documents", type=int)
@click.argument("texts", nargs=-1)
def main(run: Path, lengths: str, documents: int, texts: tuple[str, ...]) -> None:
    """Write the losses of RUN, up to LENGTHS times its training length, on so many DOCUMENTS.

    They are of TEXTS, or else of what was held out of the training text.
    """
    units, scorer = [int(end) for end in lengths.split(",")], open_scorer(run)
    ends = [unit * scorer.training_length for unit in units]
    chosen, _ = long_documents(scorer, texts, "text", ends[-1] + 1, documents)
    asked = {"lengths": units, "documents": documents, "texts": list(texts)}
    partial = run / f".{SCORES_FILE}"
    losses = read_losses(partial, asked)
    for document in chosen[len(losses) :]:
        losses.append(losses_by_length(scorer, document, ends))
        partial.write_text(json.dumps({"asked": asked, "losses": losses}) + "\n", encoding="utf-8")
    partial.replace(run / SCORES_FILE)


def read_losses(partial: Path, asked: Mapping[str, Any]) -> list[list[float]]:
    """Return the losses of the documents that an interrupted run of the same kind has scored."""
    try:
        record = json.loads(partial.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # there is none, or it was being written
        return []
    return list(record["losses"]) if record["asked"] == asked else []


if __name__ == "__main__":
    main()
