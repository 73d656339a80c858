"""The report of a sweep: one HTML file with every run, the means over seeds and the figures that compare them.

The file needs nothing beside it and runs nothing: figures are inside it, and a policy in its head lets the browser
fetch and execute nothing. All words go through an element tree, which escapes them.
"""

import base64
import io
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element, tostring

from matplotlib.figure import Figure

from vitlib import plots
from vitlib.course.figures import format_figure
from vitlib.course.runner import FIGURES_IN_TABLE
from vitlib.spread import (
    REPEATS,
    are_shares,
    cells,
    in_words,
    number_of,
    parameter_in_words,
    parameters_of,
    spread_in_words,
    sweep_summary,
)
from vitlib.utils import atomic_write

SMALLER_FIGURES = 2  # metrics beside the main one
NOTHING = "–"
LONG = 24  # letters of a text that may be broken
STYLE = """
:root { color-scheme: light dark; --line: #ccc; --soft: #f4f4f4; --bad: #a40000; --quiet: #555; }
@media (prefers-color-scheme: dark) { :root { --line: #555; --soft: #2a2a2a; --bad: #ff8a80; --quiet: #bbb; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin-top: 2.5rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; overflow-wrap: anywhere; }
pre { background: var(--soft); padding: 0.6rem 0.8rem; white-space: pre-wrap; }
.conclusion { font-size: 1.1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.35; }
caption { text-align: left; color: var(--quiet); padding-bottom: 0.4rem; }
th, td { text-align: left; vertical-align: top; padding: 0.25rem 0.5rem; border-bottom: 1px solid var(--line); }
thead th { border-bottom-width: 2px; }
tbody th { font-weight: normal; }
.status { white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--soft); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td.number { white-space: nowrap; }
.long { min-width: 14rem; max-width: 24rem; overflow-wrap: anywhere; }
.bad { color: var(--bad); font-weight: bold; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; }
figure { margin: 0 0 1rem; max-width: 100%; }
figure img { max-width: 100%; height: auto; background: white; }
figcaption { color: var(--quiet); max-width: 50rem; overflow-wrap: anywhere; }
.figures figcaption { max-width: 31rem; }
@page { margin: 1.5cm; }
@media print {
  :root { color-scheme: light; --line: #bbb; --soft: #f4f4f4; --bad: #a40000; --quiet: #444; }
  body { font-size: 10pt; max-width: none; margin: 0; padding: 0; }
  table { font-size: 7pt; }
  th, td { padding: 1pt 3pt; }
  .long { min-width: 8em; }
  thead { display: table-header-group; }
  tr, figure { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
  .figures figure { width: 48%; }
}
"""


def write_report(results: Mapping, path: str | Path) -> None:
    """Write the report of a sweep as one HTML file that stands by itself.

    Args:
        results: the content of the sweep's results.json: ``command``, ``notebook``, ``notebook_sha256``, ``vitlib``,
            ``varied`` (names of parameters) and ``runs``.
        path: where to write it; a report that stands there is replaced when the new one is whole.
    """
    page = _element("html", _head(results), _body(results), lang="en")
    html = tostring(page, encoding="unicode", method="html", short_empty_elements=False)
    with atomic_write(path) as temporary:
        # names may hold halves of surrogate pairs, as those of files that are not UTF-8 do
        temporary.write_text(f"<!DOCTYPE html>\n{html}\n", encoding="utf-8", errors="replace")


def _head(results: Mapping) -> Element:
    nothing_from_outside = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return _element(
        "head",
        _element("meta", charset="utf-8"),
        _element("meta", **{"http-equiv": "Content-Security-Policy", "content": nothing_from_outside}),
        _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _element("title", f"Sweep of {results['notebook']}"),
        _element("style", STYLE),
    )


def _body(results: Mapping) -> Element:
    runs = results["runs"]
    varied = list(results["varied"])
    compared = _compared(runs, varied)
    metrics = _metrics(compared)
    body = _element("body", _element("h1", f"Sweep of {results['notebook']}"), _counts(runs))
    if not metrics:
        body.append(_element("p", "No run that is ok has recorded a number, so there is nothing to compare."))
    elif len(set(varied) - set(REPEATS)) > 1:  # or the figure's caption says it
        body.append(_element("p", sweep_summary(compared, metrics[0]), **{"class": "conclusion"}))
    body.extend(_figures(compared, varied, metrics))
    body.extend(_means(compared, varied))
    body.extend(_all_runs(runs, varied))
    body.extend(_origin(results))
    return body


