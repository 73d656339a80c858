"""Run notebooks through papermill, one after another, and record what came out.

A run is a folder: the executed notebooks, the files they saved, and ``metrics.json``. Notebooks are executed under a
temporary name and renamed at the end, so a file with its final name is complete.
"""

import ast
import json
import logging
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import nbformat
import papermill
import psutil
import yaml
from nbclient.exceptions import CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from vitlib.course.figures import format_figure, recorded_figures
from vitlib.utils import atomic_write, near_match, text_table

if TYPE_CHECKING:  # parameters loads torch, which a process that only starts kernels does without
    from vitlib.course.parameters import Parameter

COURSE_FOLDER = Path(__file__).parents[2] / "notebooks"
FIGURES_IN_TABLE = 4
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

    def __init__(self, end: Callable[[], str] = lambda: "", interval: float = 0.2):
        self.pid: int | None = None
        self.peak_bytes: int | None = None
        self.ended = ""
        self._end, self._interval = end, interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "KernelMonitor":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            if self.pid is None:
                continue
            with suppress(psutil.Error, OSError):  # the process is ending
                self.peak_bytes = max(self.peak_bytes or 0, peak_memory(self.pid))
                self.ended = self.ended or self._end()
                if self.ended:
                    kill_tree(self.pid)


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
    versions = {package: version(package) for package in ("torch", "vitlib", "papermill")}
    result = RunResult(
        "ok", parameters=in_full, seed=in_full.get("seed"),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        versions={"python": platform.python_version(), **versions, "platform": platform.platform()},
    )  # fmt: skip
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # the result says it in one line
    start = time.perf_counter()
    with KernelMonitor(end) as monitor:
        try:
            _execute(
                _verbatim(notebook) if isinstance(notebook, Path) else notebook, _verbatim(partial), dict(parameters),
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
        executed = nbformat.read(partial, as_version=4)
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


def _verbatim(path: Path) -> str:
    """Escape braces, which papermill would fill in."""
    return str(path).replace("{", "{{").replace("}", "}}")


def last_cell(executed: NotebookNode) -> str:
    """Return the cell that ran last, as ``In [3] "first line": ``, by the number that Jupyter shows."""
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    started = [number for number, cell in enumerate(code) if cell.metadata.papermill.start_time]
    if not started:
        return ""
    cell = code[started[-1]]
    number = cell.execution_count or started[-1] + 1  # a cell that ended its kernel has no count
    return f'In [{number}] "{cell.source.strip().splitlines()[0]}": '


@dataclass(frozen=True)
class Lesson:
    """A notebook file with its declared parameters, and the notebooks that must have run before it."""

    path: Path
    parameters: dict[str, "Parameter"]
    defaults: dict[str, object]
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.path.stem


def run_course(
    out: str | Path,
    *,
    notebooks: str | Path = COURSE_FOLDER,
    only: Sequence[str] = (),
    shared: Mapping[str, object] | None = None,
    given: Mapping[str, object] | None = None,
    timeout: float | None = 3600,
) -> dict[str, RunResult]:
    """Run notebooks in order into the folder ``out``; a failure stops only the notebooks that need it.

    Kernels start in the current folder, so relative paths mean the same as on the command line. Returns one result per
    selected notebook, in order.

    Args:
        out: folder of the run; notebooks with a parameter ``run_dir`` get it.
        notebooks: folder whose ``[0-9]*.ipynb`` are the course.
        only: numbers or names of the notebooks to run; empty for all.
        shared: values for the notebooks that take them, as in a parameters file.
        given: values that a selected notebook must take; they win over ``shared``. Texts are parsed.
        timeout: longest time for one cell, in seconds; None for no limit.

    Raises:
        ValueError: for an unknown notebook or parameter or a value that is not allowed, before any kernel starts.
        FileNotFoundError: if there is no notebook.
    """
    out = Path(out).expanduser().resolve()
    lessons = read_lessons(notebooks)
    if out == lessons[0].path.resolve().parent:
        raise ValueError(f"The run folder {out} holds the notebooks themselves; choose another with --out.")
    selected = _select(lessons, only)
    values = checked_values(lessons, shared or {}, given or {})
    for name in given or {}:
        if not any(name in lesson.parameters for lesson in selected):
            takers = ", ".join(lesson.name for lesson in lessons if name in lesson.parameters)
            raise ValueError(f"{name} is a parameter of {takers} only, which this run leaves out; drop one of the two.")
    _read_metrics(out)  # find a broken file now, not after the first notebook
    out.mkdir(parents=True, exist_ok=True)

    results: dict[str, RunResult] = {}
    width = max(len(lesson.name) for lesson in selected)
    values["run_dir"] = str(out)
    for lesson in selected:
        missing = [name for name in lesson.needs if name in results and results[name].status != "ok"]
        if any(result.status == "interrupted" for result in results.values()):
            results[lesson.name] = RunResult("not run", "interrupted")
        elif missing:
            results[lesson.name] = RunResult("not run", f"needs {', '.join(missing)}")
        else:
            parameters = {name: values[name] for name in lesson.parameters if name in values}
            bar = {"desc": f"{lesson.name:<{width}}", "mininterval": 0.5 if sys.stderr.isatty() else 30}
            results[lesson.name] = run_notebook(
                lesson.path, out, lesson.name, parameters,
                defaults=lesson.defaults, cell_timeout=timeout, progress_bar=bar,
            )  # fmt: skip
        _record(out, lesson.name, results[lesson.name])
    return results


def read_lessons(folder: str | Path) -> list[Lesson]:
    """Read the notebooks ``[0-9]*.ipynb`` of a folder, in order."""
    paths = sorted(Path(folder).expanduser().glob("[0-9]*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"No notebook [0-9]*.ipynb in {folder}; name the course's folder with --notebooks.")
    return [read_lesson(path) for path in paths]


def read_lesson(path: Path) -> Lesson:
    """Read a notebook's parameters; raise ValueError for another kind of file, OSError for one that cannot be read."""
    from vitlib.course.parameters import PARAMETERS

    try:
        notebook = nbformat.read(path, as_version=4)
    except nbformat.reader.NotJSONError as error:
        raise ValueError(f"{path} is not a notebook; restore it or move it out of the folder.") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no notebook {path}; the course's own are in notebooks/.") from error
    # some editors leave out the language, which papermill asks for
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    declared = papermill.inspect_notebook(notebook)
    defaults = {name: _literal(entry["default"]) for name, entry in declared.items()}
    parameters = {
        name: PARAMETERS.get(name) or _own_parameter(name, entry, defaults[name]) for name, entry in declared.items()
    }
    return Lesson(path, parameters, defaults, tuple(notebook.metadata.get("vitlib", {}).get("needs", ())))


def _own_parameter(name: str, entry: Mapping[str, str], default: object) -> "Parameter":
    """Make a parameter for a teacher's own notebook; its annotation, or else its default, gives the type."""
    from vitlib.course.parameters import Parameter

    annotation = entry["inferred_type_name"]
    is_optional = annotation.startswith("Optional[")
    if annotation == "None":
        annotation = type(default).__name__
    types = {"int": int, "float": float, "bool": bool, "str": str}
    found = types.get(annotation.removeprefix("Optional[").removesuffix("]"), object)
    return Parameter(name, found, entry["help"], optional=is_optional)


def _literal(source: str) -> object:
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return source


def _select(lessons: list[Lesson], only: Sequence[str]) -> list[Lesson]:
    names = [lesson.name for lesson in lessons]
    numbers = {name.split("_")[0]: name for name in names}
    chosen = [numbers.get(word.zfill(2), word) for word in only] or names
    for word in chosen:
        if word not in names:
            hint = near_match(word, names)
            raise ValueError(f"{word!r} is not a notebook of the course{hint}; there are {', '.join(names)}.")
    return [lesson for lesson in lessons if lesson.name in chosen]


def checked_values(
    lessons: list[Lesson], shared: Mapping[str, object], given: Mapping[str, object]
) -> dict[str, object]:
    """Parse and check values of parameters; ``given`` wins. An unknown or wrong one raises ValueError."""
    known = {name: parameter for lesson in lessons for name, parameter in lesson.parameters.items()}
    for name in [*shared, *given]:
        if name == "run_dir":
            raise ValueError("run_dir cannot be given as a parameter: it is the folder of the run; use --out.")
        if name not in known:
            of = lessons[0].name if len(lessons) == 1 else "the notebooks"
            allowed = ", ".join(known) or "none; tag the cell that sets them with 'parameters'"
            raise ValueError(f"{name!r} is not a parameter of {of}{near_match(name, known)}; there are {allowed}.")
    parsed = {name: known[name].parse(value) if isinstance(value, str) else value for name, value in given.items()}
    return {name: known[name].check(value) for name, value in {**shared, **parsed}.items()}


def parameters_from_file(path: str | Path) -> dict[str, object]:
    """Read a YAML file of names and values; raise ValueError for other content, OSError if it cannot be read."""
    try:
        values = yaml.safe_load(Path(path).expanduser().read_bytes()) or {}  # UTF-8, or UTF-16 of PowerShell
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}; the course's own are in notebooks/parameters/.") from error
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {told}; write one 'name: value' a line.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {values!r}, not a mapping; write one 'name: value' a line.")
    return values


def _read_metrics(out: Path) -> dict:
    path = out / "metrics.json"
    if not path.exists():
        return {"notebooks": {}}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["notebooks"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of runs; move it away to start a new one.") from error
    return metrics


def _record(out: Path, name: str, result: RunResult) -> None:
    """Write one notebook's entry of ``metrics.json`` and keep the others."""
    metrics = _read_metrics(out)
    metrics["notebooks"] = dict(sorted((metrics["notebooks"] | {name: asdict(result)}).items()))
    with atomic_write(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, default=str) + "\n", encoding="utf-8")


def summary(results: Mapping[str, RunResult]) -> str:
    """Return the closing table: notebook, status, seconds, peak memory and main figures; then a line per failure."""
    rows = [("notebook", "status", "seconds", "peak memory", "figures")]
    for name, one in results.items():
        status = f"not run ({one.error})" if one.status == "not run" else one.status
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        memory = "" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**20:.0f} MiB"
        rows.append((name, status, seconds, memory, ", ".join(map(" ".join, main_figures(one.figures).items()))))
    failures = [f"{name}: {one.error}" for name, one in results.items() if one.status in ("failed", "interrupted")]
    return "\n".join([*text_table(rows, right=(2, 3)), *failures])


def main_figures(figures: Mapping[str, object]) -> dict[str, str]:
    """Return the first figures of a run, as many as fit into a table, as texts."""
    return {name: format_figure(value) for name, value in list(figures.items())[:FIGURES_IN_TABLE]}


def escape_formula(cell: object) -> object:
    """Return the cell of a table, a text that a spreadsheet would run as a formula with a quote before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@")) else cell
