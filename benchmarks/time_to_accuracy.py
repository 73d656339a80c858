"""How soon is one training as good as another one is in the end? Read from their records; nothing is trained.

    python benchmarks/time_to_accuracy.py
    python benchmarks/time_to_accuracy.py runs/published runs/long

Without run folders it compares two records that ship with vitlib: recipe `published`, and recipe `long`, which trained
`cifar100-small`. The first is judged by its last epoch, the second by the first epoch that is at least as good, both on
the validation images. Where the batches differ, as here, compare epochs and not steps. A long training seldom has its
machine for itself, so seconds are given twice: as they were, and "quiet", where every epoch counts as long as the
fastest one from it to the end (with fewer patches only the first epochs are faster).
"""

from pathlib import Path

import click
import common

from vitlib.records import load_record
from vitlib.training import History


def epochs_of(run: Path | str) -> list[dict]:
    """Return what was measured after every epoch of a pretraining: of a run folder, or of a shipped record."""
    if isinstance(run, Path):
        return History.load(run / "pretrained-history.json").epochs
    return load_record(run)["record"]["epochs_run"]


def learning_curve(epochs: list[dict]) -> list[dict]:
    """Return epoch, step, accuracy, and the seconds of training until then."""
    curve, seconds, quiet = [], 0.0, 0.0
    for number, epoch in enumerate(epochs):
        seconds += epoch["seconds"]
        quiet += min(later["seconds"] for later in epochs[number:])
        point = {"epoch": epoch["epoch"], "step": epoch["step"], "accuracy": epoch["validation_accuracy"]}
        curve.append(point | {"seconds": seconds, "quiet": quiet})
    return curve


def conclusion(slow: list[dict], fast: list[dict]) -> str:
    """Return one sentence: by what share of the epochs, steps and seconds the second curve gets there sooner."""
    end = slow[-1]
    goal = f"the first ends with {end['accuracy']:.1%} after {end['epoch']} epochs"
    reached = next((point for point in fast if point["accuracy"] >= end["accuracy"]), None)
    if reached is None:
        best = max(point["accuracy"] for point in fast)
        return f"{goal}; the second does not reach that in {fast[-1]['epoch']} epochs (best: {best:.1%})."
    shares = {key: reached[key] / end[key] for key in ("epoch", "step", "seconds", "quiet")}
    return (
        f"{goal}; the second reaches that after {reached['epoch']}: {shares['epoch']:.2f} of the epochs, "
        f"{shares['step']:.2f} of the steps, {shares['seconds']:.2f} of the seconds and {shares['quiet']:.2f} of the "
        "quiet seconds (goal: at most 0.33)."
    )


@click.command(help=__doc__.splitlines()[0])
@click.argument("slow", type=click.Path(exists=True, path_type=Path), required=False)
@click.argument("fast", type=click.Path(exists=True, path_type=Path), required=False)
def main(slow, fast) -> None:
    runs = (slow or "published_here", fast or "cifar100-small")
    curves = {str(run): learning_curve(epochs_of(run)) for run in runs}
    header = ["run", "epoch", "step", "seconds", "quiet seconds", "validation accuracy, %"]
    rows = [
        [name, str(point["epoch"]), str(point["step"]), f"{point['seconds']:.0f}", f"{point['quiet']:.0f}",
         f"{100 * point['accuracy']:.1f}"]
        for name, curve in curves.items()
        for point in curve
    ]  # fmt: skip
    click.echo(f"{common.table(header, rows)}\n\n{conclusion(*curves.values())}")


if __name__ == "__main__":
    main()
