"""Grids: one notebook with every combination of parameters, each checked before the first run."""

import csv
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nbformat

from vitlib.course.parameters import PARAMETERS
from vitlib.course.runner import Lesson, checked_values, parameters_from_file, read_lesson
from vitlib.utils import near_match

GRID_KEYS = ("notebook", "grid", "zip", "parameters")


@dataclass(frozen=True)
class Run:
    """One combination. ``label`` names its folders; ``key`` is a hash of notebook, parameters and version."""

    key: str
    label: str
    varied: dict[str, object]
    parameters: dict[str, object]  # all of the notebook's but run_dir


@dataclass(frozen=True)
class Plan:
    """A notebook and its runs, all checked."""

    lesson: Lesson
    source: str  # the notebook as JSON, without outputs
    sha256: str  # of its code cells but two, see _source
    varied: tuple[str, ...]
    runs: tuple[Run, ...]


def parse_axes(words: Iterable[str]) -> dict[str, list[str]]:
    """Return the values by name of words such as ``seed=0,1,2``; a value with a comma stands in double quotes.

    Raises:
        ValueError: for a word of another form.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        if not (name and values):
            raise ValueError(f"{word!r} is not of the form name=value,value; write for instance seed=0,1,2.")
        axes.setdefault(name, []).extend(next(csv.reader([values], skipinitialspace=True)))
    return axes


def make_plan(
    path: str | Path,
    grid: Mapping[str, Sequence] | None = None,
    zips: Sequence[Mapping[str, Sequence]] = (),
    parameters: Mapping[str, object] | None = None,
    given: Mapping[str, object] | None = None,
) -> Plan:
    """Return all runs of a grid, each combination checked.

    Args:
        path: a notebook, or a YAML file with the keys ``notebook``, ``grid``, ``zip`` and ``parameters``. The other
            arguments win over the file.
        grid: values by parameter; each is crossed with all others.
        zips: groups of parameters whose values go together, first with first.
        parameters: values for all runs. Those of other notebooks of the course are passed over.
        given: values for all runs that win over ``parameters``; the notebook must take them. Texts are parsed.

    Raises:
        ValueError: one sentence about the first mistake.
        OSError: if a file cannot be read.
    """
    grid, given = grid or {}, given or {}
    notebook, file_axes, file_values = _read_grid(Path(path).expanduser())
    lesson = read_lesson(notebook)
    typed = {*grid, *given, *(name for group in zips for name in group)}
    axes = [axis for axis in file_axes if typed.isdisjoint(axis)]
    axes += _axes(grid, zips)
    names = [name for axis in axes for name in axis]
    if twice := [name for name, count in Counter([*names, *given]).items() if count > 1]:
        raise ValueError(f"{twice[0]} is given twice; leave it in one place of --grid, --zip and -p.")
    shared = {
        name: value
        for name, value in {**file_values, **(parameters or {})}.items()
        if name not in names and (name in lesson.parameters or name not in PARAMETERS)
    }
    common = checked_values([lesson], shared, given)
    source, sha256 = _source(lesson.path)
    runs = {}  # by key: equal runs are one
    for parts in itertools.product(*(_rows(lesson, axis) for axis in axes)):
        varied = {name: value for part in parts for name, value in part.items()}
        values = {**lesson.defaults, **common, **varied}
        values = {name: values[name] for name in lesson.parameters if name != "run_dir"}
        identity = json.dumps([lesson.name, sha256, values, version("vitlib")], sort_keys=True, default=str)
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        label = ",".join(f"{name}={value}" for name, value in varied.items()) or lesson.name
        label = re.sub(r"[^\w=,.+-]+", "_", label).encode()[:100].decode(errors="ignore").strip("._ ")
        runs[key] = Run(key, f"{label}-{key[:8]}", varied, values)
    return Plan(lesson, source, sha256, tuple(names), tuple(runs.values()))


def _axes(grid: Mapping[str, Sequence], zips: Iterable[Mapping[str, Sequence]]) -> list[Mapping[str, Sequence]]:
    """Return the axes of a grid: each has the values of one parameter, or of several that go together."""
    return [*({name: values} for name, values in grid.items()), *zips]


def _read_grid(path: Path) -> tuple[Path, list[dict[str, list]], dict[str, object]]:
    """Return notebook, axes and parameters of a sweep's YAML file; a notebook alone has no axes."""
    if path.suffix == ".ipynb":
        return path, [], {}
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} is neither a notebook (.ipynb) nor the file of a sweep (.yaml).")
    content = parameters_from_file(path)
    for name in content:
        if name not in GRID_KEYS:
            raise ValueError(f"{path} has {name!r}{near_match(name, GRID_KEYS)}; a sweep has {', '.join(GRID_KEYS)}.")
    if not isinstance(content.get("notebook"), str):
        raise ValueError(f"{path} names no notebook; write `notebook: FILE.ipynb`, relative to the file.")
    grid, zips, parameters = (content.get(name) or {} for name in GRID_KEYS[1:])
    zips = zips if isinstance(zips, list) else [zips] if zips else []
    for part in (grid, parameters, *zips):
        if not isinstance(part, dict):
            raise ValueError(f"{path} has {part!r} where names and values belong; write one 'name: value' a line.")
    for axis in (grid, *zips):
        axis.update({name: values if isinstance(values, list) else [values] for name, values in axis.items()})
    return path.parent / Path(content["notebook"]).expanduser(), _axes(grid, zips), parameters


def _rows(lesson: Lesson, axis: Mapping[str, Sequence]) -> list[dict[str, object]]:
    """Return the checked values of one axis."""
    counts = {name: len(values) for name, values in axis.items()}
    if 0 in counts.values() or len({*counts.values()}) > 1:
        told = ", ".join(f"{name} has {count}" for name, count in counts.items())
        raise ValueError(f"A parameter needs values, and those that go together equally many, but {told}.")
    return [checked_values([lesson], {}, dict(zip(axis, row, strict=True))) for row in zip(*axis.values(), strict=True)]


def _source(path: Path) -> tuple[str, str]:
    """Return the notebook as JSON without outputs, and the SHA-256 of its code cells with their tags.

    Two cells do not count: the one for Colab, which ``make address`` changes, and the parameters, which each run holds.
    """
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    cells = [(cell.source, cell.metadata.get("tags", [])) for cell in code if "google.colab" not in cell.source]
    cells = [(source, tags) for source, tags in cells if "parameters" not in tags]
    return nbformat.writes(notebook), hashlib.sha256(json.dumps(cells).encode()).hexdigest()
