"""One notebook through papermill: how it ended, what it recorded, how much memory its kernel had, and when to end it.

Without torch, so that a process which only starts kernels starts quickly and stays small.
"""

import functools
import logging
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from vitlib.course.figures import recorded_figures

STARTS = 3  # times that a kernel is started which dies before its first word
NOT_STARTED = "Kernel died before replying"  # jupyter_client's words for it


@dataclass
class Outcome:
    """What became of one notebook; its fields are the entry in ``metrics.json``."""

    status: str  # ok, failed, interrupted or not run
    error: str | None = None
    parameters: dict[str, object] = field(default_factory=dict)
    figures: dict[str, object] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    started: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


def run_notebook(
    notebook: Path | NotebookNode,
    out: Path,
    name: str,
    parameters: Mapping[str, object],
    *,
    defaults: Mapping[str, object],
    cell_timeout: float | None = None,
    progress_bar: bool | dict = False,
    log: TextIO | None = None,
    end: Callable[[], str] = lambda: "",
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
) -> Outcome:
    """Run one notebook to ``out/<name>.ipynb``, or ``out/<name>.failed.ipynb``; an earlier good one is left alone then.

    Nothing but a missing folder is raised: errors, dead kernels, timeouts and Ctrl-C are in the outcome.

    Args:
        notebook: its file, or what nbformat read from it.
        out: folder of the executed notebook.
        name: its name there.
        parameters: values for papermill to inject.
        defaults: the values that the notebook's own parameters cell has; for the record.
        cell_timeout: longest time for one cell, in seconds; None for no limit.
        progress_bar: papermill's, over the cells.
        log: gets what the cells and the kernel itself print, as they print it.
        end: asked a few times a second; a text ends the kernel at once and is the reason.
        folder, environment: see :func:`kernel_manager`.
    """
    partial, failed = out / f"{name}.partial.ipynb", out / f"{name}.failed.ipynb"
    in_full = {**defaults, **parameters}
    outcome = Outcome("ok", parameters=in_full, seed=in_full.get("seed"), versions=_versions())
    outcome.started = datetime.now().astimezone().isoformat(timespec="seconds")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the outcome says it, in one line
    start = time.perf_counter()
    with Watch(end) as watch:
        manager = kernel_manager(watch.kernel_started, folder=folder, environment=environment, log=log)
        execute = functools.partial(
            papermill.execute_notebook,
            _verbatim(notebook) if isinstance(notebook, Path) else notebook,
            _verbatim(partial),
            dict(parameters),
            kernel_name="python3",
            language="python",
            kernel_manager_class=manager,
            execution_timeout=cell_timeout,
            progress_bar=progress_bar,
            stdout_file=log,
            stderr_file=log,
        )
        try:
            _with_a_kernel_that_starts(execute)
        except KeyboardInterrupt:
            outcome.status, outcome.error = "interrupted", "Ctrl-C"
        except Exception as error:  # whatever stops one notebook must not stop the others
            outcome.status, outcome.error = "failed", watch.ended or reason(error, cell_timeout)
    outcome.seconds = round(time.perf_counter() - start, 2)
    outcome.peak_memory_bytes = watch.peak_bytes
    if partial.exists():
        executed = nbformat.read(partial, as_version=4)
        outcome.figures = recorded_figures(executed)
        if outcome.status == "ok":
            partial.replace(out / f"{name}.ipynb")
            failed.unlink(missing_ok=True)
        else:
            outcome.error = f"{last_cell(executed)}{outcome.error}"
            partial.replace(failed)
    return outcome


def _with_a_kernel_that_starts(execute: Callable[[], object]) -> None:
    """Jupyter picks free ports before the kernel binds them: another that starts at the same moment may be quicker."""
    for attempt in range(STARTS):
        try:
            execute()
            return
        except RuntimeError as error:
            if attempt == STARTS - 1 or NOT_STARTED not in str(error):
                raise


def kernel_manager(
    on_start: Callable[[int], None],
    *,
    folder: Path | None = None,
    environment: Mapping[str, str | None] | None = None,
    log: TextIO | None = None,
) -> type:
    """A kernel manager that starts this very interpreter, whatever a user's kernelspec named python3 points to.

    Args:
        on_start: is told the kernel's process number.
        folder: where the kernel starts; None for the current folder.
        environment: variables for the kernel beside those of this process; None takes one of these away.
        log: a file for what the kernel itself says on stderr, as when it dies; None drops it, since it would break up
            the progress lines. What cells print is in the notebook.
    """
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict(["--log-level=ERROR"]))

        async def _async_launch_kernel(self, *arguments, **options):
            options["stderr"] = log or subprocess.DEVNULL
            if folder is not None:
                options["cwd"] = str(folder)
            if environment:
                variables = {**options["env"], **environment}
                options["env"] = {name: value for name, value in variables.items() if value is not None}
            await super()._async_launch_kernel(*arguments, **options)
            on_start(self.provisioner.pid)

    return ThisInterpreter


def reason(error: Exception, timeout: float | None = None) -> str:
    """One line that says why a notebook stopped."""
    if isinstance(error, papermill.PapermillExecutionError):
        name, text = error.ename, error.evalue
    elif isinstance(error, DeadKernelError):
        return "the kernel died (no memory left, or the process was ended)"
    elif isinstance(error, CellTimeoutError):
        return f"no answer for {timeout:g} seconds; allow more with --timeout"
    else:
        name, text = type(error).__name__, str(error)
    lines = text.strip().splitlines()
    return f"{name}: {lines[0]}" if lines else name


def _verbatim(path: Path) -> str:
    """papermill fills in ``{names}`` in paths; a folder may have braces in its name."""
    return str(path).replace("{", "{{").replace("}", "}}")


def last_cell(executed: NotebookNode) -> str:
    """The cell that ran last, as ``In [3] "first line": ``, by the number Jupyter shows in the failed notebook."""
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    started = [number for number, cell in enumerate(code) if cell.metadata.papermill.start_time]
    if not started:
        return ""
    cell = code[started[-1]]
    number = cell.execution_count or started[-1] + 1  # a cell that ended its kernel has no count
    return f'In [{number}] "{cell.source.strip().splitlines()[0]}": '


class Watch:
    """Watches a kernel from a thread.

    ``peak_bytes`` is the most memory that it and its children had resident. A text from ``end`` kills them, since a
    cell that hangs in compiled code hears no interrupt; ``ended`` then holds the text.
    """

    def __init__(self, end: Callable[[], str] = lambda: "", interval: float = 0.2):
        self.peak_bytes: int | None = None
        self.ended = ""
        self._end = end
        self._interval = interval
        self._pid: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def kernel_started(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            if self._pid is None:
                continue
            with suppress(psutil.Error, OSError):  # it is ending
                self.peak_bytes = max(self.peak_bytes or 0, peak_memory(self._pid))
                self.ended = self.ended or self._end()
                for process in _with_children(self._pid) if self.ended else ():
                    process.kill()


def peak_memory(pid: int) -> int:
    """The most bytes that a process and those it has started had in memory so far.

    Raises:
        psutil.Error: if there is no such process.
    """
    return sum(map(_peak_resident, _with_children(pid)))


def _with_children(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def _peak_resident(process: psutil.Process) -> int:
    """The most bytes a process had in memory so far, where the system keeps count; else what it has now."""
    if sys.platform == "linux":
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    usage = process.memory_info()
    return getattr(usage, "peak_wset", usage.rss)  # Windows counts as well


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "vitlib", "papermill")}
    return {"python": platform.python_version(), **packages, "platform": platform.platform()}
