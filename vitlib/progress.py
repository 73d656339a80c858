"""One progress bar for terminals, notebooks and papermill logs."""

import sys

from tqdm import tqdm

SHORT = "{l_bar}{bar:6}| {elapsed}<{remaining}, {rate_fmt}{postfix}"  # fits into one line of a notebook's page


def progress_bar(iterable=None, *, description: str, total: int | None = None, unit: str = "it", show: bool = True):
    """A tqdm bar written as text to stdout.

    Text, not a widget: a widget's output is lost in papermill logs and its saved state makes stored notebooks
    invalid on GitHub. Stdout, not stderr: notebooks paint stderr red, and a beginner reads red as an error.
    """
    return tqdm(
        iterable,
        desc=description,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        bar_format=SHORT if "images" in unit else None,
        file=sys.stdout,
        mininterval=0.5,
        disable=not show,
    )
