"""Right and typically wrong answers to the exercises of chapter 03."""

import copy
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from vitlib.model import ViTModel

SIZE = {"image_size": 32, "patch_size": 8, "num_layers": 2, "em_dim": 32, "num_heads": 2, "ff_dim": 48}


def ordered(count, seed):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def split_well(count, fraction, seed):
    order, held_out = ordered(count, seed), round(fraction * count)
    return order[held_out:], order[:held_out]


def split_by_mask(count, fraction, seed):
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[ordered(count, seed)[: int(fraction * count)]] = True
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()


def split_with_python(count, fraction, seed):
    order = list(range(count))
    random.Random(seed).shuffle(order)
    cut = math.floor((1 - fraction) * count)
    return [torch.tensor(order[:cut]), torch.tensor(order[cut:])]


def turned(count, fraction, seed):
    return cut(torch.arange(count).roll(ordered(count, seed)[0].item()), fraction)


def split_in_a_fork(count, fraction, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(count)
    return order.tensor_split([count - round(fraction * count)])


def cut(order, fraction):
    held_out = round(fraction * len(order))
    return order[held_out:], order[:held_out]


def last_part(count, fraction, seed):
    indices = torch.arange(count)
    return indices[: count - round(fraction * count)], indices[count - round(fraction * count) :]


def shuffled_after_the_cut(count, fraction, seed):
    training, validation = last_part(count, fraction, seed)
    return training[ordered(len(training), seed)], validation[ordered(len(validation), seed)]


def with_replacement(count, fraction, seed):
    drawn = torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))
    return cut(drawn, fraction)


def two_draws(count, fraction, seed):
    held_out = round(fraction * count)
    return ordered(count, seed)[held_out:], ordered(count, seed + 1)[:held_out]


def two_cuts(count, fraction, seed):
    order = ordered(count, seed)
    return order[: int((1 - fraction) * count) - 1], order[-int(fraction * count) :]


def from_one(count, fraction, seed):
    return cut(ordered(count, seed) + 1, fraction)


def with_numpy(count, fraction, seed):
    np.random.seed(seed)
    return cut(torch.from_numpy(np.random.permutation(count)), fraction)


def with_pythons_shared_numbers(count, fraction, seed):
    random.seed(seed)
    return cut(torch.tensor(random.sample(range(count), count)), fraction)


def with_torchs_shared_numbers(count, fraction, seed):
    torch.manual_seed(seed)
    return cut(torch.randperm(count), fraction)


def masks(count, fraction, seed):
    held_out = ordered(count, seed) < fraction * count
    return ~held_out, held_out


def lists(count, fraction, seed):
    return [part.tolist() for part in split_well(count, fraction, seed)]


class Small(ViTModel):
    """A small ViT with the forward pass of the notebook's exercise, repaired; the others change one step of it."""

    def __init__(self, num_classes):
        super().__init__(num_classes, **SIZE)

    def forward(self, images):
        return self.head(self.encode(self.embed(images)))

    def embed(self, images):
        return self.vit_encoder.embedding(images)

    def encode(self, tokens):
        for block in self.vit_encoder.encoder:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens)[:, 0]

    def head(self, cls):
        return self.linear_classifier(cls)


class DropoutThatKnowsTheMode(Small):
    def head(self, cls):
        return self.linear_classifier(F.dropout(cls, training=self.training))


class ZeroHead(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        nn.init.zeros_(self.linear_classifier.weight)


class DefaultHead(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.linear_classifier = nn.Linear(32, num_classes)


class CutOff(Small):
    def embed(self, images):
        return super().embed(images)[:, :1]


class TopLeftPatchOnly(Small):
    def embed(self, images):
        return super().embed(images)[:, :2]


class PatchLeftOut(Small):
    def embed(self, images):
        return super().embed(images)[:, :-1]


class SquaredTokens(Small):
    def encode(self, tokens):
        for block in self.vit_encoder.encoder:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens.square())[:, 0]


class BlockTwice(Small):
    def encode(self, tokens):
        for block in [*self.vit_encoder.encoder, self.vit_encoder.encoder[0]]:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens)[:, 0]


class AnotherToken(Small):
    def encode(self, tokens):
        for block in self.vit_encoder.encoder:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens)[:, 1]


class PositiveLogits(Small):
    def head(self, cls):
        return super().head(cls).relu()


class Stub(Small):
    def forward(self, images):
        return ...


class DropoutAlwaysOn(Small):
    def head(self, cls):
        return self.linear_classifier(F.dropout(cls))


class BothFaults(CutOff, DropoutAlwaysOn):
    """The notebook's exercise."""


class Detached(Small):
    def head(self, cls):
        return self.linear_classifier(cls.detach())


class WithoutGradients(Small):
    def forward(self, images):
        with torch.no_grad():
            return super().forward(images)


class LayerLeftOut(Small):
    def encode(self, tokens):
        for block in self.vit_encoder.encoder[:-1]:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens)[:, 0]


class FirstImageForAll(Small):
    def head(self, cls):
        return self.linear_classifier(cls[0]).expand(len(cls), -1)


