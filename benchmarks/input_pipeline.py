"""How fast are training images prepared, and what does that cost of a training step?

    python benchmarks/input_pipeline.py --out input_pipeline.json

vitlib prepares whole batches: for every epoch it draws the order and all random numbers and gathers the images
(``Trainer.batches``); for every batch it augments, normalises and, where the recipe says so, mixes images
(``Augmentation.apply`` and ``mix``). The usual way is a DataLoader that hands one image after the other to
torchvision.transforms.v2. Both get uint8 tensors in memory, do the steps of the same recipe and give float32 batches;
torchvision too moves pixels about while they are uint8, and is spared the mixing, which it does by the batch as well.

Each is given one core (a DataLoader without workers) and all cores (a worker per core). The training step is that of
``vitlib.training.fit`` with the model ``small``, on all cores, with the preparation of its images.
"""

import time
from collections.abc import Callable
from statistics import median

import click
import common
import torch
from common import ratio
from torch.utils.data import DataLoader, Dataset

from vitlib.course.doctor import usable_cores
from vitlib.data import LabelledImages
from vitlib.data.augment import CIFAR10_MEAN, CIFAR10_STD
from vitlib.model import create_model
from vitlib.training import RECIPES, Trainer, TrainingOptions, fit
from vitlib.utils import import_torchvision
from vitlib.weights import ModelCard


def torchvision_transform(recipe: str) -> Callable:
    """Return the recipe's augmentation by torchvision.transforms.v2: uint8 ``[3, 32, 32]`` to float32."""
    import_torchvision()
    from torchvision.transforms import v2

    augmentation = RECIPES[recipe].augmentation
    steps = [v2.RandomCrop(32, padding=augmentation.padding or None, padding_mode="reflect")]
    steps.append(v2.RandomHorizontalFlip(augmentation.flip))
    if augmentation.randaugment:
        steps.append(v2.RandAugment(augmentation.randaugment, augmentation.magnitude))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(CIFAR10_MEAN, CIFAR10_STD)]
    if augmentation.cutout:
        area = (augmentation.cutout / 32) ** 2
        steps.append(v2.RandomErasing(p=1.0, scale=(area, area), ratio=(1.0, 1.0)))
    if augmentation.erase:
        steps.append(v2.RandomErasing(p=augmentation.erase, scale=(0.02, 0.33), ratio=(0.3, 3.3)))
    return v2.Compose(steps)


class OneByOne(Dataset):
    """Images in memory, each transformed on its own."""

    def __init__(self, data: LabelledImages, recipe: str):
        self.data, self.transform = data, torchvision_transform(recipe)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        return self.transform(self.data.images[index]), self.data.labels[index]


def new_trainer(recipe: str, precision: str, data: LabelledImages, batch_size: int) -> Trainer:
    """Return a trainer of the model ``small`` for one epoch, on the device of ``data``."""
    norm_first, recipe = recipe != "published", RECIPES[recipe]
    model = create_model(
        "small", len(data.classes), drop=recipe.drop, drop_path=recipe.drop_path, norm_first=norm_first
    )
    card = ModelCard(data.classes, CIFAR10_MEAN, CIFAR10_STD)
    options = TrainingOptions(epochs=1, batch_size=batch_size, precision=precision)
    return Trainer(model.to(data.images.device), data, card, recipe, options)


def vitlib_task(trainer: Trainer, data: LabelledImages, cores: int) -> Callable[[], float]:
    """Return a function that prepares all images once and returns images/s."""

    def prepare() -> float:
        with common.threads(cores):
            start = common.clock(trainer.device)
            for batch in trainer.batches(1):
                trainer.augment(batch)
            return len(data) / (common.clock(trainer.device) - start)

    return prepare


def torchvision_task(recipe: str, data: LabelledImages, batch_size: int, cores: int) -> Callable[[], float]:
    """Return a function that fetches all images once and returns images/s. Workers live on between its calls."""
    workers = 0 if cores == 1 else cores
    loader = DataLoader(
        OneByOne(data, recipe), batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )

    def fetch() -> float:
        with common.threads(1):  # the workers do the work; without them an image on its own is too small to share
            start = time.perf_counter()
            for _ in loader:
                pass
            return len(data) / (time.perf_counter() - start)

    return fetch


