"""Controls around the figures of :mod:`vitlib.plots`, for readers who want to turn the knobs themselves.

Each widget shows a picture that a tested plot function draws, so nothing in here can be wrong about a ViT.
Works with ipywidgets 7 (Colab) and 8.
"""

import inspect
from collections.abc import Callable, Mapping

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

from vitlib import plots


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


def explorer(draw: Callable[..., Figure], alt: str, /, **choices) -> Explorer:
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
        options = list(options)
        names = {"description": name.replace("_", " "), "style": {"description_width": "10em"}}
        value = defaults.get(name) if defaults.get(name) in options else options[0]
        if isinstance(value, str):
            controls[name] = ipywidgets.Dropdown(options=options, value=value, **names)
        else:
            controls[name] = ipywidgets.SelectionSlider(options=options, value=value, continuous_update=False, **names)
    return Explorer(draw, alt, controls)
