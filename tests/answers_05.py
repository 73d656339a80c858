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


def delete(images, relevance, count, patch_size, descending=True, drop_cls=True):
    scores = relevance[:, 1:] if drop_cls else relevance
    order = scores.argsort(1, descending=descending)[:, :count]
    grid = images.shape[-1] // patch_size
    keep = torch.ones(len(images), grid**2).scatter(1, order.clamp(max=grid**2 - 1), 0).view(-1, 1, grid, grid)
    return images * F.interpolate(keep, scale_factor=patch_size, mode="nearest")


def cls_first(images, relevance, count, patch_size):
    order = relevance.argsort(dim=1, descending=True)[:, 1 : count + 1] - 1
    grid = images.shape[-1] // patch_size
    kept = torch.ones(len(images), grid**2).scatter(1, order, 0)
    mask = kept.view(-1, 1, grid, grid).repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)
    return images * mask


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
        "in patches": (lambda w, size: distance(w, size, scale=False), "that is in patches"),
        "not normalised": (lambda w, size: distance(w, size, normalised=False), "sums to less than 1"),
        "summed": (lambda w, size: distance(w, size, total=torch.sum), "take their mean"),
        "unweighted": (lambda w, size: distance(w, size, attend=False), "weight the distances by the attention"),
        "columns": (lambda w, size: distance(w, size, dim=0), "normalise the rows, not the columns"),
        "sums without their axis": (
            lambda w, size: (
                (w[1:, 1:] / w[1:, 1:].sum(1) * explain.patch_distances(math.isqrt(len(w) - 1)) * size).sum(1).mean()
            ),
            "keepdim=True",
        ),
        "nothing of the kind": (lambda w, size: 7.0, "weighted by the attention"),
    },
    "rollout": {
        "first layer on the left": (lambda a: rolled(a, order=0), "the first layer stands on the left"),
        "no residual": (lambda a: rolled(a, residual=0.0, half=False), "the residual connection is left out"),
        "not halved": (lambda a: rolled(a, half=False), "not halved"),
        "last layer": (lambda a: halves(a)[-1], "the last layer alone"),
        "sum": (lambda a: halves(a).sum(0), "the sum of the layers"),
        "mean": (lambda a: halves(a).mean(0), "the mean of the layers"),
        "place by place": (lambda a: halves(a).prod(0), "place by place"),
        "one head": (lambda a: rolled(a, heads=0), "only one head"),
        "two faults": (lambda a: rolled(a, heads=0, half=False), "two faults are left: one head alone, and nothing"),
        "two other faults": (lambda a: rolled(a, order=0, half=False), "two faults are left: nothing is halved"),
        "all faults": (lambda a: rolled(a, order=0, half=False, heads=0), "all three faults are left"),
        "transposed": (lambda a: rolled(a).T, "transposed"),
        "half a residual": (lambda a: rolled(a, residual=0.5, half=False) / 1.5 ** len(a), "rows sum to 1, but"),
        "noise": (lambda a: torch.rand(a.shape[-2:]), "the rows do not sum to 1"),
        "heads kept": (lambda a: a[-1], "the shape is ["),
    },
    "deletion": {
        "least relevant": (lambda *given: delete(*given, descending=False), "sort in descending order"),
        "shifted by CLS": (lambda *given: delete(*given, drop_cls=False), "token i is patch i - 1"),
        "the others": (lambda x, *given: x - delete(x, *given), "only the patches that should go are left"),
        "CLS as the first of the order": (cls_first, "CLS is the first token, not the first of the order"),
        "one too many": (lambda x, r, n, p: delete(x, r, n + 1, p), "should have lost 36 pixels"),
        "others of the same number": (
            lambda x, r, n, p: delete(x, r.roll(1, 0), n, p), "not those of the most relevant patches"
        ),
    },
    "without_a_model": {
        "the corners": (lambda images, size: -explain.middle_relevance(images, size), "upside down"),
        "nothing": (lambda images, size: torch.ones(len(images), (images.shape[-1] // size) ** 2), "orders nothing"),
        "chance": (
            lambda images, size: torch.rand(len(images), (images.shape[-1] // size) ** 2), "a mean probability of"
        ),
        "pixels": (lambda images, size: images[:, 0], "a number for each patch"),
    },
    "share_on_object": {
        "not divided": (lambda r, m, p: share(r, m, p, normalised=False), "does not sum to 1"),
        "touched": (lambda r, m, p: share(r, m, p, touched=True), "only touches counts in full"),
        "background": (lambda r, m, p: share(r, ~m, p), "share of the background"),
        "area": (lambda r, m, p: m.float().mean(), "the relevance plays no part"),
        "by the object": (
            lambda r, m, p: share(r, m, p, normalised=False) / m.float().mean() / len(r),
            "divided by the size of the object",
        ),
        "constant": (lambda r, m, p: 0.5, "0.500 where"),
    },
}  # fmt: skip
