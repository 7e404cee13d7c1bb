"""What a study has found, as plain data, from what is on disk of its runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expe_edge.divergence import Double
from expe_edge.package.directory import TOKENIZER_FILE
from expe_edge.speed.machine import processor, versions
from expe_edge.study.cost import COST_FILE, ratios
from expe_edge.study.plan import Study, Variant
from expe_edge.study.records import read_record
from expe_edge.study.scores import paired_difference
from expe_edge.study.state import losses_of, trouble
from expe_edge.study.work import read_probes
from expe_edge.training.settings import TRAINING_FILE, WEIGHTS_FILE


def gather(study: Study, out: Path, text: str) -> dict[str, Any]:
    """Return everything that the report says; what is not finished is left out and named under `troubles`.

    `nll` is (seeds, buckets) by variant, nats per token, of the `seeds` that are scored; `difference` and
    `difference_stderr` are (buckets,), paired by document and seed, of the variants to `against` and of those of an
    ablation to their base. Variants of another tokenizer or training length than what they are compared with, or scored
    on the held-out part of another text, do not read the same tokens and have none.

    Args:
        text: of the study file.
    """
    variants = {variant.name: variant for variant in study.all_variants}
    losses = {name: _losses(study, out, variant) for name, variant in variants.items()}
    scored = {name: found for name, found in losses.items() if found}
    runs = [_run(study, out, variant, seed) for variant in variants.values() for seed in study.seeds]
    others = {name: variants[variant.base or study.against] for name, variant in variants.items()}
    pairs = {name: _difference(study, out, losses, variants[name], other) for name, other in others.items()}
    differences = {name: pair for name, pair in pairs.items() if pair is not None}
    probes = _probes(study, out)
    return {
        "title": study.title,
        "about": study.about,
        "study": text,
        "lengths": list(study.lengths),
        "against": study.against,
        "training_length": study.training_length,
        "documents": max((len(each) for found in scored.values() for each in found.values()), default=0),
        "seeds": {name: list(found) for name, found in scored.items()},
        "nll": {name: [each.mean(axis=0).tolist() for each in found.values()] for name, found in scored.items()},
        "difference": {name: mean.tolist() for name, (mean, _) in differences.items()},
        "difference_stderr": {name: error.tolist() for name, (_, error) in differences.items()},
        "base": {name: variant.base for name, variant in variants.items() if variant.base is not None},
        "losses": {name: [each.tolist() for each in found.values()] for name, found in scored.items()},
        "runs": runs,
        "troubles": {run["run"]: run["trouble"] for run in runs if run["trouble"]},
        "probes": probes,
        "trade_off": _trade_off(study, scored, probes),
        "cost": _cost(study, out),
        "versions": versions(),
        "processor": processor(),
    }


def _losses(study: Study, out: Path, variant: Variant) -> dict[int, Double]:
    """Return the losses of a variant's scored runs, (documents, buckets), by seed."""
    found = {seed: losses_of(study, out, study.run(variant, seed)) for seed in study.seeds}
    return {seed: np.array(losses) for seed, losses in found.items() if losses}


def _difference(
    study: Study, out: Path, losses: Mapping[str, Mapping[int, Double]], variant: Variant, other: Variant
) -> tuple[Double, Double] | None:
    """Return `paired_difference` over the seeds that both have, if they read the same documents as the same tokens."""
    ours, theirs = losses[variant.name], losses[other.name]
    seeds = [seed for seed in ours if seed in theirs]
    scored = [each[seed] for each in (ours, theirs) for seed in seeds]
    if len({each.shape for each in scored}) != 1 or not _same_tokens(study, out, (variant, other), seeds):
        return None
    return paired_difference(np.stack(scored[: len(seeds)]), np.stack(scored[len(seeds) :]))


