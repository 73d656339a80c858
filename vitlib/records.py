"""Trainings on record: figures that ship with vitlib, to be read without training for hours."""

import json
import statistics
from pathlib import Path

from vitlib.weights.checkpoint import PRETRAINED, load_pretrained

SHIPPED = "cifar100-small"
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon and AdamW"}


def load_record(name: str) -> dict:
    """Return a measurement that ships with vitlib, as the JSON file holds it.

    - ``published``: the published system, epoch by epoch (``accuracy``, ``loss``), as its authors recorded it.
    - ``cifar100-small``, ``shapes100-mini``: the training of the shipped weights (``record``, ``classes``, ...).
    - ``sweep_labels``, ``sweep_patches``: the sweeps of notebooks/sweeps (``runs``: ``parameters`` and ``figures``).
    - ``vit_against_cnn``: benchmarks/vit_against_cnn.py (``models``, ``trainings``: a training for each seed).

    Shares are in [0, 1], losses in nats. ``command`` says how to measure it again.

    Raises:
        ValueError: for another name.
    """
    file = PRETRAINED / f"{name}.json"
    if not file.is_file() or name == "index":
        known = sorted(file.stem for file in PRETRAINED.glob("*.json") if file.stem != "index")
        raise ValueError(f"There is no record named {name!r}; choose one of {', '.join(known)}.")
    return json.loads(file.read_text(encoding="utf-8"))


def recorded_curves() -> dict[str, dict]:
    """Two trainings of models of one size on 100 classes of photographs, epoch by epoch.

    Returns:
        ``published``, the small published system, and ``ours``, the model that ships as ``cifar100-small``. Each is a
        dict of ``accuracy`` (top-1, a share from 0 to 1) and ``loss`` (mean cross-entropy in nats), lists with one
        entry per epoch from epoch 1 on, and ``about``, a sentence that says what was trained and on which images it
        was measured. The images differ: the curves do not say by how much one training is better than the other.

    Raises:
        ValueError: if the model's file is not the one that shipped.
    """
    return {"published": _published(), "ours": _ours()}


def _published() -> dict:
    record = json.loads((PRETRAINED / "published.json").read_text())
    author = record["system"].split(",")[0]
    about = (
        f"{author}'s own record of a model of {record['parameters']:,} parameters: {record['recipe']}; "
        f"measured on {record['upstream']}."
    )
    return {"accuracy": record["accuracy"], "loss": record["loss"], "about": about}


def _ours() -> dict:
    _, card = load_pretrained(SHIPPED)
    record, recipe, test = card.record, card.record["recipe"], card.record["test"]
    data = Path(record["source"]).name  # of a folder its name alone
    about = (
        f"vitlib's {SHIPPED}: {OPTIMIZERS[recipe['optimizer']]}, {recipe['schedule']} schedule, "
        f"label smoothing {recipe['label_smoothing']}, batch {record['batch_size']}, {record['train_images']:,} "
        f"training images of {data}; measured on {record['validation_images']:,} others of its training images. "
        f"Its last weights are right on {test['accuracy']:.1%} of the {test['images']:,} test images."
    )
    epochs = record["epochs_run"]
    return {
        "accuracy": [epoch["validation_accuracy"] for epoch in epochs],
        "loss": [epoch["validation_loss"] for epoch in epochs],
        "about": about,
    }


def recorded_label_budgets() -> dict:
    """Test accuracy against the number of labelled images, as the sweep ``notebooks/sweeps/labels.yaml`` measured it.

    Returns:
        ``arms``: by name, per budget (images, in rising order) a list of top-1 accuracies, one per seed, shares from 0
        to 1; ``chance``, the accuracy of guessing; ``about``, what all trainings have in common; ``command``, which
        measures all of it again.
    """
    record = _sweep("labels")
    arms: dict[str, dict[int, list[float]]] = {}
    for run in sorted(
        record["runs"], key=lambda run: (run["parameters"]["labelled_images"], run["parameters"]["seed"])
    ):
        cells = arms.setdefault(run["parameters"]["arm"], {})
        cells.setdefault(run["parameters"]["labelled_images"], []).append(run["figures"]["top1"])
    named = dict.fromkeys(run["parameters"]["arm"] for run in record["runs"])  # in the order of the sweep
    common = record["parameters"]
    about = (
        f"{common['downstream']}, encoder {common['weights']}, {common['steps']} steps of {common['batch_size']} images"
    )
    return {"arms": {name: arms[name] for name in named}, **_origin(record), "about": about}


