"""Controls around the figures of :mod:`vitlib.plots`, for readers who want to turn the knobs themselves.

Each widget shows a picture that a tested plot function draws, so nothing in here can be wrong about a ViT.
Works with ipywidgets 7 (Colab) and 8.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure
from torch import Tensor

from vitlib import plots
from vitlib.costs import Costs, costs, preset_config
from vitlib.explain import query_attention, with_temperature

TEMPERATURES = (0.25, 0.5, 1, 2, 4)  # of a softmax; 1 changes nothing


class Explorer(ipywidgets.VBox):
    """Sliders and menus above a figure. A page without a kernel shows the figure as it was at first."""

    def __init__(self, draw: Callable[..., Figure], alt: str, controls: Mapping[str, ipywidgets.Widget]):
        self.draw, self.alt, self.controls = draw, alt, controls
        self.picture = ipywidgets.Image(format="png")
        for control in controls.values():
            control.observe(self.redraw, names="value")
        self.redraw()
        # aligned to the left, or the picture would be stretched to the width of the page and blurred
        layout = ipywidgets.Layout(align_items="flex-start")
        super().__init__([*controls.values(), self.picture], layout=layout)

    def redraw(self, change=None) -> None:
        self.picture.value = plots.png(self.draw(**{name: control.value for name, control in self.controls.items()}))

    def _ipython_display_(self, **kwargs) -> None:  # the one way to be displayed that ipywidgets 7 and 8 share
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        bundle = {"application/vnd.jupyter.widget-view+json": view, "image/png": bytes(self.picture.value)}
        display({**bundle, "text/plain": self.alt}, metadata={"image/png": {"alt": self.alt}}, raw=True)


def explorer(draw: Callable[..., Figure], alt: str = "", /, **choices) -> Explorer:
    """Make a control for each argument of ``draw``, and redraw its figure below them whenever one changes.

    >>> def cut(patch_size=64):
    ...     return plots.patch_grid(photo, patch_size)
    >>> explorer(cut, "A photograph, cut into patches.", patch_size=[16, 32, 64, 128])

    Args:
        draw: a function that returns a figure. A control starts at the default of its argument, or else at the first
            choice.
        alt: the text that says what is seen in the first figure.
        choices: by name of an argument its values in turn: a menu for texts, a slider for anything else.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(draw).parameters.items()}
    controls = {}
    for name, options in choices.items():
        if isinstance(options, ipywidgets.Widget):
            controls[name] = options
            continue
        options = list(options)
        names = {"description": name.replace("_", " "), "style": {"description_width": "10em"}}
        value = defaults.get(name) if defaults.get(name) in options else options[0]
        if isinstance(value, str):
            controls[name] = ipywidgets.Dropdown(options=options, value=value, **names)
        else:
            controls[name] = ipywidgets.SelectionSlider(options=options, value=value, continuous_update=False, **names)
    return Explorer(draw, alt, controls)


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
