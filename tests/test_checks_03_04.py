"""The checks of chapters 03 and 04: right answers pass, and each typical wrong answer is told what is wrong with it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitlib.augment import normalise
from vitlib.checkpoint import transfer_encoder
from vitlib.course import checks
from vitlib.model import ViTModel


def evaluate_well(model, images):
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(images)
    model.train(was_training)
    return logits


def evaluate_and_forget_mode(model, images):
    model.eval()
    with torch.no_grad():
        return model(images)


def evaluate_with_gradients(model, images):
    model.eval()
    logits = model(images)
    model.train()
    return logits


def keep_old_head(pretrained, num_classes):
    model = ViTModel(**pretrained.config)
    model.vit_encoder.load_state_dict(pretrained.vit_encoder.state_dict())
    return model


def fresh_encoder(pretrained, num_classes):
    return ViTModel(**{**pretrained.config, "num_classes": num_classes})


def shared_encoder(pretrained, num_classes):
    model = fresh_encoder(pretrained, num_classes)
    model.vit_encoder = pretrained.vit_encoder
    return model


def new_head_in_place(pretrained, num_classes):
    pretrained.linear_classifier = nn.Linear(16, num_classes)
    return pretrained


def embedding_only(pretrained, num_classes):
    model = fresh_encoder(pretrained, num_classes)
    model.vit_encoder.embedding.load_state_dict(pretrained.vit_encoder.embedding.state_dict())
    return model


def freeze_all(model):
    model.requires_grad_(False)


def freeze_half(model):
    model.vit_encoder.embedding.requires_grad_(False)


RIGHT = [
    (checks.first_loss, math.log),
    (checks.first_loss, lambda c: -math.log(1 / c)),
    (checks.top1, lambda logits, labels: (logits.argmax(1) == labels).float().mean()),
    (checks.top1, lambda logits, labels: (logits.argmax(-1) == labels).sum().item() / len(labels)),
    (checks.evaluation, evaluate_well),
    (checks.transfer, transfer_encoder),
    (checks.linear_probe, lambda model: model.vit_encoder.requires_grad_(False)),
    (checks.normalisation, lambda images, upstream, downstream: normalise(images, *upstream)),
]
WRONG = [
    (checks.first_loss, math.log2, "base 2"),
    (checks.first_loss, math.log10, "base 10"),
    (checks.first_loss, lambda c: 1 / c, "probability of each class"),
    (checks.first_loss, lambda c: -math.log(c), "sign is wrong"),
    (checks.first_loss, lambda c: 4.6, "-log(p)"),
    (checks.first_loss, lambda c: "ln C", "a str came back"),
    (checks.top1, lambda logits, labels: (logits.argmax(1) == labels).sum(), "counts the right answers"),
    (checks.top1, lambda logits, labels: 100 * (logits.argmax(1) == labels).float().mean(), "in percent"),
    (checks.top1, lambda logits, labels: (logits.argmax(1) != labels).float().mean(), "wrong answers"),
    (checks.top1, lambda logits, labels: (logits.argmax(1) == labels).float(), "24 came back"),
    (checks.top1, lambda logits, labels: 0.123, "argmax over the classes"),
    (checks.evaluation, lambda model, images: model(images), "dropout is still on"),
    (checks.evaluation, evaluate_with_gradients, "gradients are recorded"),
    (checks.evaluation, evaluate_and_forget_mode, "left in eval mode"),
    (checks.transfer, keep_old_head, "100 rows for 10 classes"),
    (checks.transfer, fresh_encoder, "fresh one"),
    (checks.transfer, embedding_only, "only some"),
    (checks.transfer, shared_encoder, "shares tensors"),
    (checks.transfer, new_head_in_place, "the pretrained model itself"),
    (checks.linear_probe, freeze_all, "head is frozen"),
    (checks.linear_probe, freeze_half, "still trained"),
    (checks.linear_probe, lambda model: model.linear_classifier.requires_grad_(False), "head is frozen"),
    (checks.normalisation, lambda x, up, down: normalise(x, *down), "downstream statistics"),
    (checks.normalisation, lambda x, up, down: x.float() / 255, "only divides by 255"),
    (checks.normalisation, lambda x, up, down: normalise(x, (0, 0, 0), up[1]), "not (x / 255 - mean) / std"),
    (
        checks.normalisation,
        lambda x, up, down: (x - torch.tensor(up[0]).view(3, 1, 1)) / torch.tensor(up[1]).view(3, 1, 1),
        "divide by 255 first",
    ),
]
ALL = {check: None for check, _ in RIGHT}


def name(value):
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("check, function", RIGHT, ids=name)
def test_right_answers_pass(check, function, verdict):
    assert verdict(check, function) == "correct"


@pytest.mark.parametrize("check, function, words", WRONG, ids=name)
def test_typical_wrong_answers_are_told_why(check, function, words, verdict):
    said = verdict(check, function)
    assert said.startswith("not yet: ") and words in said


@pytest.mark.parametrize("check", ALL, ids=name)
@pytest.mark.parametrize("wrong", [None, 3, "text", [], lambda: 1, lambda *a, **k: object(), nn.Linear(1, 1)], ids=type)
def test_no_object_crashes_a_check(check, wrong, verdict):
    assert verdict(check, copy.deepcopy(wrong)).startswith("not ")


def test_each_check_has_at_least_three_wrong_answers():
    assert all(sum(wrong[0] is check for wrong in WRONG) >= 3 for check in ALL)


def test_reference_loss_is_that_of_pytorch():
    assert F.cross_entropy(torch.zeros(1, 100), torch.tensor([3])).item() == pytest.approx(math.log(100))
