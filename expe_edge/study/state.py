"""What is on disk of the runs of a study."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from expe_edge.errors import CheckpointError, ConfigError, one_line
from expe_edge.study.plan import Run, Study
from expe_edge.study.scores import PARTIAL_SCORES_FILE, SCORES_FILE, asked_for, read_losses
from expe_edge.study.work import read_probes
from expe_edge.training.settings import TRAINING_FILE, WEIGHTS_FILE, TrainSettings

#: Settings that may change between two calls: they decide nothing of the outcome.
FREE_SETTINGS = ("save_every", "log_every")
#: How `train` says in a log how far it is.
STEP = re.compile(r"^step (\d+)/\d+ ", re.MULTILINE)


def losses_of(study: Study, out: Path, run: Run, name: str = SCORES_FILE) -> list[list[float]]:
    """Return the losses of a run as the study asks for them, (documents, buckets); none where they are not there."""
    return read_losses(out / run.name / name, asked_for(study.lengths, study.documents, study.data))


def finished(study: Study, out: Path, run: Run) -> bool:
    """Tell whether a run is trained, scored and probed."""
    directory = out / run.name
    probed = study.probe_settings is None or read_probes(directory, study) is not None
    return probed and (directory / WEIGHTS_FILE).is_file() and bool(losses_of(study, out, run))


def log_of(out: Path, run: Run) -> str:
    """Return what a run has printed so far."""
    try:
        return (out / f"{run.name}.log").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def counts(study: Study, out: Path, run: Run) -> tuple[int, int]:
    """Return how many steps a run has trained, as its log has it, and how many documents it has scored."""
    if (out / run.name / WEIGHTS_FILE).is_file():
        steps = run.settings.max_steps
    else:
        steps = int((STEP.findall(log_of(out, run)) or [0])[-1])
    if losses_of(study, out, run):
        return steps, study.documents
    return steps, len(losses_of(study, out, run, PARTIAL_SCORES_FILE))


def trouble(study: Study, out: Path, run: Run) -> str | None:
    """Return why a run is not finished, the last line of its log; None where it is."""
    if finished(study, out, run):
        return None
    lines = log_of(out, run).strip().splitlines()
    return one_line(lines[-1].removeprefix("Error: ")) if lines else "not begun"


def require_unchanged(study: Study, out: Path) -> None:
    """Raise `ConfigError` where a run on disk was begun by other settings than the study's."""
    from expe_edge.training.record import differences

    names = [each.name for each in dataclasses.fields(TrainSettings) if each.name not in FREE_SETTINGS]
    for run in study.runs:
        directory = out / run.name
        if not (directory / TRAINING_FILE).is_file():
            continue
        try:
            changed = list(differences(run.settings, directory, names))
        except (CheckpointError, TypeError) as error:
            raise CheckpointError(f"{directory}: its {TRAINING_FILE} is damaged; move it away") from error
        for name, stored, asked in changed:
            raise ConfigError(
                f"{name} is {asked} in the study, but {stored} in the run of {directory}; change it back, move the run "
                "away, or choose another `out`"
            )
