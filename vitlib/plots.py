"""Six kinds of figure, each a function that returns a matplotlib ``Figure``, and ``show``, which displays it.

image_grid(images, titles)              pictures and maps side by side, in rows
patch_grid(image, patch_size)           one image cut into numbered patches
heatmap(matrix, rows, columns)          a matrix in colours, with its numbers where there is room; or tiles of maps
lines(x, series, xlabel, ylabel)        curves by name, with bands, runs, a reference such as chance, a reading
dots(groups, xlabel)                    a row for each group: a dot for each run, a bar at the mean
cost_bars(costs_by_name)                what the parts of one or several models cost
panels(count)                           axes side by side, for the ``ax=`` of these functions
show(figure, alt)                       display a figure with its alternative text

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; maps of numbers use viridis, and PuOr
around zero, which also survive a grey printout.
"""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, wraps

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.textpath import text_to_path
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter
from torch import Tensor

from vitlib.costs import Costs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FONTS = (  # with letters that matplotlib's own font lacks, of Linux, macOS and Windows
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "Noto Sans SC", "WenQuanYi Zen Hei", "PingFang SC",
    "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic", "Noto Sans Devanagari",
    "Kohinoor Devanagari", "Nirmala UI", "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Thai", "Thonburi",
    "Leelawadee UI", "Arial Unicode MS", "Segoe UI", "FreeSans",
)  # fmt: skip
STYLE = {
    "font.family": ["DejaVu Sans", *(name for name in FONTS if name in {font.name for font in fontManager.ttflist})],
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": plt.cycler(color=COLOURS),
    "legend.edgecolor": "none",
    "figure.dpi": 100,  # a screen counts 96 pixels to the inch, so a font of 10 pt is shown with 10 pt at least
    "figure.constrained_layout.use": True,
    "image.cmap": "viridis",
}
WIDEST = 8.8  # inches: what a notebook's page shows without making the figure, and its words, smaller
HALO = withStroke(linewidth=3, foreground="white")  # keeps words legible that cross a curve


# Warnings for each letter of each figure, in whose place _say_what_is_missing prints a sentence.
BOXES = r"Glyph .* missing from|Matplotlib currently does not support .* natively"
warnings.filterwarnings("ignore", BOXES)


def _styled(draw):
    """Draw in the course's style, and take the figure out of pyplot's list, which would keep it for ever."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        plt.close(figure)
        letters = {ord(letter) for text in figure.findobj(Text) for letter in text.get_text() if letter.isprintable()}
        if not letters <= {*range(128)} and not letters <= _letters():
            _say_what_is_missing()
        return figure

    return drawn


@cache
def _letters() -> set[int]:
    """Return the letters that a font of the style has."""
    return set().union(*(get_font(findfont(name)).get_charmap() for name in STYLE["font.family"]))


@cache  # so that it is said once
def _say_what_is_missing() -> None:
    print("No font here has all letters of these names, so that boxes stand for some (Noto Sans has them).")


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook, with the text that says what is seen in it, for readers who cannot see it."""
    from IPython.display import display  # only notebooks have it loaded

    picture = {"image/png": png(figure), "text/plain": alt}
    display(picture, metadata={"image/png": {"alt": alt}}, raw=True)