def _counts(runs: Sequence[Mapping]) -> Element:
    """How many runs there are, how they ended and how long they took."""
    by_status = Counter(run["status"] for run in runs)
    text = ", ".join([_plural(len(runs), "run"), *(f"{count} {status}" for status, count in by_status.items())])
    seconds = [run["seconds"] for run in runs if run.get("seconds") is not None]
    if seconds:
        text += f"; together they ran for {_plural(round(sum(seconds)), 'second')}"
    return _element("p", f"{text}. The same rows are in results.csv and results.json.")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _figure_names(runs: Sequence[Mapping]) -> list[str]:
    """All recorded figures, the main ones first, as the notebook names them."""
    return list(dict.fromkeys(name for run in runs for name in run["figures"]))


def _metrics(runs: Sequence[Mapping]) -> list[str]:
    """The figures to draw: numbers, and those first that are not the same in every run; at most ``SMALLER_FIGURES``
    beside the main one."""
    values = {name: {number_of(run, name) for run in runs} - {None} for name in _figure_names(runs)}
    changing = [name for name, seen in values.items() if len(seen) > 1]
    return changing[: 1 + SMALLER_FIGURES] or [name for name, seen in values.items() if seen][:1]


def _compared(runs: Sequence[Mapping], varied: Sequence[str]) -> list[dict]:
    """The runs as they are compared: with the varied parameters and the seed alone, since the others are the same or
    follow from where a run ran, and without what a run had recorded before it failed."""
    return [
        {
            "parameters": parameters_of(run, [*varied, "seed"]),
            "figures": run["figures"] if run["status"] == "ok" else {},
        }
        for run in runs
    ]


def _figures(runs: Sequence[Mapping], varied: Sequence[str], metrics: Sequence[str]) -> list[Element]:
    """Per varied parameter one large figure of the main metric and smaller ones of others."""
    if not metrics:
        return []
    axes = [name for name in varied if name not in REPEATS]
    parts = []
    for axis in axes or ["seed"]:
        parts.append(_element("h2", f"By {axis}" if axes else "By run"))
        parts.append(_figure(runs, metrics[0], axis, width=8.0))
        if metrics[1:]:
            smaller = (_figure(runs, name, axis, width=5.0) for name in metrics[1:])
            parts.append(_element("div", *smaller, **{"class": "figures"}))
    return parts


def _figure(runs: Sequence[Mapping], metric: str, axis: str, width: float) -> Element:
    words = sweep_summary(runs, metric, [axis] if axis != "seed" else [])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks is drawn as boxes
        address = _as_address(plots.sweep(runs, metric, axis, width=width))
    image = _element("img", src=address, alt=words, width=f"{100 * width:.0f}")
    return _element("figure", image, _element("figcaption", words))


