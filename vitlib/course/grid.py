"""A grid of runs of one notebook: what is varied, which runs that makes, and whether every one of them is allowed.

A run is known by its key: the notebook's content, all of its parameters and the version of vitlib.
"""

import csv
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import nbformat

from vitlib.arguments import check, check_path, check_type
from vitlib.course.parameters import near_match
from vitlib.course.runner import Lesson, checked_values, parameters_from_file, read_lesson

MOST_RUNS = 10_000
LABEL_LENGTH = 100
FILE_KEYS = ("notebook", "grid", "zip", "parameters")


@dataclass(frozen=True)
class Grid:
    """Which runs of which notebook.

    Args:
        notebook: its file.
        grid: by name of a parameter the values that are crossed with all others.
        zips: groups of parameters whose values go together, first with first.
        parameters: what all runs have in common.

    Raises:
        ValueError: if one of these is something else.
    """

    notebook: str | Path
    grid: Mapping[str, Sequence] = field(default_factory=dict)
    zips: Sequence[Mapping[str, Sequence]] = ()
    parameters: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_path("notebook", self.notebook)
        check("grid", self.grid, _are_axes(self.grid), "a mapping of names to lists of values")
        zips = isinstance(self.zips, list | tuple) and all(zip_ and _are_axes(zip_) for zip_ in self.zips)
        check("zips", self.zips, zips, "a list of mappings of names to lists of values")
        check("parameters", self.parameters, _is_by_name(self.parameters), "a mapping of names to values")


def _is_by_name(values: object) -> bool:
    return isinstance(values, Mapping) and all(isinstance(name, str) for name in values)


def _are_axes(values: object) -> bool:
    return _is_by_name(values) and all(isinstance(one, list | tuple) for one in values.values())


@dataclass(frozen=True)
class Run:
    """One combination: ``label`` for people and folders, ``varied`` what tells it from the others of its grid."""

    key: str
    label: str
    varied: dict[str, object]
    parameters: dict[str, object]  # all of the notebook's but run_dir


@dataclass(frozen=True)
class Plan:
    """A grid whose every combination has been checked."""

    lesson: Lesson
    source: str  # the notebook as JSON, without outputs
    sha256: str  # of its cells
    varied: tuple[str, ...]
    runs: tuple[Run, ...]


def read_grid(path: str | Path) -> Grid:
    """The grid that a YAML file describes; a notebook alone is a grid of one run.

    Raises:
        ValueError: if the file is neither, or names what no grid has.
        OSError: if it cannot be read.
    """
    check_path("path", path)
    path = Path(path)
    if path.suffix == ".ipynb":
        return Grid(path)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"{path} is neither a notebook (.ipynb) nor the file of a sweep (.yaml).")
    content = parameters_from_file(path)
    for name in content:
        if name not in FILE_KEYS:
            raise ValueError(f"{path} has {name!r}{near_match(name, FILE_KEYS)}; a sweep has {', '.join(FILE_KEYS)}.")
    if not isinstance(content.get("notebook"), str):
        raise ValueError(f"{path} names no notebook; write `notebook: FILE.ipynb`, relative to the file.")
    zips = content.get("zip") or []
    zips = zips if isinstance(zips, list) else [zips]
    parameters = content.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise ValueError(f"{path} has parameters={parameters!r}; write one 'name: value' a line.")
    grid = _lists(content.get("grid") or {}, f"grid in {path}")
    return Grid(path.parent / content["notebook"], grid, [_lists(zip_, f"zip in {path}") for zip_ in zips], parameters)


def _lists(values: object, where: str) -> dict[str, list]:
    """The mapping of names to lists that a grid is; one value stands for a list of one."""
    if not isinstance(values, dict) or not values and where.startswith("zip"):
        raise ValueError(f"{where}: {values!r} is not a mapping; write 'name: [value, value]'.")
    return {str(name): value if isinstance(value, list) else [value] for name, value in values.items()}


def parse_axes(words: Iterable[str]) -> dict[str, list[str]]:
    """``seed=0,1,2`` and more of the kind as a mapping. A value with a comma is put in double quotes.

    Raises:
        ValueError: for a word that is not of this form, or a name that comes twice.
    """
    axes: dict[str, list[str]] = {}
    for word in words:
        name, equals, values = word.partition("=")
        if not (name and equals and values):
            raise ValueError(f"{word!r} is not of the form name=value,value; write for instance seed=0,1,2.")
        if name in axes:
            raise ValueError(f"{name} is given twice; write all of its values in one list.")
        axes[name] = next(csv.reader([values], skipinitialspace=True))
    return axes


