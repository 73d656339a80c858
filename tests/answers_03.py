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


def cut(order, fraction):
    held_out = round(fraction * len(order))
    return order[held_out:], order[:held_out]


def split_by(order):
    return lambda count, fraction, seed: cut(order(count, seed), fraction)


split_well = split_by(ordered)


def split_by_mask(count, fraction, seed):
    held_out = torch.zeros(count, dtype=torch.bool)
    held_out[ordered(count, seed)[: int(fraction * count)]] = True
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()


def two_draws(count, fraction, seed):
    return split_well(count, fraction, seed)[0], split_well(count, fraction, seed + 1)[1]


def two_cuts(count, fraction, seed):
    order = ordered(count, seed)
    return order[: int((1 - fraction) * count) - 1], order[-int(fraction * count) :]


def with_replacement(count, seed):
    return torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))


def with_numpy(count, seed):
    np.random.seed(seed)
    return torch.from_numpy(np.random.permutation(count))


def with_pythons_shared_numbers(count, seed):
    random.seed(seed)
    return torch.tensor(random.sample(range(count), count))


class Small(ViTModel):
    """A small ViT with the forward pass of the notebook's exercise, repaired."""

    def __init__(self, num_classes):
        super().__init__(num_classes, **SIZE)

    def forward(self, images):
        return self.head(self.encode(self.embed(images)))

    def embed(self, images):
        return self.vit_encoder.embedding(images)

    def encode(self, tokens):
        for block in self.vit_encoder.encoder:
            tokens, _ = block(tokens)
        return self.vit_encoder.layernorm(tokens)

    def head(self, tokens):
        return self.linear_classifier(tokens[:, 0])


def changed(**steps):
    """A model that does some steps in another way."""
    return type("Changed", (Small,), steps)


def started(start):
    """A model whose head starts in another way."""

    def build(num_classes):
        model = Small(num_classes)
        start(model.linear_classifier)
        return model

    return build


class KeepsItsTokens(Small):
    def head(self, tokens):
        self.tokens = tokens  # a tensor with a history, which nothing can copy
        return super().head(tokens)


class Stub(Small):
    def forward(self, images):
        return ...


class WithoutGradients(Small):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


def dropped(self, tokens):
    return Small.head(self, F.dropout(tokens))


def across_the_batch(self, tokens):
    """Tokens sequence first, classified by the mean of all, so that images attend to each other."""
    return Small.encode(self, tokens.transpose(0, 1)).mean(0)[:, None]


def hits(logits, labels):
    return logits.argmax(1) == labels


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


def evaluate_with_gradients(model, images):
    logits = model.eval()(images)
    model.train()
    return logits


def evaluate_after(change):
    """A right evaluation, once ``change(model)`` has left a mark."""

    def evaluate(model, images):
        change(model)
        return evaluate_well(model, images)

    return evaluate


EQUATIONS = "are these the logits of equations 1 to 4? No"
SHARED = "moves the random numbers that the rest"

