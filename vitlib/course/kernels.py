"""Run one notebook through papermill in a kernel of its own, watch it, and say why it stopped.

This module does without torch, since processes that only start kernels are to start quickly.
"""

import logging
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TextIO

import nbformat
import papermill
import psutil
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from vitlib.course.figures import recorded_figures
from vitlib.utils import versions

STARTS = 3  # attempts to start a kernel
NOT_STARTED = "Kernel died before replying"  # jupyter_client's words


@dataclass
class RunResult:
    """The result of one notebook; its fields are the entry in ``metrics.json``."""

    status: str  # ok, failed, interrupted or not run
    error: str | None = None
    parameters: dict[str, object] = field(default_factory=dict)
    figures: dict[str, object] = field(default_factory=dict)
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    started: str | None = None
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)


class KernelMonitor:
    """Watch a process and its children from a thread: ``peak_bytes`` is the most memory they have had.

    When ``end`` returns a text, they are killed (a cell that hangs in compiled code ignores interrupts), and ``ended``
    holds the text.
    """

    def __init__(self, end: Callable[[], str]):
        self.pid: int | None = None
        self.peak_bytes: int | None = None
        self.ended = ""
        self._end = end
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "KernelMonitor":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            if self.pid is None:
                continue
            with suppress(psutil.Error, OSError):  # the process is ending
                self.ended = self.ended or self._end()
                if self.ended:
                    kill_tree(self.pid)
                self.peak_bytes = max(self.peak_bytes or 0, peak_memory(self.pid))


def with_children(pid: int) -> list[psutil.Process]:
    """Return a process and all it has started; raise psutil.Error if there is none."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def kill_tree(pid: int, itself: bool = True) -> None:
    """Kill a process, unless ``itself`` is False, and all it has started. Halted first, they start no others."""
    for act in (psutil.Process.suspend, psutil.Process.suspend, psutil.Process.kill):
        for process in with_children(pid)[0 if itself else 1 :]:
            with suppress(psutil.Error):
                act(process)


def peak_memory(pid: int) -> int:
    """Return the most bytes that a process and its children have had in memory; raise psutil.Error if it is gone."""
    return sum(map(_peak_resident, with_children(pid)))


def _peak_resident(process: psutil.Process) -> int:
    if sys.platform == "linux":
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)  # a process that has ended has none
        return int(peak[1]) * 1024 if peak else 0
    usage = process.memory_info()
    return getattr(usage, "peak_wset", usage.rss)  # the peak on Windows, the current value on macOS


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
    **options: object,
) -> RunResult:
    """Run one notebook to ``out/<name>.ipynb``, or to ``out/<name>.failed.ipynb`` and keep an earlier good one.

    Errors, dead kernels, timeouts and Ctrl-C are in the result; only a missing folder raises.

    Args:
        notebook: a file, or a notebook read by nbformat.
        parameters: values that papermill injects.
        defaults: values of the notebook's own parameters cell, for the record.
        cell_timeout: longest time for one cell, in seconds; None for no limit.
        progress_bar: papermill's, over the cells.
        log: gets the text that cells and the kernel print.
        end: called a few times a second; a text kills the kernel and is the reason.
        folder, environment: where the kernel starts, and its variables beside this process's; None removes one.
        options: further options of papermill and nbclient; with ``allow_errors=True`` an error in a cell neither
            stops the notebook nor counts as a failure.
    """
    partial, failed = out / f"{name}.partial.ipynb", out / f"{name}.failed.ipynb"
    in_full = {**defaults, **parameters}
    result = RunResult(
        "ok", parameters=in_full, seed=in_full.get("seed"),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions={**versions("papermill"), "platform": platform.platform()},
    )  # fmt: skip
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the result says it in one line
    start = time.perf_counter()
    with KernelMonitor(end) as monitor:
        try:
            _execute(
                notebook, partial, dict(parameters),
                kernel_manager_class=_kernel_manager(monitor, folder, environment or {}, log),
                execution_timeout=cell_timeout, progress_bar=progress_bar, stdout_file=log, stderr_file=log, **options,
            )  # fmt: skip
        except KeyboardInterrupt:
            result.status, result.error = "interrupted", "Ctrl-C"
        except Exception as error:  # one notebook's failure must not stop the others
            if not (options.get("allow_errors") and isinstance(error, papermill.PapermillExecutionError)):
                result.status, result.error = "failed", monitor.ended or reason(error, cell_timeout)
    result.seconds = round(time.perf_counter() - start, 2)
    result.peak_memory_bytes = monitor.peak_bytes
    if partial.exists():
        try:
            executed = nbformat.read(partial, as_version=4)
        except nbformat.reader.NotJSONError:  # cut short, as by a full disk
            return result
        result.figures = recorded_figures(executed)
        if result.status == "ok":
            partial.replace(out / f"{name}.ipynb")
            failed.unlink(missing_ok=True)
        else:
            result.error = f"{last_cell(executed)}{result.error}"
            partial.replace(failed)
    return result


def _execute(*arguments, **options) -> None:
    """Run papermill, again if the kernel did not start: Jupyter picks free ports, and another may bind them first."""
    for starts_left in reversed(range(STARTS)):
        try:
            papermill.execute_notebook(*arguments, kernel_name="python3", language="python", **options)
            return
        except RuntimeError as error:
            if not starts_left or NOT_STARTED not in str(error):
                raise


def _kernel_manager(monitor: KernelMonitor, folder: Path | None, environment: Mapping, log: TextIO | None) -> type:
    """Make a kernel manager that starts this interpreter, even if a user's own kernel is named python3."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict(["--log-level=ERROR"]))

        async def _async_launch_kernel(self, *arguments, **options):
            variables = {**options["env"], **environment}
            options["env"] = {name: value for name, value in variables.items() if value is not None}
            options["stderr"] = log or subprocess.DEVNULL  # a dying kernel's words would break the progress lines
            if folder is not None:
                options["cwd"] = str(folder)
            await super()._async_launch_kernel(*arguments, **options)
            monitor.pid = self.provisioner.pid

        _launch_kernel = _async_launch_kernel  # the name by which jupyter_client 7, Colab's, calls it

    return ThisInterpreter


def reason(error: Exception, timeout: float | None = None) -> str:
    """Return one line about why a notebook stopped."""
    if isinstance(error, DeadKernelError):
        return "the kernel died (no memory left, or the process was ended)"
    if isinstance(error, CellTimeoutError):
        return f"no answer for {timeout:g} seconds; allow more with --timeout"
    is_of_cell = isinstance(error, papermill.PapermillExecutionError)
    name, text = (error.ename, error.evalue) if is_of_cell else (type(error).__name__, str(error))
    return ": ".join([name, *text.strip().splitlines()[:1]])


def last_cell(executed: NotebookNode) -> str:
    """Return the cell that ran last, as ``In [3] "first line": ``, by the number that Jupyter shows."""
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    started = [number for number, cell in enumerate(code) if cell.metadata.papermill.start_time]
    if not started:
        return ""
    cell = code[started[-1]]
    number = cell.execution_count or started[-1] + 1  # a cell that ended its kernel has no count
    return f'In [{number}] "{cell.source.strip().splitlines()[0]}": '