def recorded_patches() -> dict:
    """Small ViTs trained with patches of several sizes, with position embeddings and without, as the sweep
    ``notebooks/sweeps/patches.yaml`` measured them.

    Returns:
        ``runs``, for :func:`vitlib.plots.sweep`: per run ``parameters`` (``patch_size``, ``position_embedding``,
        ``seed``) and ``figures`` (``top1``, a share from 0 to 1, ``loss``, in nats, and others); ``accuracy``: by patch
        size and whether there are position embeddings, as in ``accuracy[4, True]``, a list of the ``top1`` of all
        seeds; ``chance``, the accuracy of guessing; ``about``, what all trainings have in common; ``command``, which
        measures all of it again.
    """
    record = _sweep("patches")
    accuracy: dict[tuple[int, bool], list[float]] = {}
    for run in sorted(record["runs"], key=lambda run: run["parameters"]["seed"]):
        place = run["parameters"]["patch_size"], run["parameters"]["position_embedding"]
        accuracy.setdefault(place, []).append(run["figures"]["top1"])
    common = record["parameters"]
    about = f"{common['preset']} on {common['upstream']}, {common['steps']} steps of {common['batch_size']} images"
    return {"runs": record["runs"], "accuracy": accuracy, **_origin(record), "about": about}


def _sweep(name: str) -> dict:
    """The record of a sweep, as ``pretrained/keep_sweep.py`` wrote it."""
    return json.loads((PRETRAINED / f"sweep_{name}.json").read_text(encoding="utf-8"))


def _origin(record: dict) -> dict:
    """What the readers of both sweeps say: the accuracy of guessing, and the command."""
    return {"chance": record["runs"][0]["figures"]["chance"], "command": record["command"]}


def recorded_cnn() -> dict:
    """A ViT against a CNN of equal parameters after equal steps, as ``benchmarks/vit_against_cnn.py`` measured it.

    Returns:
        ``models``: by name what each is: ``what`` (in words), ``parameters``, ``forward_flops`` (of one image, a
        multiply-add counts as 2), ``images_per_second`` (of training, the median) and ``learning_rate``, its own best;
        ``accuracy`` and ``train_accuracy``: by name and number of training images, as in "ViT, 2,000 images", a list
        of top-1 accuracies on the test images and on the training images without augmentation, one per seed, shares
        from 0 to 1; ``chance``, the accuracy of guessing; ``about``, what all trainings have in common; ``command``,
        which measures all of it again.
    """
    record = json.loads((PRETRAINED / "vit_against_cnn.json").read_text())
    settings, trainings = record["settings"], record["trainings"]
    speeds = {name: statistics.median(rounds) for name, rounds in record["images_per_second"].items()}
    models = {name: {**facts, "images_per_second": speeds[name]} for name, facts in record["models"].items()}
    sizes = sorted({size for cells in trainings.values() for size in cells}, key=int)
    arms = {f"{name}, {int(size):,} images": trainings[name][size] for size in sizes for name in models}
    accuracies = {
        key: {arm: [cell[key] for cell in cells] for arm, cells in arms.items()}
        for key in ("accuracy", "train_accuracy")
    }
    about = (
        f"{settings['upstream']}, {settings['steps']} steps of {settings['batch_size']} images, "
        f"{settings['test_images']:,} test images"
    )
    return {
        "models": models,
        **accuracies,
        "chance": 1 / settings["classes"],
        "about": about,
        "command": record["command"],
    }
