"""What a worker of a sweep does: one run of the notebook, in a folder that the client sees too or that it sends back.

A worker needs this package and nothing else: the notebook comes with the job. It does without torch, which the kernel
loads.
"""

import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import nbformat

from vitlib.course.runner import RunResult, run_notebook

LOG = "log.txt"
TOKEN = "token"
SENT = 256 * 2**20  # most bytes of files that one run sends through the scheduler
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")

clock = time.monotonic


@dataclass(frozen=True)
class Job:
    """One run, as it is sent to a worker.

    Args:
        key: what tells this run from all others.
        name: the notebook's name.
        notebook: the notebook itself, as JSON.
        parameters: values for papermill to inject.
        defaults: the values of the notebook's own parameters cell.
        has_run_dir: whether the notebook takes the folder of its run as ``run_dir``.
        work: the client's folder for unfinished runs. A worker that finds ``token`` in it works there.
        token: content of the file ``work/token``.
        home: the folder in which the client was called; kernels start there, where it exists.
        threads: for the kernel to compute with.
        timeout: longest time for the run, in seconds; None for no limit.
        topic: of the message which says that the run has started.
    """

    key: str
    name: str
    notebook: str
    parameters: dict[str, object]
    defaults: dict[str, object]
    has_run_dir: bool
    work: str
    token: str
    home: str
    threads: int
    timeout: float | None
    topic: str


@dataclass
class Result:
    """What came of a job: the outcome, and the run's files in a ``folder`` that the client sees, or as ``files``."""

    outcome: RunResult
    host: str
    folder: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # files that were too much to send


def dask_setup(worker) -> None:
    """Called by Dask as a worker of this machine starts. A terminal sends Ctrl-C to the workers as well, but it is for
    the client to end them. A function, since kernels would inherit that a signal is ignored.
    """
    signal.signal(signal.SIGINT, lambda number, frame: None)


def facts() -> dict[str, str]:
    """What the client wants to know of a worker before it sends jobs: its host and its version of vitlib."""
    return {"host": socket.gethostname(), "vitlib": version("vitlib")}


def run_job(job: Job) -> Result:
    """Run a job as a Dask task. Whatever goes wrong inside the notebook is in the outcome."""
    from distributed import get_worker  # here, since a client that only reads results does without Dask

    worker = get_worker()
    task, host = worker.get_current_task(), socket.gethostname()
    worker.log_event(job.topic, {"key": job.key, "host": host})
    is_shared = _is_shared(job)
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix=f"{job.key}-", dir=job.work if is_shared else None))
        if not is_shared:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        folder.chmod(0o777 & ~_umask())  # mkdtemp hides its folders from other users
        outcome = _run(job, folder, _reason_to_end(worker, task, job.timeout))
        if is_shared:
            return Result(outcome, host, str(folder))
        files, left_out = _collect(folder)
        return Result(outcome, host, None, files, left_out)


def _is_shared(job: Job) -> bool:
    """Whether this worker sees the client's folder; a folder of the same name elsewhere has another token in it."""
    try:
        return Path(job.work, TOKEN).read_text() == job.token and os.access(job.work, os.W_OK)
    except OSError:
        return False


def _umask() -> int:
    os.umask(mask := os.umask(0))
    return mask


def _run(job: Job, folder: Path, end: Callable[[], str]) -> RunResult:
    run_dir = {"run_dir": str(folder)} if job.has_run_dir else {}
    home = Path(job.home)
    with open(folder / LOG, "a", encoding="utf-8") as log:
        outcome = run_notebook(
            nbformat.reads(job.notebook, as_version=4),
            folder,
            job.name,
            job.parameters | run_dir,
            defaults=job.defaults,
            log=log,
            end=end,
            folder=home if home.is_dir() else folder,
            environment=_environment(job.threads),
        )
        if outcome.error:
            log.write(f"\n{outcome.error}\n")
    return outcome


def _environment(threads: int) -> dict[str, str | None]:
    """The kernel's variables. Those that Dask has set for its workers are taken back: with its MALLOC_TRIM_THRESHOLD_ a
    training on the CPU takes up to half as long again.
    """
    import dask

    of_dask = dask.config.get("distributed.nanny.pre-spawn-environ", {})
    taken_back = {name: None for name, value in of_dask.items() if os.environ.get(name) == str(value)}
    return {**taken_back, **dict.fromkeys(THREAD_VARIABLES, str(threads))}


def _reason_to_end(worker, task: str, timeout: float | None) -> Callable[[], str]:
    """``worker`` is Dask's, ``task`` its name for the run."""
    deadline = clock() + timeout if timeout else float("inf")

    def reason() -> str:
        if clock() > deadline:
            return f"stopped after {timeout:g} s; allow more with --timeout"
        state = worker.state.tasks.get(task)  # the client has gone, or nobody asks for this run any longer
        return "" if state is not None and state.state == "executing" else "nobody waits for it any longer"

    return reason


def _collect(folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """The files of a folder by their names, the small ones first, and the names of those that are too much."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    files, left_out, total = {}, [], 0
    for path in paths:
        total += path.stat().st_size
        name = path.relative_to(folder).as_posix()
        if total > SENT:
            left_out.append(name)
        else:
            files[name] = path.read_bytes()
    return files, left_out
