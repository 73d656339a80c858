"""Runs the course's notebooks through papermill, one after another, and records what came out.

A run is a folder: the executed notebooks, what they saved, and ``metrics.json``. Whatever stands there under a final
name is whole: notebooks are executed under a temporary name and moved when they are done.
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

from vitlib.course.figures import format_figure
from vitlib.course.notebook import Outcome, run_notebook
from vitlib.course.parameters import PARAMETERS, Parameter, near_match
from vitlib.course.tables import aligned
from vitlib.utils import atomic_write

COURSE_FOLDER = Path(__file__).parents[2] / "notebooks"
FIGURES_IN_TABLE = 4


@dataclass(frozen=True)
class Lesson:
    """A notebook as it stands on disk: where it is, what it takes and which notebooks must have run before it."""

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
) -> dict[str, Outcome]:
    """Run notebooks in order into the folder ``out``. Kernels start in the current folder, so relative paths among
    the parameters mean what they mean on the command line.

    Args:
        out: folder of the run; every notebook that has a ``run_dir`` gets it.
        notebooks: folder whose ``[0-9]*.ipynb`` are the course.
        only: numbers or names of the notebooks to run; empty for all.
        shared: values for whichever notebooks take them, as a parameters file has.
        given: values that some selected notebook must take; they win over ``shared``. Texts are parsed.
        timeout: longest time for one cell, in seconds; None for no limit.

    Returns:
        one outcome per selected notebook, in order. A notebook that fails stops only those that need it.

    Raises:
        ValueError: for an unknown notebook or parameter or a value that is not allowed, before any kernel starts.
        FileNotFoundError: if there is no notebook.
    """
    out = Path(out).resolve()
    lessons = read_lessons(notebooks)
    if out == lessons[0].path.resolve().parent:
        raise ValueError(f"The run folder {out} holds the notebooks themselves; choose another with --out.")
    selected = _select(lessons, only)
    values = checked_values(lessons, selected, shared or {}, given or {})
    _read_metrics(out)  # a broken file is better found now than after the first notebook
    out.mkdir(parents=True, exist_ok=True)

    outcomes: dict[str, Outcome] = {}
    width = max(len(lesson.name) for lesson in selected)
    for lesson in selected:
        missing = [name for name in lesson.needs if name in outcomes and outcomes[name].status != "ok"]
        if any(outcome.status == "interrupted" for outcome in outcomes.values()):
            outcomes[lesson.name] = Outcome("not run", "interrupted")
        elif missing:
            outcomes[lesson.name] = Outcome("not run", f"needs {', '.join(missing)}")
        else:
            parameters = {name: values[name] for name in lesson.parameters if name in values}
            if "run_dir" in lesson.parameters:
                parameters["run_dir"] = str(out)
            bar = {"desc": f"{lesson.name:<{width}}", "mininterval": 0.5 if sys.stderr.isatty() else 30}
            outcomes[lesson.name] = run_notebook(
                lesson.path, out, lesson.name, parameters,
                defaults=lesson.defaults, cell_timeout=timeout, progress_bar=bar,
            )  # fmt: skip
        _record(out, lesson.name, outcomes[lesson.name])
    return outcomes


def read_lessons(folder: str | Path) -> list[Lesson]:
    """The notebooks ``[0-9]*.ipynb`` of a folder, in order, with the parameters they declare."""
    paths = sorted(Path(folder).glob("[0-9]*.ipynb"))
    if not paths:
        raise FileNotFoundError(f"No notebook [0-9]*.ipynb in {folder}; name the course's folder with --notebooks.")
    return [read_lesson(path) for path in paths]


def read_lesson(path: Path) -> Lesson:
    """A notebook with the parameters it declares.

    Raises:
        ValueError: if the file is no notebook.
        OSError: if it cannot be read.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except nbformat.reader.NotJSONError as error:
        raise ValueError(f"{path} is not a notebook; restore it or move it out of the folder.") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no notebook {path}; the course's own are in notebooks/.") from error
    # papermill asks the notebook for its language, which one saved by some editors does not have
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.setdefault("tags", [])
    declared = papermill.inspect_notebook(notebook)
    defaults = {name: _literal(entry["default"]) for name, entry in declared.items()}
    return Lesson(
        path=path,
        parameters={
            name: PARAMETERS.get(name) or _own_parameter(name, entry, defaults[name])
            for name, entry in declared.items()
        },
        defaults=defaults,
        needs=tuple(notebook.metadata.get("vitlib", {}).get("needs", ())),
    )


