"""Sweeps: grids of runs of one notebook on Dask workers. The same command again runs what is missing or failed, and of
a grid that has grown only what is new.
"""

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from vitlib.arguments import check_number, check_path, check_text, check_type, check_whole
from vitlib.course.figures import format_figure
from vitlib.course.grid import Plan, Run
from vitlib.course.results import SweepFolder, finished
from vitlib.course.runner import FIGURES_IN_TABLE, text_table
from vitlib.course.worker import Job, Result


def run_sweep(
    plan: Plan,
    out: str | Path,
    *,
    scheduler: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    retries: int = 0,
    timeout: float | None = 3600,
    command: str = "",
    say: Callable[[str], None] = print,
) -> dict:
    """Run what is missing of a plan, and write results.csv, results.json and report.html into the folder ``out``.

    Args:
        plan: of :func:`vitlib.course.grid.make_plan`.
        out: folder of the sweep.
        scheduler: address of a Dask scheduler; None for worker processes on this machine.
        workers: how many of these; None for as many as cores and memory allow.
        threads: for each run to compute with; None for those that are left over, on a cluster for one.
        retries: how often a run that failed is tried again.
        timeout: longest time for one run, in seconds; None for no limit.
        command: what was typed, for the record.
        say: gets lines for people.

    Returns:
        what results.json holds. Its runs have the status ok, failed or, where Ctrl-C ended the sweep, not run.

    Raises:
        ValueError: for a value that is not allowed, if another sweep is at work in ``out``, or if the scheduler's
            address is none.
        OSError: if the folder cannot be written, or a scheduler cannot be reached or goes away. What was finished by
            then is in the results.
        ModuleNotFoundError: if Dask is not installed.
    """
    check_type("plan", plan, Plan, "what make_plan returns")
    check_path("out", out)
    check_text("scheduler", scheduler, optional=True)
    check_whole("workers", workers, optional=True)
    check_whole("threads", threads, optional=True)
    check_whole("retries", retries, 0)
    check_number("timeout", timeout, above=0, optional=True)
    cluster = _engine()
    with SweepFolder(out, plan, command) as folder:
        missing = folder.missing()
        if scheduler is None:
            workers, threads = cluster.local_size(max(1, len(missing)), workers, threads)
            where = f"{workers} at a time on this machine, threads for each: {threads}"
        else:
            threads, where = threads or 1, f"on {scheduler}, threads for each: {threads or 1}"
        todo = len(missing)
        say(f"Runs: {len(plan.runs)}; finished before: {len(plan.runs) - todo}; to run: {todo}, {where}.")
        runs = {run.key: run for run in missing}

        def done(job: Job, result: Result, attempts: int) -> str:
            return line(folder.store(runs[job.key], result, attempts))

        try:
            if missing:
                with cluster.cluster_workers(scheduler) if scheduler else cluster.local_workers(workers) as client:
                    threading.Thread(target=_load_report, daemon=True).start()  # the runs leave time for it
                    jobs = [_job(run, plan, folder, threads, timeout) for run in missing]
                    cluster.run_jobs(client, jobs, retries, done)
        except KeyboardInterrupt:
            say("Interrupted; the same command again goes on with what is missing.")
        finally:
            results = folder.write()
            _write_report(results, folder.path)
    return results


def _engine():
    """The module that needs Dask."""
    try:
        from vitlib.course import cluster
    except ModuleNotFoundError as error:
        if error.name not in ("dask", "distributed"):
            raise
        raise ModuleNotFoundError(
            f'{error.name} is not installed, and sweeps need it; run `pip install "vitlib[sweep]"`.'
        ) from error
    return cluster


def _job(run: Run, plan: Plan, folder: SweepFolder, threads: int, timeout: float | None) -> Job:
    lesson = plan.lesson
    defaults = lesson.defaults
    return Job(
        key=run.key,
        name=lesson.name,
        notebook=plan.source,
        parameters={name: value for name, value in run.parameters.items() if value != defaults[name]},
        defaults=defaults,
        has_run_dir="run_dir" in lesson.parameters,
        work=str(folder.work),
        token=folder.token,
        home=os.getcwd(),
        threads=threads,
        timeout=timeout,
        topic="",
    )


def _load_report():
    """The module that draws figures; it takes longer to load than all others here."""
    from vitlib.course import report

    return report


def _write_report(results: dict, folder: Path) -> None:
    _load_report().write_report(results, folder / "report.html")


def preview(plan: Plan, out: str | Path) -> str:
    """The runs of a plan as a table, each with whether it is finished in ``out``."""
    states = ["finished" if finished(Path(out), run) else "to run" for run in plan.runs]
    rows = [("", *plan.varied, "state")]
    rows += [
        (str(number), *(str(run.varied[name]) for name in plan.varied), state)
        for number, (run, state) in enumerate(zip(plan.runs, states, strict=True), start=1)
    ]
    return "\n".join([*text_table(rows), f"Runs: {len(plan.runs)}; to run: {states.count('to run')}."])


MOST_ROWS = 40


def summary(results: dict) -> str:
    """What is printed at the end: all runs, or of many those that are not ok, and how many there are of each status."""
    runs, statuses = results["runs"], [run["status"] for run in results["runs"]]
    shown = runs if len(runs) <= MOST_ROWS else [run for run in runs if run["status"] != "ok"][:MOST_ROWS]
    counts = ", ".join(
        f"{statuses.count(status)} {status}" for status in ("ok", "failed", "not run") if status in statuses
    )
    return "\n".join(filter(None, (table(shown, results["varied"]) if shown else "", f"Runs: {counts}.")))


def table(records: Sequence[dict], varied: Sequence[str]) -> str:
    """The runs as lines of text: status, what varies, the main figures, seconds and memory, and why one failed."""
    figures = list(dict.fromkeys(name for record in records for name in record["figures"]))[:FIGURES_IN_TABLE]
    rows = [("status", *varied, *figures, "seconds", "peak memory", "")]
    for record in records:
        memory = record["peak_memory_bytes"]
        rows.append(
            (
                record["status"],
                *(str(record["parameters"].get(name, "")) for name in varied),
                *(format_figure(record["figures"][name]) if name in record["figures"] else "" for name in figures),
                "" if record["seconds"] is None else f"{record['seconds']:.1f}",
                "" if memory is None else f"{memory / 2**20:.0f} MiB",
                record["error"] or "",
            )
        )
    numbers = range(1 + len(varied), len(rows[0]) - 1)
    return "\n".join(text_table(rows, right=numbers))


def line(record: dict) -> str:
    """One run in one line, printed as it ends."""
    figures = list(record["figures"].items())[:FIGURES_IN_TABLE]
    seconds = "" if record["seconds"] is None else f"{record['seconds']:.1f} s"
    text = ", ".join(f"{key} {format_figure(value)}" for key, value in figures)
    return "  ".join(filter(None, (record["status"], record["run"], seconds, text, record["error"])))
