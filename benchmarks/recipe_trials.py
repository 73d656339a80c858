"""Which recipe learns most in equal seconds? Short trainings of `small`, scored on validation images only.

    python benchmarks/recipe_trials.py FOLDER --seconds 240 half quarter-256

Each trial is recipe ``long`` with some values replaced (``TRIALS`` below). The script measures the trial's speed, and
makes its schedule as long as the seconds allow: every trial decays its learning rate to zero in the same time. Test
images are not touched: a tenth of the training images is held out, and a tenth of the rest for validation.
"""

import time
from dataclasses import replace

import click
import common
import torch

from vitlib.data import load_images, train_validation_split
from vitlib.training import evaluate, pretrain
from vitlib.training.recipes import RECIPES, Recipe

LONG = RECIPES["long"]
FULL, HALF, QUARTER = (), ((0.85, 0.5),), ((0.85, 0.25),)
TRIALS: dict[str, tuple[Recipe, int]] = {  # name: recipe and batch size
    "full": (replace(LONG, keep_patches=FULL), 128),
    "half": (replace(LONG, keep_patches=HALF), 128),
    "half-256": (replace(LONG, keep_patches=HALF), 256),
    "quarter-256": (replace(LONG, keep_patches=QUARTER), 256),
    "quarter-half-256": (replace(LONG, keep_patches=((0.4, 0.25), (0.85, 0.5))), 256),
    "half-256-rate-5": (replace(LONG, keep_patches=HALF, matrix_rate=5.0), 256),
    "half-256-rate-2": (replace(LONG, keep_patches=HALF, matrix_rate=2.0), 256),
}
STEPS = 20  # optimiser steps per "epoch" of a trial, so that schedules end where the time does


def seconds_per_step(recipe: Recipe, batch_size: int, train, **options) -> float:
    """Return the mean over the schedule: each stage of dropped patches is timed on a few steps of its own."""
    start, total = 0.0, 0.0
    for until, share in (*recipe.keep_patches, (1.0, 1.0)):
        stage = replace(recipe, keep_patches=((1.0, share),))
        trained = pretrain(train, recipe=stage, batch_size=batch_size, pretrain_epochs=2, train_steps_per_epoch=6,
                           eval_steps_per_epoch=1, progress=False, **options)  # fmt: skip
        total += (until - start) * trained.history.epochs[-1]["seconds"] / 6
        start = until
    return total


@click.command(help=__doc__.splitlines()[0])
@click.argument("source")
@click.argument("names", nargs=-1, type=click.Choice(list(TRIALS)))
@click.option("--seconds", default=240.0, show_default=True, help="Of training in each trial.")
@common.precision_option
@common.whole_number("--seed", 0, "Start of all random numbers.", least=0)
@common.out_option
def main(source, names, seconds, precision, seed, out):
    train, held_out = train_validation_split(load_images(source, "train"), 0.1, seed=1234)
    results = []
    for name in names or TRIALS:
        recipe, batch_size = TRIALS[name]
        options = {"precision": precision, "seed": seed}
        step = seconds_per_step(recipe, batch_size, train, **options)
        epochs = max(1, round(seconds / step / STEPS))
        began = time.perf_counter()
        trained = pretrain(train, recipe=recipe, batch_size=batch_size, pretrain_epochs=epochs,
                           train_steps_per_epoch=STEPS, eval_steps_per_epoch=1, **options)  # fmt: skip
        took = sum(epoch["seconds"] for epoch in trained.history.epochs)
        score = evaluate(trained.model, held_out, trained.card)
        images = epochs * STEPS * batch_size
        results.append({"trial": name, "accuracy": score["accuracy"], "loss": score["loss"], "seconds": took,
                        "passes": images / trained.card.record["train_images"], "images_per_second": images / took,
                        "train_loss": trained.history.epochs[-1]["train_loss"],
                        "wall_seconds": time.perf_counter() - began})  # fmt: skip
        click.echo("{trial:18} {accuracy:.2%} of the held-out images (loss {loss:.3f}) after {seconds:.0f} s, "
                   "{passes:.2f} passes, {images_per_second:.0f} images/s; training loss {train_loss:.3f}"
                   .format(**results[-1]))  # fmt: skip
        common.write_json(out, {"threads": torch.get_num_threads(), "trials": results})


if __name__ == "__main__":
    main()