def _same_tokens(study: Study, out: Path, variants: Sequence[Variant], seeds: Sequence[int]) -> bool:
    runs = [study.run(variant, seed) for variant in variants for seed in seeds]
    tokenizers = {(out / run.name / TOKENIZER_FILE).read_bytes() for run in runs}
    lengths = {run.settings.training_length for run in runs}
    texts = {study.data or (run.settings.data, run.settings.text_field) for run in runs}
    return len(tokenizers) == len(lengths) == len(texts) == 1


def _run(study: Study, out: Path, variant: Variant, seed: int) -> dict[str, Any]:
    """Return a run's settings and what its training has recorded."""
    run = study.run(variant, seed)
    found: dict[str, Any] = {
        "run": run.name,
        "variant": variant.name,
        "seed": seed,
        "trouble": trouble(study, out, run),
        "settings": dataclasses.asdict(run.settings),
    }
    if (out / run.name / WEIGHTS_FILE).is_file():
        record = json.loads((out / run.name / TRAINING_FILE).read_text(encoding="utf-8"))
        found["parameters"] = record["parameters"]
        found["tokens_per_second"] = record.get("tokens_per_second")  # earlier releases did not record it
        found["history"] = [[entry["step"], entry["loss"]] for entry in record["history"]]
    return found


def _probes(study: Study, out: Path) -> list[dict[str, Any]]:
    """Return what far text gains by variant, probe and length: mean over seeds, and over depths where there are any.

    The standard error is over seeds; with one seed that over documents, which is not known of a mean over depths.
    """
    found = []
    for variant in study.all_variants if study.probes is not None else ():
        cells: dict[tuple[str, int], dict[int, list[dict[str, Any]]]] = {}
        for seed in study.seeds:
            report = read_probes(out / study.run(variant, seed).name, study) or {"context_use": (), "recall": ()}
            for result in (*report["context_use"], *report["recall"]):
                cell = cells.setdefault((result.get("probe", "context-use"), result["length"]), {})
                cell.setdefault(seed, []).append(result)
        for (probe, length), by_seed in cells.items():
            results = [result for of_seed in by_seed.values() for result in of_seed]
            gained = np.array([np.mean([result["gained"] for result in of_seed]) for of_seed in by_seed.values()])
            error = float(gained.std(ddof=1) / np.sqrt(len(gained))) if len(gained) > 1 else None
            exact = [result["exact_match"] for result in results if "exact_match" in result]
            found.append(
                {
                    "variant": variant.name,
                    "probe": probe,
                    "length": length,
                    "gained": float(gained.mean()),
                    "gained_stderr": results[0]["gained_stderr"] if len(results) == 1 else error,
                    "exact_match": float(np.mean(exact)) if exact else None,
                }
            )
    return found


def _trade_off(
    study: Study, scored: Mapping[str, Mapping[int, Double]], probes: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return what each variant recalls and how it predicts, both beyond its own N.

    `loss` is the mean over ranges of positions, `gained` and `exact_match` over probes of recall and lengths. Variants
    that lack either are left out.
    """
    beyond = [begin >= 1 for begin in (0, *study.lengths[:-1])]
    trained = {variant.name: study.settings_of(variant, 0).training_length for variant in study.all_variants}
    found = []
    for name, losses in scored.items():
        recalled = [
            result
            for result in probes
            if result["variant"] == name and result["exact_match"] is not None and result["length"] > trained[name]
        ]
        if recalled and any(beyond):
            means = {key: float(np.mean([result[key] for result in recalled])) for key in ("gained", "exact_match")}
            loss = float(np.mean([each[:, beyond] for each in losses.values()]))
            found.append({"variant": name, "loss": loss, **means})
    return found


def _cost(study: Study, out: Path) -> list[dict[str, Any]]:
    """Return what `cost.measure` has found, with quartiles of the ratios to `against` where it is among them."""
    kept = read_record(out / COST_FILE) if study.cost else None
    results: list[dict[str, Any]] = kept["results"] if kept else []
    for result in results:
        for what in ("prefill", "step"):
            if study.against in result[what]:
                result[f"{what}_ratio"] = ratios(result[what], study.against)
    return results
