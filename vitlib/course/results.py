"""The folder of a sweep, and its results as tables.

- ``runs/<label>/`` of each finished run: the executed notebook, its log, what it saved, and ``run.json``
- ``failed/<label>/`` of each that failed, the same as far as it got
- ``results.csv``, ``results.json`` and ``report.html`` about all of them

Whatever stands there under such a name is whole: runs take place in ``.work`` and are moved.
"""

import csv
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path, PurePosixPath

import filelock
import nbformat

from vitlib.course.grid import Plan, Run
from vitlib.course.runner import RunResult, escape_formula, last_cell
from vitlib.course.worker import LOG, TOKEN, Result
from vitlib.utils import atomic_write

RECORD = "run.json"
EVERY = 5  # seconds between two writings of the tables while runs come in


class SweepFolder:
    """The folder of a plan's runs, with a record of each. Only one process at a time may write to it: it is used in a
    ``with`` statement.

    Raises:
        ValueError: if another sweep is at work in it.
        OSError: if it cannot be written.
    """

    def __init__(self, path: str | Path, plan: Plan, command: str = ""):
        self.path = Path(path).resolve()
        self.work = self.path / ".work"
        self.token = uuid.uuid4().hex
        self._plan = plan
        self._command = command
        self._lock = filelock.FileLock(self.path / ".lock")
        self._records: dict[str, dict] = {}
        self._others: list[dict] = []
        self._next_writing = 0.0

    def __enter__(self) -> "SweepFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except filelock.Timeout as error:
            raise ValueError(
                f"Another sweep is at work in {self.path}; wait for it, or choose another folder with --out."
            ) from error
        shutil.rmtree(self.work, ignore_errors=True)  # of a sweep that was killed
        self.work.mkdir()
        (self.work / TOKEN).write_text(self.token)
        found = {run.key: finished(self.path, run) for run in self._plan.runs}
        self._records = {key: record for key, record in found.items() if record}
        self._others = list(self._read_others())
        return self

    def __exit__(self, *exception) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self._lock.release()

    def missing(self) -> list[Run]:
        """The runs of the plan that are not finished."""
        return [run for run in self._plan.runs if self._records.get(run.key, {}).get("status") != "ok"]

    def store(self, run: Run, result: Result, attempts: int) -> dict:
        """Move what a run left to its place, with its record, which is returned."""
        folder, outcome = self._folder_of(run, result), result.outcome
        if outcome.status != "ok":
            self._rescue(folder, outcome)
        record = self._new_record(run, outcome) | {
            "host": result.host,
            "attempts": attempts,
            "left_out": result.left_out,
        }
        (folder / RECORD).write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
        place = self.path / ("runs" if outcome.status == "ok" else "failed") / run.label
        place.parent.mkdir(exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)  # an earlier failure, or damaged: what is whole is never run again
        folder.replace(place)
        if outcome.status == "ok":
            shutil.rmtree(self.path / "failed" / run.label, ignore_errors=True)
        self._records[run.key] = record
        if time.monotonic() > self._next_writing:  # each writing is about all runs
            self.write()
            self._next_writing = time.monotonic() + EVERY
        return record

    def write(self) -> dict:
        """Write results.csv and results.json about the runs of the plan, in its order, and about others that are
        finished, for instance those of a larger grid. Returns what results.json holds.
        """
        plan = self._plan
        records = [
            self._records.get(run.key)
            or _failed(self.path, run)
            or self._new_record(run, RunResult("not run")) | {"host": None, "attempts": 0, "left_out": []}
            for run in plan.runs
        ] + self._others
        results = {
            "command": self._command,
            "notebook": plan.lesson.name,
            "notebook_sha256": plan.sha256,
            "vitlib": version("vitlib"),
            "varied": list(dict.fromkeys([*plan.varied, *(name for one in records for name in one["varied"])])),
            "runs": records,
        }
        with atomic_write(self.path / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=2, default=str) + "\n", encoding="utf-8")
        with atomic_write(self.path / "results.csv") as temporary:
            write_csv(temporary, records, results["varied"])
        return results

    def _new_record(self, run: Run, outcome: RunResult) -> dict:
        about = {"run": run.label, "key": run.key, "notebook": self._plan.lesson.name}
        about |= {"notebook_sha256": self._plan.sha256, "vitlib": version("vitlib")}
        given = {"parameters": run.parameters, "seed": run.parameters.get("seed"), "varied": run.varied}
        return {**about, **asdict(outcome), **given}

    def _read_others(self) -> Iterator[dict]:
        """Records of finished runs of the same notebook and version which the plan does not have."""
        planned = {run.label for run in self._plan.runs}
        for folder in sorted((self.path / "runs").glob("*/")):
            record = None if folder.name in planned else _read(folder)
            if record and (record["notebook_sha256"], record["vitlib"]) == (self._plan.sha256, version("vitlib")):
                yield record

    def _folder_of(self, run: Run, result: Result) -> Path:
        """The run's folder in ``work``: where the worker worked, or what it sent, or what a killed one left."""
        if result.folder:
            return Path(result.folder)
        left = sorted(self.work.glob(f"{run.key}-*/"), key=os.path.getmtime)
        if left and not result.files:
            return left[-1]
        folder = Path(tempfile.mkdtemp(prefix=f"{run.key}-", dir=self.work))
        for name, content in result.files.items():
            path = PurePosixPath(name)
            if not path.is_absolute() and ".." not in path.parts:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(content)
        return folder

    def _rescue(self, folder: Path, outcome: RunResult) -> None:
        """Of a run whose worker was killed, keep as the failed notebook what papermill had written, and name the cell;
        the log says why it ended."""
        partial = folder / f"{self._plan.lesson.name}.partial.ipynb"
        with suppress(Exception):  # it may have been killed while it wrote
            executed = nbformat.read(partial, as_version=4)
            outcome.error = f"{last_cell(executed)}{outcome.error}"
            partial.replace(folder / f"{self._plan.lesson.name}.failed.ipynb")
        log = folder / LOG
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        if outcome.error and outcome.error not in text:
            log.write_text(f"{text}\n{outcome.error}\n", encoding="utf-8")


