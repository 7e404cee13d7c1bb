"""Carrying out the runs of a study side by side: joblib hands them out, each is a process of its own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from expe_edge.errors import ConfigError, unknown_name
from expe_edge.progress import note, progress_bar
from expe_edge.study.plan import Study
from expe_edge.study.state import counts, finished, require_unchanged
from expe_edge.study.work import STUDY_FILE
from expe_edge.training.replacing import require_writable

#: Backends that joblib learns of from elsewhere, and what pip installs for them.
ELSEWHERE = {"ray": "ray", "dask": "distributed"}
#: In the directory of a study, it tells its workers, on whatever machine, to stop.
STOP_FILE = ".stop"
#: Seconds between two looks at it, and between two at what runs have done.
PATIENCE = 0.5


def begin(study: Study, file: Path, out: Path) -> None:
    """Make the directory of a study and put its file there, where the workers read it.

    Raises:
        ConfigError: `out` cannot be written, or holds runs of other settings, which stay as they are.
    """
    require_writable(out)
    require_unchanged(study, out)
    out.mkdir(parents=True, exist_ok=True)
    if file.resolve() != (out / STUDY_FILE).resolve():
        shutil.copyfile(file, out / STUDY_FILE)


def run_all(study: Study, out: Path, jobs: int | None, backend: str) -> None:
    """Carry out every run that is not finished, so many at a time; `state.trouble` tells what failed.

    Args:
        out: where the study file is and the runs go. jobs: by default one for each processor, here or of the cluster.
        backend: of joblib, after `register`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once every run has saved what it goes on from; a second one stops at once.
    """
    from joblib import Parallel, delayed, parallel_config

    (out / STOP_FILE).unlink(missing_ok=True)
    waiting = [run for run in study.runs if not finished(study, out, run)]
    if not waiting:
        return
    most = jobs or (-1 if backend in ELSEWHERE else os.cpu_count() or 1)  # -1: what the cluster has
    place, owner = (str(Path.cwd()), str(out.absolute())), os.getpid()
    with (
        stopped_by_file(out) as interrupted,
        watched(study, out),
        parallel_config(backend=backend, n_jobs=min(most, len(waiting))),
    ):
        Parallel(batch_size=1)(delayed(run_alone)(*place, run.name, owner) for run in waiting)
    if interrupted():
        raise KeyboardInterrupt


def register(backend: str) -> None:
    """Make a backend known to joblib, and a client of the cluster that its environment names.

    Raises:
        ConfigError: joblib does not know it, or it is not installed.
    """
    from joblib.parallel import BACKENDS

    try:
        if backend == "ray":
            from ray.util.joblib import register_ray

            register_ray()
        elif backend == "dask":
            from distributed import Client

            Client()
        elif backend not in BACKENDS:
            raise ConfigError(unknown_name("backend", backend, {*BACKENDS, *ELSEWHERE}))
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`backend` {backend} needs {error.name}, not installed; pip install {ELSEWHERE[backend]} on every machine"
        ) from error


def run_alone(directory: str, out: str, name: str, owner: int) -> None:
    """Carry out one run in a process of its own; what it prints goes to a log beside its directory.

    Where `STOP_FILE` appears it gets Ctrl-C, at which it saves what it goes on from.

    Args:
        directory: to work in. owner: the process of the study; a worker of its leaves Ctrl-C to it.
    """
    stop = Path(out, STOP_FILE)
    if stop.exists():
        return
    if os.getpid() != owner and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, lambda *_: None)  # not SIG_IGN, which the run would inherit
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with Path(out, f"{name}.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(  # noqa: S603  # this project's own module
            [sys.executable, "-m", "expe_edge.study.work", out, name],
            cwd=directory,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # or Ctrl-C at the terminal would reach it twice
        )
        try:
            while process.poll() is None and not stop.exists():
                time.sleep(PATIENCE)
            process.send_signal(signal.SIGINT)  # to none, where it has ended
            process.wait()
        finally:
            process.kill()


@contextmanager
def stopped_by_file(out: Path) -> Iterator[Callable[[], bool]]:
    """Turn Ctrl-C into `STOP_FILE`; a second one interrupts at once. Yields what tells whether there was one."""
    stop = out / STOP_FILE

    def handle(*_: object) -> None:
        stop.touch()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        note("stopping: runs save what they go on from; Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield stop.exists
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def watched(study: Study, out: Path) -> Iterator[None]:
    """Show, while the work goes on, how many runs are finished, and the steps and documents of all together."""
    over, bar, known = threading.Event(), progress_bar(), {run.name for run in study.runs if finished(study, out, run)}
    steps = sum(run.settings.max_steps for run in study.runs)
    totals = {"runs": len(study.runs), "training steps": steps, "documents": len(study.runs) * study.documents}

    def done() -> tuple[int, ...]:
        whole = [(run.settings.max_steps, study.documents) for run in study.runs if run.name in known]
        parts = [counts(study, out, run) for run in study.runs if run.name not in known]
        return (len(known), *map(sum, zip(*whole, *parts, strict=True)))

    def look() -> None:
        for run in study.runs:
            if run.name not in known and finished(study, out, run):
                known.add(run.name)
                bar.console.print(f"{run.name} is finished, {len(known)} of {len(study.runs)} runs", highlight=False)
        for task, completed in zip(tasks, done(), strict=True):
            bar.update(task, completed=completed)

    def keep_looking() -> None:
        while not over.wait(PATIENCE):
            look()

    tasks = [
        bar.add_task(name, total=total, completed=completed)
        for (name, total), completed in zip(totals.items(), done(), strict=True)
    ]
    watcher = threading.Thread(target=keep_looking, daemon=True)
    with bar:
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            look()
