"""Run one notebook through papermill in a kernel of its own, watch it, and say why it stopped.

This module does without torch, since processes that only start kernels have to start quickly.
"""

import logging
import os
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
from nbclient.exceptions import DeadKernelError
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
    versions: dict[str, str] = field(default_factory=dict)


def with_children(pid: int) -> list[psutil.Process]:
    """Return a process and all it has started; raise psutil.Error if there is none."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def kill_tree(pid: int, itself: bool = True) -> None:
    """Kill a process, unless ``itself`` is False, and all it has started. Halted first, they start no others."""
    for act in (psutil.Process.suspend, psutil.Process.suspend, psutil.Process.kill):  # twice: some start meanwhile
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
    timeout: float | None = None,
    progress_bar: bool | dict = False,
    log: TextIO | None = None,
    end: Callable[[], str] = lambda: "",
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    **options: object,
) -> RunResult:
    """Run one notebook to ``out/<name>.ipynb``, or to ``out/<name>.failed.ipynb`` and keep an earlier good one.

    Errors, dead kernels, timeouts and Ctrl-C are in the result; only a missing folder raises.

    Args:
        notebook: a file, or a notebook read by nbformat.
        parameters: values that papermill injects.
        timeout: longest time for the notebook, in seconds; None for no limit.
        progress_bar: papermill's, over the cells.
        log: gets the text that cells and the kernel print.
        end: called a few times a second; a text kills the kernel and is the reason.
        folder, environment: where the kernel starts, and its variables beside this process's.
        options: further options of papermill and nbclient; with ``allow_errors=True`` an error in a cell neither
            stops the notebook nor counts as a failure.
    """
    partial, failed = out / f"{name}.partial.ipynb", out / f"{name}.failed.ipynb"
    result = RunResult(
        "ok",
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions={**versions("papermill"), "platform": platform.platform()},
    )
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the result says it in one line
    start, ended = time.perf_counter(), ""

    def watch(pid: int) -> None:
        nonlocal ended
        with suppress(psutil.NoSuchProcess):  # it has ended already
            kernel = psutil.Process(pid)
            while kernel.is_running():  # False too where another process has got its number
                with suppress(psutil.Error, OSError):  # a process is ending
                    is_late = timeout and time.perf_counter() - start > timeout
                    ended = ended or (f"stopped after {timeout:g} s; allow more with --timeout" if is_late else end())
                    if ended:  # a cell that hangs in compiled code ignores interrupts
                        kill_tree(pid)
                    result.peak_memory_bytes = max(result.peak_memory_bytes or 0, peak_memory(pid))
                time.sleep(0.2)

    try:
        _execute(
            notebook, partial, dict(parameters),
            kernel_manager_class=_kernel_manager(watch, folder, environment or {}, log),
            progress_bar=progress_bar, stdout_file=log, stderr_file=log, **options,
        )  # fmt: skip
    except KeyboardInterrupt:
        result.status, result.error = "interrupted", "Ctrl-C"
    except Exception as error:  # one notebook's failure must not stop the others
        if not (options.get("allow_errors") and isinstance(error, papermill.PapermillExecutionError)):
            result.status, result.error = "failed", ended or reason(error)
    result.seconds = round(time.perf_counter() - start, 2)
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


def _kernel_manager(watch: Callable, folder: Path | None, environment: Mapping, log: TextIO | None) -> type:
    """Make a kernel manager that starts this interpreter, even if a user's own kernel is named python3."""
    from ipykernel.kernelspec import RESOURCES, get_kernel_dict
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisInterpreter(AsyncKernelManager):
        kernel_spec = KernelSpec(resource_dir=RESOURCES, **get_kernel_dict(["--log-level=ERROR"]))

        async def start_kernel(self, **options):
            words = log or subprocess.DEVNULL  # a dying kernel's words would break the progress lines
            await super().start_kernel(**options, cwd=folder, env={**os.environ, **environment}, stderr=words)
            threading.Thread(target=watch, args=[self.provisioner.pid], daemon=True).start()

    return ThisInterpreter


def reason(error: Exception) -> str:
    """Return one line about why a notebook stopped."""
    if isinstance(error, DeadKernelError):
        return "the kernel died (no memory left, or the process was ended)"
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
    # a cell that ended its kernel has no count
    number = cell.execution_count or 1 + max(cell.execution_count or 0 for cell in code)
    return f'In [{number}] "{cell.source.strip().splitlines()[0]}": '
