"""Answers to the exercises of chapter 05, right and typically wrong."""

import math

import torch
import torch.nn.functional as F

from vitlib import explain
from vitlib.model import patchify


def distance(weights, patch_size, normalised=True, total=torch.Tensor.mean, scale=True, dim=1, attend=True):
    among = weights[1:, 1:]
    grid = math.isqrt(len(weights) - 1)
    if not attend:
        among = torch.ones_like(among)
    if normalised:
        among = among / among.sum(dim=dim, keepdim=True)
    places = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    return total((among * torch.cdist(places, places)).sum(dim=dim)) * (patch_size if scale else 1)


def rolled(attention, residual=1.0, half=True, order=1, heads=None):
    mixed = torch.eye(attention.shape[-1])
    for layer in attention:
        mean = layer.mean(0) if heads is None else layer[heads]
        matrix = (mean + residual * torch.eye(len(mixed))) / (2 if half else 1)
        mixed = matrix @ mixed if order == 1 else mixed @ matrix
    return mixed


def halves(attention):
    return (attention.mean(1) + torch.eye(attention.shape[-1])) / 2


def delete(images, relevance, count, patch_size, descending=True, first=1, skip=0):
    """``first`` is the first token that is sorted; of the order, ``skip`` tokens are left out."""
    order = relevance[:, first:].argsort(1, descending=descending)[:, skip : count + skip] - skip
    grid = images.shape[-1] // patch_size
    keep = torch.ones(len(images), grid**2).scatter(1, order.clamp(0, grid**2 - 1), 0).view(-1, 1, grid, grid)
    return images * F.interpolate(keep, scale_factor=patch_size, mode="nearest")


def cls_in_the_mask_alone(images, relevance, count, patch_size):
    order = relevance[:, 1:].argsort(1, descending=True)[:, :count]
    grid = images.shape[-1] // patch_size
    keep = torch.ones_like(relevance).scatter(1, order, 0)[:, 1:].view(-1, 1, grid, grid)
    return images * F.interpolate(keep, scale_factor=patch_size)


def share(relevance, mask, patch_size, normalised=True, touched=False):
    covered = patchify(mask[None, None].float(), patch_size)[0].mean(1)
    if touched:
        covered = covered.ceil()
    return (relevance * covered).sum() / (relevance.sum() if normalised else 1)


RIGHT = {
    "distance": {
        "the library's": lambda weights, size: explain.attention_distance(
            torch.stack([weights.T, weights])[None, None], size
        )[0, 1],
    },
    "rollout": {
        "the library's": lambda attention: explain.rollout(attention[:, None])[0],
        "a loop": rolled,
    },
    "deletion": {
        "the library's": lambda images, relevance, count, size: explain.delete_patches(images, relevance[:, 1:], count),
        "by interpolation": delete,
    },
    "without_a_model": {
        "contrast": explain.contrast_relevance,
        "the middle": explain.middle_relevance,
        "the mean patch": lambda images, size: (
            (patchify(images, size) - patchify(images, size).mean(1, keepdim=True)).norm(dim=2).numpy()
        ),
    },
    "share_on_object": {
        "the library's": lambda relevance, mask, size: explain.share_on_mask(relevance[None], mask[None])[0],
    },
}
WRONG = {
    "distance": {
        "that is in patches": lambda w, size: distance(w, size, scale=False),
        "sums to less than 1": lambda w, size: distance(w, size, normalised=False),
        "take their mean": lambda w, size: distance(w, size, total=torch.sum),
        "weight the distances by the attention": lambda w, size: distance(w, size, attend=False),
        "normalise the rows, not the columns": lambda w, size: distance(w, size, dim=0),
        "keepdim=True": lambda w, size: (
            (w[1:, 1:] / w[1:, 1:].sum(1) * explain.patch_distances(math.isqrt(len(w) - 1)) * size).sum(1).mean()
        ),
        "weighted by the attention": lambda w, size: 7.0,
    },
    "rollout": {
        "the first layer stands on the left": lambda a: rolled(a, order=0),
        "the residual connection is left out": lambda a: rolled(a, residual=0.0, half=False),
        "not halved": lambda a: rolled(a, half=False),
        "the last layer alone": lambda a: halves(a)[-1],
        "the sum of the layers": lambda a: halves(a).sum(0),
        "the mean of the layers": lambda a: halves(a).mean(0),
        "place by place": lambda a: halves(a).prod(0),
        "only one head": lambda a: rolled(a, heads=0),
        "two faults are left: one head alone, and nothing": lambda a: rolled(a, heads=0, half=False),
        "two faults are left: nothing is halved": lambda a: rolled(a, order=0, half=False),
        "all three faults are left": lambda a: rolled(a, order=0, half=False, heads=0),
        "transposed": lambda a: rolled(a).T,
        "rows sum to 1, but": lambda a: rolled(a, residual=0.5, half=False) / 1.5 ** len(a),
        "the rows do not sum to 1": lambda a: torch.rand(a.shape[-2:]),
        "the shape is [": lambda a: a[-1],
    },
    "deletion": {
        "sort in descending order": lambda *given: delete(*given, descending=False),
        "token i is patch i - 1": lambda *given: delete(*given, first=0),
        "without CLS, number i is patch i": cls_in_the_mask_alone,
        "only the patches that should go are left": lambda x, *given: x - delete(x, *given),
        "CLS is the first token, not the first of the order": lambda *given: delete(*given, first=0, skip=1),
        "should have lost 36 pixels": lambda x, r, n, p: delete(x, r, n + 1, p),
        "not those of the most relevant patches": lambda x, r, n, p: delete(x, r.roll(1, 0), n, p),
    },
    "without_a_model": {
        "upside down": lambda images, size: -explain.middle_relevance(images, size),
        "orders nothing": lambda images, size: torch.ones(len(images), (images.shape[-1] // size) ** 2),
        "a mean probability of": lambda images, size: torch.rand(len(images), (images.shape[-1] // size) ** 2),
        "a number for each patch": lambda images, size: images[:, 0],
    },
    "share_on_object": {
        "does not sum to 1": lambda r, m, p: share(r, m, p, normalised=False),
        "only touches counts in full": lambda r, m, p: share(r, m, p, touched=True),
        "share of the background": lambda r, m, p: share(r, ~m, p),
        "the relevance plays no part": lambda r, m, p: m.float().mean(),
        "divided by the size of the object": lambda r, m, p: (
            share(r, m, p, normalised=False) / m.float().mean() / len(r)
        ),
        "0.500 where": lambda r, m, p: 0.5,
    },
}
