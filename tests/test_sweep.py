"""Sweeps on Dask workers: a run that fails, hangs or is killed stops no other, and the same command again goes on."""

import contextlib
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import filelock
import psutil
import pytest
from children import start_command, wait_until
from jupyter_core.utils import ensure_event_loop
from test_runner import SHOW, write_notebook

from vitlib.course import sweep as sweeps
from vitlib.course.grid import make_plan
from vitlib.course.kernels import RunResult
from vitlib.course.sweep import run_sweep

PARAMETERS = """\
seed: int = 0  # start of every random draw
case: str = "good"  # the behaviour
run_dir: str = "."  # folder for what this run saves"""
FIGURES = SHOW % '[["top1", 0.5 + seed / 100], ["chance", 0.1], ["seed", seed]]'
CASES = """\
import os, pathlib, time
print("this is", case, seed, "with", os.environ["OMP_NUM_THREADS"], "thread in", os.getcwd())
print("malloc:", os.environ.get("MALLOC_TRIM_THRESHOLD_"))
pathlib.Path(run_dir, "saved.txt").write_text("kept")
time.sleep(0.5)  # so that the log is written before the kernel ends
if case == "error":
    raise ValueError("=no luck")
if case == "dead kernel":
    os._exit(1)
if case == "hangs":
    time.sleep(1000)"""
ALL = {"case": ["good", "error", "dead kernel", "hangs"], "seed": [1, 0, 0, 0]}


@pytest.fixture(scope="module")
def client():
    """Two threads that all sweeps of this module share, in a program that has an event loop already."""
    ensure_event_loop()
    with sweeps._local_workers(2) as client, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweeps, "_local_workers", lambda count: contextlib.nullcontext(client))
        patch.setenv("MALLOC_TRIM_THRESHOLD_", "65536")  # as `dask worker` does
        yield client


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    write_notebook(folder, "07_case", CASES, FIGURES, parameters=PARAMETERS)
    return folder / "07_case.ipynb"


def sweep(notebook, out, grid=None, zips=(), **options):
    return run_sweep(make_plan(notebook, grid, zips), out, say=lambda line: None, **options)


@pytest.fixture(scope="module")
def everything(client, notebook, tmp_path_factory):
    """One sweep with all cases: its folder and its results."""
    out = tmp_path_factory.mktemp("all")
    return out, sweep(notebook, out, {}, [ALL], timeout=10)


@pytest.fixture
def no_kernel(client, monkeypatch):
    """Workers that find every run good, without a kernel."""

    def work(**job):
        return sweeps.Result(RunResult("ok"), "host")

    monkeypatch.setattr(sweeps, "_work", work)


