"""Checks of chapter 03: pretraining."""

import math
import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlib.model import ViTModel

from .frame import answer, as_indices, close, compare, exercise, expect, number_answer, reject, tensor_answer, unchanged


# a size that has to be rounded, and one that has not
@exercise("split", (103, 0.2), (60, 0.15))
def split(learners: Callable, count: int, fraction: float) -> None:
    """Check ``split(count, fraction, seed) -> (training, validation)``: indices, together 0 to count - 1."""
    seed, *other_seeds = torch.randperm(1000)[:3].tolist()

    def parts(seed: int) -> tuple[list[int], ...]:
        given = answer(learners, count, fraction, seed)
        expect(isinstance(given, tuple | list) and len(given) == 2, "two parts are wanted: return training, validation")
        return tuple(sorted(as_indices(part).tolist()) for part in given)  # in any order within a part

    before = _shared_generators()
    training, validation = drawn = parts(seed)
    together, both = set(training + validation), len(set(training) & set(validation))
    twice, lost = any(len(set(part)) < len(part) for part in drawn), count - len(together)
    wanted, size = fraction * count, f"the validation part has {len(validation)} of {count} images"
    followed = sum((index + 1) % count in validation for index in validation)  # few are, after a shuffle
    neighbours = 3 * followed >= 2 * len(validation)
    steps = {second - first for first, second in zip(validation, validation[1:], strict=False)}
    faults = {
        f"for {count} images the indices run from 0 to {count - 1}, but yours from {min(together, default=0)} to "
        f"{max(together, default=0)}; torch.randperm(count) has each of them once": together - set(range(count)),
        "an image stands twice in the same part: you drew with replacement; shuffle with torch.randperm": twice,
        f"{both} of {count} images are in both parts; cut one order in two, at one place": both,
        f"{lost} of {count} images are in neither part; cut one order in two, at one place": lost,
        f"{size} for the fraction {fraction}; the fraction is that of the second part": abs(len(training) - wanted) < 1,
        f"{size}, but {fraction} of {count} is {wanted:.1f}": abs(len(validation) - wanted) >= 1,
        "the validation part is made of neighbours, in the order in which the images come; a folder comes sorted "
        "by class, so whole classes would never be trained on; shuffle before you cut": neighbours,
        "you hold out one image in every so many; draw a random order, with torch.randperm": len(steps) == 1,
        "the same seed gave two different splits; draw with torch.randperm(count, generator=...), seeded with "
        "seed": parts(seed) != drawn,
        "another seed gives the same split; seed your generator with seed": (
            all(parts(other) == drawn for other in other_seeds)
        ),
        "your split moves the random numbers that the rest of the program draws; use a torch.Generator() of your "
        "own": _shared_generators() != before,
    }
    reject(faults)


def _shared_generators() -> tuple:
    """Return the states of the generators that everything in a program draws from."""
    _, keys, position, *_ = np.random.get_state()
    return torch.get_rng_state().tolist(), random.getstate(), keys.tolist(), position


@exercise("first loss")
def first_loss(learners: Callable) -> None:
    """Check ``first_loss(num_classes)``: the cross-entropy in nats of a model that gives all classes the same share."""
    for num_classes in (*torch.randint(20, 1000, (3,)).tolist(), 2):
        given, right = number_answer(learners, num_classes), math.log(num_classes)
        slips = {
            "the sign is wrong; a loss is minus the logarithm of a probability, so it is positive": -right,
            "that is the logarithm to base 2 (bits); PyTorch's cross-entropy is in nats, base e": right / math.log(2),
            "that is the logarithm to base 10; PyTorch's cross-entropy uses base e": right / math.log(10),
            "that is the probability of each class; the loss is minus its logarithm": 1 / num_classes,
            "that is how often a guess is wrong; the loss is minus the logarithm of a probability": 1 - 1 / num_classes,
            "that is divided by the number of classes; only the right class counts, -log(p) of its probability p": (
                right / num_classes
            ),
        }
        otherwise = f"{given:.3g} for {num_classes} classes; what is -log(p) if all classes are equally likely?"
        compare(given, right, slips, otherwise, tolerance=1e-2)


@exercise("sound model", (13,), (18,))
def sound_model(learners: Callable, num_classes: int) -> None:
    """Check ``build(num_classes) -> nn.Module``, untrained: images ``[B, 3, 32, 32]`` to logits ``[B, classes]``."""
    model = answer(learners, num_classes)
    expect(isinstance(model, nn.Module), f"build should return a model, but a {type(model).__name__} came back")
    images, labels = torch.randn(num_classes, 3, 32, 32), torch.arange(num_classes)
    _expect_logits(answer(model, images), labels, num_classes)
    with torch.no_grad():
        for parameter in model.parameters():  # a head may start at zero, which would let nothing through
            parameter += 0.02 * torch.randn_like(parameter)
    _expect_gradients(model, images, labels)
    model.eval()
    pixels = images.clone().requires_grad_()
    logits = model(pixels).clone()
    logits.square().sum().backward()
    seen = 0.0 if pixels.grad is None else (pixels.grad != 0).any(1).float().mean().item()
    changed = torch.cat([3 * torch.randn(1, 3, 32, 32), images[1:]])
    with torch.no_grad():
        faults = {
            "do different images give different logits? No; an index or a mean over the batch leaves one image of "
            "all": close(logits, logits[:1].expand_as(logits)),
            "do two eval passes agree? No: something random is on in eval mode; F.dropout needs "
            "training=self.training": not close(logits, model(images)),
            "is each image on its own? No: the others' logits change with the first image; look for a mean, a norm or "
            "an attention over axis 0, the batch": not close(model(changed)[1:], logits[1:]),
            f"does every patch matter? Only {seen:.0%} of the pixels have an influence; an index leaves out some "
            "tokens": seen <= 0.99,
            "are these the logits of equations 1 to 4? No: something is left out or added, or it is not CLS, token 0, "
            "that goes into the head": (
                isinstance(model, ViTModel) and not close(logits, ViTModel.forward(model, images), 1e-4)
            ),
        }
    reject(faults)


