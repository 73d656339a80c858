"""Run a notebook of somebody else's: in a scratch copy of its folder, under limits, contained by bubblewrap.

``bwrap`` (https://github.com/containers/bubblewrap, a package of most Linux systems) gives the notebook a network, a
process table and a file tree of its own. Where it is missing, the limits and the scratch copy remain.

Run as a program, this module is the part inside: it runs papermill, which starts the kernel. It does without torch, so
that it starts quickly.
"""

import functools
import json
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import nbformat
import psutil
from nbformat import NotebookNode

from vitlib.course.kernels import kill_tree, run_notebook, with_children
from vitlib.utils import cache_dir

# Environment variables that a notebook inherits; tokens and passwords are in others.
PASSED = re.compile(
    r"PATH|LANG|LANGUAGE|LC_\w+|TZ|USER|LOGNAME|USERNAME|VIRTUAL_ENV|CONDA_PREFIX|PYTHON(PATH|HOME|HASHSEED|UTF8)|"
    r"(LD|DYLD|DYLD_FALLBACK)_LIBRARY_PATH|GOMP_SPINCOUNT|KMP_BLOCKTIME|OMP_WAIT_POLICY|"
    r"SYSTEM(ROOT|DRIVE)|WINDIR|COMSPEC|PATHEXT|NUMBER_OF_PROCESSORS|PROCESSOR_\w+",  # Windows needs these
    re.IGNORECASE,
)
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/nix/store", "/gnu/store")
PACKAGE = Path(__file__).parents[1]
IN_CHECKOUT = (PACKAGE.parent / "notebooks").is_dir()
NAME = "executed"  # of the executed notebook
LARGEST = 50 * 2**20  # bytes of an executed notebook: one that prints without end is stopped there
LARGEST_FILE = 2 * 2**30  # bytes
MOST_PROCESSES = 100
GRACE = 30  # seconds after the time limit in which papermill can still write


@functools.cache
def why_not_contained() -> str:
    """Return why notebooks are not contained on this machine, "" if they are. Tries to start Python in bwrap."""
    if shutil.which("bwrap") is None:
        return "bwrap is not installed"
    with tempfile.TemporaryDirectory() as own:
        line = [*_bwrap(Path(own), [Path(own)], ()), sys.executable, "-c", "import encodings"]
        probe = subprocess.run(line, capture_output=True, text=True, env=_environment(Path(own)))
    said = (probe.stderr.strip().splitlines() or [f"exit code {probe.returncode}"])[-1]
    return f"bwrap does not work here: {said}" if probe.returncode else ""


def run_apart(
    notebook: NotebookNode,
    companions: Path | None,
    hidden: Sequence[Path],
    parameters: Mapping[str, object],
    limits: Mapping[str, float],
    stopped: threading.Event,
) -> tuple[NotebookNode | None, str]:
    """Run a notebook to its end, beyond errors in its cells.

    Args:
        companions: folder with the files that it expects beside it; it gets a copy. None for an empty folder.
        hidden: folders that it must not see, even if Python's packages lie around them.
        parameters: values that papermill injects. A file or folder that one names by its whole path can be read.
        limits: ``timeout`` in seconds, and ``memory`` in GiB of all that it has started.
        stopped: an event that ends it.

    Returns:
        The executed notebook up to the cell it reached, and what stopped it, or "". None if it did not start, or if
        it has ended papermill: then what is there may be forged.
    """
    with tempfile.TemporaryDirectory(prefix="vitlib-grade-", ignore_cleanup_errors=True) as scratch:
        own = Path(scratch).resolve()
        environment = _environment(own)
        (own / "folder").mkdir()
        if companions:
            _copy(companions, own / "folder")
        nbformat.write(notebook, own / "notebook.ipynb")
        contained = not why_not_contained()
        readable = [value for value in parameters.values() if isinstance(value, str) and os.path.isabs(value)]
        job = {"own": str(own), "parameters": parameters, "contained": contained, "grader": os.getpid(), **limits}
        line = _bwrap(own, hidden, readable) if contained else []
        line += [sys.executable, "-P", "-m", __name__, json.dumps(job)]
        deadline = time.monotonic() + limits["timeout"] + GRACE
        with tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, env=environment,
                cwd=own / "folder", start_new_session=True,
            )  # fmt: skip
            try:
                while process.poll() is None and time.monotonic() < deadline and not stopped.wait(0.1):
                    pass
            finally:
                if process.poll() is None:  # the limits are kept inside, unless the notebook has halted papermill
                    kill_tree(process.pid)
                    process.wait()
            errors.seek(max(errors.seek(0, os.SEEK_END) - 10_000, 0))  # the notebook can write there without end
            said = errors.read().decode(errors="replace").strip().splitlines() or ["its process was ended"]
        # the notebook can write here, too: other names, a link that leads out, a pipe that never ends
        paths = [own / f"{NAME}{end}.ipynb" for end in ((".partial", ".failed") if process.returncode else ("",))]
        found = [path for path in paths if path.is_file() and not path.is_symlink()]
        if process.returncode not in (0, 1) or not found:  # not ended by itself
            return None, f"no result: {said[-1]}"
        if found[0].stat().st_size > 5 * LARGEST:
            return None, f"it has more than {5 * LARGEST >> 20} MiB of output"
        return nbformat.read(found[0], as_version=4), said[-1] if process.returncode else ""


