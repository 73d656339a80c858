"""The figures of a run (accuracies, counts), shown in a notebook and read back from it afterwards."""

import math
import sys
from collections.abc import Mapping

MIME_TYPE = "application/vnd.vitlib.figures+json"


def record_figures(**figures: float | int | str | None) -> None:
    """Show figures as a small table, and store them in the notebook for ``metrics.json``.

    The first ones named are the main ones: the runner's table shows as many as fit. NumPy and torch scalars are
    converted; JSON has no nan or infinity, so these are shown but stored as null.

    Raises:
        ValueError: for a figure that is no number, text or None.

    >>> record_figures(top1=0.5, chance=0.1)
    top1    0.5
    chance  0.1
    """
    plain = {name: _plain(name, value) for name, value in figures.items()}
    width = max(map(len, plain), default=0)
    table = "\n".join(f"{name:<{width}}  {format_figure(value)}" for name, value in plain.items())
    if not _in_notebook():
        print(table)
        return
    from IPython.display import display

    # a list of pairs, since notebooks are stored with the keys of every mapping in alphabetical order
    stored = [[name, None if _not_finite(value) else value] for name, value in plain.items()]
    display({"text/plain": table, MIME_TYPE: stored}, raw=True)


def recorded_figures(notebook: Mapping) -> dict[str, float | int | str | None]:
    """All figures recorded in an executed notebook (an ``nbformat`` node); of two with one name, the later."""
    figures: dict = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            figures.update(output.get("data", {}).get(MIME_TYPE, ()))
    return figures


def format_figure(value: float | int | str | None) -> str:
    """Four significant digits for a float, all of them for the rest."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(name: str, value):
    if getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
        value = value.item()
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float | str)):
        raise ValueError(f"The figure {name}={value!r} is not a number, a text or None; record one value per name.")
    return value


def _not_finite(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _in_notebook() -> bool:
    # a program that has not imported IPython is not running inside it
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None