def with_options(
    grid: Grid,
    axes: Mapping[str, Sequence],
    zips: Sequence[Mapping[str, Sequence]] = (),
    parameters: Mapping[str, object] | None = None,
) -> Grid:
    """A grid with what the command line says instead of, or beside, what it says of the same names itself."""
    named = {*axes, *(name for zip_ in zips for name in zip_)}
    kept = [zip_ for zip_ in grid.zips if named.isdisjoint(zip_)]
    return Grid(
        grid.notebook,
        {name: values for name, values in grid.grid.items() if name not in named} | dict(axes),
        [*kept, *zips],
        {**grid.parameters, **(parameters or {})},
    )


def make_plan(grid: Grid, given: Mapping[str, object] | None = None) -> Plan:
    """All runs of a grid, each combination checked: names, types and what the notebook's parameters may be.

    Args:
        grid: the runs; texts among its values are parsed as on the command line.
        given: values for all runs that win over the grid's ``parameters``; the notebook must take them.

    Raises:
        ValueError: one sentence about the first thing that is wrong; names that look alike are suggested.
        OSError: if the notebook cannot be read.
    """
    check_type("grid", grid, Grid, "a Grid")
    check("given", given, given is None or _is_by_name(given), "a mapping of names to values, or None")
    lesson = read_lesson(Path(grid.notebook))
    given = dict(given or {})
    axes = [{name: values} for name, values in grid.grid.items()] + list(grid.zips)
    names = [name for axis in axes for name in axis]
    for name in {*names, *given}:
        if names.count(name) + (name in given) > 1:
            raise ValueError(f"{name} is given twice; leave it in one place of --grid, --zip and -p.")
    shared = {name: value for name, value in grid.parameters.items() if name not in names}
    common = checked_values([lesson], [lesson], shared, given)
    lists = [[dict(zip(axis, row, strict=True)) for row in _rows(lesson, axis)] for axis in axes]
    if (count := math.prod(map(len, lists))) > MOST_RUNS:
        raise ValueError(f"The grid has {count:,} runs; at most {MOST_RUNS:,} are allowed, so split it.")
    source, sha256 = _source(lesson.path)
    runs = []
    for parts in itertools.product(*lists):
        varied = {name: value for part in parts for name, value in part.items()}
        values = {**lesson.defaults, **common, **varied}
        parameters = {name: values[name] for name in lesson.parameters if name != "run_dir"}
        runs.append(_run(lesson.name, sha256, varied, parameters))
    return Plan(lesson, source, sha256, tuple(names), tuple(runs))


def _rows(lesson: Lesson, axis: Mapping[str, Sequence]) -> list[tuple]:
    """The values of one axis, checked: rows of one value each, or of several that go together."""
    columns = []
    for name, values in axis.items():
        if not values:
            raise ValueError(f"{name} has no values; write for instance {name}=0,1,2.")
        columns.append([checked_values([lesson], [lesson], {}, {name: value})[name] for value in values])
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{name} has {len(values)}" for name, values in axis.items())
        raise ValueError(f"Values that go together must be equally many, but {lengths}.")
    rows = list(zip(*columns, strict=True))
    for row in rows:
        if rows.count(row) > 1:
            text = ", ".join(f"{name}={value}" for name, value in zip(axis, row, strict=True))
            raise ValueError(f"{text} comes twice; each run takes place once.")
    return rows


def _source(path: Path) -> tuple[str, str]:
    """The notebook as JSON without its outputs, and the SHA-256 of what decides what it does."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    cells = [(cell.source, cell.metadata.get("tags", [])) for cell in notebook.cells if cell.cell_type == "code"]
    return nbformat.writes(notebook), hashlib.sha256(json.dumps(cells).encode()).hexdigest()


def _run(notebook: str, sha256: str, varied: dict, parameters: dict) -> Run:
    identity = json.dumps([notebook, sha256, parameters, version("vitlib")], sort_keys=True, default=str)
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    text = ",".join(f"{name}={value}" for name, value in varied.items()) or notebook
    label = re.sub(r"[^\w=,.+-]+", "_", text)[:LABEL_LENGTH].strip("._ ")
    return Run(key, f"{label}-{key[:8]}", varied, parameters)
