"""The report of a sweep: one HTML file with figures, means and all runs, which needs no other file and runs no code."""

import base64
import html
import io
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pandas as pd

from vitlib import plots
from vitlib.course.sweep import as_frame
from vitlib.utils import atomic_write

MOST_METRICS = 3  # drawn against each parameter
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # for the browser: fetch and run nothing
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.875rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.25rem 0.5rem; border-bottom: 1px solid #ccc; max-width: 24rem; }
pre, td { overflow-wrap: anywhere; white-space: pre-wrap; }
img { max-width: 100%; }
"""


def write_report(results: Mapping, path: str | Path) -> None:
    """Write the report of a sweep.

    Args:
        results: the content of the sweep's results.json.
        path: of the HTML file; an earlier one is replaced when the new one is whole.
    """
    frame, titles = as_frame(results)
    runs = [run for run in results["runs"] if run["status"] == "ok"]
    good = frame[frame["status"] == "ok"]
    numbers = good[[*titles.values()]].apply(pd.to_numeric, errors="coerce").dropna(axis="columns", how="all")
    metrics = [name for name, title in titles.items() if title in numbers]
    metrics = [name for name in metrics if numbers[titles[name]].nunique() > 1][:MOST_METRICS] or metrics[:1]
    names = [name for name in results["varied"] if name != "seed"]
    text = partial(html.escape, quote=False)
    parts = [f"<h1>Sweep of {text(results['notebook'])}</h1>", f"<p>{_counts(frame)}</p>"]
    if metrics:
        rows = [", ".join(f"{name}={row[name]}" for name in names) or "all runs" for _, row in good.iterrows()]
        groups = numbers.groupby(rows, sort=False)
        means = pd.DataFrame({title: groups[title].agg(partial(_spread, title)) for title in numbers})
        parts.append(f"<p>{text(_conclusion(titles[metrics[0]], groups, means))}</p>")
        parts += [_image(runs, metric, axis) for axis in names or ["seed"] for metric in metrics]
        parts.append("<h2>Means</h2><p>In brackets: lowest and highest of the runs that differ in the seed alone.</p>")
        parts.append(_table(means))
    else:
        parts.append("<p>No run that is ok has recorded a number, so there is nothing to compare.</p>")
    frame = frame.drop(columns=["key", "started"])
    same = [name for name in frame if name not in ("run", "status") and frame[name].map(repr).nunique() < 2]
    parts += ["<h2>All runs</h2>", _table(frame.drop(columns=same), index=False)]
    about = {name: results[name] for name in ("notebook_sha256", "vitlib")}
    about |= {name: frame[name].iloc[0] for name in same if len(frame)}
    parts += [f"<h2>How it was made</h2><pre>{text(results['command'])}</pre>", "<p>The same in all runs:</p>"]
    parts.append(_table(pd.Series(about, dtype=object).to_frame(), header=False))
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    head += f"<title>Sweep of {text(results['notebook'])}</title><style>{STYLE}</style>"
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    with atomic_write(path) as temporary:
        # a name of a file that is not UTF-8 holds halves of surrogate pairs
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _counts(frame: pd.DataFrame) -> str:
    statuses = ", ".join(f"{count} {html.escape(status)}" for status, count in Counter(frame["status"]).items())
    seconds = pd.to_numeric(frame["seconds"]).sum()
    return f"{len(frame)} runs: {statuses}; together they ran for {seconds:.0f} seconds."


def _spread(name: str, values: pd.Series) -> str:
    """Return the mean and, where the values differ, the lowest and the highest: ``61.2 % (60.1 to 62.0)``."""
    if values.isna().all():
        return "–"
    scale, form, unit = (100, ".1f", " %") if plots.in_percent(name, values.dropna()) else (1, ".4g", "")
    mean, low, high = (f"{scale * value:{form}}" for value in (values.mean(), values.min(), values.max()))
    return f"{mean}{unit} ({low} to {high})" if low != high else f"{mean}{unit}"


def _conclusion(metric: str, groups, means: pd.DataFrame) -> str:
    average = groups[metric].mean()
    best, worst = average.idxmax(), average.idxmin()
    if best == worst:
        return f"{metric}: {means[metric][best]} with {best}."
    overlap = "; their ranges overlap" if groups[metric].max()[worst] >= groups[metric].min()[best] else ""
    return (
        f"{metric} is highest with {best}: {means[metric][best]}; it is lowest with {worst}: "
        f"{means[metric][worst]}{overlap}."
    )


def _image(runs: list[Mapping], metric: str, axis: str) -> str:
    """Draw one metric against one parameter, as an image inside the page."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that the font lacks is drawn as boxes
        plots.sweep(runs, metric, axis).savefig(buffer, format="png", dpi=150)
    words = html.escape(f"{metric} against {axis}: a dot for each run, a line through the means")
    return f'<img alt="{words}" width="800" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _table(frame: pd.DataFrame, **options) -> str:
    with pd.option_context("display.max_colwidth", None):
        return frame.fillna("–").to_html(float_format="{:.4g}".format, border=0, **options)
