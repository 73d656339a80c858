"""Trainings on record: figures that ship with vitlib, to be read without training for hours."""

import json
from pathlib import Path

from .checkpoint import PRETRAINED, load_pretrained

SHIPPED = "cifar100-small"
OPTIMIZERS = {"sgd": "SGD", "adamw": "AdamW", "muon": "Muon and AdamW"}


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
    """Test accuracy against the number of labelled images, as ``benchmarks/label_budget.py`` measured it.

    Returns:
        ``arms``: by name, per budget (images, in rising order) a list of top-1 accuracies, one per seed, shares from 0
        to 1; ``chance``, the accuracy of guessing; ``about``, what all trainings have in common.
    """
    record = json.loads((PRETRAINED / "label_budget.json").read_text())
    settings = record["settings"]
    arms = {
        name: {int(budget): cells[budget] for budget in sorted(cells, key=int)}
        for name, cells in record["arms"].items()
    }
    about = (
        f"{settings['downstream']}, encoder {settings['encoder']}, "
        f"{settings['steps']} steps of {settings['batch_size']} images"
    )
    return {"arms": arms, "chance": 1 / settings["classes"], "about": about}
