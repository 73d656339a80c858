"""Is a ViT better than a CNN? Equal parameters, equal steps, equal images, and few of them.

    python benchmarks/vit_against_cnn.py --upstream cifar100 --precision bfloat16 --out cnn.json

The ViT ``small`` against the residual network that He et al. (2016, section 4.2) made for CIFAR, ResNet-20, so wide
that its parameters are as many. Both start from random weights and have the same optimiser, schedule and augmentation;
of one seed they see the same images in the same batches with the same crops. The learning rate is each one's own: the
best of a few on images set aside from the training images, in a shorter training. Test images choose nothing.

All sizes of training set have the same number of steps, so fewer images are seen more often. A seed draws the images,
equally many of each class, and decides the new weights, the order and the augmentation.

Equal parameters are not equal work: a convolution uses each of its weights once for every pixel, a linear layer of a
ViT once for every patch. FLOPs and images/s of both are part of the record; images/s are measured side by side.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import click
import common
import torch
import torch.nn.functional as F
from throughput import training_task
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlib.data import LabelledImages, channel_statistics, draw_evenly, load_images, train_validation_split
from vitlib.model import PRESETS, count_parameters, create_model
from vitlib.training import evaluate, fit, resolve_precision
from vitlib.training.recipes import RECIPES, Recipe
from vitlib.weights import ModelCard

NAMES = ("ViT", "CNN")
PRESET = "small"
SIDE = PRESETS[PRESET]["image_size"]
BLOCKS = 3  # per stage, as in ResNet-20
# Without the moving average of the weights, for which the statistics of batch norm would have to be taken anew.
RECIPE = replace(RECIPES["modern"], ema_decay=0.0)
VALIDATION_FRACTION = 0.02
LOOKED_BACK_AT = 2000  # training images, at most, to measure the training accuracy on
ROUNDS, STEPS_PER_ROUND = 7, 2  # of the measurement of speed


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, figure 2), projected where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.convolutions(x))


def create_cnn(width: int, num_classes: int) -> nn.Sequential:
    """Return a residual network, images ``[B, 3, H, W]`` to logits: a first convolution, three stages of ``BLOCKS``
    blocks, each on half the side and with twice the channels of the one before, the mean over all positions, a head."""
    stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks, channels = [], width
    for stage in range(3):
        for block in range(BLOCKS):
            blocks.append(Block(channels, width << stage, stride=2 if stage and not block else 1))
            channels = width << stage
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return nn.Sequential(stem, *blocks, head).to(memory_format=torch.channels_last)


@cache
def matching_width(parameters: int, num_classes: int) -> int:
    """Return the width at which the CNN's parameters come closest to ``parameters``."""
    with torch.device("meta"):
        counts = {width: count_parameters(create_cnn(width, num_classes)) for width in range(1, 129)}
    return min(counts, key=lambda width: abs(counts[width] - parameters))


def create(name: str, num_classes: int, seed: int = 0) -> nn.Module:
    """Return a new "ViT" or "CNN"."""
    torch.manual_seed(seed)
    vit = create_model(PRESET, num_classes, drop=RECIPE.drop, drop_path=RECIPE.drop_path)
    if name == "ViT":
        return vit
    return create_cnn(matching_width(count_parameters(vit), num_classes), num_classes)


def description(name: str, num_classes: int) -> dict:
    """Return a model's parameters, and the FLOPs of the forward pass of one image (a multiply-add counts as 2)."""
    model = create(name, num_classes).eval()
    # the counter knows no formula for the CPU's fused attention and would leave it out
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, SIDE, SIDE))
    what = f"preset {PRESET}" if name == "ViT" else f"ResNet-{6 * BLOCKS + 2}, width {model[0][0].out_channels}"
    return {"what": what, "parameters": count_parameters(model), "forward_flops": counter.get_total_flops()}


def set_aside(train: LabelledImages) -> tuple[LabelledImages, LabelledImages]:
    """Return images to train on, in random order, and to validate on, for the choice of the learning rates."""
    others, validation = train_validation_split(train, VALIDATION_FRACTION)
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0))  # folders come sorted by class
    return others.subset(order), validation


def train_once(
    name: str, images: LabelledImages, scored: LabelledImages, recipe: Recipe, steps: int,
    batch_size: int, seed: int, device: torch.device, precision: str,
) -> dict[str, float]:  # fmt: skip
    """Train a new model for ``steps`` full batches from ``images``.

    Returns:
        in the precision of the training: ``accuracy`` and ``loss`` (mean cross-entropy) on ``scored``, and
        ``train_accuracy`` on the images that it was trained on, without augmentation. Accuracies are from 0 to 1.
    """
    model = create(name, len(images.classes), seed).to(device)
    # one epoch of as many images as the steps need, however few there are
    shown = images.subset(torch.arange(steps * batch_size) % len(images))
    card = ModelCard(images.classes, *channel_statistics(shown.images))
    options = {"epochs": 1, "batch_size": batch_size, "seed": seed, "precision": precision, "eval_steps_per_epoch": 1}
    if fit(model, shown, scored, card, recipe, description=name, **options).interrupted:
        raise click.Abort
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        score = evaluate(model, scored, card)
        return score | {"train_accuracy": evaluate(model, shown.subset(slice(LOOKED_BACK_AT)), card)["accuracy"]}