def _environment(own: Path) -> dict[str, str]:
    """Return the variables of a notebook, and make the home and the folder of temporary files that they name."""
    home, temporary, fonts = (own / name for name in ("home", "tmp", "matplotlib"))
    for folder in (home, temporary, fonts):
        folder.mkdir()
    listed = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = [*listed, *([str(PACKAGE.parent)] if IN_CHECKOUT else [])]  # none is the student's folder
    import matplotlib

    for known in Path(matplotlib.get_cachedir()).glob("fontlist-*.json"):  # to make another takes seconds
        shutil.copy(known, fonts)
    return {
        **{name: value for name, value in os.environ.items() if PASSED.fullmatch(name)},
        **dict.fromkeys(("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA"), str(home)),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)),
        "MPLCONFIGDIR": str(fonts),
        "PYTHONPATH": os.pathsep.join(paths),  # this very vitlib, even if another one is installed
        "PYTHONUSERBASE": site.getuserbase(),  # the packages of `pip install --user` are in the real home
        "VITLIB_DATA": str(cache_dir()),
        "OMP_NUM_THREADS": "1",  # other cores are for other notebooks
        "CUDA_VISIBLE_DEVICES": "-1",  # no GPU of NVIDIA; an empty value counts as unset on Windows
    }


def _bwrap(own: Path, hidden: Sequence[Path], readable: Iterable[str]) -> list[str]:
    """Begin a command line that runs a program contained: it writes below ``own`` and reads what Python needs."""
    line = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    line += ["--proc", "/proc", "--dev", "/dev", "--bind", str(own / "tmp"), "/tmp"]
    shown = [*_of_python(), str(cache_dir()), *readable]
    hidden = [folder for folder in hidden if folder.is_dir()]
    # first, so that the hidden folders cover them
    around = [path for path in shown if any(folder.is_relative_to(path) for folder in hidden)]
    line += [word for path in around for word in ("--ro-bind-try", path, path)]
    line += [word for folder in hidden for word in ("--tmpfs", str(folder))]
    line += [word for path in shown if path not in around for word in ("--ro-bind-try", path, path)]
    line += ["--bind", str(own), str(own)]
    line += [word for folder in (*hidden, "/") for word in ("--remount-ro", str(folder))]
    return [*line, "--chdir", str(own)]


def _of_python() -> list[str]:
    """Return the system's files, this Python with its packages, and vitlib, but no checkout: it holds the solutions."""
    here = PACKAGE.parent
    closed = {Path.cwd(), *([here, *here.parents] if IN_CHECKOUT else ())}
    listed = (os.environ.get(name, "").split(os.pathsep) for name in ("PYTHONPATH", "LD_LIBRARY_PATH"))
    packages = {path for paths in (sys.path, *listed) for path in paths if path and Path(path).absolute() not in closed}
    python = {sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1])}
    return sorted({*SYSTEM, *python, str(PACKAGE), *map(str, here.glob("vitlib*-info")), *packages})


def _copy(source: Path, target: Path) -> None:
    """Copy regular files that can be read, but no hidden folders; links would lead back to the originals."""
    for here, folders, files in os.walk(source):
        folders[:] = [name for name in folders if not name.startswith(".")]
        copied = target / Path(here).relative_to(source)
        copied.mkdir(exist_ok=True)
        for path in (Path(here, name) for name in files):
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    shutil.copyfile(path, copied / path.name)


def main(job: str) -> None:
    """Run the notebook of a job, which :func:`run_apart` writes as JSON, to ``executed*.ipynb``.

    It exits with 0, or with 1 and, on stderr, a sentence about what stopped the notebook.
    """
    given = json.loads(job)
    own = Path(given["own"])
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))

    def end() -> str:
        # inside bwrap every process is the notebook's, even one that has cut itself loose
        processes = list(psutil.process_iter()) if given["contained"] else with_children(os.getpid())
        partial = own / f"{NAME}.partial.ipynb"
        used = shutil.disk_usage("/dev").used / 2**30 if given["contained"] else 0.0  # files in /dev/shm are memory
        for process in processes:
            with suppress(psutil.Error, OSError):  # it has ended
                used += process.memory_info().rss / 2**30
        if not given["contained"] and not psutil.pid_exists(given["grader"]):  # bwrap ends this by itself
            return "interrupted"
        if len(processes) > MOST_PROCESSES:
            return f"stopped with {len(processes)} processes at once, of which it may have {MOST_PROCESSES}"
        if used > given["memory"]:
            return f"stopped with {used:.1f} GiB of memory, of which it may have {given['memory']:g}"
        if partial.exists() and partial.stat().st_size > LARGEST:
            return f"stopped with more than {LARGEST >> 20} MiB of output"
        return ""

    result = run_notebook(
        nbformat.read(own / "notebook.ipynb", as_version=4), own, NAME, given["parameters"],
        timeout=given["timeout"], end=end, folder=own / "folder", allow_errors=True, autosave_cell_every=5,
        iopub_timeout=30, raise_on_iopub_timeout=False,  # messages that a flood has lost
        store_widget_state=False, shutdown_kernel="immediate",
    )  # fmt: skip
    kill_tree(os.getpid(), itself=False)
    sys.exit(result.error)  # it is printed to stderr, and the exit code is 1


if __name__ == "__main__":
    main(sys.argv[1])
