"""Sweeps on a real scheduler with worker processes on loopback: what is killed, hangs or fails stops nothing else, and
the same command again goes on."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from test_runner import SHOW, write_notebook

import vitlib.course
from vitlib.course import cluster, results, worker
from vitlib.course.grid import Grid, make_plan
from vitlib.course.sweep import run_sweep, summary

PARAMETERS = """\
seed: int = 0  # start of every random draw
case: str = "good"  # what happens
flag: str = ""  # a file; where there is one all is well, and one named once is made
run_dir: str = "."  # folder for what this run saves"""
FIGURES = SHOW % '[["top1", 0.5 + seed / 100], ["chance", 0.1], ["seed", seed]]'
CASES = """\
import os, pathlib, signal, time
print("this is", case, seed, "with", os.environ["OMP_NUM_THREADS"], "thread in", os.getcwd())
print("malloc:", os.environ.get("MALLOC_TRIM_THRESHOLD_"))
pathlib.Path(run_dir, "saved.txt").write_text("kept")
time.sleep(0.5)  # so that what was printed gets out before the kernel ends
if flag and os.path.exists(flag):
    case = "good"
elif flag.endswith("once"):
    pathlib.Path(flag).touch()
if case == "error":
    raise ValueError("no luck")
if case == "dead kernel":
    os._exit(1)
if case == "killed kernel":
    os.kill(os.getpid(), signal.SIGKILL)
if case == "hangs":
    while True:
        time.sleep(1)
if case == "kills its worker":
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)"""


@pytest.fixture
def notebook(tmp_path):
    write_notebook(tmp_path / "book", "07_case", CASES, FIGURES, parameters=PARAMETERS)
    return tmp_path / "book" / "07_case.ipynb"


def sweep(notebook, out, grid, **options):
    return run_sweep(make_plan(Grid(notebook, grid)), out, say=lambda line: None, **options)


def statuses(found):
    return {(run["varied"].get("case"), run["varied"].get("seed")): run["status"] for run in found["runs"]}


def by_case(found, case):
    return next(run for run in found["runs"] if run["varied"]["case"] == case)


