"""How soon is one training as good as another one is in the end? Read from their run folders; nothing is trained.

    python -m vitlib pretrain --recipe published --norm-first false --pretrain-epochs 100 --run-dir runs/published
    python -m vitlib pretrain --recipe long --pretrain-epochs 100 --batch-size 256 --run-dir runs/long
    python benchmarks/time_to_accuracy.py runs/published runs/long --figure curves.png

The first is judged by its last epoch, the second by the first epoch that is at least as good, both on the validation
images. A long training seldom has its machine for itself, so seconds are given twice: as they were, and "quiet", where
every epoch counts as long as the fastest one from it to the end (with fewer patches only the first epochs are faster).
"""

from pathlib import Path

import click
import common
from matplotlib.figure import Figure

from vitlib.plots import lines
from vitlib.training import History


def learning_curve(run_dir: Path) -> list[dict]:
    """Return epoch, step, accuracy, and the seconds of training until then after every epoch of a pretraining."""
    epochs = History.load(run_dir / "pretrained-history.json").epochs
    curve, seconds, quiet = [], 0.0, 0.0
    for number, epoch in enumerate(epochs):
        seconds += epoch["seconds"]
        quiet += min(later["seconds"] for later in epochs[number:])
        point = {"epoch": epoch["epoch"], "step": epoch["step"], "accuracy": epoch["validation_accuracy"]}
        curve.append(point | {"seconds": seconds, "quiet": quiet})
    return curve


def first_to_reach(curve: list[dict], accuracy: float) -> dict | None:
    """Return the first point of the curve with at least this accuracy, or None."""
    return next((point for point in curve if point["accuracy"] >= accuracy), None)


def conclusion(slow: list[dict], fast: list[dict]) -> str:
    """Return one sentence: by what share of the steps and seconds the second curve gets there sooner."""
    end = slow[-1]
    goal = f"the first ends with {end['accuracy']:.1%} after {end['step']} steps"
    reached = first_to_reach(fast, end["accuracy"])
    if reached is None:
        best = max(point["accuracy"] for point in fast)
        return f"{goal}; the second does not reach that in {fast[-1]['step']} steps (best: {best:.1%})."
    shares = {key: reached[key] / end[key] for key in ("step", "seconds", "quiet")}
    return (
        f"{goal}; the second reaches that after {reached['step']} steps, {shares['step']:.2f} of the steps, "
        f"{shares['seconds']:.2f} of the seconds and {shares['quiet']:.2f} of the quiet seconds (goal: at most 0.33)."
    )


def draw(curves: dict[str, list[dict]]) -> Figure:
    """Draw validation accuracy against quiet seconds, and where the first ends."""
    hours, accuracies = (
        {name: [point[key] / unit for point in curve] for name, curve in curves.items()}
        for key, unit in (("quiet", 3600), ("accuracy", 1))
    )
    name = next(iter(curves))
    return lines(
        hours, accuracies, "hours of training on a quiet machine", "accuracy on the validation images", percent=True,
        ylim=(0, None), reference={f"{name}'s last": accuracies[name][-1]},
    )  # fmt: skip


@click.command(help=__doc__.splitlines()[0])
@click.argument("slow", type=click.Path(exists=True, path_type=Path))
@click.argument("fast", type=click.Path(exists=True, path_type=Path))
@click.option("--figure", type=click.Path(dir_okay=False), help="PNG file for the curves.")
def main(slow, fast, figure) -> None:
    curves = {str(folder): learning_curve(folder) for folder in (slow, fast)}
    header = ["run", "epoch", "step", "seconds", "quiet seconds", "validation accuracy, %"]
    rows = [
        [name, str(point["epoch"]), str(point["step"]), f"{point['seconds']:.0f}", f"{point['quiet']:.0f}",
         f"{100 * point['accuracy']:.1f}"]
        for name, curve in curves.items()
        for point in curve
    ]  # fmt: skip
    click.echo(f"{common.table(header, rows)}\n\n{conclusion(*curves.values())}")
    if figure is not None:
        draw(curves).savefig(figure, dpi=150)


if __name__ == "__main__":
    main()