def png(figure: Figure) -> bytes:
    """Return a figure as the bytes of a PNG file."""
    file = io.BytesIO()
    with plt.rc_context(STYLE):
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def panels(count: int, height: float = 3.8) -> list[Axes]:
    """Return ``count`` axes side by side in a new figure, one for the ``ax=`` of each drawing."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, count, figsize=(WIDEST, height), squeeze=False)
    plt.close(figure)
    return list(axes[0])


@_styled
def image_grid(
    images: Tensor | Sequence[Tensor],
    titles: Sequence[str] = (),
    columns: int = 6,
    title: str = "",
    side: float = 1.4,
    rows: Sequence[str] = (),
    limit: float | None = None,
    frames: Mapping[int, tuple[float, float, float]] | None = None,
) -> Figure:
    """Draw pictures and maps in rows.

    Args:
        images: pictures uint8 ``[C, H, W]``, or maps ``[g, g]`` of numbers from 0 on, bright where they are large.
        titles: one for each.
        columns: pictures in a row.
        title: of the whole figure.
        side: of a picture in inches, less where a row would leave the page.
        rows: a name for each row.
        limit: the brightest number of all maps; by default the largest of each.
        frames: by number of the picture a square to outline: its top, left and side, in pixels or cells.
    """
    columns = min(columns, len(images))
    side = min(side, (WIDEST - bool(rows)) / columns)
    count = -(-len(images) // columns)
    room = 0.25 * max((str(text).count("\n") + 1 for text in titles), default=0)
    size = (side * columns + bool(rows), (side + room) * count + 0.4 * bool(title))
    figure, axes = plt.subplots(count, columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        _without_ticks(ax)
    for ax, image in zip(axes.flat, images, strict=False):
        if image.ndim == 3:
            ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=255)
        else:
            ax.imshow(image.detach().cpu().numpy(), vmin=0, vmax=limit)
    for ax, text in zip(axes.flat, titles, strict=False):
        ax.set_title(text, fontsize=10, parse_math=False)  # names of folders may hold dollar signs
    for ax, text in zip(axes[:, 0], rows, strict=False):
        ax.set_ylabel(text, rotation=0, ha="right", va="center")
    for number, (top, left, length) in (frames or {}).items():
        axes.flat[number].add_patch(_frame(top, left, length))
    if title:
        figure.suptitle(title)
    return figure


@_styled
def patch_grid(image: Tensor, patch_size: int, title: str | None = None, ax: Axes | None = None) -> Figure:
    """Draw one image uint8 ``[C, H, W]`` with its patches outlined and, up to 12 columns, numbered row by row. The
    title says what the cut costs: N patches of so many numbers, and N^2 weights in each head."""
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    patches = rows * columns
    ax = _axes(ax, 5.2, 5.2 * height / width + 0.6)
    ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=255)
    for row in range(rows + 1):
        ax.axhline(row * patch_size - 0.5, color="white", linewidth=0.8)
    for column in range(columns + 1):
        ax.axvline(column * patch_size - 0.5, color="white", linewidth=0.8)
    if columns <= 12:
        for number in range(patches):
            row, column = divmod(number, columns)
            ax.text(
                (column + 0.5) * patch_size - 0.5, (row + 0.5) * patch_size - 0.5, number,
                ha="center", va="center", color="white", fontsize=10,
                bbox={"boxstyle": "round,pad=0.15", "facecolor": "black", "alpha": 0.55, "linewidth": 0},
            )  # fmt: skip
    _without_ticks(ax)
    cost = (
        f"patch size {patch_size}: N = {rows} x {columns} = {patches:,} patches\n"
        f"{channels * patch_size**2:,} numbers per patch, N² = {patches**2:,} attention weights"
    )
    ax.set_title(cost if title is None else title)
    return ax.figure


@_styled
def heatmap(
    matrix: Tensor,
    rows: Sequence | Mapping[int, str] = (),
    columns: Sequence | Mapping[int, str] = (),
    *,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    label: str = "",
    numbers: str = "{:.2f}",
    limits: tuple[float, float] | None = None,
    frame: tuple[int, int] | None = None,
    cuts: Sequence[float] = (),
    ax: Axes | None = None,
) -> Figure:
    """Draw a matrix in colours: from dark to bright, or where numbers are negative, from orange to purple.

    Args:
        matrix: ``[R, C]``; or ``[R, C, h, w]``, drawn as R x C tiles with gaps between them.
        rows, columns: names of all rows or columns in turn, or of some by number.
        label: the meaning of a colour, written beside the scale.
        numbers: the format of the numbers in the cells, which are written up to 400 cells; "" for none.
        limits: the numbers at the two ends of the scale from dark to bright.
        frame: row and column of a cell to outline.
        cuts: columns before which to draw a line.
    """
    values, tiled = matrix.detach().cpu().float(), matrix.ndim == 4
    written = bool(numbers) and not tiled and values.numel() <= 400
    negative = bool((values < 0).any())
    largest = values.nan_to_num().abs().max().item()
    low, high = limits or (-largest if negative else 0, largest)
    if tiled:
        step = values.shape[-1] + 1
        values = F.pad(values, (0, 1, 0, 1), value=torch.nan).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-1, :-1]
    height, width = values.shape
    if written:
        size = min(WIDEST, 0.9 * width + 2), min(WIDEST, 0.55 * height + 1.5)
    else:
        size = (5.8, 5.0) if width == height else (8, 4.4)
    ax = _axes(ax, *size)
    aspect = "equal" if width == height and not written else "auto"
    colours = "PuOr" if negative and not limits else "viridis"
    drawn = ax.imshow(values.numpy(), cmap=colours, vmin=low, vmax=high, aspect=aspect, interpolation="none")
    if written:
        for (row, column), value in np.ndenumerate(values.numpy()):
            red, green, blue, _ = drawn.cmap(drawn.norm(value))
            colour = "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"
            text = numbers.format(value)
            ax.text(column, row, text, ha="center", va="center", color=colour, fontsize=12 if width <= 10 else 10)
    else:
        ax.figure.colorbar(drawn, ax=ax, label=label, shrink=0.85 if aspect == "equal" else 1)
    for axis, names, length in ((ax.yaxis, rows, height), (ax.xaxis, columns, width)):
        named = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
        places = [place * step + (step - 2) / 2 if tiled else place for place in named]
        if named or written:
            axis.set_ticks(places, [str(name) for name in named.values()], parse_math=False)
        if axis is ax.xaxis and sum(len(str(name)) + 2 for name in named.values()) > 9 * size[0]:
            plt.setp(ax.get_xticklabels(), rotation=45, ha="right", rotation_mode="anchor")
        axis.set_tick_params(length=0 if len(named) == length or tiled else 3)
    for cut in cuts:
        ax.axvline(cut - 0.5, color="black", linewidth=1)
    if frame:
        ax.add_patch(_frame(*frame, 1))
    ax.spines[:].set_visible(False)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    return ax.figure


@_styled
def lines(
    x: Sequence | Mapping[str, Sequence],
    series: Mapping[str, Sequence],
    xlabel: str,
    ylabel: str,
    title: str = "",
    *,
    bands: Mapping[str, tuple[Sequence, Sequence]] | None = None,
    reference: Mapping[str, float] | None = None,
    read_at: float | None = None,
    percent: bool = False,
    ax: Axes | None = None,
    **axis,
) -> Figure:
    """Draw curves by name.

    Args:
        x: the places of the points, for all curves or by name for each. A shorter curve takes the first of them.
        series: by name a number for each point; or several numbers for each, one of every run: then the curve goes
            through their means, and every run is a dot.
        bands: by name the lower and the upper edge of a band around the curve.
        reference: numbers to draw dotted lines at, by name, such as ``{"chance": 0.1}``.
        read_at: a place to mark. The legend says where each curve is there; one that ends earlier is read at its end.
        percent: whether the numbers are shares, to be written in percent.
        axis: given to ``Axes.set``, as ``xscale="log"`` or ``ylim=(0, None)``.
    """
    ax = _axes(ax, 7, 3.8)
    for number, (name, values) in enumerate(series.items()):
        values = np.asarray(values, dtype=float)
        places = list(x[name] if isinstance(x, Mapping) else x)[: len(values)]
        means = values if values.ndim == 1 else values.mean(axis=1)
        colour, marker = COLOURS[number % len(COLOURS)], "os^Dv"[number % 5]
        dashes = ("-", "--", "-.", (0, (1, 1)))[number % 4]
        dotted = marker if values.ndim == 1 and len(places) <= 20 else ""
        (curve,) = ax.plot(places, means, marker=dotted, color=colour, linestyle=dashes, label=name)
        if values.ndim == 2:
            ax.plot(places, values, marker, color=colour, alpha=0.6, markersize=6)
        if name in (bands or {}):
            ax.fill_between(places, *bands[name], color=colour, alpha=0.2, linewidth=0)
        if read_at is not None:
            last = max((place for place in range(len(places)) if places[place] <= read_at), default=0)
            ax.plot(places[last], means[last], marker, color=colour, markersize=9, zorder=3)
            ended = "" if places[-1] >= read_at else f" (at {places[-1]:,})"
            curve.set_label(f"{name}: {_number(means[last], percent)}{ended}")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, **axis)
    for name, value in (reference or {}).items():
        ax.axhline(value, color="black", linestyle=":")
        place = {"xy": (1, value), "xycoords": ax.get_yaxis_transform(), "xytext": (0, 3), "ha": "right"}
        ax.annotate(name, textcoords="offset points", fontsize=10, path_effects=[HALO], **place)
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    if axis.get("xscale") == "log" and not isinstance(x, Mapping) and len(x) <= 12 and "xticks" not in axis:
        ax.set_xticks(list(x), [f"{place:,}" for place in x])
        ax.set_xticks([], minor=True)
    if read_at is not None:
        ax.axvline(read_at, color="black", linewidth=1, linestyle="--", zorder=0)
    if len(series) > 1 or read_at is not None:
        ax.legend(fontsize=10, title=None if read_at is None else f"{xlabel} {read_at:,}")
    return ax.figure


@_styled
def dots(
    groups: Mapping[str, Sequence[float]],
    xlabel: str,
    title: str = "",
    *,
    reference: Mapping[str, float] | None = None,
    kinds: Sequence[str] = (),
    percent: bool = False,
    ax: Axes | None = None,
    **axis,
) -> Figure:
    """Draw a row for each group: a dot for each run, a bar at the mean, and beside it the mean (lowest to highest).

    Args:
        groups: by name the numbers of its runs, such as accuracies over seeds.
        reference: numbers to draw dotted lines at, by name, such as ``{"chance": 0.1}``.
        kinds: one for each group; groups of one kind share a colour.
        percent: whether the numbers are shares, to be written in percent.
        axis: given to ``Axes.set``, as ``xlim=(0, None)``.
    """
    ax = _axes(ax, 7.5, 1.1 + 0.5 * len(groups))
    kinds = list(kinds) or list(groups)
    colours = dict(zip(dict.fromkeys(kinds), COLOURS * len(kinds), strict=False))
    for row, (values, kind) in enumerate(zip(groups.values(), kinds, strict=True)):
        values = np.asarray(values, dtype=float)
        heights = np.full(len(values), float(row))
        if len(values) > 20:  # dots would hide dots
            heights += np.random.default_rng(0).uniform(-0.3, 0.3, len(values))
        ax.plot(values, heights, "o", color=colours[kind], markersize=8 if len(values) <= 20 else 3, alpha=0.6)
        mean, *ends = (_number(value, percent) for value in (values.mean(), values.min(), values.max()))
        ax.plot([values.mean()] * 2, [row - 0.32, row + 0.32], color=colours[kind], linewidth=4, solid_capstyle="butt")
        written = mean if len(values) == 1 else f"{mean} ({ends[0]} to {ends[1]})"
        place = {"xy": (1, row), "xycoords": ax.get_yaxis_transform(), "xytext": (8, 0), "va": "center"}
        ax.annotate(written, textcoords="offset points", fontsize=10, **place)
    for name, value in (reference or {}).items():
        ax.axvline(value, color="black", linestyle=":")
        place = {"xy": (value, 0), "xycoords": ax.get_xaxis_transform(), "xytext": (4, 3)}
        ax.annotate(name, textcoords="offset points", fontsize=10, path_effects=[HALO], **place)
    ax.set_yticks(range(len(groups)), groups)
    ax.set(xlabel=xlabel, title=title, ylim=(len(groups) - 0.4, -0.6), **axis)
    if percent:
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    return ax.figure


COST_PARTS = {  # as they are drawn, from the image to the classifier: sums of fields of vitlib.costs.Parts
    "embedding": ("patch_embedding", "positions"),
    "attention: projections": ("projections",),
    "attention: products": ("products",),
    "MLP": ("mlp",),
    "norms": ("norms",),
    "classifier": ("classifier",),
}


@_styled
def cost_bars(models: Mapping[str, Costs], title: str = "") -> Figure:
    """Draw the costs of models for one image, each a bar that is divided among the parts: parameters, FLOPs of the
    forward pass, and the bytes of activations that a training step keeps.

    Args:
        models: by name, from :func:`vitlib.costs.costs`.
    """
    scaled = EngFormatter(places=1)
    quantities = {
        "parameters": "parameters", "forward_flops": "FLOPs, forward", "activation_bytes": "bytes of activations",
    }  # fmt: skip
    figure, axes = plt.subplots(len(quantities), figsize=(7.5, len(quantities) * (0.5 + 0.4 * len(models)) + 0.9))
    for ax, (quantity, name) in zip(axes, quantities.items(), strict=True):
        starts = np.zeros(len(models))
        for (part, fields), colour in zip(COST_PARTS.items(), COLOURS, strict=False):
            counts = [sum(getattr(getattr(cost, quantity), field) for field in fields) for cost in models.values()]
            ax.barh(range(len(models)), counts, 0.7, starts, color=colour, label=part)
            starts += counts
        for row, total in enumerate(starts):
            ax.annotate(scaled(total).strip(), (total, row), (5, 0), textcoords="offset points", va="center")
        _rows(ax, models)
        ax.margins(x=0.12)
        ax.set(title=name)
        ax.xaxis.set_major_formatter(EngFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    if title:
        figure.suptitle(title)
    return figure


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    """Return ``ax``, or the axes of a new figure of this size in inches."""
    return ax if ax is not None else plt.subplots(figsize=(width, height))[1]


def _picture(image: Tensor) -> Tensor:
    """Turn ``[C, H, W]`` into ``[H, W, 3]``, or ``[H, W]`` for grey, as imshow takes it."""
    return image.permute(1, 2, 0).squeeze(2).cpu().numpy()


def _without_ticks(ax) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _frame(top: float, left: float, side: float) -> Rectangle:
    """Return an outline that is visible on any colour, by its white border."""
    border = [withStroke(linewidth=5, foreground="white")]
    corner = (left - 0.5, top - 0.5)
    return Rectangle(corner, side, side, fill=False, edgecolor=COLOURS[1], linewidth=3, path_effects=border)


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"


def _rows(ax, names) -> None:
    """Name horizontal bars, the first on top."""
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()


# The figures of before, until no notebook uses them.


@_styled
def top_classes(
    image: Tensor, probabilities: Tensor, classes: Sequence[str], count: int = 5, title: str = ""
) -> Figure:
    """One image uint8 ``[C, H, W]`` beside the ``count`` classes that a model finds most probable: a bar each, the most
    probable on top. ``probabilities`` are ``[num_classes]``, shares in [0, 1]."""
    best = probabilities.detach().cpu().topk(min(count, len(classes)))
    names = [classes[number] for number in best.indices]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), width_ratios=(1, 1.7))
    left.imshow(_picture(image), cmap="gray", vmin=0, vmax=255)
    _without_ticks(left)
    rows = range(len(names))
    right.barh(rows, 100 * best.values.numpy(), color=COLOURS[0])
    for row, share in zip(rows, best.values.tolist(), strict=True):
        right.annotate(f"{share:.0%}", (100 * share, row), xytext=(4, 0), textcoords="offset points", va="center")
    right.set_yticks(rows, names)
    right.invert_yaxis()
    right.set(xlabel="probability (%)", xlim=(0, 112), title=title)
    right.set_xticks(range(0, 101, 20))
    return figure


@_styled
def token_matrix(
    tokens: Tensor, title: str = "", row_labels: Sequence[str] = (), row: str = "token", column: str = "feature"
) -> Figure:
    """Tokens ``[T, D]`` as a matrix: one row a token, one column a feature, or whatever ``row`` and ``column`` say."""
    figure, ax = plt.subplots(figsize=(8, 4.4))
    limit = tokens.abs().max().item()
    drawn = ax.imshow(
        tokens.detach().cpu().numpy(), aspect="auto", cmap="PuOr", vmin=-limit, vmax=limit, interpolation="none"
    )
    ax.set(xlabel=column, ylabel=row, title=title)
    if row_labels:
        ax.set_yticks(range(len(row_labels)), row_labels)
    figure.colorbar(drawn, label="value")
    return figure


@_styled
def number_matrix(values: Tensor, rows: Sequence[str], columns: Sequence[str], title: str = "") -> Figure:
    """A small matrix ``[R, C]`` with its numbers written into the cells, for attention worked out by hand."""
    figure, ax = plt.subplots(figsize=(1.3 * len(columns) + 1.6, 0.9 * len(rows) + 1.3))
    ax.imshow(values.detach().cpu().numpy(), cmap="cividis")
    middle = (values.max() + values.min()).item() / 2
    for row, numbers in enumerate(values.tolist()):
        for column, value in enumerate(numbers):
            colour = "black" if value > middle else "white"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=13)
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(rows)), rows)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_title(title)
    return figure


@_styled
def position_maps(similarity: Tensor, title: str = "", limit: float = 1.0) -> Figure:
    """Position similarities ``[g, g, g, g]``: the tile in row i, column j belongs to the patch that stands there.

    Colours run from -``limit`` to ``limit``.
    """
    grid = len(similarity)
    # one picture of g x g tiles with gaps of one cell between them: an axes for each tile would take seconds to draw
    tiles = F.pad(similarity.cpu(), (0, 1, 0, 1), value=torch.nan)  # [g, g, g + 1, g + 1]
    mosaic = tiles.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:-1, :-1]
    figure, ax = plt.subplots(figsize=(5.8, 5.2))
    drawn = ax.imshow(mosaic.numpy(), vmin=-limit, vmax=limit, interpolation="none")
    centres = [tile * (grid + 1) + (grid - 1) / 2 for tile in range(grid)]
    ax.set_xticks(centres, range(grid))
    ax.set_yticks(centres, range(grid))
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="column of the patch", ylabel="row of the patch", title=title)
    figure.colorbar(drawn, label="cosine similarity", shrink=0.85, extend="both" if limit < 1 else "neither")
    return figure


@_styled
def position_tile(similarity: Tensor, row: int, column: int, title: str = "", limit: float = 1.0) -> Figure:
    """One tile of :func:`position_maps`, enlarged: how alike the patch in ``row``, ``column`` (framed) is to every
    patch. ``similarity`` is ``[g, g, g, g]``."""
    figure, ax = plt.subplots(figsize=(5.2, 4.4))
    drawn = ax.imshow(similarity[row, column].cpu().numpy(), vmin=-limit, vmax=limit)
    ax.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=3))
    ax.set(xlabel="column of the other patch", ylabel="row of the other patch", title=title)
    ax.spines[:].set_visible(False)
    figure.colorbar(drawn, label="cosine similarity", shrink=0.85, extend="both" if limit < 1 else "neither")
    return figure


@_styled
def attention_of_query(image: Tensor, shares: Tensor, cls_share: float, query: int, title: str = "") -> Figure:
    """Where one token looks: the image uint8 ``[C, S, S]`` with the query marked, beside the shares ``[g, g]``.

    ``query`` counts tokens: 0 is CLS, which has no place in the image and is not marked.
    """
    grid = len(shares)
    patch = image.shape[-1] / grid
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 4.1))
    left.imshow(_picture(image), cmap="gray", vmin=0, vmax=255)
    drawn = right.imshow(shares.cpu().numpy(), vmin=0)
    if query:
        row, column = divmod(query - 1, grid)
        corner = (column * patch - 0.5, row * patch - 0.5)
        # the white border keeps the frame visible on an image or map of any colour
        frame = {
            "fill": False,
            "edgecolor": COLOURS[1],
            "linewidth": 3,
            "path_effects": [withStroke(linewidth=5, foreground="white")],
        }
        left.add_patch(plt.Rectangle(corner, patch, patch, **frame))
        right.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, **frame))
    for ax in (left, right):
        _without_ticks(ax)
    left.set_title(f"query: token {query}, patch {query - 1}" if query else "query: CLS")
    right.set_title(f"{title}\n{cls_share:.0%} to CLS, the rest:")
    figure.colorbar(drawn, ax=right, label="attention weight", shrink=0.85)
    return figure


@_styled
def head_maps(maps: Tensor, title: str = "") -> Figure:
    """Where one token looks in every head of every layer: ``[L, H, g, g]``, a row of maps for each layer. The colours
    of each map run from 0 to its own largest weight."""
    layers, heads = maps.shape[:2]
    side = min(1.5, WIDEST / heads)
    figure, axes = plt.subplots(layers, heads, figsize=(side * heads, side * layers + 0.6), squeeze=False)
    for layer, row in enumerate(axes):
        row[0].set_ylabel(f"layer {layer + 1}")
        for head, ax in enumerate(row):
            ax.imshow(maps[layer, head].cpu().numpy(), vmin=0)
            _without_ticks(ax)
            if layer == 0:
                ax.set_title(f"head {head + 1}", fontsize=11)
    figure.suptitle(title)
    return figure


@_styled
def attention_distances(distances: Mapping[str, Tensor], even: float, title: str = "") -> Figure:
    """How far the heads of each layer look: named ``[L, H]`` in pixels, a dot for each head; ``even`` is the distance
    of attention that is spread evenly."""
    figure, ax = plt.subplots(figsize=(7, 3.8))
    for number, (name, values) in enumerate(distances.items()):
        shift = 0.16 * (number - (len(distances) - 1) / 2)  # beside each other, or dots would hide dots
        layers = torch.arange(1, len(values) + 1)[:, None].expand_as(values) + shift
        ax.plot(layers.flatten(), values.flatten().cpu(), "os^D"[number % 4], markersize=8, alpha=0.7, label=name)
    ax.axhline(even, color=COLOURS[6], linestyle=":", label="attention spread evenly")
    ax.set(xlabel="layer", ylabel="mean distance (pixels)", title=title, ylim=(0, 1.25 * even))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, loc="lower right")
    return figure


@_styled
def image_maps(images: Tensor, maps: Mapping[str, Tensor], titles: Sequence[str] = ()) -> Figure:
    """Images uint8 ``[N, C, S, S]``, one a column under its title, and below them named rows of maps ``[N, g, g]``.
    The colours of each map run from 0 to its own largest value."""
    side = min(1.6, (WIDEST - 1.2) / len(images))
    rows = 1 + len(maps)
    figure, axes = plt.subplots(rows, len(images), figsize=(side * len(images) + 1.2, side * rows + 0.3), squeeze=False)
    for number, ax in enumerate(axes[0]):
        ax.imshow(_picture(images[number]), cmap="gray", vmin=0, vmax=255)
    for ax, text in zip(axes[0], titles, strict=False):
        ax.set_title(text, fontsize=10)
    for row, values in zip(axes[1:], maps.values(), strict=True):
        for number, ax in enumerate(row):
            ax.imshow(values[number].cpu().numpy(), vmin=0)
    for row, name in zip(axes, ("image", *maps), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for ax in row:
            _without_ticks(ax)
    return figure


@_styled
def deletion_curves(shares: Sequence[float], curves: Mapping[str, Tensor], title: str = "") -> Figure:
    """What is left of a model's opinion when patches are deleted in the orders that have a name.

    Args:
        shares: of the patches that are deleted, in [0, 1], one for each point.
        curves: by name, ``[points, images]`` in [0, 1], such as :func:`vitlib.explain.deletion_curve` gives them; the
            line is the mean of the images, the band its 95 % confidence interval.
    """
    figure, ax = plt.subplots(figsize=(8, 4.4))
    percent = [100 * share for share in shares]
    for (name, values), dashes in zip(curves.items(), ("-", "--", "-.", ":") * 2, strict=False):
        mean = values.mean(dim=1).cpu()
        margin = 1.96 * values.std(dim=1).cpu() / values.shape[1] ** 0.5
        (line,) = ax.plot(percent, mean, dashes, label=name)
        ax.fill_between(percent, mean - margin, mean + margin, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set(xlabel="patches deleted (%)", ylabel="probability of the first prediction", title=title, ylim=(0, None))
    ax.legend(frameon=False, title="order of deletion")
    return figure


@_styled
def spreads(
    values: Mapping[str, Sequence[float]], reference: float, meaning: str, label: str, title: str = ""
) -> Figure:
    """How named shares in [0, 1] are spread over images: a box from the lower to the upper quartile, a line at the
    median, a diamond at the mean, whiskers from the 5th to the 95th percentile; and a line at ``reference``."""
    figure, ax = plt.subplots(figsize=(8, 1.3 + 0.6 * len(values)))
    percent = [[100 * float(value) for value in group] for group in values.values()]
    ax.boxplot(
        percent, orientation="horizontal", whis=(5, 95), showfliers=False, showmeans=True, patch_artist=True,
        widths=0.5, boxprops={"facecolor": COLOURS[5], "alpha": 0.6},
        medianprops={"color": COLOURS[6], "linewidth": 2},
        meanprops={"marker": "D", "markerfacecolor": COLOURS[1], "markeredgecolor": "white"},
    )  # fmt: skip
    ax.axvline(100 * reference, color=COLOURS[6], linestyle=":")
    ax.annotate(
        meaning, (100 * reference, 1), xycoords=ax.get_xaxis_transform(), xytext=(5, 2), textcoords="offset points",
        fontsize=10,
    )  # fmt: skip
    ax.set_yticks(range(1, len(values) + 1), values)
    ax.set(xlabel=label, xlim=(0, 100))
    ax.invert_yaxis()
    ax.set_title(title, pad=22)
    return figure


@_styled
def training_curves(history, chance: float, title: str = "") -> Figure:
    """Loss and top-1 accuracy over a ``vitlib.training.History``; ``chance`` is the accuracy of guessing."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDEST, 3.8))
    per_epoch = history.steps[-1]["step"] / history.steps[-1]["epoch"]
    left.plot(
        [step["step"] / per_epoch for step in history.steps], [step["loss"] for step in history.steps],
        color=COLOURS[5], linewidth=0.7, label="training, each step",
    )  # fmt: skip
    epochs = [epoch["epoch"] for epoch in history.epochs]
    for ax, quantity in ((left, "loss"), (right, "accuracy")):
        scale = 100 if quantity == "accuracy" else 1
        for part, colour in (("train", COLOURS[0]), ("validation", COLOURS[1])):
            values = [scale * epoch[f"{part}_{quantity}"] for epoch in history.epochs]
            label = "training (augmented)" if part == "train" else "validation"
            ax.plot(epochs, values, marker="o" if len(epochs) <= 20 else "", color=colour, label=label)
        ax.set(xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.axhline(100 * chance, color=COLOURS[6], linestyle=":", label=f"chance, {chance:.0%}")
    left.set(ylabel="cross-entropy (nats)", title="loss")
    right.set(ylabel="top-1 accuracy (%)", title="accuracy", ylim=(0, 100))
    left.legend(frameon=False)
    right.legend(frameon=False)
    if title:
        figure.suptitle(title)
    return figure


@_styled
def recorded_curves(curves: Mapping[str, Mapping], stop: int | None = None) -> Figure:
    """Accuracy and loss of several trainings, epoch by epoch, side by side.

    Args:
        curves: by name, each with ``accuracy`` (shares) and ``loss`` (nats), one entry per epoch from epoch 1 on, such
            as :func:`vitlib.records.recorded_curves` gives them.
        stop: an epoch to mark and to read the curves at; a curve that is shorter is read at its last epoch.

    Raises:
        ValueError: for a ``stop`` beyond the longest curve.
    """
    longest = max(len(curve["loss"]) for curve in curves.values())
    if stop is not None and not 1 <= stop <= longest:
        raise ValueError(f"stop={stop} is no epoch of these curves; choose one from 1 to {longest}.")
    # margins by hand: to find them takes as long as to draw, and a slider redraws this figure
    room = {"left": 0.08, "right": 0.9, "bottom": 0.13, "top": 0.92, "wspace": 0.45}
    figure, (left, right) = plt.subplots(1, 2, figsize=(WIDEST, 4.2), layout="none", gridspec_kw=room)
    accuracies = {name: [100 * share for share in curve["accuracy"]] for name, curve in curves.items()}
    losses = {name: curve["loss"] for name, curve in curves.items()}
    for ax, series in ((left, accuracies), (right, losses)):
        _named_at_their_ends(ax, series)
        ax.set(xlabel="epoch", xlim=(0, longest + 1))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    left.set(ylabel="top-1 accuracy (%)", title="accuracy", ylim=(0, None))
    right.set(ylabel="cross-entropy (nats)", title="loss")
    if stop is not None:
        # where there is room: accuracies rise from the lower left corner, losses fall from the upper left one
        _read_at(left, accuracies, stop, "{:.1f} %", place="bottom")
        _read_at(right, losses, stop, "{:.2f}", place="top")
    return figure


def _named_at_their_ends(ax, series: Mapping[str, Sequence]) -> None:
    """Curves over epochs 1, 2, ..., each with its name in its colour."""
    lowest = min(series, key=lambda name: series[name][-1])
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        epochs = range(1, len(values) + 1)
        ax.plot(epochs, values, marker="o" if len(values) <= 20 else "", markersize=4, color=colour)
        ax.annotate(
            name, (epochs[-1], values[-1]), xytext=(7, 0), textcoords="offset points", color=colour,
            va="top" if name == lowest else "bottom",  # names stay apart where curves end together
            path_effects=[HALO],
        )  # fmt: skip
    ax.margins(y=0.08)


def _read_at(ax, series: Mapping[str, Sequence], stop: int, written: str, place: str) -> None:
    """A line at epoch ``stop``, a dot on every curve there or at its end, and their values at the line's ``place``."""
    longest = max(len(values) for values in series.values())
    readings = [(f"epoch {stop}", COLOURS[6])]
    for (name, values), colour in zip(series.items(), COLOURS, strict=False):
        epoch = min(stop, len(values))
        ax.plot(epoch, values[epoch - 1], "o", color=colour, markersize=9, markeredgecolor="white", zorder=3)
        ended = f" (at {epoch})" if epoch < stop else ""
        readings.append((f"{name} {written.format(values[epoch - 1])}{ended}", colour))
    ax.axvline(stop, color=COLOURS[6], linewidth=1, linestyle="--")
    x, side = (8, "left") if stop <= 0.55 * longest else (-8, "right")  # words further right would leave the figure
    top = 0 if place == "top" else 16 * len(readings) + 4
    for line, (text, colour) in enumerate(readings):
        ax.annotate(
            text, (stop, 1 if place == "top" else 0), xycoords=ax.get_xaxis_transform(), xytext=(x, top - 16 * line),
            textcoords="offset points", ha=side, va="top", color=colour, path_effects=[HALO],
        )  # fmt: skip


@_styled
def confusion(labels: Tensor, predictions: Tensor, classes: Sequence[str], title: str = "") -> Figure:
    """How often each true class (row) was taken for each class (column), in percent of the row.

    Args:
        labels, predictions: int64 ``[N]``.
        classes: their names are written only where there is room, up to 25 classes.
    """
    rates = 100 * confusion_rates(labels, predictions, len(classes))
    named = len(classes) <= 25
    figure, ax = plt.subplots(figsize=(WIDEST, 7.6) if named and len(classes) > 12 else (6.6, 5.6))
    drawn = ax.imshow(rates.numpy(), cmap="cividis", vmin=0, vmax=100, interpolation="none")
    if named:
        names = [_shortened(name, 110) for name in classes]
        written = {"fontsize": 10, "parse_math": False}
        ax.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", **written)
        ax.set_yticks(range(len(names)), names, **written)
    ax.set(xlabel="predicted class", ylabel="true class", title=title)
    figure.colorbar(drawn, label="% of the true class")
    return figure


def confusion_rates(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """``[num_classes, num_classes]``, row: true class, column: predicted class; rows of seen classes sum to 1."""
    counts = torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).view(num_classes, -1).float()
    return counts / counts.sum(1, keepdim=True).clamp(min=1)


@_styled
def confident_mistakes(
    images: Tensor, labels: Tensor, logits: Tensor, classes: Sequence[str], title: str = ""
) -> Figure:
    """Images, each under its true class and under the class that a model takes it for, with the probability.

    Which images these are, and in which order, says :func:`vitlib.classify.confident_mistakes`.

    Args:
        images: uint8 ``[N, C, H, W]``, at least one.
        labels: int64 ``[N]``, the true classes.
        logits: ``[N, num_classes]``.
        classes: their names; what is too long for its place is shortened.
    """
    confidence, predicted = logits.softmax(dim=1).max(dim=1)
    columns = 4
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(WIDEST, 2.5 * rows + 0.5), squeeze=False)
    for ax in axes.flat:
        _without_ticks(ax)
    described = zip(axes.flat, images, labels.tolist(), predicted.tolist(), confidence.tolist(), strict=False)
    for ax, image, label, wrong, share in described:
        ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=255)
        lines = (f"true: {classes[label]}", f"{share:.0%} {classes[wrong]}")
        ax.set_title("\n".join(_shortened(line, 145) for line in lines), fontsize=10, parse_math=False)
    if title:
        figure.suptitle(title)
    return figure


