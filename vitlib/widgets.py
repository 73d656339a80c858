"""Controls around the figures of :mod:`vitlib.plots`, for readers who want to turn the knobs themselves.

Each widget shows a picture that a tested plot function draws, so nothing in here can be wrong about a ViT.
Works with ipywidgets 7 (Colab) and 8.
"""

import io
from collections.abc import Callable, Mapping

import ipywidgets
from matplotlib.figure import Figure
from torch import Tensor

from . import plots
from .explain import query_attention


def explorer(draw: Callable[..., Figure], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """The controls, and below them the figure ``draw(**values)``, redrawn whenever a control changes.

    The figure is a plain PNG in an ``Image`` widget: there is no output area that could swallow or pile up outputs.
    """
    picture = ipywidgets.Image(format="png")

    def redraw(change=None) -> None:
        png = io.BytesIO()
        draw(**{name: control.value for name, control in controls.items()}).savefig(png, format="png")
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
        style={"description_width": "8em"},
        continuous_update=False,
    )


def patch_sizes(image: Tensor, sizes: list[int]) -> ipywidgets.VBox:
    """A slider over patch sizes, above the image uint8 ``[C, H, W]`` cut into such patches."""
    slider = _control(ipywidgets.SelectionSlider, sizes, sizes[len(sizes) // 2], "patch size")
    return explorer(lambda patch_size: plots.patch_grid(image, patch_size), patch_size=slider)


def attention_browser(image: Tensor, attention: Tensor, query: int = 0) -> ipywidgets.VBox:
    """Sliders over layer, head and query token, above the map of where that token looks.

    Args:
        image: uint8 ``[C, S, S]``.
        attention: ``[L, H, T, T]`` for this image, from ``ViTModel.intermediates(...)["attention"][:, 0]``.
        query: the token shown first; 0 is CLS.
    """
    layers, heads, tokens, _ = attention.shape

    def draw(layer: int, head: int, query: int) -> Figure:
        cls_share, shares = query_attention(attention[layer - 1, head - 1], query)
        return plots.attention_of_query(image, shares, cls_share, query, f"layer {layer}, head {head}")

    return explorer(
        draw,
        layer=_control(ipywidgets.SelectionSlider, range(1, layers + 1), layers, "layer"),
        head=_control(ipywidgets.SelectionSlider, range(1, heads + 1), 1, "head"),
        query=_control(ipywidgets.SelectionSlider, range(tokens), query, "query (0 = CLS)"),
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