RIGHT = {
    "split": {
        "one order, one cut": split_well,
        "a mask turned into indices": split_by_mask,
        "lists": lambda *numbers: [part.tolist() for part in split_well(*numbers)],
        "arrays": lambda *numbers: tuple(part.numpy()[::-1] for part in split_well(*numbers)),
    },
    "first_loss": {
        "ln C": math.log,
        "measured": lambda c: F.cross_entropy(torch.zeros(1, c), torch.tensor([1])),
    },
    "sound_model": {
        "repaired": Small,
        "keeps its tokens": KeepsItsTokens,
        "dropout that knows the mode": changed(head=lambda self, x: Small.head(self, F.dropout(x, 0.1, self.training))),
        "the library's": lambda c: ViTModel(c, **SIZE),
        "post-norm, mean of the patches": lambda c: ViTModel(c, **SIZE, norm_first=False, pooling="mean"),
        "a head that starts at zero": started(lambda head: nn.init.zeros_(head.weight)),
        "PyTorch's own start of the head": started(nn.Linear.reset_parameters),
    },
    "top1": {
        "mean of the hits": lambda logits, labels: hits(logits, labels).float().mean(),
        "a number": lambda logits, labels: round(hits(logits, labels).sum().item() / len(labels), 3),
    },
    "evaluation": {
        "no_grad": evaluate_well,
        "inference_mode": evaluate_in_inference_mode,
        "a copy": evaluate_a_copy,
    },
}
WRONG = {
    "split": {
        "the first part": (split_by(lambda count, seed: torch.arange(count)), "shuffle before you cut"),
        "with replacement": (split_by(with_replacement), "you drew with replacement"),
        "two draws": (two_draws, "images are in both parts"),
        "two cuts": (two_cuts, "images are in neither part"),
        "parts swapped": (lambda *numbers: split_well(*numbers)[::-1], "the fraction is that of the second part"),
        "half and half": (lambda count, _, seed: cut(ordered(count, seed), 0.5), "images, but 0.2 of 103 is 20.6"),
        "counted from 1": (split_by(lambda count, seed: ordered(count, seed) + 1), "the indices run from 0 to 102"),
        "no seed": (split_by(lambda count, seed: torch.randperm(count)), "gave two different splits"),
        "seed 0 always": (split_by(lambda count, seed: ordered(count, 0)), "another seed gives the same"),
        "every fifth": (split_by(lambda n, seed: (torch.arange(n) % 5).argsort(stable=True)), "in every so many"),
        "torch.manual_seed": (split_by(lambda n, seed: torch.randperm(n, generator=torch.manual_seed(seed))), SHARED),
        "random.seed": (split_by(with_pythons_shared_numbers), SHARED),
        "np.random.seed": (split_by(with_numpy), SHARED),
        "masks": (lambda count, *_: (torch.arange(count) > 20, torch.arange(count) < 21), "a mask of True and False"),
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
        "true": (lambda c: True, "a bool came back"),
    },
    "sound_model": {
        "the notebook's": (
            changed(embed=lambda self, x: Small.embed(self, x)[:, :1], head=dropped),
            "None reaches vit_encoder.embedding.patch_embedding.weight;",
        ),
        "one patch only": (changed(embed=lambda self, x: Small.embed(self, x)[:, :2]), "Only 6% of the pixels"),
        "tokens tampered with": (changed(embed=lambda self, x: Small.embed(self, x).square()), EQUATIONS),
        "dropout always on": (changed(head=dropped), "do two eval passes agree? No"),
        "CLS detached": (changed(head=lambda self, x: Small.head(self, x.detach())), "and 27 others;"),
        "no gradients": (WithoutGradients, "do gradients reach every parameter? They reach none"),
        "the first image's logits": (
            changed(head=lambda self, x: Small.head(self, x[:1]).expand(len(x), -1)),
            "do different images give different logits?",
        ),
        "attention across the batch": (changed(encode=across_the_batch), "is each image on its own? No"),
        "the head starts too large": (started(lambda head: nn.init.normal_(head.weight)), "is the first loss that of"),
        "probabilities": (changed(head=lambda self, x: Small.head(self, x).softmax(1)), "applies the softmax itself"),
        "always 13 classes": (lambda c: Small(13), "one logit for each class?"),
        "no model": (lambda c: Small, "should return a model, but a type came back"),
    },
    "top1": {
        "the number of hits": (lambda logits, labels: hits(logits, labels).sum(), "counts the right answers"),
        "percent": (lambda logits, labels: 100 * hits(logits, labels).float().mean(), "in percent"),
        "the error rate": (lambda logits, labels: (~hits(logits, labels)).float().mean(), "wrong answers"),
        "one for each image": (lambda logits, labels: hits(logits, labels).float(), "60 came back"),
        "by the classes": (lambda logits, labels: hits(logits, labels).sum() / logits.shape[1], "number of classes;"),
        "rounded down": (lambda logits, labels: hits(logits, labels).sum() // len(labels), "rounds a share down"),
        "argmax over the batch": (lambda x, y: (x.argmax(0) == y).float().mean(), "runs over the images"),
        "the probability": (lambda x, y: (-F.cross_entropy(x, y, reduction="none")).exp().mean(), "mean probability"),
        "two highest": (lambda x, y: (x.topk(2).indices == y[:, None]).any(1).float().mean(), "whose highest logit is"),
    },
    "evaluation": {
        "no eval()": (torch.no_grad()(lambda model, images: model(images)), "dropout is still on"),
        "with gradients": (evaluate_with_gradients, "gradients are recorded"),
        "left in eval mode": (torch.no_grad()(lambda model, images: model.eval()(images)), "left in eval mode"),
        "always to train mode": (torch.no_grad()(evaluate_with_gradients), "goes out in train mode"),
        "gradients off for good": (evaluate_after(lambda _: torch.set_grad_enabled(False)), "stay switched off"),
        "frozen": (evaluate_after(lambda model: model.requires_grad_(False)), "your function changes the model"),
        "a softmax on top": (lambda model, images: evaluate_well(model, images).softmax(1), "not the logits of the"),
    },
}
