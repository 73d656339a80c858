"""For the grader: one notebook executed to its end, whatever is in it, by a process of its own under limits.

As a program this module is that process. It does without torch, so that it starts quickly. The notebook's kernel has
fewer rights than it: see :mod:`vitlib.course.contain`.
"""

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
import papermill
import psutil
from nbformat import NotebookNode
from nbformat.v4 import new_output
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from vitlib.course import contain
from vitlib.course.runner import KernelMonitor, _kernel_manager, reason
from vitlib.utils import atomic_write, cache_dir

PROCESSES = 100  # that a notebook may have at once
KEPT = 10_000_000  # characters of output in one notebook, and again as many of verdicts
STOPPED = "stopped"  # the notebook's metadata key for why it did not run to its end
MARK = "VITLIB_GRADING"  # environment variable by which a notebook's processes are known, even those it cut loose

clock = time.monotonic


@dataclass(frozen=True)
class Limits:
    """What one notebook may use.

    Args:
        timeout: longest time for the whole notebook, in seconds.
        memory: most memory of its kernel and all that this has started, in GiB.
        one_thread: whether it should compute on one thread.
    """

    timeout: float
    memory: float
    one_thread: bool = False


def execute_apart(
    notebook: NotebookNode,
    folder: Path,
    without: set[Path],
    parameters: Mapping[str, object],
    verdict: str,
    limits: Limits,
    stopped: threading.Event,
) -> tuple[NotebookNode | None, str]:
    """Execute a notebook to its end, whatever is in it, in a process of its own and in a copy of its folder.

    Args:
        notebook: what to execute; the copy of the folder need not have it.
        folder: what the notebook expects beside it.
        without: files and folders that stay out of the copy.
        parameters: values for papermill to inject; a file or folder that one names by its whole path can be read.
        verdict: the MIME type of outputs that are kept when other output is left out for being too much.
        limits: what ends it.
        stopped: ends the execution when it is set.

    Returns:
        the executed notebook as far as it got (None: not to its first cell), and why it got no further, or "".
    """
    with tempfile.TemporaryDirectory(prefix="vitlib-grade-", ignore_cleanup_errors=True) as scratch:
        source, executed, rights, own = (
            Path(scratch, name) for name in ("notebook.ipynb", "executed.ipynb", "rights.json", "own")
        )
        environment = _environment(own, limits, mark := uuid.uuid4().hex)
        _copy_folder(folder, own / "folder", without)
        nbformat.write(notebook, source)
        rights.write_text(json.dumps(_rights(own, parameters)))
        job = {
            "notebook": str(source), "folder": str(own / "folder"), "executed": str(executed), "rights": str(rights),
            "parameters": parameters, "verdict": verdict,
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vitlib.course.execution", json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env=environment,
        )  # fmt: skip
        try:
            note = _wait(process, limits, stopped)
        finally:
            _kill(process, mark)
        if not executed.exists():
            return None, note or "it ended before its first cell"
        result = nbformat.read(executed, as_version=4)
        return result, note or result.metadata.get(STOPPED, "")


def _environment(own: Path, limits: Limits, mark: str) -> dict[str, str]:
    """The environment variables of a notebook, and the folders below ``own`` that they name."""
    environment = contain.own_environment(os.environ, own)
    for folder in (path for path in environment.values() if Path(path).is_relative_to(own)):
        Path(folder).mkdir(parents=True, exist_ok=True)
    for fonts in _font_lists():  # to make another takes seconds
        shutil.copy(fonts, environment["MPLCONFIGDIR"])
    threads = {"OMP_NUM_THREADS": "1"} if limits.one_thread else {}
    return {**environment, **threads, MARK: mark, "VITLIB_DATA": str(cache_dir())}


def _rights(own: Path, parameters: Mapping[str, object]) -> dict[str, object]:
    """The arguments of :func:`vitlib.course.contain.restrict` for a notebook whose folders are below ``own``."""
    named = [value for value in parameters.values() if isinstance(value, str) and os.path.isabs(value)]
    readable = [*contain.readable(), str(cache_dir()), *named]
    return {"version": contain.landlock_version(), "writable": [str(own)], "readable": readable}


def _font_lists() -> Iterable[Path]:
    """What matplotlib has found out about the fonts of this machine."""
    import matplotlib

    return Path(matplotlib.get_cachedir()).glob("fontlist-*.json")


def _copy_folder(source: Path, target: Path, without: set[Path]) -> None:
    """Regular files only: through a link the copy would lead back to the originals. What cannot be read stays out."""
    for here, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(here, name) not in without]
        copied = target / Path(here).relative_to(source)
        copied.mkdir()
        for path in (Path(here, name) for name in files):
            if path.is_file() and not path.is_symlink() and path not in without:
                with contextlib.suppress(OSError):
                    shutil.copyfile(path, copied / path.name)


def _wait(process: subprocess.Popen, limits: Limits, stopped: threading.Event) -> str:
    """Until the process ends or has to be ended; why, if it did not end well by itself."""
    deadline = clock() + limits.timeout
    while process.poll() is None:
        if clock() > deadline:
            return f"stopped after {limits.timeout:g} s"
        started = _started_by(process.pid)
        if len(started) > PROCESSES:
            return f"stopped with {len(started)} processes at once, of which it may have {PROCESSES}"
        if (used := _memory(started, limits.memory * 2**30)) > limits.memory * 2**30:
            return f"stopped with {used / 2**30:.1f} GiB of memory, of which it may have {limits.memory:g}"
        if stopped.wait(0.1):
            return "interrupted"
    return f"its process ended with exit code {process.returncode}" if process.returncode else ""


