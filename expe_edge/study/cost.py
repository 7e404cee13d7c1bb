"""What encodings cost at inference: time of prefill and of a decoding step by length, bytes of package and cache."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expe_edge.export.exporter import export
from expe_edge.progress import counted
from expe_edge.runtime.session import PackageSession
from expe_edge.speed.machine import processor
from expe_edge.speed.measuring import in_turn
from expe_edge.study.plan import Study
from expe_edge.study.records import read_record, write_record
from expe_edge.training.settings import WEIGHTS_FILE

PRECISIONS = ("float32", "int8-dynamic")
#: Steps whose median is the time of one, after a prefill.
DECODED = 40
#: How often everything is measured, in turn.
TURNS = 7
COST_FILE = "cost.json"


def measure_variants(study: Study, out: Path) -> None:
    """Measure the first trained run of every named variant at the study's lengths, if it wants to know the cost.

    Raises:
        As `measure`.
    """
    checkpoints: dict[str, Path] = {}
    for variant in study.named_variants if study.cost else ():
        trained = (out / study.run(variant, seed).name for seed in study.seeds)
        for run in (run for run in trained if (run / WEIGHTS_FILE).is_file()):
            checkpoints.setdefault(variant.name, run)
    if checkpoints:
        measure(checkpoints, [length * study.training_length for length in study.lengths], out)


def measure(checkpoints: Mapping[str, Path], lengths: Sequence[int], out: Path) -> list[dict[str, Any]]:
    """Export every checkpoint, by name, in `PRECISIONS`, and measure all of them on one thread, with progress bars.

    Results are kept in `out`, and those of the same checkpoints and lengths are taken from there.

    Args:
        lengths: of the prefilled text, in tokens.

    Returns:
        for each precision and length: `prefill` and `step`, seconds of every turn by name of the checkpoint;
        `cache_bytes`, of a cache with room for the text and the steps; `package_bytes`; the `processor`.

    Raises:
        ExportError, GenerationError: one cannot be exported, or reaches no such length.
    """
    asked = {
        "checkpoints": {name: path.name for name, path in checkpoints.items()},
        "lengths": list(lengths),
        "turns": TURNS,
    }
    kept = read_record(out / COST_FILE)
    if kept is not None and kept["asked"] == asked:
        return list(kept["results"])
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=out) as directory:
        for precision in PRECISIONS:
            with counted(f"exporting {precision}", len(checkpoints)) as advance:
                packages = []
                for index, checkpoint in enumerate(checkpoints.values()):
                    packages += export(checkpoint, Path(directory, str(index)), [precision])
                    advance()
            sessions = [PackageSession.load(package.path, threads=1) for package in packages]
            with counted(f"timing {precision}", len(lengths)) as advance:
                for length in lengths:
                    # Of any vocabulary: single bytes.
                    tokens = np.random.default_rng(0).integers(256, size=length + DECODED)
                    times = in_turn(sessions, tokens, DECODED, TURNS)
                    caches = [(length + DECODED) * session.contract.cache_bytes for session in sessions]
                    found.append(
                        {
                            "precision": precision,
                            "length": length,
                            "processor": processor(),
                            "prefill": dict(zip(checkpoints, times[..., 0].T.tolist(), strict=True)),
                            "step": dict(zip(checkpoints, times[..., 1].T.tolist(), strict=True)),
                            "cache_bytes": dict(zip(checkpoints, caches, strict=True)),
                            "package_bytes": dict(zip(checkpoints, (p.size_bytes for p in packages), strict=True)),
                        }
                    )
                    advance()
    write_record(out / COST_FILE, asked, results=found)
    return found


def ratios(times: Mapping[str, Sequence[float]], against: str) -> dict[str, list[float]]:
    """Return quartiles over turns of every name's time over that of `against` in the same turn."""
    return {
        name: np.quantile(np.divide(values, times[against]), [0.25, 0.5, 0.75]).tolist()
        for name, values in times.items()
    }
