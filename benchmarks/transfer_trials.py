"""Which fine-tuning gains most in one epoch? Trials of recipe `muon` with some values replaced, on validation images.

    python benchmarks/transfer_trials.py FOLDER --weights runs/long/pretrained.safetensors muon no-flip

Test images are not touched: a tenth of the training images is held out here, and a tenth of the rest by `finetune`.
"""

from dataclasses import replace

import click
import common

from vitlib.data import load_images, train_validation_split
from vitlib.training import FINETUNING, Recipe, evaluate, finetune
from vitlib.weights import load_weights

MUON = FINETUNING["muon"]
CROP = replace(MUON, augmentation=replace(MUON.augmentation, padding=4))
FIRST = replace(CROP, layer_decay=0.9)
TRIALS: dict[str, Recipe] = {  # the rows of RESULTS.md, in their order
    "first": FIRST,
    "rate-half": replace(FIRST, learning_rate=FIRST.learning_rate / 2),
    "rate-double": replace(FIRST, learning_rate=FIRST.learning_rate * 2),
    "crop": CROP,
    "crop-decay-0.7": replace(CROP, layer_decay=0.7),
    "crop-smoothing": replace(CROP, label_smoothing=0.1),
    "muon": MUON,
    "no-flip": replace(MUON, augmentation=replace(MUON.augmentation, flip=0.0)),
}
BATCH_SIZE = 64


@click.command(help=__doc__.splitlines()[0])
@click.argument("source")
@click.argument("names", nargs=-1, type=click.Choice(list(TRIALS)))
@click.option("--weights", default="cifar100-small", show_default=True, help="A shipped name or a checkpoint.")
@common.whole_number("--steps", None, "Of each trial; without it, one epoch.")
@common.precision_option
@common.whole_number("--seed", 0, "Start of all random numbers.", least=0)
@common.out_option
def main(source, names, weights, steps, precision, seed, out):
    model, card = load_weights(weights)
    train, held_out = train_validation_split(load_images(source, "train"), 0.1, seed=1234)
    results = []
    for name in names or TRIALS:
        trained = finetune(
            model, card, train, recipe=TRIALS[name], batch_size=BATCH_SIZE, train_steps_per_epoch=steps,
            eval_steps_per_epoch=1, precision=precision, seed=seed,
        )  # fmt: skip
        score, epoch = evaluate(trained.model, held_out, trained.card), trained.history.epochs[-1]
        results.append({"trial": name, **score, "steps": epoch["step"], "seconds": epoch["seconds"]})
        click.echo(
            "{trial:14} {accuracy:.2%} of the held-out images (loss {loss:.3f}) after {steps} steps in {seconds:.0f} s"
            .format(**results[-1])
        )  # fmt: skip
        common.write_json(out, {"weights": weights, "trials": results})


if __name__ == "__main__":
    main()