def _as_address(figure: Figure) -> str:
    """The figure as a data: address of a PNG with two pixels for each of the page's."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _means(runs: Sequence[Mapping], varied: Sequence[str]) -> list[Element]:
    """A row for each combination of the varied parameters but the seed: how many runs, and per figure mean and ends."""
    names = [name for name in varied if name not in REPEATS]
    figures = [name for name in _figure_names(runs)[:FIGURES_IN_TABLE] if _is_number(runs, name)]
    if len(runs) < 2 or not figures:
        return []
    columns = [cells(runs, name, names) for name in figures]
    shares = [are_shares(runs, name) for name in figures]
    rows = []
    for row in zip(*columns, strict=True):
        values = (parameter_in_words(value) for value in row[0].parameters.values())
        counted = str(max(len(cell.runs) for cell in row))
        spreads = [
            spread_in_words(cell, share) if cell.values else NOTHING for cell, share in zip(row, shares, strict=True)
        ]
        rows.append([*map(_text, values), _number(counted), *map(_number, spreads)])
    table = _table(
        "Mean and, in brackets, the lowest and the highest of the runs that differ in the seed alone.",
        [*map(_heading, names), _heading("runs", "number"), *(_heading(name, "number") for name in figures)],
        rows,
    )
    return [_element("h2", "Means and spread"), table]


def _is_number(runs: Sequence[Mapping], figure: str) -> bool:
    return any(number_of(run, figure) is not None for run in runs)


def _all_runs(runs: Sequence[Mapping], varied: Sequence[str]) -> list[Element]:
    """A row for each run; columns that would be empty or the same all the way down are left out."""
    figures = _figure_names(runs)[:FIGURES_IN_TABLE]
    shares = {name: are_shares(runs, name) for name in figures}
    hosts = len({run.get("host") for run in runs} - {None}) > 1
    attempts = any(run.get("attempts", 1) > 1 for run in runs)
    errors = any(run.get("error") for run in runs)
    left_out = any(run.get("left_out") for run in runs)
    headings = [
        *map(_heading, ("status", *varied)),
        *(_heading(name, "number") for name in (*figures, "seconds", "peak memory")),
        *([_heading("attempts", "number")] if attempts else []),
        *([_heading("host")] if hosts else []),
        *([_heading("error")] if errors else []),
        *([_heading("files too large to send")] if left_out else []),
        _heading("run"),
    ]
    rows = []
    for run in runs:
        row = [_status(run["status"])]
        row += [_text(parameter_in_words(value)) for value in parameters_of(run, varied).values()]
        row += [_recorded(run["figures"].get(name), share) for name, share in shares.items()]
        row += [_number(_shown(run.get("seconds"), "{:.1f}")), _number(_memory(run.get("peak_memory_bytes")))]
        row += [_number(str(run.get("attempts", NOTHING)))] if attempts else []
        row += [_text(run.get("host") or NOTHING)] if hosts else []
        row += [_text(run.get("error") or "")] if errors else []
        row += [_text(", ".join(run.get("left_out", ())))] if left_out else []
        row.append(_element("th", run["run"], scope="row", **_classes("", run["run"])))
        rows.append(row)
    return [
        _element("h2", "All runs"),
        _table(
            "In the order of the grid. A run's name is that of its folder, which has its notebook and its log.",
            headings,
            rows,
        ),
    ]


def _status(status: str) -> Element:
    return _element("td", status, **{"class": "status" if status == "ok" else "status bad"})


def _recorded(value: object, share: bool) -> Element:
    """A recorded figure; a text has room to break, a number stands to the right."""
    if value is None:
        return _number(NOTHING)
    if isinstance(value, str):
        return _text(value)
    return _number(in_words(value, share) if share else format_figure(value))


def _shown(value: float | None, form: str) -> str:
    return NOTHING if value is None else form.format(value)


def _memory(size: int | None) -> str:
    return NOTHING if size is None else f"{size / 2**20:,.0f} MiB"


def _origin(results: Mapping) -> list[Element]:
    """What is needed to repeat the sweep: the command, the notebook, the versions and the machines."""
    runs = results["runs"]
    facts = {
        "notebook": f"{results['notebook']}, SHA-256 {results['notebook_sha256']}",
        "vitlib": results["vitlib"],
        "versions": _counted(
            ", ".join(f"{name} {version}" for name, version in run["versions"].items())
            for run in runs
            if run["versions"]
        ),
        "hosts": _counted(run["host"] for run in runs if run.get("host")),
        "first run begun": min((run["started"] for run in runs if run.get("started")), default=NOTHING),
    }
    rows = [[_element("th", name, scope="row"), _text(value)] for name, value in facts.items()]
    return [
        _element("h2", "How it was made"),
        _element("pre", results["command"]),
        _table("The command above again runs only what is missing.", [], rows),
    ]


def _counted(values) -> str:
    """Values with the number of runs that have each, or the value alone where all have the same."""
    counts = Counter(values)
    if len(counts) < 2:
        return next(iter(counts), NOTHING)
    return "; ".join(f"{value} ({_plural(count, 'run')})" for value, count in counts.items())


def _table(caption: str, headings: Sequence[Element], rows: Sequence[Sequence[Element]]) -> Element:
    """A table that is scrolled sideways by itself where the page is too narrow."""
    table = _element("table", _element("caption", caption))
    if headings:
        table.append(_element("thead", _element("tr", *headings)))
    table.append(_element("tbody", *(_element("tr", *row) for row in rows)))
    return _element("div", table, **{"class": "wide", "tabindex": "0"})


def _heading(text: str, kind: str = "") -> Element:
    return _element("th", text, scope="col", **_classes(kind, text))


def _text(text: object) -> Element:
    return _element("td", str(text), **_classes("", str(text)))


def _classes(kind: str, text: str) -> dict[str, str]:
    classes = " ".join(filter(None, (kind, "long" if len(text) > LONG else "")))
    return {"class": classes} if classes else {}


def _number(text: str) -> Element:
    return _element("td", text, **{"class": "number"})


def _element(tag: str, *content: Element | str, **attributes: str) -> Element:
    """An element with a text or with children."""
    element = Element(tag, attributes)
    for part in content:
        if isinstance(part, str):
            element.text = part
        else:
            element.append(part)
    return element