def files(folder: Path) -> dict[str, int]:
    """The files of a folder with the time of their last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def statuses(found) -> list[str]:
    return [run["status"] for run in found["runs"]]


def test_bad_runs_are_named_with_their_cell(everything):
    _, found = everything
    assert statuses(found) == ["ok"] + ["failed"] * 3
    start = 'In [3] "import os, pathlib, time": '
    error, dead, hangs = (run["error"].removeprefix(start) for run in found["runs"][1:])
    assert error == "ValueError: =no luck" and dead.startswith("the kernel died")
    assert hangs == "stopped after 10 s; allow more with --timeout"
    assert "Runs: 1 ok, 3 failed." in sweeps.summary(found) and "=no luck" in sweeps.summary(found)
    assert sweeps.summary({**found, "runs": 50 * found["runs"][:1]}) == "\nRuns: 50 ok."


def test_every_run_leaves_its_notebook_log_and_files(everything):
    out, found = everything
    for run in found["runs"]:
        folder = out / ("runs" if run["status"] == "ok" else "failed") / run["run"]
        name = "07_case.ipynb" if run["status"] == "ok" else "07_case.failed.ipynb"
        assert sorted(files(folder)) == [name, "log.txt", "run.json", "saved.txt"]
        log = (folder / "log.txt").read_text()
        assert f"this is {run['varied']['case']} {run['varied']['seed']} with 1 thread in {os.getcwd()}" in log
        assert "malloc: None" in log, "Dask's setting for its workers makes training slow"
        assert not run["error"] or run["error"] in log
    assert {path.name for path in out.iterdir()} == {
        ".lock", "failed", "runs", "report.html", "results.csv", "results.json"
    }  # fmt: skip


def test_the_tables_have_a_row_for_each_run(everything):
    out, found = everything
    assert json.loads((out / "results.json").read_text()) == found
    assert found["varied"] == ["case", "seed"] and found["notebook"] == "07_case"
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:5] == ["run", "status", "case", "seed", "top1"]
    assert [row["top1"] for row in rows] == ["0.51", "", "", ""]
    assert rows[0]["figure_seed"] == rows[0]["seed"] == "1", "a figure named like a parameter"
    assert float(rows[0]["seconds"]) > 0 and int(rows[0]["peak_memory_bytes"]) > 10e6 and rows[0]["version_python"]
    assert rows[0]["host"] == socket.gethostname() and {row["attempts"] for row in rows} == {"1"}


def test_the_same_command_runs_only_what_is_missing(everything, no_kernel, notebook, tmp_path):
    first, found = everything
    out = tmp_path / "out"
    shutil.copytree(first, out)
    mended = sweep(notebook, out, {}, [ALL])
    assert statuses(mended) == ["ok"] * 4 and mended["runs"][0] == found["runs"][0]
    assert not list(out.glob("failed/*"))
    before = files(out / "runs")
    assert sweep(notebook, out, {}, [ALL])["runs"] == mended["runs"] and files(out / "runs") == before
    turned = sweep(notebook, out, {}, [{name: ALL[name] for name in reversed(ALL)}])
    assert turned["runs"] == mended["runs"] and files(out / "runs") == before, "known by its key, not its label"
    damaged = out / "runs" / mended["runs"][0]["run"] / "run.json"
    damaged.write_text(damaged.read_text()[:100])
    grown = sweep(notebook, out, {}, [{"case": ["good", "good"], "seed": [1, 2]}])
    assert [run["parameters"]["seed"] for run in grown["runs"]] == [1, 2, 0, 0, 0], "a smaller grid loses no row"
    changed = {Path(name).parts[0] for name, moment in files(out / "runs").items() if before.get(name) != moment}
    assert changed == {run["run"] for run in grown["runs"][:2]}


def test_runs_that_differ_beside_the_grid_are_told_apart(no_kernel, notebook, tmp_path):
    for case in ("good", "error"):
        plan = make_plan(notebook, {"seed": [0, 1]}, given={"case": case})
        found = run_sweep(plan, tmp_path / "out", say=lambda line: None)
    assert found["varied"] == ["seed", "case"] and len(found["runs"]) == 4


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows cannot kill a process like this")
def test_a_failed_run_is_tried_again_when_asked(notebook, tmp_path, monkeypatch):
    def work(parameters, **job):
        begun = tmp_path / str(parameters["seed"])
        if begun.exists() and parameters["seed"] < 2:
            return sweeps.Result(RunResult("ok"))
        begun.touch()
        if parameters["seed"]:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("no luck")

    monkeypatch.setattr(sweeps, "_work", work)
    with (
        sweeps.dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        sweeps.LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
    ):
        found = sweep(notebook, tmp_path, {"seed": [0, 1, 2]}, retries=1, scheduler=cluster.scheduler_address)
    assert statuses(found) == ["ok", "ok", "failed"] and {run["attempts"] for run in found["runs"]} == {2}
    assert found["runs"][2]["error"] == "its worker died (killed, or no memory left)"


def test_no_run_waits_while_a_worker_is_free(client, notebook, tmp_path, monkeypatch):
    def work(folder, parameters, **job):
        begun = tmp_path / "begun"
        begun.mkdir(exist_ok=True)
        (begun / str(parameters["seed"])).touch()
        while parameters["seed"] == 0 and len(list(begun.iterdir())) < 4:  # the first ends when the others have begun
            time.sleep(0.1)
        return sweeps.Result(RunResult("ok"))

    monkeypatch.setattr(sweeps, "_work", work)
    assert statuses(sweep(notebook, tmp_path, {"seed": list(range(4))})) == ["ok"] * 4


def test_a_cluster_without_a_shared_disk_sends_the_files(client, notebook, tmp_path):
    (run,) = sweep(notebook, tmp_path, scheduler=client.scheduler.address)["runs"]
    folder = tmp_path / "runs" / run["run"]
    assert run["status"] == "ok" and sorted(files(folder)) == ["07_case.ipynb", "log.txt", "run.json", "saved.txt"]
    assert str(tmp_path) not in (folder / "07_case.ipynb").read_text(), "it worked in a folder of the worker"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("tcp://127.0.0.1:1", "No scheduler answers at tcp://127.0.0.1:1 within 2 s; start one"),
        ("nonsense:x", "scheduler='nonsense:x' is not an address"),
        ("empty", "has no worker; start some with `dask worker tcp:"),
        ("other version", r"The worker tcp://.* lacks vitlib 9\.9 \("),
    ],
)
def test_a_cluster_that_cannot_work_is_one_sentence(client, notebook, tmp_path, monkeypatch, address, words):
    monkeypatch.setattr(sweeps, "PATIENCE", 2)
    with contextlib.ExitStack() as stack:
        if address == "other version":
            address = client.scheduler.address
            monkeypatch.setattr(sweeps, "version", lambda package: "9.9")
        if address == "empty":
            cluster = stack.enter_context(sweeps.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=50))
            address = cluster.scheduler_address
        with pytest.raises((ValueError, ConnectionError), match=words):
            sweep(notebook, tmp_path, scheduler=address)


def test_two_sweeps_do_not_share_a_folder(notebook, tmp_path):
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="Another sweep is at work in"):
        sweep(notebook, tmp_path)


@pytest.mark.parametrize(
    ("runs", "gibibytes", "workers", "threads", "size"),
    [
        (100, 64, None, None, (8, 1)),
        (3, 64, None, None, (3, 2)),
        (100, 0.5, None, None, (1, 8)),
        (100, 64, 2, None, (2, 4)),
        (100, 64, None, 4, (2, 4)),
        (100, 64, 16, None, (16, 1)),
    ],
)
def test_workers_fit_cores_and_memory(monkeypatch, runs, gibibytes, workers, threads, size):
    monkeypatch.setattr(sweeps, "CPU_COUNT", 8)
    monkeypatch.setattr(sweeps, "MEMORY_LIMIT", gibibytes * 2**30)
    assert sweeps.local_size(runs, workers, threads) == size


def test_without_the_extra_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "vitlib.course.sweep")
    with pytest.raises(ModuleNotFoundError, match=r"pandas is not installed.*pip install \"vitlib\[sweep\]\""):
        import vitlib.course.sweep  # noqa: F401


def start(notebook, out, *options) -> subprocess.Popen:
    process = start_command("sweep", notebook, "--out", out, "--grid", "case=good,hangs", *options)
    wait_until(lambda: list(out.glob("runs/*/run.json")) and list(out.glob("results.csv")), process)
    return process


def test_ctrl_c_leaves_whole_results_and_no_kernel(notebook, tmp_path):
    process = start(notebook, tmp_path, "--workers", "2")
    kernels = [one for one in psutil.Process(process.pid).children(recursive=True) if "ipykernel" in str(one.cmdline())]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in printed, printed
    assert "The same command again goes on with what is missing." in printed and "Interrupted." in printed
    assert statuses(json.loads((tmp_path / "results.json").read_text())) == ["ok", "not run"]
    assert kernels and not any(kernel.is_running() for kernel in kernels)


@pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="starts a cluster: set VITLIB_SLOW to run it")
def test_a_scheduler_that_goes_away_is_one_sentence(notebook, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command, address = [sys.executable, "-m"], f"tcp://127.0.0.1:{port}"
    scheduler = [*command, "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", port, "--no-dashboard"]
    worker = [*command, "distributed.cli.dask_worker", address, "--nthreads", "1", "--nworkers", "2", "--no-dashboard"]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(scheduler, **quiet) as first, subprocess.Popen(worker, **quiet) as second:
        time.sleep(5)
        process = start(notebook, tmp_path / "out", "--scheduler", address)
        first.kill()
        printed, _ = process.communicate(timeout=60)
        second.terminate()
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "Error: The scheduler is gone; the same command again goes on with what is missing." in printed
    assert statuses(json.loads((tmp_path / "out" / "results.json").read_text())) == ["ok", "not run"]
