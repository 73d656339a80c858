"""Runs over a grid of parameters: which of them repeat each other, their mean and spread, and what they say in words.

A run is a mapping ``{"parameters": {name: value}, "figures": {name: value}}``, as the entries of a sweep's results.json
are. A figure of a run counts where it is a number; a run that failed, or recorded none, has no value.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

REPEATS = ("seed", "run_dir")  # runs that differ in nothing else are repetitions of one experiment
SHARES = re.compile(r"top\d|accuracy|chance|probe|scratch")  # names of figures that are shares of images


@dataclass(frozen=True)
class Cell:
    """Runs that are alike in some ``parameters``, and what they have recorded of one figure."""

    parameters: Mapping[str, object]
    runs: tuple[Mapping, ...]  # those that have the figure
    values: tuple[float, ...]  # one for each of them

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def lowest(self) -> float:
        return min(self.values)

    @property
    def highest(self) -> float:
        return max(self.values)

    @property
    def repeats(self) -> str:
        """What the values differ in: "seeds", or "runs" where it is more than the seed."""
        seeds = {_key(run["parameters"].get("seed")) for run in self.runs}
        return "seeds" if len(seeds) == len(self.runs) else "runs"


def cells(runs: Sequence[Mapping], figure: str, names: Sequence[str]) -> list[Cell]:
    """The runs in groups that are alike in the parameters ``names``, in the order in which the groups begin.

    A group whose runs all lack the figure is there too, with no values.
    """
    groups: dict[str, list[Mapping]] = {}
    for run in runs:
        groups.setdefault(_key(parameters_of(run, names)), []).append(run)
    return [_cell(group, figure, names) for group in groups.values()]


def _cell(group: Sequence[Mapping], figure: str, names: Sequence[str]) -> Cell:
    having = tuple(run for run in group if number_of(run, figure) is not None)
    return Cell(parameters_of(group[0], names), having, tuple(number_of(run, figure) for run in having))


def measured_cells(runs: Sequence[Mapping], figure: str, names: Sequence[str]) -> list[Cell]:
    """The :func:`cells` that have a value.

    Raises:
        ValueError: if there is none, since no run has the figure as a number.
    """
    measured = [cell for cell in cells(runs, figure, names) if cell.values]
    if not measured:
        known = ", ".join(dict.fromkeys(name for run in runs for name in run["figures"])) or "none"
        raise ValueError(f"No run has recorded a number named {figure!r}; choose one of the recorded figures: {known}.")
    return measured


def parameters_of(run: Mapping, names: Sequence[str]) -> dict[str, object]:
    """Some parameters of a run; None for one that it does not have."""
    return {name: run["parameters"].get(name) for name in names}


def number_of(run: Mapping, figure: str) -> float | None:
    """A figure of a run, or None where it is missing or no finite number."""
    value = run["figures"].get(figure)
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def varied(runs: Sequence[Mapping]) -> list[str]:
    """The parameters in which the runs differ, apart from ``REPEATS``, in the order in which they are given."""
    names = dict.fromkeys(name for run in runs for name in run["parameters"])
    return [name for name in names if name not in REPEATS and len(_seen(runs, [name])) > 1]


def varied_beside(runs: Sequence[Mapping], axis: str) -> list[str]:
    """The parameters that vary while ``axis`` stands still: one that follows it, as in zipped lists, does not."""
    values = len(_seen(runs, [axis]))
    return [name for name in varied(runs) if name != axis and len(_seen(runs, [axis, name])) > values]


def _seen(runs: Sequence[Mapping], names: Sequence[str]) -> set[str]:
    return {_key(parameters_of(run, names)) for run in runs}


def _key(value: object) -> str:
    """Tells values of parameters apart, lists too; in a set, True would be the same as 1."""
    return repr(value)


def are_shares(runs: Sequence[Mapping], figure: str) -> bool:
    """Whether a figure is to be shown in percent: it is named as an accuracy is, and never leaves [0, 1]."""
    values = (number_of(run, figure) for run in runs)
    return bool(SHARES.search(figure)) and all(0 <= value <= 1 for value in values if value is not None)


def in_words(value: float, shares: bool) -> str:
    """A mean or an end of a range, to four digits or to a tenth of a percent."""
    if shares:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def spread_in_words(cell: Cell, shares: bool) -> str:
    """The mean and, where the values differ, the lowest and the highest: ``61.2 % (60.1 to 62.0)``."""
    mean = in_words(cell.mean, shares)
    return f"{mean} ({_ends(cell, shares)})" if cell.lowest < cell.highest else mean


def _ends(cell: Cell, shares: bool) -> str:
    return " to ".join(in_words(value, shares).removesuffix(" %") for value in (cell.lowest, cell.highest))


def parameter_in_words(value: object) -> str:
    """The value of a parameter, on one line; ``''`` for an empty text."""
    return f"{value:g}" if isinstance(value, float) else on_one_line(str(value)) or "''"


def on_one_line(text: str) -> str:
    """A text that a figure can show: a name of a file that is not UTF-8 has halves of surrogate pairs in it."""
    return " ".join(text.split()).encode(errors="replace").decode()


def combination_in_words(parameters: Mapping[str, object]) -> str:
    """``patch_size=4, position_embedding=True``"""
    return ", ".join(f"{on_one_line(name)}={parameter_in_words(value)}" for name, value in parameters.items())


def sweep_summary(runs: Sequence[Mapping], figure: str, names: Sequence[str] | None = None) -> str:
    """One sentence: where a figure is highest on average, where lowest, and whether the seeds' ranges overlap.

    Args:
        runs: as the module describes them.
        figure: name of a recorded figure.
        names: the parameters to compare over, averaged over all others; None for all that vary, except the seed.

    Raises:
        ValueError: if no run has the figure as a number.

    >>> sweep_summary(runs, "top1")
    'top1 is highest with patch_size=4: 61.2 % on average over 3 seeds (60.1 to 62.0); it is lowest with ...'
    """
    measured = measured_cells(runs, figure, varied(runs) if names is None else names)
    shares = are_shares(runs, figure)
    best, worst = max(measured, key=lambda cell: cell.mean), min(measured, key=lambda cell: cell.mean)
    if len(measured) == 1:
        return f"{figure} is {_average(best, shares)}."
    if best.mean == worst.mean:
        return f"{figure} is the same everywhere, {in_words(best.mean, shares)} on average."
    seeds_alone = best.repeats == worst.repeats == "seeds"  # other parameters make ranges that say nothing about chance
    overlap = "; their ranges overlap" if seeds_alone and worst.highest >= best.lowest else ""
    return (
        f"{figure} is highest with {combination_in_words(best.parameters)}: {_average(best, shares)}; it is lowest "
        f"with {combination_in_words(worst.parameters)}: {_average(worst, shares)}{overlap}."
    )


def _average(cell: Cell, shares: bool) -> str:
    """``61.2 % on average over 3 seeds (60.1 to 62.0)``"""
    mean, count = in_words(cell.mean, shares), len(cell.values)
    if cell.lowest == cell.highest:
        return f"{mean} in {'one run' if count == 1 else f'all {count} runs'}"
    return f"{mean} on average over {count} {cell.repeats} ({_ends(cell, shares)})"