def speeds(num_classes: int, batch_size: int, device: torch.device, precision: str) -> dict[str, list[float]]:
    """Return images/s of whole training steps, round by round, the models in turn."""
    images, labels = torch.randn(batch_size, 3, SIDE, SIDE), torch.randint(num_classes, (batch_size,))
    tasks = {}
    for name in NAMES:
        model = create(name, num_classes).to(device)
        task = training_task(model, images.to(device), labels.to(device), precision, STEPS_PER_ROUND)
        task()  # the first steps choose kernels and fetch memory
        tasks[name] = task
    rounds = common.interleave(tasks, ROUNDS, "images/s of both")
    return {
        name: [batch_size * STEPS_PER_ROUND / sum(phases.values()) for phases in measured]
        for name, measured in rounds.items()
    }


def try_rates(train: LabelledImages, rates: list[float], steps: int, **how) -> dict[str, dict[str, dict]]:
    """Train each model once with each of the ``rates``; return loss and accuracy on validation images."""
    others, validation = set_aside(train)
    sweep = {name: {} for name in NAMES}
    for rate in rates:
        for name in NAMES:
            recipe = replace(RECIPE, learning_rate=rate)
            scores = train_once(name, others, validation, recipe, steps, seed=0, **how)
            sweep[name][str(rate)] = {key: scores[key] for key in ("loss", "accuracy")}
            click.echo(
                f"{name}, learning rate {rate}: loss {scores['loss']:.3f}, {scores['accuracy']:.2%} of the "
                "validation images"
            )
    return sweep


def summary(record: dict) -> str:
    """Return a row per size and model, in percent, over the seeds; and how much the CNN computes against the ViT."""
    rows = []
    for size in record["trainings"]["ViT"]:
        for name in NAMES:
            cells = record["trainings"][name][size]
            scores = [common.mean_and_range([cell[key] for cell in cells]) for key in ("accuracy", "train_accuracy")]
            rows.append([f"{int(size):,}", name, str(len(cells)), *scores])
    scores = common.table(["images", "model", "seeds", "test accuracy, %", "training accuracy, %"], rows)
    vit, cnn = (record["models"][name]["forward_flops"] for name in NAMES)
    speed = common.ratio(*(record["images_per_second"][name] for name in reversed(NAMES)))
    return f"{scores}\n\nThe CNN has {cnn / vit:.2f} times the FLOPs of the ViT and trains {speed:.2f} times as fast."


@click.command()
@common.upstream_option
@common.listed("--sizes", click.IntRange(1), "2000,19200", "Numbers of training images, separated by commas.")
@common.whole_number("--steps", 600, "Training steps of every training.")
@common.whole_number("--batch-size", 32, "Images per step.")
@common.whole_number("--seeds", 3, "Repetitions, each with other images and weights.")
@common.listed(
    "--rates",
    click.FloatRange(0, 1, min_open=True, max_open=True),
    "5e-5,1.5e-4,5e-4,1.5e-3,4.5e-3",
    "Learning rates to choose from, separated by commas.",
)
@common.whole_number("--sweep-steps", 200, "Training steps for each of the learning rates.")
@common.device_option
@common.precision_option
@common.out_option
def main(upstream, sizes, steps, batch_size, seeds, rates, sweep_steps, device, precision, out) -> None:
    """Test accuracy of a ViT and of a CNN with as many parameters, after as many steps on the same images."""
    how = {"batch_size": batch_size, "device": device, "precision": resolve_precision(precision, device)}
    sizes, rates = sorted(sizes), sorted(rates)
    if sizes[-1] > steps * batch_size:
        raise click.ClickException(
            f"a training set of {sizes[-1]} images has more than the {steps * batch_size} that {steps} steps of "
            f"{batch_size} see; give more --steps or smaller --sizes."
        )
    train, test = (load_images(upstream, split, image_size=SIDE) for split in ("train", "test"))
    settings = {"upstream": Path(upstream).name, "classes": len(train.classes), "test_images": len(test)}
    settings |= {"recipe": "modern without averaging", "steps": steps, "batch_size": batch_size}
    settings |= {"precision": how["precision"], "rates": rates, "sweep_steps": sweep_steps}
    subsets = {(size, seed): draw_evenly(train, size, seed) for size in sizes for seed in range(seeds)}
    models = {name: description(name, len(train.classes)) for name in NAMES}
    for name, facts in models.items():
        click.echo(f"{name}: {facts['what']}, {facts['parameters']:,} parameters, {facts['forward_flops']:,} FLOPs")
    command = (
        f"python benchmarks/vit_against_cnn.py --upstream {settings['upstream']} --sizes {','.join(map(str, sizes))} "
        f"--steps {steps} --batch-size {batch_size} --seeds {seeds} --rates {','.join(map(str, rates))} "
        f"--sweep-steps {sweep_steps} --precision {how['precision']}"
    )
    sweep = try_rates(train, rates, sweep_steps, **how)
    for name in NAMES:  # after few steps the loss says more than the accuracy
        models[name]["learning_rate"] = min(rates, key=lambda rate: sweep[name][str(rate)]["loss"])
    trainings = {name: {str(size): [] for size in sizes} for name in NAMES}
    for seed in range(seeds):
        for size in sizes:
            for name in NAMES:
                recipe = replace(RECIPE, learning_rate=models[name]["learning_rate"])
                scores = train_once(name, subsets[size, seed], test, recipe, steps, seed=seed, **how)
                trainings[name][str(size)].append(scores)
                click.echo(
                    f"seed {seed}, {size:,} images, {name}: {scores['accuracy']:.2%} of the test images, "
                    f"{scores['train_accuracy']:.2%} of the training images"
                )
    record = {"command": command, "machine": common.machine(device), "settings": settings, "models": models}
    record |= {"sweep": sweep, "trainings": trainings, "images_per_second": speeds(len(train.classes), **how)}
    common.write_json(out, record)
    click.echo(f"\n{summary(record)}")


if __name__ == "__main__":
    main()