def kernels_of(text: str) -> list[psutil.Process]:
    """Running kernels with ``text`` in their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        try:
            if "ipykernel_launcher" in (process.info["cmdline"] or ()) and text in str(process.environ()):
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def eventually(condition, seconds: float = 30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within the time"
        time.sleep(0.1)


def files(folder: Path) -> dict[str, int]:
    """The files of a folder with the time of their last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_bad_runs_spoil_nothing_and_are_listed_with_their_cell(notebook, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_", raising=False)
    out = tmp_path / "out"
    cases = ["good", "error", "dead kernel", "killed kernel", "hangs", "kills its worker"]
    found = sweep(notebook, out, {"case": cases, "seed": [0, 1]}, workers=2, timeout=6)
    expected = {(case, seed): "ok" if case == "good" else "failed" for case in cases for seed in (0, 1)}
    assert statuses(found) == expected
    cell = 'In [3] "import os, pathlib, signal, time": '
    assert by_case(found, "error")["error"] == f"{cell}ValueError: no luck"
    assert by_case(found, "dead kernel")["error"].startswith(f"{cell}the kernel died")
    assert by_case(found, "killed kernel")["error"].startswith(f"{cell}the kernel died")
    assert by_case(found, "hangs")["error"] == f"{cell}stopped after 6 s; allow more with --timeout"
    assert by_case(found, "kills its worker")["error"] == f"{cell}its worker died (killed, or no memory left)"
    for run in found["runs"]:
        folder = out / ("runs" if run["status"] == "ok" else "failed") / run["run"]
        kind = "" if run["status"] == "ok" else ".failed"
        assert sorted(path.name for path in folder.iterdir()) == sorted(
            [f"07_case{kind}.ipynb", "log.txt", "run.json", "saved.txt"]
        )
        log = (folder / "log.txt").read_text()
        assert f"this is {run['varied']['case']} {run['seed']} with 1 thread in {os.getcwd()}" in log
        assert "malloc: None" in log, "Dask's setting for its workers makes training slow"
        assert run["error"] is None or run["error"] in log
        assert run["attempts"] == 1 and run["host"] == socket.gethostname()
        assert (run["started"] and run["versions"]) or run["varied"]["case"] == "kills its worker"
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock", "failed", "report.html", "results.csv", "results.json", "runs",
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert f"failed  {by_case(found, 'error')['run']}" in printed and "12/12" in printed and "9 failed" in printed
    table = summary(found)
    assert "Runs: 2 ok, 10 failed." in table and "ValueError: no luck" in table
    assert not kernels_of(str(out)), "nothing goes on after the end"


def test_no_run_waits_behind_a_long_one_while_another_worker_is_free(tmp_path):
    source = """\
import os, time
if seed == 0:  # the first ends when the others have
    while len(os.listdir(flag)) < 5:
        time.sleep(0.1)
else:
    open(os.path.join(flag, str(seed)), "w").close()"""
    write_notebook(tmp_path / "book", "08_long", source, parameters=PARAMETERS)
    (tmp_path / "others").mkdir()
    grid = {"flag": [str(tmp_path / "others")], "seed": list(range(6))}
    found = sweep(tmp_path / "book" / "08_long.ipynb", tmp_path / "out", grid, workers=2, timeout=90)
    assert [run["status"] for run in found["runs"]] == ["ok"] * 6


def test_the_tables_have_a_row_a_run(notebook, tmp_path):
    found = sweep(notebook, tmp_path / "out", {"case": ["good", "error"], "seed": [3]}, workers=1)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    assert found["varied"] == ["case", "seed"] and found["notebook"] == "07_case" and found["vitlib"]
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        good, bad = csv.DictReader(file)
    assert list(good)[:6] == ["run", "status", "case", "seed", "flag", "top1"]
    assert good["top1"] == "0.53" and good["figure_seed"] == "3" and good["seed"] == "3", "a figure named like a column"
    assert float(good["seconds"]) > 0 and int(good["peak_memory_bytes"]) > 10e6 and good["version_python"]
    assert bad["status"] == "failed" and "no luck" in bad["error"] and bad["top1"] == ""


@pytest.mark.parametrize("case", ["error", "dead kernel", "kills its worker"])
def test_what_fails_is_tried_again_as_often_as_asked(notebook, tmp_path, case):
    (flags := tmp_path / "flags").mkdir()
    grid = {"case": [case], "seed": [0, 1], "flag": [str(flags / "once")]}
    found = sweep(notebook, tmp_path / "out", grid, workers=1, retries=1)
    assert [run["status"] for run in found["runs"]] == ["ok", "ok"]
    assert sorted(run["attempts"] for run in found["runs"]) == [1, 2]
    assert not list((tmp_path / "out").glob("failed/*"))
    found = sweep(notebook, tmp_path / "more", {"case": ["error"]}, workers=1, retries=2)
    assert [(run["status"], run["attempts"]) for run in found["runs"]] == [("failed", 3)]


def test_the_same_again_runs_only_what_is_missing_or_failed(notebook, tmp_path):
    out, repaired = tmp_path / "out", tmp_path / "repaired"
    grid = {"case": ["good", "error"], "seed": [0, 1], "flag": [str(repaired)]}
    first = sweep(notebook, out, grid, workers=2)
    assert [run["status"] for run in first["runs"]] == ["ok", "ok", "failed", "failed"]
    repaired.touch()
    whole = sweep(notebook, out, grid, workers=2)
    assert set(statuses(whole).values()) == {"ok"}
    before = files(out / "runs")
    assert sweep(notebook, out, grid, workers=2)["runs"] == whole["runs"]
    assert files(out / "runs") == before, "nothing was run again"
    victim = out / "runs" / whole["runs"][1]["run"] / "run.json"
    victim.write_text(victim.read_text()[:100])  # damaged
    more = sweep(notebook, out, grid | {"seed": [0, 1, 2]}, workers=2)
    assert set(statuses(more).values()) == {"ok"} and len(more["runs"]) == len(whole["runs"]) + 2
    changed = {name for name, time in files(out / "runs").items() if before.get(name) != time}
    assert {Path(name).parts[0] for name in changed} == {
        run["run"] for run in more["runs"] if run["seed"] == 2 or run["run"] == whole["runs"][1]["run"]
    }
    fewer = sweep(notebook, out, grid | {"seed": [2]}, workers=2)
    assert len(fewer["runs"]) == len(more["runs"]), "a smaller grid loses no row"


def test_failures_never_replace_what_is_finished(notebook, tmp_path):
    out, flag = tmp_path / "out", tmp_path / "flag"
    flag.touch()
    grid = {"case": ["error"], "flag": [str(flag)]}
    good = sweep(notebook, out, grid, workers=1)
    flag.unlink()
    assert sweep(notebook, out, grid, workers=1) == good
    write_notebook(notebook.parent, "07_case", CASES + "\n1 / 0", FIGURES, parameters=PARAMETERS)
    (out / "runs" / good["runs"][0]["run"]).stat()
    found = sweep(notebook, out, grid | {"case": ["good"]}, workers=1)
    assert [run["status"] for run in found["runs"]] == ["failed"], "another content, another run; the old one is no row"
    assert (out / "runs" / good["runs"][0]["run"] / "07_case.ipynb").exists()


def test_two_sweeps_at_once_do_not_share_a_folder(notebook, tmp_path):
    plan = make_plan(Grid(notebook))
    with results.SweepFolder(tmp_path / "out", plan), pytest.raises(ValueError, match="Another sweep is at work in"):
        sweep(notebook, tmp_path / "out", {})


def test_200_runs_leave_200_rows(tmp_path):
    write_notebook(tmp_path, "01_trivial", SHOW % '[["double", 2 * seed]]', parameters="seed: int = 0  # a seed")
    found = sweep(tmp_path / "01_trivial.ipynb", tmp_path / "out", {"seed": list(range(200))}, workers=2, retries=1)
    assert [(run["seed"], run["figures"]) for run in found["runs"]] == [(n, {"double": 2 * n}) for n in range(200)]
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        assert [int(row["double"]) for row in csv.DictReader(file)] == [2 * n for n in range(200)]
    assert len(list((tmp_path / "out" / "runs").glob("*/01_trivial.ipynb"))) == 200


# A cluster that somebody has started.


@pytest.fixture
def scheduler(tmp_path):
    """The address of a scheduler, in a process of its own, with two workers in others, which work in another folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    (elsewhere := tmp_path / "elsewhere").mkdir()
    start = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", address.rpartition(":")[2]]
    processes = [spawn([*start, "--host", "127.0.0.1", "--no-dashboard"], elsewhere)]
    options = ["--nthreads", "1", "--nworkers", "2", "--no-dashboard", "--memory-limit", "0"]
    processes.append(spawn([sys.executable, "-m", "distributed.cli.dask_worker", address, *options], elsewhere))
    yield address
    for process in reversed(processes):
        process.terminate()
        process.wait(30)


def spawn(command, folder):
    # without it the scheduler would try a run that kills its worker three times more
    environment = os.environ | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_a_cluster_runs_the_same_and_sends_files_where_no_disk_is_shared(notebook, tmp_path, scheduler, monkeypatch):
    shared = sweep(notebook, tmp_path / "shared", {"case": ["good", "error", "kills its worker"]}, scheduler=scheduler)
    assert list(statuses(shared).values()) == ["ok", "failed", "failed"]
    monkeypatch.setattr(results, "TOKEN", "not-where-workers-look")
    alone = sweep(notebook, tmp_path / "alone", {"case": ["good", "error"], "seed": [0, 1]}, scheduler=scheduler)
    assert list(statuses(alone).values()) == ["ok", "ok", "failed", "failed"]
    good, bad = alone["runs"][0], alone["runs"][2]
    folder = tmp_path / "alone" / "runs" / good["run"]
    assert sorted(files(folder)) == ["07_case.ipynb", "log.txt", "run.json", "saved.txt"]
    assert "/.work/" not in (folder / "07_case.ipynb").read_text(), "it took place in the worker's own folder"
    assert sorted(files(tmp_path / "alone" / "failed" / bad["run"])) == [
        "07_case.failed.ipynb", "log.txt", "run.json", "saved.txt",
    ]  # fmt: skip
    assert good["figures"]["top1"] == 0.5 and good["left_out"] == []


def test_what_is_too_much_to_send_is_left_out_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "SENT", 100)
    for name, size in (("a", 40), ("b/c", 60), ("d", 70)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    sent, left_out = worker._collect(tmp_path)
    assert {name: len(content) for name, content in sent.items()} == {"a": 40, "b/c": 60} and left_out == ["d"]


def test_names_that_climb_out_of_the_folder_are_not_written(notebook, tmp_path):
    plan = make_plan(Grid(notebook))
    outcome = worker.RunResult("ok")
    sent = {"07_case.ipynb": b"{}", "../../evil.txt": b"x", f"{tmp_path}/evil.txt": b"x"}
    with results.SweepFolder(tmp_path / "out", plan) as folder:
        folder.store(plan.runs[0], worker.Result(outcome, "host", None, sent), 1)
    assert not list(tmp_path.rglob("evil.txt"))
    assert sorted(files(tmp_path / "out" / "runs" / plan.runs[0].label)) == ["07_case.ipynb", "run.json"]


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "127.0.0.1:1"])
def test_a_scheduler_that_does_not_answer_is_said_in_seconds(notebook, tmp_path, monkeypatch, address):
    monkeypatch.setattr(cluster, "PATIENCE", 2)
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="No scheduler answers at .*127.0.0.1:1 within 2 s; start one with"):
        sweep(notebook, tmp_path / "out", {}, scheduler=address)
    assert time.monotonic() - start < 20


def test_an_address_that_is_none_is_refused(notebook, tmp_path):
    before = event_loops()
    with pytest.raises(ValueError, match="scheduler='nonsense:x' is not an address; give one such as tcp:"):
        sweep(notebook, tmp_path / "out", {}, scheduler="nonsense:x")
    assert event_loops() == before  # what is left of a client can hold up the next one by ten seconds


def event_loops() -> int:
    return sum(thread.name == "IO loop" for thread in threading.enumerate())


def test_a_scheduler_without_workers_is_said(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "PATIENCE", 2)
    with cluster.LocalCluster(n_workers=0, dashboard_address=None, silence_logs=50) as empty:
        address = empty.scheduler_address
        with pytest.raises(ConnectionError, match=f"{address} has no worker; start some with `dask worker {address}"):
            sweep(notebook, tmp_path / "out", {}, scheduler=address)


@pytest.mark.parametrize("own, words", [("9.9", r"has vitlib .*; install vitlib 9.9"), (None, "cannot run it")])
def test_workers_without_this_version_of_vitlib_are_refused(notebook, tmp_path, scheduler, monkeypatch, own, words):
    if own:
        monkeypatch.setattr(cluster, "version", lambda package: own)
    else:
        monkeypatch.setattr(cluster, "facts", no_such_module)
    with pytest.raises(ConnectionError, match=f"The worker tcp:.* {words}"):
        sweep(notebook, tmp_path / "out", {}, scheduler=scheduler)


def no_such_module():
    raise ModuleNotFoundError("No module named 'vitlib'")


# As a user types it, and stops it.


def start(notebook, out, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", "vitlib", "sweep", str(notebook), "--out", str(out), *options]
    # where the tests run in the background of a shell, Ctrl-C is ignored, and so it would be in the child
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until_it_hangs(out) -> None:
    eventually(lambda: any("this is hangs" in log.read_text() for log in out.glob(".work/*/log.txt")), 60)
    eventually(lambda: len(list(out.glob("runs/*/run.json"))) == 1, 60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_sweep_that_is_stopped_leaves_a_whole_folder_and_goes_on(notebook, tmp_path, number):
    out = tmp_path / "out"
    process = start(notebook, out, "--grid", "case=good,hangs", "--workers", "2")
    wait_until_it_hangs(out)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    eventually(lambda: not kernels_of(str(out)))
    assert sorted(path.parent.name.split("-")[0] for path in out.glob("*/*/run.json")) == ["case=good"]
    if number != signal.SIGKILL:
        assert process.returncode == 130, printed
        assert "Interrupted; the same command again goes on" in printed and "Traceback" not in printed
        assert not (out / ".work").exists()
        found = json.loads((out / "results.json").read_text())
        assert list(statuses(found).values()) == ["ok", "not run"]
    before = files(out / "runs")
    again = start(notebook, out, "--grid", "case=good,hangs", "--workers", "2", "--timeout", "3")
    printed, _ = again.communicate(timeout=120)
    assert again.returncode == 1 and "Runs: 1 ok, 1 failed." in printed, printed
    assert "finished before: 1; to run: 1" in printed and "stopped after 3 s" in printed
    assert files(out / "runs") == before and not (out / ".work").exists()


@pytest.mark.parametrize(
    "runs, cores, memory, asked, size",
    [
        (100, 8, 64, (None, None), (8, 1)),
        (3, 8, 64, (None, None), (3, 2)),
        (1, 8, 64, (None, None), (1, 8)),
        (100, 8, 4, (None, None), (4, 2)),
        (100, 8, 0.5, (None, None), (1, 8)),
        (100, 8, 64, (2, None), (2, 4)),
        (100, 8, 64, (None, 4), (2, 4)),
        (100, 8, 64, (16, None), (16, 1)),
        (100, 2, 64, (None, 4), (1, 4)),
    ],
)
def test_workers_fit_cores_and_memory(monkeypatch, runs, cores, memory, asked, size):
    monkeypatch.setattr(cluster, "CPU_COUNT", cores)
    monkeypatch.setattr(cluster, "MEMORY_LIMIT", memory * 2**30)
    assert cluster.local_size(runs, *asked) == size


def test_without_dask_a_sentence_says_what_to_install(notebook, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    monkeypatch.delitem(sys.modules, "vitlib.course.cluster")
    monkeypatch.delattr(vitlib.course, "cluster")
    with pytest.raises(ModuleNotFoundError, match=r"distributed is not installed.*pip install \"vitlib\[sweep\]\""):
        sweep(notebook, tmp_path / "out", {})


def test_a_scheduler_that_goes_away_is_said_and_what_is_finished_stays(notebook, tmp_path, scheduler):
    out = tmp_path / "out"
    process = start(notebook, out, "--grid", "case=good,hangs", "--scheduler", scheduler)
    wait_until_it_hangs(out)
    for other in psutil.process_iter(["cmdline"]):
        if (
            "distributed.cli.dask_scheduler" in (other.info["cmdline"] or ())
            and scheduler.rpartition(":")[2] in other.info["cmdline"]
        ):
            other.kill()
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "Traceback" not in printed, printed
    assert "Error: The scheduler is gone; the same command again goes on with what is missing." in printed
    found = json.loads((out / "results.json").read_text())
    assert list(statuses(found).values()) == ["ok", "not run"] and not (out / ".work").exists()
    eventually(lambda: not kernels_of(str(out)), 60)


def test_a_worker_killed_by_its_run_is_replaced_on_the_command_line_too(notebook, tmp_path):
    out = tmp_path / "out"
    process = start(notebook, out, "--grid", "case=kills its worker,good", "seed=0,1,2", "--workers", "1")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "Runs: 3 ok, 3 failed." in printed, printed
    assert not kernels_of(str(out))


class Dies:
    """A client whose workers die with whatever they are sent; ``begins`` says whether the run had begun by then."""

    status = "running"

    def __init__(self, begins: bool):
        self.begins, self.sent = begins, []

    def nthreads(self):
        return {}

    def subscribe_topic(self, topic, handler):
        self.note = handler

    def submit(self, function, job, **options):
        self.sent.append(job)
        if self.begins:
            self.note((0.0, {"key": job.key, "host": "somewhere"}))
        return Dead()


class Dead:
    status = "error"

    def add_done_callback(self, function):
        function(self)

    def result(self):
        raise cluster.KilledWorker("a run", None, 0)

    def release(self):
        self.status = "released"


def job_named(key: str) -> worker.Job:
    return worker.Job(key, "n", "{}", {}, {}, False, ".", "", ".", 1, None, "")


@pytest.mark.parametrize("begins, sent", [(True, 3), (False, cluster.UNCOUNTED + 3)])
def test_a_worker_that_dies_before_a_run_has_begun_costs_the_run_no_retry_but_not_for_ever(begins, sent):
    client = Dies(begins)
    sender = cluster.Sender(client, retries=2)
    sender.add(job_named("k"))
    ((job, result),) = sender.results(lambda: None)
    assert result.outcome.status == "failed" and "its worker died" in result.outcome.error
    assert len(client.sent) == sent and sender.starts["k"] == (sent if begins else 0) and sender.running == 0


class Works(Dies):
    """A client of two workers with three threads; what they were sent ends when :meth:`end_one` says so."""

    def __init__(self):
        super().__init__(begins=False)
        self.futures, self.waiting = [], []

    def nthreads(self):
        return {"one": 1, "two": 2}

    def submit(self, function, job, **options):
        super().submit(function, job)
        self.futures.append(Done(job.key))
        return self.futures[-1]

    def end_one(self):
        self.waiting.append(len(self.futures))
        if self.futures:
            self.futures.pop(0).end()


class Done(Dead):
    status = "finished"

    def __init__(self, key):
        self.key = key

    def add_done_callback(self, function):
        self.end = lambda: function(self)

    def result(self):
        return worker.Result(worker.RunResult("failed" if self.key == "4" else "ok"), "somewhere")


def test_as_many_runs_are_under_way_as_there_are_threads_in_the_order_of_the_plan_and_what_failed_comes_first():
    client = Works()
    sender = cluster.Sender(client, retries=1)
    for number in range(9):
        sender.add(job_named(str(number)))
    ended = [(job.key, result.outcome.status) for job, result in sender.results(client.end_one)]
    assert "".join(job.key for job in client.sent) == "0123456478", "4 again as soon as it has failed"
    assert ended == [(key, "failed" if key == "4" else "ok") for key in "012356478"]
    assert max(client.waiting) == 3 and client.waiting[:7] == [3] * 7
