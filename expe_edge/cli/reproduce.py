"""`expe-edge reproduce`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from expe_edge.cli.output import PATH, report_written, require_counts, write_json


@click.command(short_help="Run a study and write its report.")
@click.argument("study", type=PATH)
@click.option("--out", type=PATH, help="Directory of runs and report.  [default: runs/ and the study file's name]")
@click.option("--jobs", type=int, help="Runs at a time, one thread each.  [default: every core]")
@click.option("--backend", default="loky", show_default=True, help="joblib's backend: ray and dask for many machines.")
@click.option("--report-only", is_flag=True, help="Run nothing; make the report from what is in --out.")
def reproduce(study: Path, out: Path | None, jobs: int | None, backend: str, report_only: bool) -> None:
    """Run the study in the YAML file STUDY, and write report.html, report.md and report.json.

    Variants × seeds are trained, scored by length, and probed and timed where the study says so. What is finished is
    kept, and what is not goes on from its last checkpoint: after Ctrl-C, or a failure, give the same command again.
    Where a run fails the others go on, the report says why, and the exit code is 1. docs/reproduce.md says what a study
    file holds.
    """
    require_counts(jobs=jobs)
    from rich.console import Console

    from expe_edge.cli.reproduce_page import sections_of, write_pages
    from expe_edge.cli.tables import print_whole, rows_by_name
    from expe_edge.errors import ConfigError, ExPEEdgeError
    from expe_edge.progress import note
    from expe_edge.study.cost import measure_variants
    from expe_edge.study.plan import read_study
    from expe_edge.study.report import gather
    from expe_edge.study.running import begin, register, run_all

    plan, text, out = read_study(study), study.read_text(encoding="utf-8"), out or Path("runs", study.stem)
    if not report_only:
        register(backend)
    elif not out.is_dir():
        raise ConfigError(f"{out} is not a directory; choose another `out`, or drop `report_only`")
    begin(plan, study, out)
    troubles = {}
    if not report_only:
        run_all(plan, out, jobs, backend)
        try:
            measure_variants(plan, out)
        except ExPEEdgeError as error:
            troubles["cost"] = str(error)
    report = gather(plan, out, text)
    troubles = report["troubles"] = {**report["troubles"], **troubles}
    sections = sections_of(report)
    for section in sections:
        if section.rows:
            table = rows_by_name(section.title, section.columns)
            for row in section.rows:
                table.add_row(*row)
            print_whole(table, Console())
    files = write_pages(report, sections, out)
    write_json(out / "report.json", report)
    report_written(*files, out / "report.json")
    note(*(f"{name}: {why}" for name, why in troubles.items()))
    if troubles:
        sys.exit(1)
