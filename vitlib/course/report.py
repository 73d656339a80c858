"""The report of a sweep: one HTML file with figures, means and all runs, which needs no other file and runs no code."""

import base64
import html
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from vitlib import plots
from vitlib.course.sweep import as_frame
from vitlib.utils import atomic_write

MOST_METRICS = 3  # drawn against each parameter
MOST_LINES = 8  # of a figure that a reader can still tell apart
SHARES = re.compile(r"top\d|accuracy|chance|probe|scratch")  # in names of recorded numbers that are shares of images
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-size: 0.875rem; display: block; overflow-x: auto; }
th, td { text-align: left; padding: 0.25rem 0.5rem; border-bottom: 1px solid #ccc; max-width: 24rem; }
pre, td { overflow-wrap: break-word; white-space: pre-wrap; }
img { max-width: 100%; }
"""


def write_report(results: Mapping, path: str | Path) -> None:
    """Write the report of a sweep to an HTML file, whole or not at all; ``results`` is what results.json holds."""
    frame, titles = as_frame(results)
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
        axes = names or [name for name in ["seed"] if name in frame]
        parts += [_image(results, metric, axis) for axis in axes for metric in metrics]
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
    head = f'<meta charset="utf-8"><title>Sweep of {text(results["notebook"])}</title><style>{STYLE}</style>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"
    with atomic_write(path) as temporary:
        # a name on the command line that is not UTF-8 holds halves of surrogate pairs
        temporary.write_text(page, encoding="utf-8", errors="replace")


def _counts(frame: pd.DataFrame) -> str:
    statuses = ", ".join(f"{count} {html.escape(status)}" for status, count in Counter(frame["status"]).items())
    seconds = pd.to_numeric(frame["seconds"]).sum()
    return f"{len(frame)} runs: {statuses}; together they ran for {seconds:.0f} seconds."


def _spread(name: str, values: pd.Series) -> str:
    """Return the mean and, where the values differ, the lowest and the highest: ``61.2 % (60.1 to 62.0)``."""
    if values.isna().all():
        return "–"
    scale, form, unit = (100, ".1f", " %") if in_percent(name, values.dropna()) else (1, ".4g", "")
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


def draw_metric(results: Mapping, metric: str, axis: str) -> Figure:
    """Draw the recorded number ``metric`` against the parameter ``axis``: means, and a band from lowest to highest.

    Each combination of the other parameters that vary, except the seed, has a line; more than ``MOST_LINES`` are
    averaged. Numbers are spaced as numbers, logarithmically where they differ more than eightfold; other values stand
    side by side. Shares of images are in percent, with a line at chance.
    """
    frame, titles = as_frame(results)
    frame = frame[frame["status"] == "ok"]
    values = pd.to_numeric(frame[titles[metric]], errors="coerce")
    keys = frame.map(repr)
    others = [name for name in results["varied"] if name not in (axis, "seed")]
    # a parameter that goes with the axis, as in --zip, makes no lines
    others = [name for name in others if len(keys[[axis, name]].drop_duplicates()) > keys[axis].nunique()]
    if others and len(keys[others].drop_duplicates()) > MOST_LINES:
        others = []
    lines = [_word(", ".join(f"{name}={row[name]}" for name in others) or metric) for _, row in frame.iterrows()]
    choices = dict(zip(keys[axis], frame[axis], strict=True))
    if len(choices) > 1 and all(type(value) in (int, float) for value in choices.values()):
        places, ticks = pd.to_numeric(frame[axis]), sorted(choices.values())
        options = {"xticks": ticks, "xticklabels": [f"{value:,}" for value in ticks]} if len(ticks) <= 12 else {}
        if ticks[0] > 0 and ticks[-1] > 8 * ticks[0]:
            options = {"xscale": "log", **options}
    else:
        places = keys[axis].map(list(choices).index)
        names = [textwrap.shorten(_word(str(value)), 24, placeholder="…") for value in choices.values()]
        options = {"xticks": range(len(names)), "xticklabels": names}
    percent, chance = in_percent(metric, values.dropna()), frame.get(titles.get("chance"), pd.Series()).unique()
    if percent and len(chance) == 1 and chance[0] is not None:
        options |= {"reference": {"chance": chance[0]}, "ylim": (0, None)}
    spread = values.groupby([lines, places], sort=False).agg(["mean", "min", "max"]).dropna()
    parts = {name: part.droplevel(0).sort_index() for name, part in spread.groupby(level=0, sort=False)}
    figure = plots.lines(
        {name: part.index for name, part in parts.items()},
        {name: part["mean"] for name, part in parts.items()},
        _word(axis), _word(metric), _word(f"{metric} against {axis}"),
        bands={name: (part["min"], part["max"]) for name, part in parts.items()}, percent=percent, **options,
    )  # fmt: skip
    figure.axes[0].minorticks_off()
    return figure


def in_percent(metric: str, values: Iterable[float]) -> bool:
    """Return whether a recorded number is shown in percent: by its name a share of images, and in [0, 1]."""
    return bool(SHARES.search(metric)) and all(0 <= value <= 1 for value in values)


def _word(text: str) -> str:
    """Return foreign text for a figure: on one line, without formulas."""
    return " ".join(text.split()).replace("$", r"\$")


def _image(results: Mapping, metric: str, axis: str) -> str:
    """Return the figure of a metric as an image inside the page."""
    picture = base64.b64encode(plots.png(draw_metric(results, metric, axis))).decode()
    words = html.escape(f"{metric} against {axis}: a line through the means, a band from the lowest to the highest run")
    return f'<img alt="{words}" width="700" src="data:image/png;base64,{picture}">'


def _table(frame: pd.DataFrame, **options) -> str:
    with pd.option_context("display.max_colwidth", None):
        return frame.fillna("–").to_html(float_format="{:.4g}".format, border=0, **options)