def step_task(trainer: Trainer, data: LabelledImages, steps: int, cores: int) -> Callable[[], float]:
    """Return a function that trains for ``steps`` and returns seconds per step, with drawing and gathering."""
    options = {"epochs": 1, "train_steps_per_epoch": steps, "batch_size": trainer.options.batch_size}
    options |= {"precision": trainer.precision, "progress": False}

    def train() -> float:
        with common.threads(cores):
            one = data.subset(slice(0, 1))
            history = fit(trainer.model, data, one, trainer.card, trainer.recipe, **options)
            return history.epochs[0]["seconds"] / len(history.steps)

    return train


def tables(speeds: dict, steps: dict, cores: int, batch_size: int) -> str:
    """Return one line per recipe and number of cores, then one per recipe and precision.

    Args:
        speeds: images/s by (library, recipe, cores), round by round.
        steps: seconds per training step of ``batch_size`` images by (recipe, precision), on ``cores`` cores.
    """
    prepared, stepped = [], []
    for recipe, count in [(recipe, count) for library, recipe, count in speeds if library == "vitlib"]:
        theirs, ours = (speeds[library, recipe, count] for library in ("torchvision", "vitlib"))
        medians = f"{median(theirs):,.0f}", f"{median(ours):,.0f}"
        prepared.append([recipe, str(count), *medians, f"{ratio(ours, theirs):.1f}"])
    for (recipe, precision), seconds in steps.items():
        preparing = [100 * batch_size / speed for speed in speeds["vitlib", recipe, cores]]
        stepped.append([recipe, precision, f"{1000 * median(seconds):.1f}", f"{ratio(preparing, seconds):.2f}"])
    first = common.table(["images/s", "cores", "torchvision", "vitlib", "ratio"], prepared)
    return first + "\n\n" + common.table(["training step", "precision", "ms", "% for its images"], stepped)


@click.command()
@common.whole_number("--images", 5120, "Images that are prepared in every measurement.")
@common.whole_number("--batch-size", 128, "Images per batch.")
@common.whole_number("--rounds", 5, "How often everything is measured.")
@common.whole_number("--steps", 2, "Training steps per recipe, precision and round.")
@common.whole_number("--cores", usable_cores(), "Cores for vitlib's threads and for the DataLoader's workers.")
@common.listed("--recipes", click.Choice(list(RECIPES)), "published,modern", "Whose augmentation is measured.")
@common.device_option
@common.precisions_option
@common.out_option
def main(images, batch_size, rounds, steps, cores, recipes, device, precisions, out) -> None:
    """Images/s of the augmentation against torchvision's, and its share of a training step."""
    data = common.random_images(images)
    on_device = data.to(device)
    keys = [(recipe, precision) for precision in precisions for recipe in recipes]
    trainers = {key: new_trainer(*key, on_device, batch_size) for key in keys}
    preparing = {}
    for recipe in recipes:
        for count in sorted({1, cores}):
            trainer = trainers[recipe, precisions[0]]
            preparing["torchvision", recipe, count] = torchvision_task(recipe, data, batch_size, count)
            preparing["vitlib", recipe, count] = vitlib_task(trainer, on_device, count)
    stepping = {key: step_task(one, on_device, steps, cores) for key, one in trainers.items()}
    tasks = preparing | stepping
    common.interleave(tasks, 1, "warming up")
    measured = common.interleave(tasks, rounds)
    speeds, seconds = ({key: measured[key] for key in part} for part in (preparing, stepping))
    click.echo("\n" + tables(speeds, seconds, cores, batch_size))
    settings = {"images": images, "batch_size": batch_size, "steps": steps, "cores": cores}
    record = {"machine": common.machine(device), "settings": settings}
    record["images_per_second"] = {f"{name}, {recipe}, cores: {n}": v for (name, recipe, n), v in speeds.items()}
    record["seconds_per_step"] = {", ".join(key): rounds for key, rounds in seconds.items()}
    common.write_json(out, record)


if __name__ == "__main__":
    main()