def _started_by(pid: int) -> list[psutil.Process]:
    """What a process has started, and what this has started, and so on; without what has ended."""
    found = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
    return found


def _memory(processes: Iterable[psutil.Process], enough: float) -> int:
    """Bytes that processes have in memory. If that is more than ``enough``, pages that they share are shared out among
    them where the system can say so (Linux), which takes longer."""
    resident = sum(_of(process, "memory_info", "rss") for process in processes)
    return resident if resident <= enough else sum(_of(process, "memory_full_info", "pss") for process in processes)


def _of(process: psutil.Process, method: str, value: str) -> int:
    try:
        usage = getattr(process, method)()
    except (psutil.Error, OSError):  # it has ended
        return 0
    return getattr(usage, value, usage.rss)


def _kill(process: subprocess.Popen, mark: str) -> None:
    """End a notebook's process, its kernel, and whatever that has started, in sessions of their own too.

    The process itself goes last, since on Linux all that the notebook has cut loose is below it.
    """
    alive = process.poll() is None
    if alive:
        with contextlib.suppress(psutil.Error):
            psutil.Process(process.pid).suspend()
    _end(lambda: [*(_started_by(process.pid) if alive else ()), *_marked(mark, process.pid)])
    process.kill()
    process.stdin.close()
    process.wait()


def _end(find: Callable[[], Collection[psutil.Process]]) -> None:
    """Kill what ``find`` finds until it finds nothing more. What is halted first starts no others meanwhile."""
    for _ in range(50):
        victims = find()
        if not victims:
            break
        for act in (psutil.Process.suspend, psutil.Process.kill):
            for victim in victims:
                with contextlib.suppress(psutil.Error):  # it has ended
                    act(victim)
        time.sleep(0.05)


def _marked(mark: str, without: int) -> list[psutil.Process]:
    return [other for other in psutil.process_iter() if other.pid != without and _has_mark(other, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


class ToItsEnd(NBClientEngine):
    """A papermill engine that goes on behind errors, and saves before each cell, so that whoever ends it loses little.

    Its options beyond papermill's: ``executed``, where to save, ``verdict``, the MIME type that is always kept, and
    ``rights``, the file that says what the kernel may read and write.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, executed, verdict, rights, **_):
        client = _Client(nb_man, Path(executed), verdict, rights, kernel_name)
        try:
            client.execute()
        except Exception as error:  # a dead kernel, or messages that nbclient cannot read
            nb_man.nb.metadata[STOPPED] = reason(error)
        client.save()


class _Client(PapermillNotebookClient):
    """Keeps a limited amount of output; endless printing would otherwise fill the memory."""

    def __init__(self, nb_man, executed: Path, verdict: str, rights: str, kernel_name: str):
        super().__init__(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=_contained(_kernel_manager(KernelMonitor(), None, {}, None), rights),
            allow_errors=True,
            on_cell_execute=lambda **_: self.save(),
            # messages lost in a flood, or still on their way
            raise_on_iopub_timeout=False,
            iopub_timeout=30,
            store_widget_state=False,
            shutdown_kernel="immediate",
        )
        self._executed, self._verdict = executed, verdict
        self._kept = {True: 0, False: 0}

    def save(self) -> None:
        with atomic_write(self._executed) as temporary:
            nbformat.write(self.nb, temporary)

    def output(self, outs, msg, display_id, cell_index):
        is_verdict = self._verdict in msg["content"].get("data", ())
        before = self._kept[is_verdict]
        self._kept[is_verdict] += len(str(msg["content"])) + 500  # what an empty message takes
        if self._kept[is_verdict] > KEPT:
            if before <= KEPT:
                outs.append(new_output("stream", name="stderr", text="[further output is left out]\n"))
            return None
        output = super().output(outs, msg, display_id, cell_index)
        if is_verdict:  # the same cell may never end
            self.save()
        return output


def _contained(manager: type, rights: str) -> type:
    """A kernel manager whose kernels start through the door of :mod:`vitlib.course.contain`."""
    command = list(manager.kernel_spec.argv)
    at = command.index("ipykernel_launcher")
    # -P: a module beside the notebook must not take the place of one that runs before the door is shut
    command[at - 1 : at + 1] = ["-P", "-m", contain.__name__, rights]
    spec = type(manager.kernel_spec)(**{**manager.kernel_spec.to_dict(), "argv": command})
    return type("Contained", (manager,), {"kernel_spec": spec})


def main(job: str) -> None:
    """Execute a notebook. ``job`` is JSON: notebook, folder to run in, parameters, executed, verdict and rights."""
    options = json.loads(job)
    logging.disable(logging.CRITICAL)
    contain.adopt_orphans()
    threading.Thread(target=_end_with_the_grader, daemon=True).start()
    papermill_engines.register("to its end", ToItsEnd)
    with contextlib.suppress(papermill.PapermillExecutionError):  # papermill's summary of errors in the cells
        papermill.execute_notebook(
            nbformat.read(options["notebook"], as_version=4),
            None,
            options["parameters"],
            engine_name="to its end",
            kernel_name="python3",
            language="python",
            progress_bar=False,
            cwd=options["folder"],
            executed=options["executed"],
            verdict=options["verdict"],
            rights=options["rights"],
        )
    _end(lambda: _started_by(os.getpid()))


def _end_with_the_grader() -> None:
    """The grader holds the other end of standard input open: when it is gone, however it ended, this process ends, and
    all that the notebook has started."""
    os.read(sys.stdin.fileno(), 1)
    _end(lambda: _started_by(os.getpid()))
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
