"""Record the figures of a run (accuracies, counts) in a notebook, and read them back."""

import math
import sys
from collections.abc import Mapping

from vitlib.utils import text_table

MIME_TYPE = "application/vnd.vitlib.figures+json"
FIGURES_IN_TABLE = 4


def record_figures(**figures: float | int | str | None) -> None:
    """Show figures as a small table, and store them in the notebook for ``metrics.json``.

    Name the main ones first: the runner's table shows as many as fit. NumPy and torch scalars are converted. JSON has
    no nan or infinity, so these are shown as they are and stored as null.

    Raises:
        ValueError: for a figure that is not a number, a text or None.

    >>> record_figures(top1=0.5, chance=0.1)
    top1    0.5
    chance  0.1
    """
    rows, stored = [], []  # stored are pairs, because notebooks sort the keys of every mapping
    for name, value in figures.items():
        if getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, int | float | str | None):
            raise ValueError(f"The figure {name}={value!r} is not a number, a text or None; record one value per name.")
        rows.append((name, _format(value)))
        stored.append([name, None if isinstance(value, float) and not math.isfinite(value) else value])
    print_and_store("\n".join(text_table(rows)), MIME_TYPE, stored)


def print_and_store(text: str, mime_type: str, stored: object) -> None:
    """Print a text; in a notebook, the output also holds ``stored``, JSON under ``mime_type``."""
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        print(text)
    else:
        from IPython.display import display

        display({"text/plain": text, mime_type: stored}, raw=True)


def recorded_figures(notebook: Mapping) -> dict[str, float | int | str | None]:
    """Return all figures of an executed notebook (an ``nbformat`` node); a later one replaces one of the same name."""
    figures: dict = {}
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            figures.update(output.get("data", {}).get(MIME_TYPE, ()))
    return figures


def main_figures(figures: Mapping[str, object]) -> str:
    """Return the first figures of a run, as many as fit into a table: ``top1 0.5123, chance 0.01``."""
    return ", ".join(f"{name} {_format(value)}" for name, value in list(figures.items())[:FIGURES_IN_TABLE])


def _format(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
