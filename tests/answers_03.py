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
        "shuffle before you cut": split_by(lambda count, seed: torch.arange(count)),
        "you drew with replacement": split_by(with_replacement),
        "images are in both parts": two_draws,
        "images are in neither part": two_cuts,
        "the fraction is that of the second part": lambda *numbers: split_well(*numbers)[::-1],
        "images, but 0.2 of 103 is 20.6": lambda count, _, seed: cut(ordered(count, seed), 0.5),
        "the indices run from 0 to 102": split_by(lambda count, seed: ordered(count, seed) + 1),
        "gave two different splits": split_by(lambda count, seed: torch.randperm(count)),
        "another seed gives the same": split_by(lambda count, seed: ordered(count, 0)),
        "in every so many": split_by(lambda n, seed: (torch.arange(n) % 5).argsort(stable=True)),
        "moves the random numbers": split_by(lambda n, seed: torch.randperm(n, generator=torch.manual_seed(seed))),
        "random numbers that the rest of the program draws": split_by(with_pythons_shared_numbers),
        "use a torch.Generator() of your own": split_by(with_numpy),
        "a mask of True and False": lambda count, *_: (torch.arange(count) > 20, torch.arange(count) < 21),
        "but a set came back": lambda *numbers: [set(part.tolist()) for part in split_well(*numbers)],
        "but float32 [82] came back": lambda *numbers: [part.float() for part in split_well(*numbers)],
        "return training, validation": lambda *numbers: split_well(*numbers)[0],
    },
    "first_loss": {
        "base 2": math.log2,
        "to base 10": math.log10,
        "probability of each class": lambda c: 1 / c,
        "how often a guess is wrong": lambda c: 1 - 1 / c,
        "sign is wrong": lambda c: math.log(1 / c),
        "only the right class counts": lambda c: math.log(c) / c,
        "what is -log(p) if": lambda c: 4.6,
        "a bool came back": lambda c: True,
    },
    "sound_model": {
        "None reaches vit_encoder.embedding.patch_embedding.weight;": changed(
            embed=lambda self, x: Small.embed(self, x)[:, :1], head=dropped
        ),
        "Only 6% of the pixels": changed(embed=lambda self, x: Small.embed(self, x)[:, :2]),
        "are these the logits of equations 1 to 4? No": changed(embed=lambda self, x: Small.embed(self, x).square()),
        "switches the model to eval mode": changed(forward=lambda self, x: Small.forward(self.eval(), x)),
        "do two eval passes agree? No": changed(head=dropped),
        "and 27 others;": changed(head=lambda self, x: Small.head(self, x.detach())),
        "do gradients reach every parameter? They reach none": changed(forward=torch.no_grad()(Small.forward)),
        "do different images give different logits?": changed(
            head=lambda self, x: Small.head(self, x[:1]).expand(len(x), -1)
        ),
        "give different logits? No; an index": changed(forward=lambda self, x: Small.forward(self, torch.ones_like(x))),
        "is each image on its own? No": changed(encode=across_the_batch),
        "is the first loss that of": started(lambda head: nn.init.normal_(head.weight)),
        "applies the softmax itself": changed(head=lambda self, x: Small.head(self, x).softmax(1)),
        "one logit for each class?": lambda c: Small(13),
        "should return a model, but a type came back": lambda c: Small,
    },
    "top1": {
        "counts the right answers": lambda logits, labels: hits(logits, labels).sum(),
        "in percent": lambda logits, labels: 100 * hits(logits, labels).float().mean(),
        "wrong answers": lambda logits, labels: (~hits(logits, labels)).float().mean(),
        "60 came back": lambda logits, labels: hits(logits, labels).float(),
        "number of classes;": lambda logits, labels: hits(logits, labels).sum() / logits.shape[1],
        "divide by /": lambda logits, labels: hits(logits, labels).sum() // len(labels),
        "runs over the images": lambda x, y: (x.argmax(0) == y).float().mean(),
        "with argmax (not with the values of max)": lambda x, y: (x.max(1).values == y).float().mean(),
        "mean probability": lambda x, y: (-F.cross_entropy(x, y, reduction="none")).exp().mean(),
        "whose highest logit is": lambda x, y: (x.topk(2).indices == y[:, None]).any(1).float().mean(),
    },
    "evaluation": {
        "dropout is still on": torch.no_grad()(lambda model, images: model(images)),
        "gradients are recorded": evaluate_with_gradients,
        "left in eval mode": torch.no_grad()(lambda model, images: model.eval()(images)),
        "goes out in train mode": torch.no_grad()(evaluate_with_gradients),
        "stay switched off": evaluate_after(lambda _: torch.set_grad_enabled(False)),
        "your function changes the model": evaluate_after(lambda model: model.requires_grad_(False)),
        "not the logits of the": lambda model, images: evaluate_well(model, images).softmax(1),
    },
}
