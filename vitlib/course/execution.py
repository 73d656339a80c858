"""For the grader: one notebook executed to its end, whatever is in it, in a process of its own.

As a program this module is that process. It does without torch, so that it starts quickly.
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
from collections.abc import Mapping
from pathlib import Path

import nbformat
import papermill
import psutil
from nbformat import NotebookNode
from nbformat.v4 import new_output
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from vitlib.course.notebook import kernel_manager, reason
from vitlib.files import written_whole

KEPT = 10_000_000  # characters of output in one notebook, and again as many of verdicts
STOPPED = "stopped"  # the notebook's metadata key for why it did not run to its end
MARK = "VITLIB_GRADING"  # environment variable by which a notebook's processes are known, even those it cut loose

clock = time.monotonic


def execute_apart(
    notebook: NotebookNode,
    folder: Path,
    without: set[Path],
    parameters: Mapping[str, object],
    verdict: str,
    timeout: float,
    one_thread: bool,
    stopped: threading.Event,
) -> tuple[NotebookNode | None, str]:
    """Execute a notebook to its end, whatever is in it, in a process of its own and in a copy of its folder.

    Args:
        notebook: what to execute; the copy of the folder need not have it.
        folder: what the notebook expects beside it.
        without: files and folders that stay out of the copy.
        parameters: values for papermill to inject.
        verdict: the MIME type of outputs that are kept when other output is left out for being too much.
        timeout: longest time for the whole notebook, in seconds.
        one_thread: whether it should compute on one thread.
        stopped: ends the execution when it is set.

    Returns:
        the executed notebook as far as it got (None: not to its first cell), and why it got no further, or "".
    """
    with tempfile.TemporaryDirectory(prefix="vitlib-grade-", ignore_cleanup_errors=True) as scratch:
        source, executed, home = (Path(scratch, name) for name in ("notebook.ipynb", "executed.ipynb", "folder"))
        _copy_folder(folder, home, without)
        nbformat.write(notebook, source)
        job = {
            "notebook": str(source), "folder": str(home), "executed": str(executed),
            "parameters": parameters, "verdict": verdict,
        }  # fmt: skip
        mark = uuid.uuid4().hex
        # one notebook must not leave the next one a file that every kernel reads at its start
        own = {MARK: mark, "JUPYTER_RUNTIME_DIR": f"{scratch}/runtime", "IPYTHONDIR": f"{scratch}/ipython"}
        process = subprocess.Popen(
            [sys.executable, "-m", "vitlib.course.execution", json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            env={**os.environ, **own, **({"OMP_NUM_THREADS": "1"} if one_thread else {})},
        )  # fmt: skip
        try:
            note = _wait(process, timeout, stopped)
        finally:
            _kill(process, mark)
        if not executed.exists():
            return None, note or "it ended before its first cell"
        result = nbformat.read(executed, as_version=4)
        return result, note or result.metadata.get(STOPPED, "")


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


def _wait(process: subprocess.Popen, timeout: float, stopped: threading.Event) -> str:
    """Until the process ends or has to be ended; why, if it did not end well by itself."""
    deadline = clock() + timeout
    while process.poll() is None:
        if clock() > deadline:
            return f"stopped after {timeout:g} s"
        if stopped.wait(0.1):
            return "interrupted"
    return f"its process ended with exit code {process.returncode}" if process.returncode else ""


def _kill(process: subprocess.Popen, mark: str) -> None:
    """End a notebook's process, its kernel, and whatever that has started, in sessions of their own too."""
    for _ in range(50):  # while they are being killed, they may start others
        victims = [other for other in psutil.process_iter() if _has_mark(other, mark)]
        if process.poll() is None:
            victims += [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        if not victims:
            break
        for victim in victims:
            with contextlib.suppress(psutil.Error):  # it has ended
                victim.kill()
        time.sleep(0.05)
    process.stdin.close()
    process.wait()


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except (psutil.Error, OSError):  # it has ended, or is another user's
        return False


class ToItsEnd(NBClientEngine):
    """A papermill engine that goes on behind errors, and saves before each cell, so that whoever ends it loses little.

    Its options beyond papermill's: ``executed``, where to save, and ``verdict``, the MIME type that is always kept.
    """

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, executed, verdict, **_):
        client = _Client(nb_man, Path(executed), verdict, kernel_name)
        try:
            client.execute()
        except Exception as error:  # a dead kernel, or messages that nbclient cannot read
            nb_man.nb.metadata[STOPPED] = reason(error)
        client.save()


class _Client(PapermillNotebookClient):
    """Keeps a limited amount of output; endless printing would otherwise fill the memory."""

    def __init__(self, nb_man, executed: Path, verdict: str, kernel_name: str):
        super().__init__(
            nb_man,
            kernel_name=kernel_name,
            kernel_manager_class=kernel_manager(lambda pid: None),
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
        with written_whole(self._executed) as temporary:
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


def main(job: str) -> None:
    """Execute a notebook. ``job`` is JSON: notebook, folder to run in, parameters, executed and verdict."""
    options = json.loads(job)
    logging.disable(logging.CRITICAL)
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
        )


def _end_with_the_grader() -> None:
    """The grader holds the other end of standard input open: when it is gone, however it ended, this process ends."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