def _expect_logits(logits, labels: Tensor, num_classes: int) -> None:
    asked = "one logit for each class?"
    expect(isinstance(logits, Tensor), f"{asked} A {type(logits).__name__} came back, not a tensor")
    found, shape = list(logits.shape), [len(labels), num_classes]
    expect(found == shape, f"{asked} The logits are {found}, but should be [B, num_classes] = {shape}")
    loss, right = F.cross_entropy(logits, labels).item(), math.log(num_classes)
    faults = {
        f"{asked} Yours are probabilities; cross-entropy applies the softmax itself": (
            logits.min() >= 0 and close(logits.sum(1), torch.ones(len(labels)), 1e-4)
        ),
        f"is the first loss that of a model that knows nothing? It is {loss:.3g}, but should be near {right:.2f}; the "
        "head's weights start too large, or its input is not normalised": not abs(loss - right) < 0.7,
    }
    reject(faults)


def _expect_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    logits, asked = model.train()(images), "do gradients reach every parameter?"
    expect(model.training, "your forward switches the model to eval mode; read self.training there, and do not set it")
    expect(logits.requires_grad, f"{asked} They reach none; look for detach(), no_grad() or .data behind the head")
    model.zero_grad()
    F.cross_entropy(logits, labels).backward()
    without = [name for name, part in model.named_parameters() if part.grad is None or not part.grad.any()]
    named = ", ".join(without[:2]) + (f" and {len(without) - 2} others" if len(without) > 2 else "")
    expect(
        not without,
        f"{asked} None reaches {named}; somewhere behind them the way to the loss is cut, by detach(), no_grad() or "
        "an index that leaves out too much",
    )


# as many classes as images first, so that an argmax over the wrong axis has an answer
@exercise("top-1 accuracy", (60, 60), (60, 7), (53, 130))
def top1(learners: Callable, batch: int, num_classes: int) -> None:
    """Check ``top1(logits [B, classes], labels [B])``: the share of images with the highest logit at their class."""
    hits = torch.randint(35, 49, ()).item()
    over_images = torch.zeros(1)
    while not over_images.any():  # two mistakes would give 0
        labels = torch.randint(num_classes, (batch,))
        winners = torch.where(torch.arange(batch) < hits, labels, (labels + 1) % num_classes)
        logits = torch.randn(batch, num_classes)
        for ahead, chosen in ((0.5, labels), (1.0, winners)):  # where the right class does not win, it comes second
            logits[torch.arange(batch), chosen] = logits.amax(1) + ahead
        over_images = (logits.argmax(0)[:batch] == labels[:num_classes]).float()
    given, right = number_answer(learners, logits, labels), hits / batch
    nothing = "that is 0 although some are right; compare with argmax (not with the values of max), divide by /"
    expect(given != 0, nothing)
    probabilities = logits.softmax(1)[torch.arange(batch), labels]
    slips = {
        "that is the mean probability of the right class; top-1 asks only whether it is the highest": (
            probabilities.mean().item()
        ),
        "your argmax runs over the images; the classes are the last axis of the logits": over_images.mean().item(),
        "that counts the right answers; divide by the number of images": hits,
        "that is in percent; give a share from 0 to 1": 100 * right,
        "that is the share of wrong answers": 1 - right,
        "that divides by the number of classes; divide by the number of images": hits / num_classes,
    }
    otherwise = f"{given:.3g} where {right:.3g} is right; count the images whose highest logit is their label's"
    compare(given, right, slips, otherwise, tolerance=1e-3)


@exercise("evaluation", (16, 8, 3), (9, 5, 7))
def evaluation(learners: Callable, batch: int, width: int, classes: int) -> None:
    """Check ``evaluate_model(model, images)``: logits in eval mode, without gradients; the model as it was before."""
    images = torch.randn(batch, width)
    layers = nn.Linear(width, 8), nn.Dropout(0.5), nn.Linear(8, classes)
    model = nn.Sequential(*layers, nn.BatchNorm1d(classes))  # in train mode it would move its statistics
    model(images).sum().backward()  # leaves gradients, which are the caller's
    right = model.eval()(images).detach()
    model.train()
    recorded = []
    model[0].register_forward_hook(lambda *_, log=recorded: log.append(torch.is_grad_enabled()))

    def given() -> Tensor:
        return tensor_answer(learners, model, images, may_change=True)  # what has changed is looked at later

    with unchanged(model, images):
        first, second = given(), given()
        faults = {
            "two calls give different logits: dropout is still on; call model.eval() first": not close(first, second),
            "gradients are recorded, which costs memory; call the model within torch.no_grad()": (
                first.requires_grad or any(recorded)
            ),
            "the model is left in eval mode, so the next epoch has no dropout; put it back": not model.training,
        }
        reject(faults)
        compare(first, right, {}, "these are not the logits of the model in eval mode; return them unchanged")
    model.eval()
    with unchanged(model, images):
        expect(close(given(), right), "a model that is in eval mode gets other logits")
        kept = "a model that came in eval mode goes out in train mode; remember model.training before you change it"
        expect(not model.training, kept)
