"""Six kinds of figure, each a function that returns a matplotlib ``Figure``, and what displays them::

    image_grid(images, titles)              pictures and maps side by side, in rows
    patch_grid(image, patch_size)           one image cut into numbered patches
    heatmap(matrix, rows, columns)          a matrix in colours, with its numbers where there is room; or tiles of maps
    lines(x, series, xlabel, ylabel)        curves by name, with bands, runs, a reference such as chance, a reading
    dots(groups, xlabel)                    a row for each group: a dot for each run, a bar at the mean
    cost_bars(models)                       what the parts of one or several models cost
    panels(count)                           axes side by side, for the ``ax=`` of heatmap and lines
    show(figure, alt)                       display a figure with its alternative text
    png(figure, dpi)                        a figure as the bytes of a PNG file

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. Maps of numbers use viridis, or PuOr
around zero.
"""

import io
import warnings
from collections.abc import Mapping, Sequence
from functools import cache, wraps

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import EngFormatter
from torch import Tensor

from vitlib.costs import Costs

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
FONTS = (  # of Linux, macOS and Windows, with letters that matplotlib's own font lacks
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
    "figure.dpi": 100,  # a screen has 96 pixels to the inch, so a font of 10 pt is shown with at least 10 pt
    "figure.constrained_layout.use": True,
    "image.cmap": "viridis",
}
WIDEST = 8.8  # inches; a notebook's page would shrink a wider figure and its words
HALO = withStroke(linewidth=3, foreground="white")  # keeps words legible that cross a curve


def _styled(draw):
    """Draw in the course's style, and remove the figure from pyplot's list, which would keep it for ever."""

    @wraps(draw)
    def drawn(*args, **kwargs) -> Figure:
        with plt.rc_context(STYLE):
            figure = draw(*args, **kwargs)
        plt.close(figure)
        return figure

    return drawn


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook, with an alternative text for readers who cannot see it."""
    from IPython.display import display  # only notebooks have it loaded

    picture = {"image/png": png(figure), "text/plain": alt}
    display(picture, metadata={"image/png": {"alt": alt}}, raw=True)


def png(figure: Figure, dpi: float = STYLE["figure.dpi"]) -> bytes:
    """Return a figure as the bytes of a PNG file, with ``dpi`` pixels to the inch."""
    file = io.BytesIO()
    figure.set_dpi(dpi)
    with plt.rc_context(STYLE), warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})  # savefig would draw it twice
    for warning in raised:
        text = str(warning.message)
        if text.startswith("Glyph"):  # one for each missing letter
            _say_what_is_missing()
        elif "natively" not in text:  # of scripts whose letters change with their neighbours
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return file.getvalue()


@cache  # said once
def _say_what_is_missing() -> None:
    print("No font here has all letters of these names, so some are drawn as boxes; install Noto Sans.")


def panels(count: int) -> list[Axes]:
    """Return ``count`` axes side by side in a new figure, each for the ``ax=`` of one drawing."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, count, figsize=(WIDEST, 3.8), squeeze=False)
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
    frames: Mapping[int, tuple[float, float, float]] | None = None,
) -> Figure:
    """Draw pictures and maps in rows.

    Args:
        images: pictures uint8 ``[C, H, W]``, or maps ``[g, g]`` of numbers from 0 on, bright where they are large.
        titles: one per picture.
        columns: pictures in a row.
        title: of the whole figure.
        side: of a picture in inches; smaller if a row would be too wide for the page.
        rows: one name per row.
        frames: a square to outline, by the number of its picture: top, left and side, in pixels or cells.
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
            ax.imshow(image.detach().cpu().numpy(), vmin=0)
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
def patch_grid(image: Tensor, patch_size: int) -> Figure:
    """Draw one image uint8 ``[C, H, W]`` with its patches outlined and, up to 12 columns, numbered row by row. The
    title says what the cut costs: N patches of so many numbers, and N^2 weights in each head."""
    channels, height, width = image.shape
    rows, columns = height // patch_size, width // patch_size
    patches = rows * columns
    figure, ax = plt.subplots(figsize=(5.2, 5.2 * height / width + 0.6))
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
    ax.set_title(
        f"patch size {patch_size}: N = {rows} x {columns} = {patches:,} patches\n"
        f"{channels * patch_size**2:,} numbers per patch, N² = {patches**2:,} attention weights"
    )
    return figure


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
    """Draw a matrix in colours: from dark to bright, or with negative numbers from orange to purple.

    Args:
        matrix: ``[R, C]``; or ``[R, C, g, g]``, drawn as R x C square tiles with gaps between them.
        rows, columns: names of all rows or columns in turn, or of some by number.
        label: what the colours mean, written beside the scale.
        numbers: the format of the numbers in the cells, written if there are at most 400 cells; "" for none.
        limits: the numbers at the two ends of a scale from dark to bright.
        frame: row and column of a cell to outline.
        cuts: columns to draw a line before.
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
        x: where the points are, for all curves or for each by name. A shorter curve takes the first of them.
        series: for each curve one number per point, or one per point and run; then the curve connects the means, and
            each run is a dot.
        bands: by name the lower and the upper edge of a band around the curve.
        reference: numbers to draw dotted lines at, by name, such as ``{"chance": 0.1}``.
        read_at: an x to mark. The legend gives each curve's value there, or its last if it ends earlier.
        percent: whether to write the numbers in percent.
        axis: passed to ``Axes.set``, such as ``xscale="log"`` or ``ylim=(0, None)``.
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
        place = {"xy": (1, value), "xycoords": ax.get_yaxis_transform(), "xytext": (4, 0), "va": "center"}
        ax.annotate(name, textcoords="offset points", fontsize=10, **place)
    if percent:
        ax.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
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
    **axis,
) -> Figure:
    """Draw a row for each group: a dot for each run, a bar at the mean, and beside it the mean (lowest to highest).

    Args:
        groups: by name the numbers of its runs, such as accuracies over seeds.
        kinds: one per group; groups of one kind share a colour.
        reference, percent, axis: as in :func:`lines`.
    """
    figure, ax = plt.subplots(figsize=(7.5, 1.1 + 0.5 * len(groups)))
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
        ax.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}%")
    return figure


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
    """Draw the costs of models by name as bars, divided among their parts: parameters, FLOPs of the forward pass, and
    bytes of activations that a training step keeps."""
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
        ax.set_yticks(range(len(models)), models)
        ax.tick_params(axis="y", length=0)
        ax.invert_yaxis()  # the first on top
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


def _picture(image: Tensor) -> np.ndarray:
    """Turn ``[C, H, W]`` into ``[H, W, 3]``, or ``[H, W]`` for grey, as imshow takes it."""
    return image.permute(1, 2, 0).squeeze(2).cpu().numpy()


def _without_ticks(ax) -> None:
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def _frame(top: float, left: float, side: float) -> Rectangle:
    """Return an outline with a white border, which is visible on any colour."""
    border = [withStroke(linewidth=5, foreground="white")]
    corner = (left - 0.5, top - 0.5)
    return Rectangle(corner, side, side, fill=False, edgecolor=COLOURS[1], linewidth=3, path_effects=border)


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"
