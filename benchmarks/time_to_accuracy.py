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
from vitlib.plots import COLOURS, STYLE, plt
from vitlib.training import fit, resolve_precision
from vitlib.training.recipes import RECIPES
from vitlib.weights import ModelCard

NORM_FIRST = {"published": False, "modern": True}


def learning_curve(
    name: str, train: LabelledImages, test: LabelledImages, preset: str, epochs: int, device: torch.device, **options
) -> list[dict]:
    """Train with the recipe ``name`` and return, after every epoch: epoch, step, seconds of training so far, accuracy
    and loss on the test images."""
    recipe = RECIPES[name]
    torch.manual_seed(options["seed"])
    model = create_model(
        preset,
        len(train.classes),
        image_size=train.images.shape[-1],
        num_channels=train.images.shape[1],
        norm_first=NORM_FIRST[name],
        drop=recipe.drop,
        drop_path=recipe.drop_path,
    )
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
    """The first point of the curve with at least this accuracy, if there is one."""
    return next((point for point in curve if point["accuracy"] >= accuracy), None)


def conclusion(curves: dict[str, list[dict]]) -> str:
    """One sentence, with the goal of a third of the steps."""
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
    """Test accuracy against steps, a line per recipe with its name at its end, and where modern draws level."""
    with plt.rc_context(STYLE | {"font.size": 13}):
        figure, ax = plt.subplots(figsize=(8, 5))
        longest = max(curve[-1]["step"] for curve in curves.values())  # to its right there is no room for its name
        for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
            steps, accuracies = [[point[key] for point in curve] for key in ("step", "accuracy")]
            ax.plot(steps, [100 * accuracy for accuracy in accuracies], color=colour, marker="o", markersize=4)
            place = {"xytext": (4, 8), "ha": "right"} if steps[-1] == longest else {"xytext": (8, 0), "va": "center"}
            end = steps[-1], 100 * accuracies[-1]
            ax.annotate(name, end, **place, textcoords="offset points", color=colour, weight="bold")
        end = curves["published"][-1]
        reached = first_to_reach(curves["modern"], end["accuracy"])
        ax.axhline(100 * end["accuracy"], color="grey", linestyle="dashed", linewidth=1)
        if reached is not None:
            ax.axvline(reached["step"], color="grey", linestyle="dashed", linewidth=1)
            share = f"{reached['step'] / end['step']:.0%} of the steps"
            ax.annotate(share, (reached["step"], 0), (6, 6), textcoords="offset points", color="dimgrey")
        ax.set(xlabel="optimiser steps", ylabel="accuracy on the test images, %", title=title)
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    plt.close(figure)
    return figure


@click.command()
@click.option("--upstream", default="cifair100", show_default=True, help="A data set's name, or a folder of images.")
@click.option(
    "--preset", default="small", show_default=True, type=click.Choice(list(PRESETS)), help="Size of the model."
)
@common.whole_number("--epochs", 30, "Passes over the training images with published.")
@common.whole_number("--modern-epochs", None, "The same with modern; without it a third of --epochs, rounded down.")
@common.whole_number("--batch-size", 128, "Images per step.")
@common.whole_number("--seed", 0, "Start of all random numbers.", least=0)
@common.device_option
@common.precision_option
@click.option("--figure", type=click.Path(dir_okay=False), help="PNG file for the curves.")
@common.out_option
def main(upstream, preset, epochs, modern_epochs, batch_size, seed, device, precision, figure, out) -> None:
    """Steps that modern takes to the accuracy that published ends with."""
    size = PRESETS[preset]["image_size"]
    try:
        train, test = (load_images(upstream, split, image_size=size) for split in ("train", "test"))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
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
