"""The edges of training: what does not go together is one sentence, and the smallest data sets can be trained on."""

import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import TINY, refusal
from torch import nn

from vitlib.data import LabelledImages
from vitlib.data.augment import Augmentation
from vitlib.model import ViTModel
from vitlib.training import FINETUNING, RECIPES, finetune, fit, pretrain
from vitlib.weights import ModelCard

PLAIN = replace(RECIPES["short"], augmentation=Augmentation(padding=1, cutout=0))
MIXED = replace(PLAIN, augmentation=Augmentation(padding=1, cutout=0, randaugment=1, erase=0.5, mixing=1.0))
QUIET = {"progress": False, "device": "cpu"}


def pictures(count=12, classes=3, channels=3, side=8) -> LabelledImages:
    images = torch.randint(256, (count, channels, side, side), dtype=torch.uint8)
    return LabelledImages(images, torch.arange(count) % classes, tuple("abcdefgh"[:classes]))


def card_of(channels=3) -> ModelCard:
    return ModelCard(("a", "b", "c"), (0.5,) * channels, (0.25,) * channels)


def tiny(**changes) -> ViTModel:
    return ViTModel(**{**TINY, "num_classes": 3, "drop": 0.0, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": tiny(num_classes=2)}, r"gives \[1, 2\] logits .* need 3 classes; give a model"),
        ({"model": nn.Conv2d(3, 4, 3)}, r"gives \[1, 4, 6, 6\] logits .* give a model with a classifier"),
        ({"model": tiny(image_size=16)}, r"\[B, 3, 16, 16\]"),
        ({"card": card_of(channels=1)}, r"do not go with images of 3 channels.* num_channels=1"),
        ({"validation": pictures(classes=5)}, r"need 5 classes; give a model with a classifier"),
        ({"train": pictures(classes=1)}, r"are of one class"),
        ({"validation": pictures(0)}, r"12 training and 0 validation images are too few"),
    ],
    ids=range(7),
)
def test_what_does_not_go_together_is_one_sentence(changes, words):
    good = {"model": tiny(), "train": pictures(), "validation": pictures(), "card": card_of(), "recipe": PLAIN}
    assert re.search(words, refusal(fit, **{**good, **changes}, epochs=1, progress=False))


def steps_of(data: LabelledImages, **changes) -> int:
    """The steps of a pretraining of two epochs, whose losses must be finite."""
    options = {"pretrain_epochs": 2, "recipe": MIXED, "validation_fraction": 0.25, **QUIET, **changes}
    history = pretrain(data, "tiny", **options).history
    assert all(math.isfinite(step["loss"]) for step in history.steps)
    return len(history.steps)


@pytest.mark.parametrize(("batch_size", "steps"), [(1, 9), (8, 2), (9, 1), (10_000, 1)])
def test_any_batch_size_works_with_nine_grey_training_images(tiny_preset, batch_size, steps):
    more = {"train_steps_per_epoch": 1000, "eval_steps_per_epoch": 1000}  # than there are: all images
    assert steps_of(pictures(12, channels=1), batch_size=batch_size, **more) == 2 * steps


def test_a_class_of_one_image_can_be_trained_but_not_all_of_them(tiny_preset):
    lonely = LabelledImages(pictures(9).images, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2]), ("a", "b", "c"))
    assert steps_of(lonely) == 2
    with pytest.raises(ValueError, match=r"cannot be split; .* must have two images\.$"):
        steps_of(pictures(3))


def test_all_recipes_take_the_smallest_training(tiny_preset):
    one = {"train_steps_per_epoch": 1, "eval_steps_per_epoch": 1, **QUIET}
    for name in RECIPES:
        done = pretrain(pictures(4, classes=2, side=16), "tiny", pretrain_epochs=1, recipe=name, **one)
        assert len(done.history.steps) == 1, name
    for name in FINETUNING:
        tuned = finetune(done.model, done.card, pictures(4, classes=2, side=8), recipe=name, **one)
        assert len(tuned.history.steps) == 1 and tuned.model.config["image_size"] == 8, name
