"""One run of a study, from text to probes; what is finished is not done again.

    python -m expe_edge.study.work OUT NAME

does it in a process of its own, by the study file in OUT, one thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from expe_edge.errors import ExPEEdgeError
from expe_edge.results import finite
from expe_edge.study.plan import Run, Study, read_study
from expe_edge.study.records import read_record, write_record
from expe_edge.training.settings import TRAINER_DIRECTORY, WEIGHTS_FILE

#: The study file as the runs of a directory are made by it, and what a run's probes have found.
STUDY_FILE = "study.yaml"
PROBES_FILE = "probes.json"


def carry_out(study: Study, out: Path, run: Run) -> None:
    """Train, score and probe a run in `out`, each unless it is done; training goes on from its last checkpoint.

    Raises:
        ExPEEdgeError: as training, scoring and probing do.
        KeyboardInterrupt: after Ctrl-C, with what is needed to go on saved.
    """
    from expe_edge.quality.scoring import open_scorer
    from expe_edge.study.scores import score

    directory = train_run(out, run)
    scorer = open_scorer(directory)
    score(scorer, study.lengths, study.documents, study.data)
    if study.probe_settings is not None and read_probes(directory, study) is None:
        from expe_edge.quality.probing import probe

        found = probe([scorer], study.probe_settings, sources=study.data).to_dict()
        write_record(directory / PROBES_FILE, asked_of_probes(study), report=found)


def train_run(out: Path, run: Run) -> Path:
    """Return the directory of a run in `out`, trained unless it is; an interrupted one goes on.

    Raises:
        ExPEEdgeError, KeyboardInterrupt: as `training.run.train`.
    """
    from expe_edge.training.run import train

    directory = out / run.name
    if not (directory / WEIGHTS_FILE).is_file():
        resume = any((directory / TRAINER_DIRECTORY).glob("checkpoint-*/trainer_state.json"))
        train(run.settings, directory, resume=resume, force=not resume)
    return directory


def asked_of_probes(study: Study) -> dict[str, Any]:
    """Return what tells one probing of a run from another, as plain data."""
    asked: dict[str, Any] = finite({**dict(study.probes or {}), "texts": study.data})
    return asked


def read_probes(directory: Path, study: Study) -> Mapping[str, Any] | None:
    """Return what probes of a run have found, as `ProbeReport.to_dict`, if they are those of the study."""
    record = read_record(directory / PROBES_FILE)
    return dict(record["report"]) if record is not None and record["asked"] == asked_of_probes(study) else None


def main() -> None:
    """Carry out the run that the command line names; what goes wrong is one line, exit code 1."""
    out, name = Path(sys.argv[1]), sys.argv[2]
    study = read_study(out / STUDY_FILE)
    (run,) = (run for run in study.runs if run.name == name)
    try:
        carry_out(study, out, run)
    except ExPEEdgeError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