class OwnStatistics(Small):
    """Normalises by the batch that happens to be there."""

    def embed(self, images):
        return super().embed((images - images.mean(0)) / images.std(0))


class AcrossTheBatch(Small):
    """Tokens sequence first, classified by the mean of all, so that images attend to each other."""

    def encode(self, tokens):
        tokens = tokens.transpose(0, 1)
        for block in self.vit_encoder.encoder:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens).mean(0)


class LargeHead(Small):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        nn.init.normal_(self.linear_classifier.weight)


class Probabilities(Small):
    def head(self, cls):
        return super().head(cls).softmax(1)


class EveryToken(Small):
    def encode(self, tokens):
        for block in self.vit_encoder.encoder:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens)


def hits(logits, labels):
    return logits.argmax(1) == labels


def top1_in_a_loop(logits, labels):
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        right += row.index(max(row)) == label
    return right / len(labels)


def evaluate_well(model, images):
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(images)
    model.train(was_training)
    return logits


@torch.inference_mode()
def evaluate_in_inference_mode(model, images):
    was_training = model.training
    logits = model.eval()(images)
    model.train(was_training)
    return logits


def evaluate_a_copy(model, images):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(images)


def evaluate_and_forget_mode(model, images):
    model.eval()
    with torch.no_grad():
        return model(images)


def evaluate_with_gradients(model, images):
    model.eval()
    logits = model(images)
    model.train()
    return logits


def evaluate_with_gradients_and_detach(model, images):
    return evaluate_with_gradients(model, images).detach()


def evaluate_and_always_train(model, images):
    model.eval()
    with torch.no_grad():
        logits = model(images)
    model.train()
    return logits


def evaluate_and_switch_off(model, images):
    torch.set_grad_enabled(False)
    return evaluate_well(model, images)


def evaluate_and_freeze(model, images):
    for parameter in model.parameters():
        parameter.requires_grad = False
    return evaluate_well(model, images)


def evaluate_and_clear(model, images):
    model.zero_grad()
    return evaluate_well(model, images)


def evaluate_without_gradients_only(model, images):
    with torch.no_grad():
        return model(images)


