"""Sweeps: give the runs of a :class:`vitlib.course.grid.Plan` to Dask workers, and tabulate the results.

The folder of a sweep holds ``runs/<label>/`` and ``failed/<label>/`` (executed notebook, log, saved files,
``run.json``), and results.csv, results.json and report.html about all runs. ``run.json`` is written when a run has
ended, so the same command finds the runs that are still missing.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
import socket
import sys
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextvars import Context
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from jupyter_core.utils import ensure_event_loop

from vitlib.course.figures import FIGURES_IN_TABLE, main_figures
from vitlib.course.kernels import RunResult, run_notebook
from vitlib.utils import alone_in, atomic_write, progress_bar

try:
    import dask
    import pandas as pd
    from dask.system import CPU_COUNT
    from distributed import Client, KilledWorker, LocalCluster, get_worker, wait
    from distributed.comm.addressing import parse_host_port
    from distributed.system import MEMORY_LIMIT
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'{error.name} is not installed, and sweeps need it; run `pip install "vitlib[sweep]"`.'
    ) from error

if TYPE_CHECKING:  # grids load torch, which workers do without
    from vitlib.course.grid import Plan, Run

MOST_ROWS = 40  # of the table at the end
RUN_MEMORY = 2**30  # bytes that one run may take; the course's kernels stay below with their own parameters
PATIENCE = 10  # seconds for a scheduler to answer and to have a worker
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # Dask sets them for its workers
LOCAL_SETTINGS = {
    "distributed.worker.profile.enabled": False,  # it takes a twentieth of a core of each worker
    "distributed.admin.tick.interval": "1s",
}


@dataclass
class Result:
    """One try of a run: its outcome, the host, and from a cluster its files as a zip archive."""

    outcome: RunResult
    host: str | None = None
    files: bytes = b""


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
    """Run the missing runs of a plan, and write results.csv, results.json and report.html into the folder ``out``.

    Args:
        scheduler: address of a Dask scheduler; None for this machine.
        workers: runs at a time on this machine; None for as many as cores and memory allow.
        threads: for each run; None for the cores that are left over, on a cluster for one.
        retries: how often a failed run is tried again.
        timeout: longest time for one run, in seconds; None for no limit.
        command: the command as typed, for the record.

    Returns:
        The content of results.json. A run is ok or failed.

    Raises:
        KeyboardInterrupt: after Ctrl-C; in results.json the missing runs are "not run".
        ValueError: if another sweep works in ``out``, or the address is wrong.
        OSError: if the folder cannot be written, or a scheduler cannot be reached or goes away. The results hold the
            runs that were finished by then.
    """
    out = Path(out).expanduser().resolve()
    with alone_in(out, "sweep", "--out"):
        records = _read_records(out)
        missing = [run for run in plan.runs if not _is_finished(records, run)]
        if scheduler:
            cluster, where, threads = _cluster_workers(scheduler), f"on {scheduler}", threads or 1
        else:
            workers, threads = local_size(max(1, len(missing)), workers, threads)
            cluster, where = _local_workers(workers), f"{workers} at a time on this machine"
        finished = len(plan.runs) - len(missing)
        say(
            f"Runs: {len(plan.runs)}; finished before: {finished}; to run: {len(missing)}, {where}, "
            f"threads for each: {threads}."
        )
        common = {
            "notebook": plan.source, "name": plan.lesson.name, "defaults": plan.lesson.defaults, "home": os.getcwd(),
            "threads": threads, "timeout": timeout,
        }  # fmt: skip
        jobs = []
        for run in missing:
            folder = None if scheduler else str(out / "runs" / run.label)
            jobs.append((run, common | {"folder": folder, "parameters": run.parameters}))
        try:
            if jobs:
                with cluster as client, progress_bar(description="sweep", total=len(jobs), unit="run") as bar:
                    for run, result, attempts in _run_all(client, jobs, retries):
                        records[run.key] = _store(out, plan, run, result, attempts)
                        bar.write(_line(records[run.key]), file=sys.stdout)
                        bar.update()
                        _write_tables(out, plan, records, command)
        except KeyboardInterrupt:
            say("The same command again goes on with what is missing.")
            raise
        finally:
            results = _write_tables(out, plan, records, command)
            from vitlib.course.report import write_report  # here, since workers do without matplotlib

            write_report(results, out / "report.html")
    return results


def local_size(runs: int, workers: int | None = None, threads: int | None = None) -> tuple[int, int]:
    """Return how many runs this machine does at a time, and with how many threads each.

    A small model gains little from a second thread. So there is a run for each core that the machine or its container
    grants, if memory allows, and the cores left over become threads.
    """
    if workers is None:
        workers = max(1, min(CPU_COUNT // (threads or 1), int(MEMORY_LIMIT // RUN_MEMORY), runs))
    return workers, threads or max(1, CPU_COUNT // workers)


@contextlib.contextmanager
def _local_workers(count: int) -> Iterator[Client]:
    """Start a scheduler and a worker of ``count`` threads in this process; they end with the block."""
    with (
        dask.config.set(LOCAL_SETTINGS),
        LocalCluster(
            n_workers=1,
            threads_per_worker=count,
            processes=False,
            protocol="tcp://",
            host="127.0.0.1",
            dashboard_address="127.0.0.1:0",  # any free port: 8787 may be that of another sweep
            memory_limit=None,  # it would count this process, not the kernels
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextlib.contextmanager
def _cluster_workers(address: str) -> Iterator[Client]:
    """Connect to the scheduler at ``address``, and check that its workers have this version of vitlib."""
    for name in ("distributed", "distributed.client"):  # they would say at length what is said here in one line
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    try:  # by hand: a Client that cannot connect stays half open, and may hold up the next one
        socket.create_connection(parse_host_port(address.partition("://")[2] or address), PATIENCE).close()
        client = Client(address, timeout=PATIENCE)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"scheduler={address!r} is not an address; give one such as tcp://192.0.2.1:8786.") from error
    except OSError as error:
        raise ConnectionError(
            f"No scheduler answers at {address} within {PATIENCE} s; start one with `dask scheduler`, or leave "
            "--scheduler out to use this machine."
        ) from error
    with client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise ConnectionError(
                f"The scheduler at {address} has no worker; start some with `dask worker {address} --nthreads 1`."
            ) from error
        own = version("vitlib")
        for worker, found in client.run(importlib.metadata.version, "vitlib", on_error="return").items():
            if found != own:
                raise ConnectionError(
                    f"The worker {worker} lacks vitlib {own} ({found}); install that with its extra `sweep` there."
                )
        yield client


def _run_all(client: Client, jobs: Sequence[tuple[Run, dict]], retries: int) -> Iterator[tuple[Run, Result, int]]:
    """Yield each run with its last result and the number of tries, as they end.

    Only as many are sent as the workers have threads. Dask would give each worker its share in advance, and fail all of
    that share with the run that kills the worker.
    """
    waiting, running, tries = deque(jobs), {}, Counter()
    try:
        while waiting or running:
            room = max(1, sum(client.nthreads().values())) - len(running)
            for _ in range(min(room, len(waiting))):
                run, job = waiting.popleft()
                running[client.submit(_work, **job, pure=False)] = run, job
            with contextlib.suppress(TimeoutError):  # after a second look for new workers
                wait(list(running), timeout=1, return_when="FIRST_COMPLETED")
            for future in [future for future in running if future.status != "pending"]:
                run, job = running.pop(future)
                try:
                    result = future.result()
                except CancelledError:
                    raise
                except KilledWorker:
                    result = Result(RunResult("failed", "its worker died (killed, or no memory left)"))
                except Exception as error:  # not of the notebook: a full disk, another version of a package
                    result = Result(RunResult("failed", f"its worker failed with {type(error).__name__}: {error}"))
                tries[run.key] += 1
                if result.outcome.status != "ok" and tries[run.key] <= retries:
                    waiting.appendleft((run, job))
                else:
                    yield run, result, tries[run.key]
    except (OSError, CancelledError) as error:
        raise ConnectionError("The scheduler is gone; the same command again goes on with what is missing.") from error
    finally:
        with contextlib.suppress(Exception):  # the connection may be what is broken
            client.cancel(list(running), force=True)  # so that workers end what nobody waits for


def _work(notebook, name, defaults, home, threads, timeout, folder, parameters) -> Result:
    """Execute the notebook once, as a Dask task.

    On this machine the run works in ``folder``. On a cluster that is None, since there may be no shared disk: the run
    works in a folder of its own, and its files come back with the result.
    """
    worker = get_worker()
    task = worker.get_current_task()

    def end() -> str:
        state = worker.state.tasks.get(task)
        return "" if state is not None and state.state == "executing" else "nobody waits for it any longer"

    # one of Dask's settings for its workers; with it a training on the CPU takes up to 1.5 times as long
    os.environ.pop("MALLOC_TRIM_THRESHOLD_", None)
    with tempfile.TemporaryDirectory(prefix="vitlib-", ignore_cleanup_errors=True) as temporary:
        place = Path(folder or f"{temporary}/run")
        shutil.rmtree(place, ignore_errors=True)  # of an earlier try
        place.mkdir(parents=True, exist_ok=True)
        given = {name: value for name, value in parameters.items() if value != defaults[name]}
        if "run_dir" in defaults:
            given["run_dir"] = str(place)
        with open(place / "log.txt", "w", encoding="utf-8") as log:
            outcome = Context().run(
                _run_and_close_loop, nbformat.reads(notebook, as_version=4), place, name, given,
                timeout=timeout, log=log, end=end, environment=dict.fromkeys(THREAD_VARIABLES, str(threads)),
                folder=Path(home) if os.path.isdir(home) else place,
            )  # fmt: skip
        files = b"" if folder else Path(shutil.make_archive(f"{temporary}/files", "zip", place)).read_bytes()
        return Result(outcome, socket.gethostname(), files)


def _run_and_close_loop(*arguments, **options) -> RunResult:
    """Run a notebook. Within a context of its own it makes an event loop, which would stay, with three open files."""
    result = run_notebook(*arguments, **options)
    ensure_event_loop().close()
    return result


def _store(out: Path, plan: Plan, run: Run, result: Result, attempts: int) -> dict:
    """Put the files of a run into their place with a record, and return the record."""
    folder, outcome = out / "runs" / run.label, result.outcome
    for earlier in out.glob(f"*/*-{run.key[:8]}"):  # other tries, also under another label
        if earlier != folder or result.files:  # without files from a cluster this try has worked in folder itself
            shutil.rmtree(earlier, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if result.files:
        zipfile.ZipFile(io.BytesIO(result.files)).extractall(folder)  # it writes nowhere else, ".." or not
    if outcome.error:
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"\n{outcome.error}\n")
    record = _record(plan, run, result, attempts)
    with atomic_write(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    if outcome.status != "ok":
        (out / "failed").mkdir(exist_ok=True)
        folder.replace(out / "failed" / run.label)
    return record


def _record(plan: Plan, run: Run, result: Result, attempts: int) -> dict:
    tried = asdict(result.outcome) | {"host": result.host, "attempts": attempts}
    given = {"parameters": run.parameters, "varied": run.varied}
    return {"run": run.label, "key": run.key} | _about(plan) | tried | given


def _about(plan: Plan) -> dict[str, str]:
    return {"notebook": plan.lesson.name, "notebook_sha256": plan.sha256, "vitlib": version("vitlib")}


def _read_records(out: Path) -> dict[str, dict]:
    """Return the records of all runs in the folder of a sweep by their keys, but damaged ones."""
    records = {}
    for path in [*sorted(out.glob("failed/*/run.json")), *sorted(out.glob("runs/*/run.json"))]:
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(path.read_text(encoding="utf-8"))
            records[record["key"]] = record
    return records


def _is_finished(records: Mapping[str, dict], run: Run) -> bool:
    return records.get(run.key, {}).get("status") == "ok"


def _write_tables(out: Path, plan: Plan, records: Mapping[str, dict], command: str) -> dict:
    """Write results.json and results.csv: the runs of the plan in its order, then others of the same notebook and
    version that are finished, for instance those of a larger grid. Return the content of results.json.
    """
    rows = [records.get(run.key) or _record(plan, run, Result(RunResult("not run")), 0) for run in plan.runs]
    keys, about = {run.key for run in plan.runs}, _about(plan)
    rows += [one for key, one in records.items() if key not in keys and one["status"] == "ok" and one == one | about]
    # runs of another -p or --parameters differ in more than their grids say
    values = {name: {repr(row["parameters"].get(name)) for row in rows} for name in plan.lesson.parameters}
    differing = [name for name, found in values.items() if len(found) > 1]
    varied = dict.fromkeys([*plan.varied, *(name for record in rows for name in record["varied"]), *differing])
    results = {"command": command, **about, "varied": list(varied), "runs": rows}
    with atomic_write(out / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
    with atomic_write(out / "results.csv") as temporary:
        as_frame(results)[0].to_csv(temporary, index=False)
    return results


def as_frame(results: Mapping) -> tuple[pd.DataFrame, dict[str, str]]:
    """Return a row for each run: parameters, those that vary first, then figures, then the rest.

    The second value is the column of each figure: one with the name of another column gets ``figure_`` before it.
    """
    runs = results["runs"]
    parameters = dict.fromkeys([*results["varied"], *(name for run in runs for name in run["parameters"])])
    rest = ("seconds", "peak_memory_bytes", "host", "started", "attempts", "error", "key")
    rest = [name for name in rest if name not in parameters]
    taken = {"run", "status", *parameters, *rest}
    figures = dict.fromkeys(name for run in runs for name in run["figures"])
    titles = {name: f"figure_{name}" if name in taken else name for name in figures}
    rows = [
        {"run": run["run"], "status": run["status"]}
        | {name: run["parameters"].get(name) for name in parameters}
        | {title: run["figures"].get(name) for name, title in titles.items()}
        | {name: run[name] for name in rest}
        | {f"version_{name}": value for name, value in run["versions"].items()}
        for run in runs
    ]
    # objects, or a column of whole numbers with a gap would become one of fractions
    return pd.DataFrame(rows, columns=None if rows else [*taken], dtype=object), titles


def preview(plan: Plan, out: str | Path) -> str:
    """Return the runs of a plan as a table, each with whether it is finished in ``out``."""
    records = _read_records(Path(out).expanduser())
    rows = [run.varied | {"state": "finished" if _is_finished(records, run) else "to run"} for run in plan.runs]
    table = pd.DataFrame(rows, index=range(1, len(rows) + 1), dtype=object)
    return f"{table.to_string()}\nRuns: {len(rows)}; to run: {(table['state'] == 'to run').sum()}."


def summary(results: Mapping) -> str:
    """Return the table printed at the end: all runs, or of many those that are not ok, and the count of each status."""
    frame, titles = as_frame(results)
    shown = frame if len(frame) <= MOST_ROWS else frame[frame["status"] != "ok"].head(MOST_ROWS)
    columns = ["status", *results["varied"], *list(titles.values())[:FIGURES_IN_TABLE], "seconds", "error"]
    table = shown[columns].fillna("").to_string(index=False, float_format="{:.4g}".format) if len(shown) else ""
    statuses = Counter(frame["status"])
    return f"{table}\nRuns: {', '.join(f'{count} {status}' for status, count in statuses.items())}."


def _line(run: Mapping) -> str:
    seconds = "" if run["seconds"] is None else f"{run['seconds']:.1f} s"
    return "  ".join(filter(None, (run["status"], run["run"], seconds, main_figures(run["figures"]), run["error"])))
