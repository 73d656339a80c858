"""Checks of chapter 05: looking inside."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from vitlib import explain
from vitlib.data.augment import normalise
from vitlib.data.shapes import draw_shapes
from vitlib.model import ViTModel
from vitlib.weights.checkpoint import load_pretrained

from .frame import answer, close, compare, exercise, expect, expect_shape, number_answer, tensor_answer


@exercise("attention distance", (3, 4), (4, 5), (2, 7))
def distance(learners: Callable, grid: int, patch_size: int) -> None:
    """Check ``distance(weights [N + 1, N + 1], patch_size) -> float``, in pixels, CLS left out."""
    weights = torch.randn(grid**2 + 1, grid**2 + 1).softmax(dim=1)
    weights[:, 0] = 0.3 * torch.rand(grid**2 + 1) + 0.2  # a share for CLS that differs from row to row
    weights[:, 1:] *= ((1 - weights[:, 0]) / weights[:, 1:].sum(1))[:, None]
    given = torch.tensor(number_answer(learners, weights, patch_size))
    among, apart = weights[1:, 1:], patch_size * explain.patch_distances(grid)
    rows, columns = among.sum(dim=1, keepdim=True), among.sum(dim=0, keepdim=True)

    def mean(shares: Tensor) -> Tensor:
        return (shares * apart).sum(dim=1).mean()

    right = mean(among / rows)
    slips = {
        "that is in patches; a patch is patch_size pixels wide": right / patch_size,
        "without CLS each row sums to less than 1; divide it by its sum": mean(among),
        "that is the sum of the queries' distances; take their mean": right * grid**2,
        "every patch counts the same in that mean; weight the distances by the attention": apart.mean(),
        "the columns are divided by their sums: normalise the rows, not the columns": mean(among / columns),
        "the sums have lost their axis, so each column is divided by another row's sum: keepdim=True": (
            mean(among / rows.T)
        ),
        "that is the mean over the pairs; sum over the keys, and take the mean over the queries": right / grid**2,
    }
    otherwise = "that is not the mean over the queries of the distances to all patches, weighted by the attention"
    compare(given, right, slips, otherwise)


@exercise("rollout")
def rollout(learners: Callable) -> None:
    """Check ``rollout(attention [L, H, T, T]) -> [T, T]``, for one image; rows sum to 1."""
    layers, heads, tokens = torch.randint(2, 5, (3,)).tolist()
    tokens += 2
    attention = (2 * torch.randn(layers, heads, tokens, tokens)).softmax(dim=-1)
    given = tensor_answer(learners, attention)
    means, itself = attention.mean(dim=1), torch.eye(tokens)

    def product(matrices: Tensor) -> Tensor:
        return torch.linalg.multi_dot(list(matrices))

    halves, firsts = (means + itself) / 2, (attention[:, 0] + itself) / 2
    both = "two faults are left: "
    slips = {
        "the first layer stands on the left; what happens later is multiplied from the left": product(halves),
        "the residual connection is left out: half of each token is itself": product(means.flip(0)),
        "each layer adds the identity but is not halved, so the rows sum to 2 and more": product(2 * halves.flip(0)),
        "that is the last layer alone; multiply the matrices of all layers": halves[-1],
        "that is the sum of the layers; what passes through one after the other is a product": halves.sum(0),
        "that is the mean of the layers; what passes through one after the other is a product": halves.mean(0),
        "numbers are multiplied place by place (*); tokens are mixed by matrix products (@)": halves.prod(0),
        "only one head takes part; take the mean of the heads": product(firsts.flip(0)),
        "the result is transposed: a row should say where a token comes from": product(halves.flip(0)).T,
        both + "one head alone, and nothing is halved": product(2 * firsts.flip(0)),
        both + "one head alone, and the first layer on the left": product(firsts),
        both + "nothing is halved, and the first layer stands on the left": product(2 * halves),
        "all three faults are left: one head alone, nothing halved, the first layer on the left": product(2 * firsts),
        "the rows do not sum to 1, so they are no shares": (
            lambda given: not close(given.float().sum(dim=1), torch.ones(tokens))
        ),
    }
    right = product(halves.flip(0))
    otherwise = "rows sum to 1, but it is not the product of (mean of the heads + identity) / 2 over the layers"
    compare(given, right, slips, otherwise)


@exercise(
    "deletion",
    ((1.0, 0.0, 1.0), 4, 3, 4),  # CLS is more relevant than every patch in one image, less in another
    ((0.5, 0.0, 0.5), 3, 2, 7),
    ((0.0, 0.5), 5, 4, 1),
    ((0.5, 1.0), 2, 5, 4),  # all patches
    ((0.0, 1.0), 3, 2, 0),  # none
)
def deletion(learners: Callable, cls: tuple[float, ...], grid: int, patch_size: int, count: int) -> None:
    """Check ``delete(images [B, C, S, S], relevance [B, N + 1], count, patch_size) -> [B, C, S, S]``.

    The ``count`` most relevant patches become 0; ``relevance`` has CLS in front, as a row of the attention has it.
    """
    relevance = torch.rand(len(cls), grid**2 + 1)
    ascending = relevance[:, 1:].sort(dim=1).values
    ends = ascending[:, 0] - 0.1, ascending[:, -1] + 0.1
    middle = ascending[:, -2:].mean(dim=1)
    relevance[:, 0] = torch.where(torch.tensor(cls) == 0.5, middle, ends[0].lerp(ends[1], torch.tensor(cls)))
    images = torch.randn(len(cls), 2, grid * patch_size, grid * patch_size) + 5  # no zero among the pixels
    batch, N = len(cls), grid**2
    given = tensor_answer(learners, images, relevance, count, patch_size)
    expect_shape(given, images, {})

    def without(orders: Tensor) -> Tensor:
        """Set the patches of these numbers ``[B, n]`` to 0; numbers that no patch has are ignored."""
        kept = (orders[..., None] != torch.arange(N)).all(dim=1).unflatten(1, (1, grid, grid))
        return images * kept.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)

    order = relevance[:, 1:].argsort(dim=1, descending=True)
    best = order[:, :count]
    with_cls = relevance.argsort(dim=1, descending=True)
    slips = {
        "the least relevant patches are gone; sort in descending order": without(order.flip(1)[:, :count]),
        "the patches behind the right ones are gone: token 0 is CLS, so token i is patch i - 1": (
            without(with_cls[:, :count])
        ),
        "the patches behind the right ones are gone, and the last in place of none: token i is patch i - 1": (
            without(with_cls[:, :count].clamp(max=N - 1))
        ),
        "the patches behind the right ones are gone; token i is patch i - 1": without(best + 1),
        "the patches before the right ones are gone; without CLS, number i is patch i": without(best - 1),
        "one patch too few is gone where CLS is among the most relevant tokens; leave it out before you sort": (
            without(with_cls[:, :count] - 1)
        ),
        "the first of the order is left out; CLS is the first token, not the first of the order": (
            without(with_cls[:, 1 : count + 1] - 1)
        ),
        "only the patches that should go are left; the others should be": images - without(best),
    }
    gone, pixels = (given == 0).all(dim=1).sum(dim=(1, 2)).tolist(), count * patch_size**2
    otherwise = "as many pixels are 0 as should be, but not those of the most relevant patches"
    if gone != [pixels] * batch:
        otherwise = f"each image should have lost {pixels} pixels, but they have lost {gone}"
    compare(given, without(best), slips, otherwise)


@exercise("a map without a model")
def without_a_model(learners: Callable) -> None:
    """Check ``without_a_model(images [B, C, S, S], patch_size) -> [B, N]``: any map that, used for deletion, destroys
    the predictions of the shipped model faster than rollout does."""
    model, images, goal = _rollout_on_drawn_images()
    _map(learners, torch.randn(2, 3, 24, 24), patch_size=6)
    given = _map(learners, images, patch_size=4)
    expect(not given.isnan().any(), "some of the numbers are nan")
    expect((given != given[:, :1]).any(), "all patches of an image have the same number, so the map orders nothing")
    area = _area(model, images, given)
    upside_down = area >= goal > _area(model, images, -given)
    expect(not upside_down, "the order is upside down: give the largest number to what goes first")
    expect(area < goal, f"this order leaves a mean probability of {area:.3f}, and the order of rollout {goal:.3f}")


def _map(learners: Callable, images: Tensor, patch_size: int) -> Tensor:
    given = answer(learners, images, patch_size)
    given = torch.from_numpy(given) if isinstance(given, np.ndarray) else given
    expect(isinstance(given, Tensor), f"a tensor is wanted, but a {type(given).__name__} came back")
    right = torch.empty(len(images), (images.shape[-1] // patch_size) ** 2)
    expect_shape(given, right, {}, letters="a number for each patch, [B, N]")
    return given.detach().float()


@cache
def _rollout_on_drawn_images() -> tuple[ViTModel, Tensor, float]:
    """Return the shipped model, 40 normalised test images, and rollout's area under their deletion curve."""
    model, card = load_pretrained("shapes100-mini")
    model.eval()
    images = normalise(draw_shapes("shapes100", "test").images[:40], card.mean, card.std)
    relevance = explain.patch_relevance(explain.rollout(explain.attention_of(model, images)))
    return model, images, _area(model, images, relevance)