def _own_parameter(name: str, entry: Mapping[str, str], default: object) -> Parameter:
    """A parameter outside the course's table, as a teacher's own notebook may have: its annotation says the type."""
    annotation = entry["inferred_type_name"]
    optional = annotation.startswith("Optional[")
    by_name = {"int": int, "float": float, "bool": bool, "str": str, "None": type(default)}
    found = by_name.get(annotation.removeprefix("Optional[").removesuffix("]"))
    known = found if found in (int, float, bool, str) else object
    return Parameter(name, known, entry["help"], optional=optional)


def _literal(source: str) -> object:
    try:
        return ast.literal_eval(source)
    except (ValueError, SyntaxError):
        return source


def _select(lessons: list[Lesson], only: Sequence[str]) -> list[Lesson]:
    known = {lesson.name.split("_")[0]: lesson for lesson in lessons} | {lesson.name: lesson for lesson in lessons}
    only = [word.zfill(2) for word in only]
    for word in only:
        if word not in known:
            hint = near_match(word, known)
            names = ", ".join(lesson.name for lesson in lessons)
            raise ValueError(f"{word!r} is not a notebook of the course{hint}; there are {names}.")
    chosen = {known[word].name for word in only}
    return [lesson for lesson in lessons if not only or lesson.name in chosen]


def checked_values(
    lessons: list[Lesson], selected: list[Lesson], shared: Mapping[str, object], given: Mapping[str, object]
) -> dict[str, object]:
    """Values of parameters, those of ``given`` parsed and winning; for an unknown or wrong one, ValueError."""
    known = {name: parameter for lesson in lessons for name, parameter in lesson.parameters.items()}
    for name in [*shared, *given]:
        if name == "run_dir":
            raise ValueError("run_dir cannot be given as a parameter: it is the folder of the run; use --out.")
        if name not in known:
            hint = near_match(name, known)
            raise ValueError(f"{name!r} is not a parameter of the course{hint}. There are:\n{_parameter_list(known)}")
    taken = {name for lesson in selected for name in lesson.parameters}
    for name in given:
        if name not in taken:
            takers = ", ".join(lesson.name for lesson in lessons if name in lesson.parameters)
            raise ValueError(f"{name} is a parameter of {takers} only, which this run leaves out; drop one of the two.")
    parsed = {name: known[name].parse(value) if isinstance(value, str) else value for name, value in given.items()}
    values = {**shared, **parsed}
    for name, value in values.items():
        known[name].check(value)
    return values


def _parameter_list(parameters: Mapping[str, Parameter]) -> str:
    width = max(len(f"{name}: {parameter.annotation}") for name, parameter in parameters.items())
    return "\n".join(
        f"  {name + ': ' + parameter.annotation:<{width}}  {parameter.help}" for name, parameter in parameters.items()
    )


def parameters_from_file(path: str | Path) -> dict[str, object]:
    """The mapping of names to values in a YAML file.

    Raises:
        ValueError: if the file is not such a mapping.
        OSError: if it cannot be read.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file {path}; the course's own are in notebooks/parameters/.") from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{path} is not YAML: {' '.join(str(error).split())}; write one 'name: value' a line."
        ) from error
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path} holds {values!r}, not a mapping; write one 'name: value' a line.")
    return values or {}


def _read_metrics(out: Path) -> dict:
    path = out / "metrics.json"
    if not path.exists():
        return {"notebooks": {}}
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        metrics["notebooks"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of runs; move it away, and it is begun again.") from error
    return metrics


def _record(out: Path, name: str, outcome: Outcome) -> None:
    """Write one notebook's entry of ``metrics.json``; the entries of others stay."""
    metrics = _read_metrics(out)
    metrics["notebooks"] = dict(sorted((metrics["notebooks"] | {name: asdict(outcome)}).items()))
    with atomic_write(out / "metrics.json") as temporary:
        temporary.write_text(json.dumps(metrics, indent=2, default=str) + "\n", encoding="utf-8")


def summary(outcomes: Mapping[str, Outcome]) -> str:
    """The closing table: notebook, status, seconds, peak memory and main figures, then one line per failure."""
    rows = [("notebook", "status", "seconds", "peak memory", "figures")]
    for name, outcome in outcomes.items():
        figures = list(outcome.figures.items())[:FIGURES_IN_TABLE]
        rows.append(
            (
                name,
                f"not run ({outcome.error})" if outcome.status == "not run" else outcome.status,
                "" if outcome.seconds is None else f"{outcome.seconds:.1f}",
                "" if outcome.peak_memory_bytes is None else f"{outcome.peak_memory_bytes / 2**20:.0f} MiB",
                ", ".join(f"{key} {format_figure(value)}" for key, value in figures),
            )
        )
    failures = [f"{name}: {o.error}" for name, o in outcomes.items() if o.status in ("failed", "interrupted")]
    return "\n".join([*aligned(rows, right=(2, 3)), *failures])