def finished(sweep: Path, run: Run) -> dict | None:
    """The record of a finished run; None if there is none, or what is there is not whole."""
    return _read(sweep / "runs" / run.label, run.key)


def _failed(sweep: Path, run: Run) -> dict | None:
    return _read(sweep / "failed" / run.label, run.key)


def _read(folder: Path, key: str | None = None) -> dict | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        whole = {"run", "status", "parameters", "figures", "varied", "versions", "notebook_sha256"} <= record.keys()
        return record if whole and record["key"] == (key or record["key"]) else None
    except (OSError, ValueError, AttributeError, KeyError):
        return None


def write_csv(path: Path, records: Sequence[dict], varied: Sequence[str]) -> None:
    """One row a run: parameters, those that vary first, then figures, then the rest. Figures that have the name of
    another column get ``figure_`` before it."""
    parameters = list(dict.fromkeys([*varied, *(name for record in records for name in record["parameters"])]))
    figures = list(dict.fromkeys(name for record in records for name in record["figures"]))
    versions = list(dict.fromkeys(name for record in records for name in record["versions"]))
    rest = ("seconds", "peak_memory_bytes", "host", "seed", "started", "attempts", "error", "key")
    rest = [name for name in rest if name not in parameters]
    taken = {"run", "status", *parameters, *rest}
    titles = [f"figure_{name}" if name in taken else name for name in figures]
    with open(path, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["run", "status", *parameters, *titles, *rest, *(f"version_{name}" for name in versions)])
        for record in records:
            cells = [record["run"], record["status"]]
            cells += [record["parameters"].get(name) for name in parameters]
            cells += [record["figures"].get(name) for name in figures]
            cells += [record.get(name) for name in rest]
            cells += [record["versions"].get(name) for name in versions]
            rows.writerow([escape_formula(cell) if isinstance(cell, str) else cell for cell in cells])
