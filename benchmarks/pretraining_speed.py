"""How many images does pretraining take per second, and how far is that from what the processor could do at most?

    python benchmarks/pretraining_speed.py --device cuda --compile --batch-size 256 --epochs 5

Trains as ``vitlib.training.fit`` does, on noise of the size of CIFAR's images, and times whole epochs: the drawing
of all random numbers, the gathering of the images and all steps, until the device is done. The first epoch, with
compilation and everything else that happens once, is reported apart.

A step takes about three times the FLOPs of the forward pass (``vitlib.costs``): the gradients of activations and of
weights cost as much again, each. No patches are dropped, whatever the recipe. With ``small`` that is 1.31 GFLOP an
image, so 100 epochs of 50,000 images are 6.54 PFLOP. At 790 TFLOP/s, about what one H200 reaches in large bfloat16
products, they take 8.3 s at least: the arithmetic floor.
"""

import statistics
from dataclasses import replace

import click
import common
import torch

from vitlib.costs import costs
from vitlib.data import channel_statistics
from vitlib.model import PRESETS, create_model
from vitlib.training import fit, resolve_precision
from vitlib.training.recipes import RECIPES
from vitlib.weights import ModelCard

FULL = 100 * 50_000  # images of a whole pretraining: 100 epochs of CIFAR-100


def summary(seconds: list[float], images: int, flops: int, peak_tflops: float) -> dict[str, float]:
    """Return the results that follow from the seconds of all epochs, the first of them apart."""
    steady = statistics.median(seconds[1:])
    floor = FULL * flops / (peak_tflops * 1e12)
    projected = FULL * steady / images
    return {
        "first_epoch_seconds": seconds[0],
        "epoch_seconds": steady,
        "images_per_second": images / steady,
        "projected_seconds": projected,
        "tflops": FULL * flops / projected / 1e12,
        "floor_seconds": floor,
        "share_of_floor": floor / projected,
    }


@click.command()
@common.whole_number("--images", 50_000, "Images per epoch.")
@common.whole_number("--epochs", 3, "Epochs; the first is reported apart.", least=2)
@common.whole_number("--batch-size", 128, "Images per step.")
@common.preset_option
@click.option(
    "--recipe", default="modern", show_default=True, type=click.Choice(list(RECIPES)), help="How it is trained."
)
@common.device_option
@common.precision_option
@click.option("--compile", is_flag=True, help="Let torch.compile translate the model first.")
@click.option(
    "--peak-tflops",
    default=790.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="What the processor does at most; the default is for one H200 in bfloat16.",
)
@common.out_option
def main(images, epochs, batch_size, preset, recipe, device, precision, compile, peak_tflops, out) -> None:
    """Images/s of pretraining, the time of a whole one, and the share of the arithmetic floor."""
    data = common.random_images(images, PRESETS[preset]["image_size"]).to(device)
    torch.manual_seed(0)
    chosen = replace(RECIPES[recipe], keep_patches=())  # every epoch costs the same
    model = create_model(preset, len(data.classes), drop=chosen.drop, drop_path=chosen.drop_path).to(device)
    card = ModelCard(data.classes, *channel_statistics(data.images))
    precision = resolve_precision(precision, device)
    options = {"epochs": epochs, "batch_size": batch_size, "precision": precision, "compile": compile}
    history = fit(model, data, data.subset(slice(0, 1)), card, chosen, **options)
    seconds = [epoch["seconds"] for epoch in history.epochs]
    figures = summary(seconds, images, costs(model.config).training_flops.total, peak_tflops)
    click.echo(
        "first epoch: {first_epoch_seconds:.2f} s, compilation included\n"
        "later epochs: {epoch_seconds:.2f} s, {images_per_second:,.0f} images/s, {tflops:.3g} TFLOP/s\n"
        "100 epochs of 50,000 images would take {projected_seconds:,.1f} s of training; the arithmetic floor is "
        "{floor_seconds:.1f} s, {share_of_floor:.2%} of that.".format(**figures)
    )
    settings = {"images": images, "batch_size": batch_size, "preset": preset, "recipe": recipe}
    settings |= {"precision": precision, "compile": compile, "peak_tflops": peak_tflops}
    record = {"machine": common.machine(device), "settings": settings}
    common.write_json(out, {**record, "epoch_seconds": seconds, "figures": figures})


if __name__ == "__main__":
    main()
