"""How soon is ``modern`` as good as ``published`` is in the end?

    python benchmarks/time_to_accuracy.py --upstream ../shared/data/cifar100 --epochs 30 --figure curves.png

Both recipes train a model of the same size from the same seed on all training images, ``published`` with post-norm
blocks, as in the published system, and ``modern`` with pre-norm blocks. After every epoch the accuracy on all test
images is measured; that takes no part in the training and chooses nothing: ``published`` is judged by its last epoch,
and ``modern`` by the first that is at least as good. Seconds are those of training alone.

The learning rate of ``modern`` falls to zero over the length that it is given, so it is given a short one: a third of
the epochs of ``published``, unless --modern-epochs says otherwise.
"""

from pathlib import Path

import click
import common
import torch
from matplotlib.figure import Figure

from vitlib.data import LabelledImages, channel_statistics, load_images
from vitlib.model import PRESETS, create_model
from vitlib.plots import lines
from vitlib.training import fit, resolve_precision
from vitlib.training.recipes import RECIPES
from vitlib.weights import ModelCard

NORM_FIRST = {"published": False, "modern": True}


def learning_curve(
    name: str, train: LabelledImages, test: LabelledImages, preset: str, epochs: int, device: torch.device, **options
) -> list[dict]:
    """Train with the recipe ``name``; return epoch, step, seconds so far, test accuracy and loss after every epoch."""
    recipe = RECIPES[name]
    torch.manual_seed(options["seed"])
    sizes = {"image_size": train.images.shape[-1], "num_channels": train.images.shape[1]}
    layers = {"norm_first": NORM_FIRST[name], "drop": recipe.drop, "drop_path": recipe.drop_path}
    model = create_model(preset, len(train.classes), **sizes, **layers)
    card = ModelCard(train.classes, *(recipe.statistics or channel_statistics(train.images)))
    history = fit(model.to(device), train, test, card, recipe, epochs=epochs, description=name, **options)
    if history.interrupted:
        raise click.Abort
    curve, seconds = [], 0.0
    for epoch in history.epochs:
        seconds += epoch["seconds"]
        scores = {"accuracy": epoch["validation_accuracy"], "loss": epoch["validation_loss"]}
        curve.append({"epoch": epoch["epoch"], "step": epoch["step"], "seconds": seconds, **scores})
    return curve


def first_to_reach(curve: list[dict], accuracy: float) -> dict | None:
    """Return the first point of the curve with at least this accuracy, or None."""
    return next((point for point in curve if point["accuracy"] >= accuracy), None)


def conclusion(curves: dict[str, list[dict]]) -> str:
    """Return one sentence, with the goal of a third of the steps."""
    end = curves["published"][-1]
    goal = f"published ends with {end['accuracy']:.1%} after {end['step']} steps and {end['seconds']:.0f} s"
    reached = first_to_reach(curves["modern"], end["accuracy"])
    if reached is None:
        best = max(curves["modern"], key=lambda point: point["accuracy"])
        steps = curves["modern"][-1]["step"]
        return f"{goal}; modern does not reach that in {steps} steps (best: {best['accuracy']:.1%})."
    return (
        f"{goal}; modern reaches that after {reached['step']} steps and {reached['seconds']:.0f} s, "
        f"{reached['step'] / end['step']:.2f} of the steps (goal: at most 0.33) and "
        f"{reached['seconds'] / end['seconds']:.2f} of the seconds."
    )


def draw(curves: dict[str, list[dict]], title: str) -> Figure:
    """Draw test accuracy against steps, a line per recipe, and where modern draws level."""
    steps, accuracies = (
        {name: [point[key] for point in curve] for name, curve in curves.items()} for key in ("step", "accuracy")
    )
    end = accuracies["published"][-1]
    reached = first_to_reach(curves["modern"], end)
    return lines(
        steps, accuracies, "optimiser steps", "accuracy on the test images", title, percent=True, ylim=(0, None),
        reference={"published's last": end}, read_at=reached and reached["step"],
    )  # fmt: skip


@click.command()
@common.upstream_option
@common.preset_option
@common.whole_number("--epochs", 30, "Passes over the training images with published.")
@common.whole_number("--modern-epochs", None, "The same with modern; without it a third of --epochs, rounded down.")
@common.whole_number("--batch-size", 128, "Images per step.")
@common.whole_number("--seed", 0, "Start of all random numbers.", least=0)
@common.device_option
@common.precision_option
@click.option("--figure", type=click.Path(dir_okay=False), help="PNG file for the curves.")
@common.out_option
def main(upstream, preset, epochs, modern_epochs, batch_size, seed, device, precision, figure, out) -> None:
    """Count the steps that modern takes to the accuracy that published ends with."""
    size = PRESETS[preset]["image_size"]
    with common.one_line_errors():
        train, test = (load_images(upstream, split, image_size=size) for split in ("train", "test"))
    lengths = {"published": epochs, "modern": modern_epochs or max(1, epochs // 3)}
    options = {"batch_size": batch_size, "seed": seed, "precision": resolve_precision(precision, device)}
    curves = {
        name: learning_curve(name, train, test, preset, length, device, **options) for name, length in lengths.items()
    }
    rows = [
        [name, str(point["epoch"]), str(point["step"]), f"{point['seconds']:.1f}", f"{100 * point['accuracy']:.2f}"]
        for name, curve in curves.items()
        for point in curve
    ]
    click.echo(f"\n{common.table(['recipe', 'epoch', 'step', 'seconds', 'test accuracy, %'], rows)}\n")
    click.echo(conclusion(curves))
    sizes = {"train_images": len(train), "test_images": len(test), "classes": len(train.classes)}
    settings = {"source": Path(upstream).name, "preset": preset, **options, **sizes}
    common.write_json(out, {"machine": common.machine(device), "settings": settings, "curves": curves})
    if figure is not None:
        draw(curves, f"{preset}, {len(train)} images of {len(train.classes)} classes").savefig(figure, dpi=150)


if __name__ == "__main__":
    main()
