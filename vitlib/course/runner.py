"""Run the notebooks of the course, one after another, and record what came out.

A run is a folder: the executed notebooks, the files they saved, and ``metrics.json``. Notebooks are executed under a
temporary name and renamed at the end, so a file with its final name is complete.
"""

import ast
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
import papermill
import yaml

from vitlib.course.figures import main_figures
from vitlib.course.kernels import RunResult, run_notebook
from vitlib.course.parameters import PARAMETERS, Parameter
from vitlib.utils import alone_in, atomic_write, near_match, text_table

COURSE_FOLDER = Path(__file__).parents[2] / "notebooks"


@dataclass(frozen=True)
class Lesson:
    """A notebook file with its declared parameters, and the notebooks that must have run before it."""

    path: Path
    parameters: dict[str, Parameter]
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

    Kernels start in the current folder, so relative paths mean the same as on the command line.

    Args:
        out: folder of the run; notebooks with a parameter ``run_dir`` get it.
        notebooks: folder whose ``[0-9]*.ipynb`` are the course.
        only: numbers or names of the notebooks to run; empty for all.
        shared: values for the notebooks that take them, as in a parameters file.
        given: values that a selected notebook must take; they win over ``shared``. Texts are parsed.
        timeout: longest time for one notebook, in seconds; None for no limit.

    Returns:
        One result for each selected notebook, by its name, in order.

    Raises:
        ValueError: for an unknown notebook or parameter, a value that is not allowed, or a folder in which another run
            is at work, before any kernel starts.
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
    results: dict[str, RunResult] = {}
    width = max(len(lesson.name) for lesson in selected)
    values["run_dir"] = str(out)
    with alone_in(out, "run", "--out"):
        for lesson in selected:
            missing = [name for name in lesson.needs if name in results and results[name].status != "ok"]
            if any(result.status == "interrupted" for result in results.values()):
                results[lesson.name] = RunResult("not run", "interrupted")
            elif missing:
                results[lesson.name] = RunResult("not run", f"needs {', '.join(missing)}")
            else:
                parameters = {name: values[name] for name in lesson.parameters if name in values}
                bar = {"desc": f"{lesson.name:<{width}}", "mininterval": 0.5 if sys.stderr.isatty() else 30}
                result = run_notebook(lesson.path, out, lesson.name, parameters, timeout=timeout, progress_bar=bar)
                result.parameters = {**lesson.defaults, **parameters}
                results[lesson.name] = result
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


def _own_parameter(name: str, entry: Mapping[str, str], default: object) -> Parameter:
    """Make a parameter for a teacher's own notebook; its annotation, or else its default, gives the type."""
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
            allowed = ", ".join(one for one in known if one != "run_dir")
            allowed = allowed or "none; tag the cell that sets them with 'parameters'"
            raise ValueError(f"{name!r} is not a parameter of {of}{near_match(name, known)}; there are {allowed}.")
    parsed = {name: known[name].parse(value) if isinstance(value, str) else value for name, value in given.items()}
    return {name: known[name].check(value) for name, value in {**shared, **parsed}.items()}


def parameters_from_file(path: str | Path) -> dict[str, object]:
    """Read a YAML file of names and values; raise ValueError for other content, OSError if it cannot be read."""
    try:
        values = yaml.safe_load(Path(path).expanduser().read_bytes()) or {}  # UTF-8, or UTF-16 of PowerShell
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file {path}; the course's own are in notebooks/parameters/ and notebooks/sweeps/."
        ) from error
    except yaml.YAMLError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{path} is not YAML: {told}; write one 'name: value' a line.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {values!r}, not a mapping; write one 'name: value' a line.")
    return values


def _record(out: Path, name: str, result: RunResult) -> None:
    """Write one notebook's entry of ``metrics.json`` and keep the others."""
    path = out / "metrics.json"
    notebooks = json.loads(path.read_text(encoding="utf-8"))["notebooks"] if path.exists() else {}
    metrics = {"notebooks": dict(sorted((notebooks | {name: asdict(result)}).items()))}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, default=str) + "\n", encoding="utf-8")


def summary(results: Mapping[str, RunResult]) -> str:
    """Return the closing table: notebook, status, seconds, peak memory and main figures; then a line per failure."""
    rows = [("notebook", "status", "seconds", "peak memory", "figures")]
    for name, one in results.items():
        status = f"not run ({one.error})" if one.status == "not run" else one.status
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        memory = "" if one.peak_memory_bytes is None else f"{one.peak_memory_bytes / 2**20:.0f} MiB"
        rows.append((name, status, seconds, memory, main_figures(one.figures)))
    failures = [f"{name}: {one.error}" for name, one in results.items() if one.status in ("failed", "interrupted")]
    return "\n".join([*text_table(rows, right=(2, 3)), *failures])
