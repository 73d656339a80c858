"""Checks of chapter 01: patching."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import answer, as_number, close, compare, exercise, expect, expect_grad, expect_shape, reject, tensor_answer


@exercise("patch numbers", (10,), (2,), (1,))
def patch_numbers(learners: Callable, channels: int) -> None:
    """Check ``patch_numbers(height, width, channels, patch_size) -> (N, C * P * P)``."""
    patch_size, rows = torch.randint(4, 9, (2,)).tolist()
    columns = rows + 2  # a picture wider than high tells the two sides apart
    height, width = rows * patch_size, columns * patch_size
    case = f"for {height} x {width} pixels, {channels} channel(s) and patches of {patch_size}"
    given = answer(learners, height, width, channels, patch_size)
    pair = isinstance(given, tuple | list) or getattr(given, "shape", ()) == (2,)
    expect(pair and len(given) == 2, "two numbers are wanted: return N, patch_dim")
    found, found_dim = map(as_number, given)
    whole = isinstance(found, int) and isinstance(found_dim, int)
    expect(whole, "both numbers count things, so both must be whole: divide with //, not with /")
    patches, patch_dim = rows * columns, channels * patch_size**2
    swapped = (found, found_dim) == (patch_dim, patches) and patches != patch_dim
    expect(not swapped, "right numbers, wrong order: return N first, then the dimension")
    hint = {
        rows: "you counted one column of patches; a grid has rows and columns, so multiply",
        columns: "you counted one row of patches; a grid has rows and columns, so multiply",
        rows**2: "you squared the number of rows, but the picture is not square: count columns by the width",
        columns**2: "you squared the number of columns, but the picture is not square: count rows by the height",
        patches * patch_size: "you divided by the patch size once; both sides are cut, so divide twice",
        patches + 1: "the CLS token is no patch: leave the 1 out",
    }.get(found, "that is not the number of rows times the number of columns of patches")
    expect(found == patches, f"N is {found} {case}: {hint}")
    hint = {
        patch_size**2: "you forgot the channels; every pixel has one number per channel",
        channels * patch_size: "you forgot to square the patch size; a patch has P rows of P pixels",
        patch_size: "you counted one row of pixels in one channel; a patch has P rows of P pixels, in C channels",
    }.get(found_dim, "that is not the number of pixels in a patch times the number of channels")
    expect(found_dim == patch_dim, f"the patch dimension is {found_dim} {case}: {hint}")


# all sizes differ, so that no mix-up goes unseen
@exercise("patchify", (2, 3, 5, 6, 4), (3, 1, 2, 4, 5), (1, 4, 3, 2, 3), (1, 2, 9, 8, 2))
def patchify(learners: Callable, batch: int, channels: int, rows: int, columns: int, size: int) -> None:
    """Check ``patchify(images [B, C, H, W], patch_size) -> [B, N, C * P * P]``."""
    images = torch.randn(batch, channels, rows * size, columns * size)
    # an independent way there: unfold gives [B, C * P * P, N] in the order in which a convolution reads its input
    right = F.unfold(images, size, stride=size).mT
    parts = right.unflatten(2, (channels, size, size)).unflatten(1, (rows, columns))  # [B, row, column, C, P, P]
    by_column, channels_last = parts.transpose(1, 2), parts.movedim(3, 5)
    slips = {
        "a row should be a patch, so swap the last two dimensions": right.mT,
        "keep the images of the batch apart": right.flatten(0, 1),
        "merge the two grid dimensions into one": parts.flatten(3),
        "flatten each patch into one row": parts.flatten(1, 2),
        "put the channels of a patch side by side in one row": parts.flatten(4).flatten(1, 3),
        "reshape alone never moves a number; permute before the last reshape": images.reshape(right.shape),
        "your patches are numbered down the columns; number them row by row": by_column.reshape(right.shape),
        "within a patch your channels come last; the order is channel, row, column": channels_last.reshape(right.shape),
        "each of your patches is mirrored: its rows and columns are swapped": parts.mT.reshape(right.shape),
        "every number of the images is there, but not in its place; note the dimensions of every line": (
            lambda given: _same_numbers(given, right)
        ),
    }
    given = tensor_answer(learners, images, size)
    otherwise = "some numbers of the images are lost or changed; only move them"
    compare(given, right, slips, otherwise, letters="[B, N, C * P * P]")
    exact = torch.equal(given, right)
    expect(exact, "put together again, your patches are the images only up to rounding; move numbers, compute nothing")
    expect_grad(learners, images, size)


@exercise("patch embedding", (3, 10, 4, False), (3, 10, 4, True), (1, 6, 5, False), (2, 9, 3, True))
def patch_embedding(learners: Callable, channels: int, width: int, size: int, bias: bool) -> None:
    """Check ``conv_to_linear(conv) -> nn.Linear``: on patches, the numbers that ``conv`` gives on images, to 1e-5.

    Whether the layer shares memory with the convolution or has a copy of its weights is left to the learner.
    """
    conv = nn.Conv2d(channels, width, size, stride=size, bias=bias)
    linear = answer(learners, conv)
    expect(isinstance(linear, nn.Linear), f"an nn.Linear is wanted, but a {type(linear).__name__} came back")
    right = conv.weight.flatten(1)
    slips = {
        "in and out are swapped: a patch of C * P * P numbers goes in, a token of D numbers comes out": right.T,
        "your weights have the channels last; a patch is flattened channel, row, column, and so must they be": (
            conv.weight.movedim(1, 3).flatten(1)
        ),
        "you merged the wrong dimensions: D stays first, the others become one": right.reshape(-1, width).T,
        "every weight of the convolution is there, but not in its place": lambda given: _same_numbers(given, right),
    }
    otherwise = "the linear layer has weights of its own; copy those of the convolution into it"
    compare(linear.weight, right, slips, otherwise, letters="that of nn.Linear(C * P * P, D).weight")
    if bias:
        expect(linear.bias is not None, "you forgot the bias: this convolution has one")
        copied = close(linear.bias, conv.bias)
        expect(copied, "the weights are right, but the bias is not the convolution's; copy it too")
    else:
        none = linear.bias is None or not linear.bias.any()
        expect(none, "this convolution has no bias, but your layer has one: use bias=False")
    images = torch.randn(2, channels, 3 * size, 2 * size)
    same = close(linear(F.unfold(images, size, stride=size).mT), conv(images).flatten(2).mT)
    expect(same, "weights and bias agree, but the numbers differ by more than 1e-5; what else is computed?")


@exercise("tokens", (3, 6, 5), (2, 11, 3))
def tokens(learners: Callable, batch: int, count: int, width: int) -> None:
    """Check ``tokens(patches [B, N, D], cls_token [1, 1, D], positions [1, N + 1, D]) -> [B, N + 1, D]``."""
    inputs = torch.randn(batch, count, width), torch.randn(1, 1, width), torch.randn(1, count + 1, width)
    no_patches, no_cls, no_positions = map(torch.zeros_like, inputs)

    def judge(patches: Tensor, cls_token: Tensor, positions: Tensor, slips: dict, otherwise: str) -> None:
        right = torch.cat([cls_token.expand(batch, 1, width), patches], 1) + positions
        slips = {"one token is missing: N patches and CLS make N + 1": patches, **slips}
        given = tensor_answer(learners, patches, cls_token, positions)
        compare(given, right, slips, otherwise, letters="[B, N + 1, D]")

    # with the others at zero, each input shows where it goes
    patches, cls, positions = inputs
    slips = {
        "the CLS token was added to the patches; it is a token of its own": (
            lambda given: close(given[:, 1:], cls.expand(batch, count, width))
        ),
        "CLS stands at the end; it belongs in front": lambda given: close(given[:, -1:], cls.expand(batch, 1, width)),
    }
    not_alone = "the first token of each image is not CLS as it came; expand it over the batch, and only add"
    judge(no_patches, cls, no_positions, slips, not_alone)
    slips = {not_alone: lambda given: given[:, 0].any()}
    judge(patches, no_cls, no_positions, slips, "behind CLS the patches should follow unchanged and in their order")
    all_positions = positions.expand(batch, -1, -1)
    slips = {
        "the positions are not added": 0 * all_positions,
        "the positions are added twice; once is enough": 2 * all_positions,
        "each patch got the position of the token before it, the first patch that of CLS; add positions after CLS": (
            lambda given: close(given[:, 1:], all_positions[:, :-1])
        ),
        "CLS has no position: the positions were added before CLS was there; put CLS in front first": (
            lambda given: not given[:, 0].any()
        ),
    }
    judge(no_patches, no_cls, positions, slips, "a token did not get the position of its own number")
    judge(*inputs, {}, "each part is in its place alone, but together they are not the sum; only add")
    expect_grad(learners, *(part.double() for part in inputs))


@exercise("position interpolation", (5, 8, 7), (6, 4, 5), (3, 7, 12))
def interpolation(learners: Callable, old: int, new: int, width: int) -> None:
    """Check ``stretch_positions(positions [1, 1 + g * g, D], grid) -> [1, 1 + grid * grid, D]``, CLS first."""

    def given(cls: Tensor, patches: Tensor, grid: int = new) -> Tensor:
        positions, right = torch.cat([cls, patches], 1), torch.empty(1, 1 + grid**2, width)
        slips = {
            "the row of CLS is lost, put it back in front": right[:, 1:],
            "that is still the old number of places": positions,
            "swap the last two dimensions back": right.mT,
        }
        result = tensor_answer(learners, positions, grid)
        expect_shape(result, right, slips, letters="[1, 1 + grid * grid, D]")
        return result

    # with the rest at zero, each part of the positions shows where it goes, whatever the mode of the interpolation
    cls, patches = torch.randn(1, 1, width), torch.randn(1, old**2, width)
    positions = torch.cat([cls, patches], 1)
    only_cls, one_feature = given(cls, 0 * patches), torch.arange(width) == 2
    others = given(0 * cls, patches * one_feature)[..., ~one_feature]
    by_row = torch.randperm(old).view(-1, 1, 1).expand(old, old, width).reshape(patches.shape)  # the same along a row
    picture = given(0 * cls, by_row)[0, 1:].unflatten(0, (new, new))
    along_rows = close(picture, picture[:, :1].expand_as(picture), 0.1)
    down_columns = close(picture, picture[:1].expand_as(picture), 0.1)
    faults = {
        "the row of CLS is not left alone; pass row 0 on as it is": not torch.equal(only_cls[:, :1], cls),
        "CLS was stretched along with the patches; take its row out before the resize, put it back in front after "
        "it": only_cls[:, 1:].any(),
        "places and features are mixed up, since reshape never moves a number; transpose to [1, D, g * g] before the "
        "resize, and back after it": others.any(),
        "rows and columns are swapped: patches are numbered row by row": down_columns and not along_rows,
        "the end of a row was mixed with the beginning of the next: the patches are a picture of g x g, not a "
        "line": not along_rows,
        "at the same size the positions do not come back as they were, to the last bit": (
            not torch.equal(given(cls, patches, old), positions)
        ),
    }
    reject(faults)

    grid = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, D, g, g]

    def resized(mode: str, **options) -> Tensor:
        return F.interpolate(grid, size=(new, new), mode=mode, **options).flatten(2).mT

    slips = {
        "each new place got a copy of one old position; bicubic mixes those around it": resized("nearest"),
        "that is bilinear interpolation, along straight lines; take the smoother mode bicubic": resized("bilinear"),
        "that is align_corners=True; this course uses align_corners=False": resized("bicubic", align_corners=True),
    }
    otherwise = "each part goes to its place, but the numbers are not those of bicubic (no align_corners or antialias)"
    compare(given(cls, patches)[:, 1:], resized("bicubic"), slips, otherwise)
    expect_grad(learners, positions.double(), new)


def _same_numbers(first: Tensor, second: Tensor) -> bool:
    """Return whether both hold the same numbers, in any order."""
    return close(first.flatten().sort().values, second.flatten().sort().values)