def _area(model: ViTModel, images: Tensor, relevance: Tensor) -> float:
    return explain.deletion_curve(model, images, relevance, [4, 10, 20]).mean().item()


@exercise("share on the object", (4, 3), (3, 4), (5, 2))
def share_on_object(learners: Callable, grid: int, patch_size: int) -> None:
    """Check ``share(relevance [N], mask bool [S, S], patch_size) -> float``: the relevance on the object, of 1."""
    relevance = torch.rand(grid**2) + 0.1  # does not sum to 1
    mask = _object(grid, patch_size)
    given = torch.tensor(number_answer(learners, relevance, mask, patch_size))
    blocks = mask.float().unflatten(1, (grid, patch_size)).unflatten(0, (grid, patch_size))  # [row, P, column, P]
    covered, total = blocks.mean(dim=(1, 3)).flatten(), relevance.sum()
    right = (relevance * covered).sum() / total
    slips = {
        "the relevance of the patches does not sum to 1; divide by its sum": right * total,
        "a patch that the object only touches counts in full; count the part that is covered": (
            (relevance * (covered > 0)).sum() / total
        ),
        "that is the share of the background; the mask is True on the object": 1 - right,
        "that is the share of the image that the object covers; the relevance plays no part in it": covered.mean(),
        "that is divided by the size of the object; divide by the relevance of the whole image": (
            (relevance * covered).sum() / covered.sum()
        ),
    }
    otherwise = f"{given:.3f} where {right:.3f} is right; weight each patch by the share of it on the object"
    compare(given, right, slips, otherwise)


def _object(grid: int, patch_size: int) -> Tensor:
    """Return a mask bool ``[S, S]``: a rectangle, and a single pixel, so that one patch is hardly covered."""
    mask = torch.zeros(grid * patch_size, grid * patch_size, dtype=torch.bool)
    top, left = torch.randint(patch_size, patch_size + 3, (2,)).tolist()
    height, width = torch.randint(4, 7, (2,)).tolist()
    mask[top : top + height, left : left + width] = True
    mask[0, -1] = True
    return mask