def _shortened(text: str, width: float) -> str:
    """The text, or as much of it as is at most ``width`` points wide in letters of 10 points."""
    kept = text
    while _points_wide(kept) > width:
        text = text[:-1]
        kept = f"{text}…"
    return kept


def _points_wide(text: str) -> float:
    """The width of a text in letters of 10 points."""
    return text_to_path.get_text_width_height_descent(text, FontProperties(size=10), ismath=False)[0]


@_styled
def comparison(accuracies: Mapping[str, Sequence[float]], chance: float, title: str = "") -> Figure:
    """Arms of an experiment side by side: a dot per seed, a bar at the mean, a line at chance. Shares in [0, 1]; where
    all are small, the axis ends earlier than at 100 %."""
    figure, ax = plt.subplots(figsize=(7.5, 1.0 + 0.8 * len(accuracies)))
    for row, values in enumerate(accuracies.values()):
        colour = COLOURS[row % len(COLOURS)]
        percent = [100 * value for value in values]
        mean = sum(percent) / len(percent)
        ax.plot([mean, mean], [row - 0.28, row + 0.28], color=colour, linewidth=4)
        ax.plot(percent, [row] * len(percent), "o", color=colour, markersize=9, alpha=0.6)
        spread = f"{mean:.1f} % ({min(percent):.1f} to {max(percent):.1f})"
        ax.annotate(spread, (max(percent), row), xytext=(12, 0), textcoords="offset points", va="center")
    ax.axvline(100 * chance, color=COLOURS[6], linestyle=":")
    ax.annotate("chance", (100 * chance, -0.5), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)
    ax.set_yticks(range(len(accuracies)), accuracies)
    highest = max(100 * value for values in accuracies.values() for value in values)
    end = next(end for end in (10, 20, 40, 100) if highest <= end)
    ax.set(xlabel="top-1 accuracy (%): a dot per seed, a bar at the mean", xlim=(0, 1.18 * end), title=title)
    ax.set_xticks(range(0, end + 1, end // 5))
    ax.set_ylim(len(accuracies) - 0.5, -0.7)
    return figure


@_styled
def label_budget(record: Mapping, budget: int) -> Figure:
    """Accuracy against the number of labelled images: a dot per seed, a line through the means of each arm.

    Args:
        record: from :func:`vitlib.records.recorded_label_budgets`.
        budget: the number of images to mark and to read the arms at.

    Raises:
        ValueError: for a ``budget`` that was not measured.
    """
    budgets = list(next(iter(record["arms"].values())))
    if budget not in budgets:
        raise ValueError(f"budget={budget} was not measured; choose one of {', '.join(map(str, budgets))}.")
    figure, ax = plt.subplots(figsize=(8.5, 5.2))
    for (name, cells), colour, marker in zip(record["arms"].items(), COLOURS, "os^D", strict=False):
        percent = {images: [100 * share for share in shares] for images, shares in cells.items()}
        means = [sum(values) / len(values) for values in percent.values()]
        dots = [(images, value) for images, values in percent.items() for value in values]
        read = percent[budget]
        reading = f"{name} {sum(read) / len(read):.1f} % ({min(read):.1f} to {max(read):.1f})"
        ax.plot(budgets, means, color=colour, linewidth=2)
        ax.plot(*zip(*dots, strict=True), marker, color=colour, markersize=7, alpha=0.7, label=reading)
    ax.axvline(budget, color=COLOURS[6], linewidth=1, linestyle="--")
    ax.axhline(100 * record["chance"], color=COLOURS[6], linestyle=":")
    end = budgets[-1], 100 * record["chance"]
    ax.annotate("chance", end, xytext=(0, -4), textcoords="offset points", ha="right", va="top")
    ax.set_xscale("log")
    ax.set_xticks(budgets, [f"{images:,}" for images in budgets])
    ax.set_xticks([], minor=True)
    ax.set(xlabel="labelled images (logarithmic)", ylabel="top-1 accuracy (%)", ylim=(0, None), title=record["about"])
    read_at = f"with {budget:,} labelled images: mean (lowest to highest)"
    figure.legend(loc="outside lower center", ncols=2, title=read_at, frameon=False)  # there it hides no curve
    return figure


MOST_LINES = 8  # of a figure that a reader can still tell apart


SHARES = re.compile(r"top\d|accuracy|chance|probe|scratch")  # names of recorded figures that are shares of images


def in_percent(figure: str, values: Sequence[float]) -> bool:
    """Return whether a recorded figure is shown in percent: by its name a share, and in [0, 1]."""
    return bool(SHARES.search(figure)) and all(0 <= value <= 1 for value in values)


@_styled
def sweep(
    runs: Sequence[Mapping], figure: str, axis: str, title: str = "", width: float = 8, words: Mapping | None = None
) -> Figure:
    """Draw a recorded figure of many runs against one of their parameters: a dot per run, a line through the means,
    and a band from the lowest to the highest.

    The other parameters that vary, except the seed, make a line for each of their combinations; more than
    ``MOST_LINES`` are averaged. Numbers are spaced as numbers, logarithmically where they differ more than eightfold;
    other values stand side by side. Shares of images are in percent, with a line at chance.

    Args:
        runs: as in results.json of a sweep, each with ``parameters`` and ``figures``; one that lacks the figure is
            left out.
        figure: name of the figure.
        axis: name of the parameter.
        title: in place of one made of the names.
        width: of the drawing, in inches.
        words: what to call parameters and figures, by their names.

    Raises:
        ValueError: for a figure that no run has as a number, or a parameter that no run has.
    """
    known = dict.fromkeys(name for run in runs for name in run["parameters"])
    if axis not in known:
        raise ValueError(f"axis={axis!r} is not a parameter of these runs; choose one of {', '.join(known)}.")
    rows = [(run["parameters"], run["figures"]) for run in runs if _is_number(run["figures"].get(figure))]
    if not rows:
        recorded = ", ".join(dict.fromkeys(name for run in runs for name in run["figures"])) or "none"
        raise ValueError(f"No run has recorded a number named {figure!r}; choose one of {recorded}.")

    def combinations(*names: str) -> int:
        return len({repr([given.get(name) for name in names]) for given, _ in rows})

    # a parameter that follows the axis, as in zipped lists, makes no lines
    others = [name for name in known if name not in (axis, "seed", "run_dir")]
    others = [name for name in others if combinations(axis, name) > combinations(axis)]
    others = others if combinations(*others) <= MOST_LINES else []
    named = {name: _on_one_line(name) for name in (*known, figure)} | dict(words or {})
    scale = 100 if in_percent(figure, [figures[figure] for _, figures in rows]) else 1
    values = list({repr(given.get(axis)): given.get(axis) for given, _ in rows}.values())
    numbers = len(values) > 1 and all(map(_is_number, values))
    lines: dict[str, dict[float, list[float]]] = {}  # by name and place the figure of each run
    for given, figures in rows:
        parts = [f"{named[other]}={given.get(other)}" for other in others]
        name = _on_one_line(str(given.get(others[0])) if len(others) == 1 else ", ".join(parts))
        place = given[axis] if numbers else values.index(given.get(axis))
        lines.setdefault(name, {}).setdefault(place, []).append(scale * figures[figure])

    drawn, ax = plt.subplots(figsize=(width, 1.5 + 0.35 * width + 0.25 * -(-len(lines) // 2) * (len(lines) > 1)))
    for row, (name, points) in enumerate(lines.items()):
        colour, places = COLOURS[row % len(COLOURS)], sorted(points)
        means = [sum(points[place]) / len(points[place]) for place in places]
        ax.plot(places, means, color=colour, marker="os^DvPX*"[row], markersize=8, label=name)
        ends = ([end(points[place]) for place in places] for end in (min, max))
        ax.fill_between(places, *ends, color=colour, alpha=0.15, linewidth=0)
        dots = [(place, value) for place in places for value in points[place]]
        ax.plot(*zip(*dots, strict=True), "o", color=colour, markersize=5, alpha=0.5, markeredgewidth=0)
    title = title or f"{named[figure]} against {named[axis]}"
    drawn.suptitle(textwrap.fill(title, int(10 * width)), parse_math=False)
    ax.set_xlabel(named[axis], parse_math=False)
    ax.set_ylabel(f"{named[figure]} (%)" if scale == 100 else named[figure], parse_math=False)
    if numbers:
        if min(values) > 0 and max(values) > 8 * min(values):
            ax.set_xscale("log")
            ax.set_xlabel(f"{named[axis]} (logarithmic)", parse_math=False)
        if len(values) <= 12:
            ax.set_xticks(sorted(values), [f"{value:,}" for value in sorted(values)])
            ax.set_xticks([], minor=True)
    else:
        names = [textwrap.shorten(_on_one_line(str(value)), 40, placeholder="…") for value in values]
        turned = {"rotation": 30, "ha": "right"} if max(map(len, names)) > 60 / len(names) else {}
        ax.set_xticks(range(len(names)), names, parse_math=False, **turned)
    chances = {figures.get("chance") for _, figures in rows}
    if scale == 100 and len(chances) == 1 and None not in chances:
        chance = 100 * chances.pop()
        ax.axhline(chance, color=COLOURS[6], linestyle=":")
        where = {"xy": (1, chance), "xycoords": ax.get_yaxis_transform(), "xytext": (0, 3), "ha": "right"}
        ax.annotate("chance", textcoords="offset points", fontsize=10, path_effects=[HALO], **where)
        ax.set_ylim(0, None)
    if len(lines) > 1:
        legend = drawn.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
        legend.set_title(named[others[0]] if len(others) == 1 else None)
        for text in (legend.get_title(), *legend.get_texts()):
            text.set_parse_math(False)
    return drawn


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _on_one_line(text: str) -> str:
    """Return a text that a figure can show: a name of a file that is not UTF-8 has halves of surrogate pairs in it."""
    return " ".join(text.split()).encode(errors="replace").decode()


@_styled
def cost_breakdown(image: Tensor, costs: Costs, reference: Costs, name: str, title: str = "") -> Figure:
    """What a ViT costs for one image: the image cut into its patches, the shares of the parts, and below, the totals as
    multiples of another model's.

    Args:
        image: uint8 ``[C, S, S]``, of any size: it is cut into as many patches as ``costs`` counts.
        costs: from :func:`vitlib.costs.costs`, for one image.
        reference: the same of the model to compare with, which the axis calls ``name``.
    """
    # margins by hand: to find them takes as long as to draw, and a slider redraws this figure
    figure = plt.figure(figsize=(WIDEST, 6), layout="none")
    places = (0.02, 0.42, 0.34, 0.46), (0.53, 0.58, 0.45, 0.3), (0.37, 0.1, 0.56, 0.2)
    picture, shares, totals = (figure.add_axes(place) for place in places)
    figure.suptitle(title, y=0.985)
    _cut(picture, image, math.isqrt(costs.patches))
    _cost_shares(shares, costs)
    _cost_totals(totals, costs, reference)
    totals.set_xlabel(f"times {name} (logarithmic)")
    return figure


def _cut(ax, image: Tensor, columns: int) -> None:
    """A square image with the outlines of ``columns`` x ``columns`` patches, thinner where there are many."""
    ax.imshow(_picture(image), cmap="gray", vmin=0, vmax=255, extent=(0, columns, columns, 0))
    edges, style = range(columns + 1), {"colors": "white", "linewidth": min(0.8, 40 / columns)}
    ax.vlines(edges, 0, columns, **style)
    ax.hlines(edges, 0, columns, **style)
    _without_ticks(ax)
    ax.set_title(f"{columns} x {columns} = {columns**2:,} patches")


def _cost_shares(ax, costs: Costs) -> None:
    """A bar for each quantity, divided among the parts; a share is written where there is room."""
    bars = {
        "parameters": costs.parameters, "FLOPs, forward": costs.forward_flops, "activations": costs.activation_bytes,
    }  # fmt: skip
    starts = [0.0] * len(bars)
    for (part, fields), colour in zip(COST_PARTS.items(), COLOURS, strict=False):
        percent = [100 * sum(getattr(parts, field) for field in fields) / parts.total for parts in bars.values()]
        drawn = ax.barh(range(len(bars)), percent, 0.7, starts, color=colour, label=part)
        words = "white" if part in ("embedding", "attention: projections") else "black"  # on the darker colours
        ax.bar_label(
            drawn, [f"{share:.0f}" if share >= 5 else "" for share in percent], label_type="center", color=words
        )
        starts = [start + share for start, share in zip(starts, percent, strict=True)]
    _rows(ax, bars)
    ax.set(xlim=(0, 100), title="which parts cost it (%)")
    ax.legend(frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.4, -0.13), fontsize=10)


def _cost_totals(ax, costs: Costs, reference: Costs) -> None:
    """A bar for each total, from the reference's to the model's, on an axis that does not move."""
    scaled = EngFormatter(places=1)
    parameters, flops, kept = costs.parameters.total, costs.forward_flops.total, costs.activation_bytes.total
    multiples = {
        f"{costs.tokens:,} tokens": costs.tokens / reference.tokens,
        f"{scaled(parameters)} parameters, {scaled(costs.state_bytes)}B in training": (
            parameters / reference.parameters.total
        ),
        f"{scaled(flops)}FLOPs forward": flops / reference.forward_flops.total,
        f"{scaled(kept)}B of activations in training": kept / reference.activation_bytes.total,
    }
    ax.barh(range(len(multiples)), [times - 1 for times in multiples.values()], 0.7, 1, color=COLOURS[0])
    for row, times in enumerate(multiples.values()):
        written = f"{times:.3g}" if times >= 1 else f"1/{1 / times:.3g}"
        x, side = (5, "left") if times >= 1 else (-5, "right")
        ax.annotate(written, (times, row), xytext=(x, 0), textcoords="offset points", ha=side, va="center")
    ax.axvline(1, color=COLOURS[6], linewidth=1)
    ax.set_xscale("log")
    ax.set_xticks([0.001, 0.01, 0.1, 1, 10, 100, 1000], ["1/1000", "1/100", "1/10", "1", "10", "100", "1000"])
    ax.set_xticks([], minor=True)
    _rows(ax, multiples)
    ax.set(xlim=(0.0006, 1800), title="in all, for one image")
