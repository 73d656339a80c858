"""Controls around the figures of :mod:`vitlib.plots`, for readers who want to turn the knobs themselves.

Each widget shows a picture that a tested plot function draws, so nothing in here can be wrong about a ViT.
Works with ipywidgets 7 (Colab) and 8.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import ipywidgets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from vitlib import plots
from vitlib.costs import Costs, costs, preset_config
from vitlib.explain import query_attention, with_temperature

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


def cost_explorer(
    image: Tensor,
    image_sizes: Sequence[int] = (224, 448, 672, 896),
    patch_sizes: Sequence[int] = (8, 14, 16, 28, 32, 56),
    widths: Sequence[int] = (192, 384, 768, 1024, 1280),
) -> ipywidgets.VBox:
    """Sliders over image size, patch size and width, above what a ViT of 12 blocks then costs, beside ViT-B/16 at 224
    pixels, where the sliders start. Heads are 64 wide and the MLP four times as wide as a token, as in ViT-B/16.

    Args:
        image: uint8 ``[C, S, S]``, shown cut into patches; it need not have any of these sizes.
        image_sizes, patch_sizes: every patch size has to divide every image size.
        widths: multiples of 64.

    Raises:
        ValueError: for sizes that cannot be combined.
    """
    base = preset_config("B/16", 1000, drop=0)

    def costs_of(image_size: int, patch_size: int, width: int) -> Costs:
        sizes = {"image_size": image_size, "patch_size": patch_size}
        return costs({**base, **sizes, "em_dim": width, "num_heads": width // 64, "ff_dim": 4 * width})

    for sizes in product(image_sizes, patch_sizes, widths):
        costs_of(*sizes)  # a slider's error would be swallowed

    def draw(image_size: int, patch_size: int, width: int) -> Figure:
        counted = costs_of(image_size, patch_size, width)
        title = f"{image_size} x {image_size} pixels in patches of {patch_size}, tokens of width {width}, 12 blocks"
        return plots.cost_breakdown(image, counted, costs(base), "ViT-B/16 at 224 pixels", title)

    return explorer(
        draw,
        image_size=_control(ipywidgets.SelectionSlider, image_sizes, 224, "image size"),
        patch_size=_control(ipywidgets.SelectionSlider, patch_sizes, 16, "patch size"),
        width=_control(ipywidgets.SelectionSlider, widths, 768, "width"),
    )