RIGHT = {
    "split": {
        "one order, one cut": split_well,
        "a mask turned into indices": split_by_mask,
        "Python's generator, rounded up": split_with_python,
        "a fork of the shared numbers": split_in_a_fork,
        "lists": lists,
        "arrays": lambda *numbers: tuple(part.numpy() for part in split_well(*numbers)),
    },
    "first_loss": {
        "ln C": math.log,
        "minus the logarithm of 1 / C": lambda c: -math.log(1 / c),
        "measured": lambda c: F.cross_entropy(torch.zeros(1, c), torch.tensor([1])),
    },
    "sound_model": {
        "repaired": Small,
        "dropout that knows the mode": DropoutThatKnowsTheMode,
        "the library's": lambda c: ViTModel(c, **SIZE),
        "post-norm, mean of the patches": lambda c: ViTModel(c, **SIZE, norm_first=False, pooling="mean"),
        "a head that starts at zero": ZeroHead,
        "PyTorch's own start of the head": DefaultHead,
    },
    "top1": {
        "mean of the hits": lambda logits, labels: hits(logits, labels).float().mean(),
        "a number": lambda logits, labels: hits(logits, labels).sum().item() / len(labels),
        "loop": top1_in_a_loop,
    },
    "evaluation": {
        "no_grad": evaluate_well,
        "inference_mode": evaluate_in_inference_mode,
        "a copy": evaluate_a_copy,
    },
}
WRONG = {
    "split": {
        "the last part": (last_part, "made of neighbours, in the order in which the images come"),
        "the first part": (lambda count, fraction, seed: cut(torch.arange(count), fraction), "shuffle before you cut"),
        "shuffled after the cut": (shuffled_after_the_cut, "whole classes would never be trained on"),
        "turned": (turned, "made of neighbours, in the order in which the images come"),
        "with replacement": (with_replacement, "you drew with replacement"),
        "two draws": (two_draws, "images are in both parts"),
        "two cuts": (two_cuts, "images are in neither part"),
        "parts swapped": (lambda *numbers: split_well(*numbers)[::-1], "the fraction is that of the second part"),
        "half and half": (lambda count, _, seed: cut(ordered(count, seed), 0.5), "images, but 0.2 of 103 is 20.6"),
        "counted from 1": (from_one, "the indices run from 0 to 102"),
        "no seed": (lambda count, fraction, seed: cut(torch.randperm(count), fraction), "gave two different splits"),
        "seed 0 always": (lambda count, fraction, seed: split_well(count, fraction, 0), "another seed gives the same"),
        "every fifth": (
            lambda count, fraction, seed: (
                torch.arange(count)[torch.arange(count) % round(1 / fraction) > 0],
                torch.arange(0, count, round(1 / fraction)),
            ),
            "one image in every so many",
        ),
        "torch.manual_seed": (with_torchs_shared_numbers, "moves the random numbers that the rest"),
        "random.seed": (with_pythons_shared_numbers, "moves the random numbers that the rest"),
        "np.random.seed": (with_numpy, "moves the random numbers that the rest"),
        "masks": (masks, "a mask of True and False"),
        "floats": (lambda *numbers: [part.float() for part in split_well(*numbers)], "one is float32"),
        "one part": (lambda *numbers: split_well(*numbers)[0], "return training, validation"),
    },
    "first_loss": {
        "base 2": (math.log2, "base 2"),
        "base 10": (math.log10, "to base 10"),
        "the probability": (lambda c: 1 / c, "probability of each class"),
        "the error rate": (lambda c: 1 - 1 / c, "how often a guess is wrong"),
        "the wrong sign": (lambda c: math.log(1 / c), "sign is wrong"),
        "the mean over the classes": (lambda c: math.log(c) / c, "only the right class counts"),
        "for 100 classes": (lambda c: 4.6, "what is -log(p) if"),
        "a text": (lambda c: "ln C", "a str came back"),
        "true": (lambda c: True, "a bool came back"),
        "one for each class": (lambda c: -torch.full((c,), 1 / c).log(), "one number is wanted"),
    },
    "sound_model": {
        "the notebook's": (BothFaults, "None reaches vit_encoder.embedding.patch_embedding.weight;"),
        "patches cut off": (CutOff, "None reaches vit_encoder.embedding.patch_embedding.weight;"),
        "the top left patch only": (
            TopLeftPatchOnly,
            "Only 2 of the 17 rows of vit_encoder",
        ),
        "the last patch left out": (PatchLeftOut, "Only 16 of the 17 rows"),
        "tokens tampered with": (SquaredTokens, "not the logits of equations 1 to 4"),
        "the first block twice": (BlockTwice, "not the logits of equations 1 to 4"),
        "a patch in place of CLS": (AnotherToken, "not the logits of equations 1 to 4"),
        "no negative logits": (PositiveLogits, "not the logits of equations 1 to 4"),
        "dropout always on": (DropoutAlwaysOn, "do two eval passes agree? No"),
        "CLS detached": (Detached, "vit_encoder.embedding.position_embedding and 27 others; somewhere"),
        "no gradients": (WithoutGradients, "do gradients reach every parameter? They reach none"),
        "the last layer left out": (LayerLeftOut, "None reaches vit_encoder.encoder.1.attention.qkv.weight"),
        "the first image's logits": (FirstImageForAll, "do different images give different logits?"),
        "the batch's own statistics": (OwnStatistics, "is each image on its own? No"),
        "attention across the batch": (AcrossTheBatch, "is each image on its own? No"),
        "the head starts too large": (LargeHead, "is the first loss near ln C?"),
        "probabilities": (Probabilities, "cross-entropy applies the softmax itself"),
        "always 10 classes": (lambda c: Small(10), "one logit for each class? The logits are [13, 10]"),
        "always 13 classes": (lambda c: Small(13), "one logit for each class?"),
        "all tokens classified": (EveryToken, "should be [B, num_classes] = [13, 13]"),
        "no model": (lambda c: Small, "should return a model, but a type came back"),
    },
    "top1": {
        "the number of hits": (lambda logits, labels: hits(logits, labels).sum(), "counts the right answers"),
        "percent": (lambda logits, labels: 100 * hits(logits, labels).float().mean(), "in percent"),
        "the error rate": (lambda logits, labels: (~hits(logits, labels)).float().mean(), "wrong answers"),
        "one for each image": (lambda logits, labels: hits(logits, labels).float(), "60 came back"),
        "by the classes": (lambda logits, labels: hits(logits, labels).sum() / logits.shape[1], "number of classes;"),
        "rounded down": (lambda logits, labels: hits(logits, labels).sum() // len(labels), "rounds a share down"),
        "argmax over the batch": (
            lambda logits, labels: (logits.argmax(0) == labels).float().mean(),
            "runs over the images",
        ),
        "the probability": (
            lambda logits, labels: (-F.cross_entropy(logits, labels, reduction="none")).exp().mean(),
            "the mean probability of the right class",
        ),
        "among the two highest": (
            lambda logits, labels: (logits.topk(2).indices == labels[:, None]).any(1).float().mean(),
            "whose highest logit is their label",
        ),
    },
    "evaluation": {
        "only the model": (lambda model, images: model(images), "dropout is still on"),
        "no eval()": (evaluate_without_gradients_only, "dropout is still on"),
        "with gradients": (evaluate_with_gradients, "gradients are recorded"),
        "detached too late": (evaluate_with_gradients_and_detach, "gradients are recorded"),
        "left in eval mode": (evaluate_and_forget_mode, "left in eval mode"),
        "always to train mode": (evaluate_and_always_train, "goes out in train mode"),
        "gradients off for good": (evaluate_and_switch_off, "gradients stay switched off"),
        "frozen for good": (evaluate_and_freeze, "your function changes the model"),
        "gradients thrown away": (evaluate_and_clear, "your function changes the model"),
        "a softmax on top": (lambda model, images: evaluate_well(model, images).softmax(1), "not the logits of the"),
    },
}
