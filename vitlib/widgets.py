"""Controls around the figures of :mod:`vitlib.plots`, for readers who want to turn the knobs themselves.

Each widget shows a picture that a tested plot function draws, so nothing in here can be wrong about a ViT.
Works with ipywidgets 7 (Colab) and 8.
"""

import io
from collections.abc import Callable, Mapping, Sequence

import ipywidgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from . import plots
from .explain import query_attention, with_temperature

TEMPERATURES = (0.25, 0.5, 1, 2, 4)  # of a softmax; 1 changes nothing


def explorer(draw: Callable[..., Figure], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """The controls, and below them the figure ``draw(**values)``, redrawn whenever a control changes.

    The figure is a plain PNG in an ``Image`` widget: there is no output area that could swallow or pile up outputs.
    """
    picture = ipywidgets.Image(format="png")

    def redraw(change=None) -> None:
        figure = draw(**{name: control.value for name, control in controls.items()})
        png = io.BytesIO()
        # what savefig does, without its detours: a hand on a slider should not have to wait
        FigureCanvasAgg(figure).print_png(png, pil_kwargs={"compress_level": 1})
        picture.value = png.getvalue()

    for control in controls.values():
        control.observe(redraw, names="value")
    redraw()
    # aligned to the left, or the picture would be stretched to the width of the page and blurred
    return ipywidgets.VBox([*controls.values(), picture], layout=ipywidgets.Layout(align_items="flex-start"))


def _control(kind, options, value, description: str) -> ipywidgets.Widget:
    return kind(
        options=options,
        value=value,
        description=description,
        style={"description_width": "10em"},
        continuous_update=False,
    )


def patch_sizes(image: Tensor, sizes: list[int]) -> ipywidgets.VBox:
    """A slider over patch sizes, above the image uint8 ``[C, H, W]`` cut into such patches."""
    slider = _control(ipywidgets.SelectionSlider, sizes, sizes[len(sizes) // 2], "patch size")
    return explorer(lambda patch_size: plots.patch_grid(image, patch_size), patch_size=slider)


def attention_browser(image: Tensor, attention: Tensor, query: int = 0) -> ipywidgets.VBox:
    """Sliders over head, query token and temperature of one layer, above the map of where that token looks.

    Args:
        image: uint8 ``[C, S, S]``.
        attention: ``[H, T, T]`` for this image, from ``ViTModel.intermediates(...)["attention"][layer, 0]``.
        query: the token shown first; 0 is CLS.
    """
    heads, tokens, _ = attention.shape

    def draw(head: int, query: int, temperature: float) -> Figure:
        cls_share, shares = query_attention(with_temperature(attention[head - 1], temperature), query)
        return plots.attention_of_query(image, shares, cls_share, query, f"head {head}, temperature {temperature:g}")

    return explorer(
        draw,
        head=_control(ipywidgets.SelectionSlider, range(1, heads + 1), 1, "head"),
        query=_control(ipywidgets.SelectionSlider, range(tokens), query, "query (0 = CLS)"),
        temperature=_control(ipywidgets.SelectionSlider, TEMPERATURES, 1, "temperature"),
    )


def head_browser(images: Tensor, attention: Tensor, titles: Sequence[str]) -> ipywidgets.VBox:
    """Sliders over image, layer and head, above the map of where CLS looks.

    Args:
        images: uint8 ``[B, C, S, S]``.
        attention: ``[L, B, H, T, T]``, from :func:`vitlib.explain.attention_of`.
        titles: a name for each image.
    """
    layers, _, heads = attention.shape[:3]

    def draw(number: int, layer: int, head: int) -> Figure:
        cls_share, shares = query_attention(attention[layer - 1, number - 1, head - 1], query=0)
        title = f"{titles[number - 1]}: layer {layer}, head {head}"
        return plots.attention_of_query(images[number - 1], shares, cls_share, 0, title)

    return explorer(
        draw,
        number=_control(ipywidgets.SelectionSlider, range(1, len(images) + 1), 1, "image"),
        layer=_control(ipywidgets.SelectionSlider, range(1, layers + 1), layers, "layer"),
        head=_control(ipywidgets.SelectionSlider, range(1, heads + 1), 1, "head"),
    )


def stopping_epoch(curves: Mapping[str, Mapping], stop: int) -> ipywidgets.VBox:
    """A slider over the epochs, above recorded curves that are read at the chosen one.

    Args:
        curves: from :func:`vitlib.records.recorded_curves`.
        stop: the epoch shown first.
    """
    longest = max(len(curve["loss"]) for curve in curves.values())
    slider = _control(ipywidgets.SelectionSlider, range(1, longest + 1), stop, "stop after epoch")
    return explorer(lambda stop: plots.recorded_curves(curves, stop), stop=slider)


def label_budgets(record: Mapping) -> ipywidgets.VBox:
    """A slider over the measured numbers of labelled images, above the accuracies that are read at the chosen one.

    Args:
        record: from :func:`vitlib.records.recorded_label_budgets`.
    """
    budgets = list(next(iter(record["arms"].values())))
    slider = _control(ipywidgets.SelectionSlider, budgets, budgets[len(budgets) // 2], "labelled images")
    return explorer(lambda budget: plots.label_budget(record, budget), budget=slider)
