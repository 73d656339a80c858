"""How many labelled images is pretraining worth?

    python benchmarks/label_budget.py --out vitlib/pretrained/label_budget.json

The four arms of chapter 04, each trained on a few labelled images of the downstream task and scored once on all of its
test images: fine-tuning, a linear probe, the same probe on an encoder that was never trained, and training from
scratch. All arms and all budgets have the same number of steps with the same number of images each, so fewer images are
seen more often. None is set aside for validation: the last weights are scored, and nothing is chosen.

A seed draws the labelled images, equally many of each class, and decides the new weights, the order and the
augmentation; all arms of one seed have the same images, and its smaller budgets are parts of its larger ones.

The file is written after every training. Started again, the script trains only what the file does not have yet.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import common
import torch
from torch import nn

from vitlib.checkpoint import Card, load_weights, transfer_encoder
from vitlib.data import LabelledImages, load_images
from vitlib.model import ViTModel
from vitlib.recipes import FINETUNING, RECIPES, Recipe
from vitlib.train import fit

BATCH_SIZE = 32
RECIPE = "short"


@dataclass(frozen=True)
class Arm:
    """What is compared: whether the encoder was trained upstream, whether it is kept as it is, and the recipe."""

    recipe: Recipe
    pretrained: bool
    frozen: bool = False


ARMS = {
    "fine-tuning": Arm(FINETUNING[RECIPE], pretrained=True),
    "linear probe": Arm(FINETUNING[RECIPE], pretrained=True, frozen=True),
    "random probe": Arm(FINETUNING[RECIPE], pretrained=False, frozen=True),
    "from scratch": Arm(RECIPES[RECIPE], pretrained=False),
}


def accuracy(
    arm: Arm,
    pretrained: nn.Module,
    card: Card,
    labelled: LabelledImages,
    test: LabelledImages,
    steps: int,
    seed: int,
    device: torch.device,
) -> float:
    """Top-1 accuracy on ``test``, a share, after ``steps`` full batches of images from ``labelled``."""
    torch.manual_seed(seed)
    encoder = pretrained if arm.pretrained else ViTModel(**pretrained.config)
    model = transfer_encoder(encoder, len(labelled.classes), drop=arm.recipe.drop, drop_path=arm.recipe.drop_path)
    model.vit_encoder.requires_grad_(not arm.frozen)
    # one epoch of as many images as the steps need, whatever the budget; after it `fit` evaluates, which is the score
    shown = labelled.subset(torch.arange(steps * BATCH_SIZE) % len(labelled))
    options = {"epochs": 1, "batch_size": BATCH_SIZE, "seed": seed, "precision": "float32", "progress": False}
    history = fit(model.to(device), shown, test, card, arm.recipe, **options)
    if history.interrupted:
        raise click.Abort
    return history.epochs[-1]["validation_accuracy"]


def missing(arms: dict[str, dict[str, list[float]]], budgets: list[int], seeds: int) -> Iterator[tuple[str, int, int]]:
    """Arm, budget and seed of what ``arms`` does not have yet: all of one seed before the next."""
    for seed in range(seeds):
        for budget in budgets:
            for name in ARMS:
                if len(arms.get(name, {}).get(str(budget), [])) <= seed:
                    yield name, budget, seed


def summary(arms: dict[str, dict[str, list[float]]]) -> str:
    """A row per budget: the mean over the seeds, the lowest and the highest accuracy of each arm, in percent."""
    budgets = sorted({budget for accuracies in arms.values() for budget in accuracies}, key=int)
    rows = [
        [budget, *(common.mean_and_range(accuracies.get(budget, [])) for accuracies in arms.values())]
        for budget in budgets
    ]
    return common.table(["images", *arms], rows)


@click.command()
@click.option("--downstream", default="shapes10", show_default=True, help="A data set's name, or a folder of images.")
@click.option("--weights", default="shapes100-mini", show_default=True, help="A shipped encoder, or a checkpoint file.")
@common.whole_numbers("--budgets", "20,50,100,200,500,1000,2000", "Numbers of labelled images, separated by commas.")
@common.whole_number("--seeds", 3, "Repetitions, each with other labelled images.")
@common.whole_number("--steps", 63, f"Training steps of {BATCH_SIZE} images; 63 are one pass over 2,000.")
@common.device_option
@common.out_option
def main(downstream, weights, budgets, seeds, steps, device, out) -> None:
    """Test accuracy against the number of labelled images, with pretraining and without."""
    try:
        pretrained, card = load_weights(weights)
        size = {"image_size": pretrained.config["image_size"], "num_channels": pretrained.config["num_channels"]}
        train, test = (load_images(downstream, split, **size) for split in ("train", "test"))
        names = {"encoder": Path(weights).name, "downstream": Path(downstream).name}
        settings = {**names, "recipe": RECIPE, "steps": steps, "batch_size": BATCH_SIZE}
        settings |= {"classes": len(train.classes), "test_images": len(test)}
        arms = common.finished(out, settings).get("arms", {})
        subsets = {(budget, seed): common.draw(train, budget, seed) for budget in budgets for seed in range(seeds)}
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    command = (
        f"python benchmarks/label_budget.py --downstream {names['downstream']} --weights {names['encoder']} "
        f"--budgets {','.join(map(str, budgets))} --seeds {seeds} --steps {steps}"
    )
    record = {"command": command, "machine": common.machine(device), "settings": settings, "arms": arms}
    for name, budget, seed in missing(arms, budgets, seeds):
        share = accuracy(ARMS[name], pretrained, card, subsets[budget, seed], test, steps, seed, device)
        arms.setdefault(name, {}).setdefault(str(budget), []).append(share)
        common.write_json(out, record)
        click.echo(f"seed {seed}, {budget} images, {name}: {share:.2%}")
    click.echo(f"\n{summary(arms)}")


if __name__ == "__main__":
    main()
