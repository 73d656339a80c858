"""Sliders and menus for the figures of :mod:`vitlib.plots`. Works with ipywidgets 7 (Colab) and 8."""

import inspect
from collections.abc import Callable, Mapping

import ipywidgets
from IPython.display import display
from matplotlib.figure import Figure

from vitlib import plots


class Explorer(ipywidgets.VBox):
    """Sliders and menus above a figure. A page without a kernel shows the first figure."""

    def __init__(self, draw: Callable[..., Figure], alt: str, controls: Mapping[str, ipywidgets.Widget]):
        self.draw, self.alt, self.controls = draw, alt, controls
        self.picture = ipywidgets.Image(format="png")
        for control in controls.values():
            control.observe(self.redraw, names="value")
        self.redraw()
        # without flex-start the picture would be stretched to the width of the page, and blurred
        layout = ipywidgets.Layout(align_items="flex-start")
        super().__init__([*controls.values(), self.picture], layout=layout)

    def redraw(self, change=None) -> None:
        self.picture.value = plots.png(self.draw(**{name: control.value for name, control in self.controls.items()}))

    def _ipython_display_(self, **kwargs) -> None:  # ipywidgets 7 and 8 both use it
        view = {"version_major": 2, "version_minor": 0, "model_id": self.model_id}
        bundle = {"application/vnd.jupyter.widget-view+json": view, "image/png": bytes(self.picture.value)}
        display({**bundle, "text/plain": self.alt}, metadata={"image/png": {"alt": self.alt}}, raw=True)


def explorer(draw: Callable[..., Figure], alt: str, /, **choices) -> Explorer:
    """Make a control for each argument of ``draw``, and redraw its figure when one changes.

    >>> def cut(patch_size=64):
    ...     return plots.patch_grid(photo, patch_size)
    >>> explorer(cut, "A photograph, cut into patches.", patch_size=[16, 32, 64, 128])

    Args:
        draw: a function that returns a figure. A control starts at its argument's default, or else the first choice.
        alt: alternative text for the first figure.
        choices: the values of each argument, by its name; texts get a menu, everything else a slider.
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
