"""Checks of chapter 01: patching."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .frame import (
    Mistake,
    answer,
    as_number,
    close,
    compare,
    exercise,
    expect,
    expect_gradients,
    expect_tensor,
    tensor_answer,
)


@exercise("patch numbers", (10,), (2,), (1,))
def patch_numbers(learners: Callable, channels: int) -> None:
    """Of ``patch_numbers(height, width, channels, patch_size) -> (N, C * P * P)``."""
    patch_size, rows = torch.randint(4, 9, (2,)).tolist()
    columns = rows + 2  # a picture wider than high tells the two sides apart
    height, width = rows * patch_size, columns * patch_size
    call = f"for {height} x {width} pixels, {channels} channel(s) and patches of {patch_size}"
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
    expect(found == patches, f"N is {found} {call}: {hint}")
    hint = {
        patch_size**2: "you forgot the channels; every pixel has one number per channel",
        channels * patch_size: "you forgot to square the patch size; a patch has P rows of P pixels",
        patch_size: "you counted one row of pixels in one channel; a patch has P rows of P pixels, in C channels",
    }.get(found_dim, "that is not the number of pixels in a patch times the number of channels")
    expect(found_dim == patch_dim, f"the patch dimension is {found_dim} {call}: {hint}")


# all sizes differ, so that no mix-up goes unseen
@exercise("patchify", (2, 3, 5, 6, 4), (3, 1, 2, 4, 5), (1, 4, 3, 2, 3), (1, 2, 9, 8, 2))
def patchify(learners: Callable, batch: int, channels: int, rows: int, columns: int, size: int) -> None:
    """Of ``patchify(images [B, C, H, W], patch_size) -> [B, N, C * P * P]``."""
    images = torch.randn(batch, channels, rows * size, columns * size)
    patches, patch_dim = rows * columns, channels * size**2
    shape = (batch, patches, patch_dim)
    hints = {
        (batch, patch_dim, patches): "a row should be a patch, so swap the last two dimensions",
        (batch * patches, patch_dim): "keep the images of the batch apart",
        (batch, rows, columns, patch_dim): "merge the two grid dimensions into one",
        (batch, patches, channels, size, size): "flatten each patch into one row",
        (batch, patches * channels, size**2): "put the channels of a patch side by side in one row",
    }
    given = tensor_answer(learners, images, size, shape=shape, letters="[B, N, C * P * P]", hints=hints)
    # an independent way there: unfold gives [B, C * P * P, N] in the order in which a convolution reads its input
    right = F.unfold(images, size, stride=size).mT
    parts = right.unflatten(2, (channels, size, size)).unflatten(1, (rows, columns))  # [B, row, column, C, P, P]
    slips = {
        "reshape alone never moves a number; permute before the last reshape": images.reshape(shape),
        "your patches are numbered down the columns; number them row by row": parts.transpose(1, 2).reshape(shape),
        "within a patch your channels come last; the order is channel, row, column": (
            parts.permute(0, 1, 2, 4, 5, 3).reshape(shape)
        ),
        "each of your patches is mirrored: its rows and columns are swapped": parts.mT.reshape(shape),
    }
    otherwise = "some numbers of the images are lost or changed; only move them"
    if _same_numbers(given, right):
        otherwise = "every number of the images is there, but not in its place; note the dimensions of every line"
    compare(given, right, slips, otherwise)
    exact = torch.equal(given, right)
    expect(exact, "put together again, your patches are the images only up to rounding; move numbers, compute nothing")
    expect_gradients(learners, images, size)


@exercise("patch embedding", (3, 10, 4), (1, 6, 5), (2, 9, 3))
def patch_embedding(learners: Callable, channels: int, width: int, size: int) -> None:
    """Of ``conv_to_linear(conv) -> nn.Linear``: on patches, the numbers that ``conv`` gives on images, to 1e-5.

    Whether the layer shares memory with the convolution or has a copy of its weights is left to the learner.
    """
    for bias in (False, True):
        conv = nn.Conv2d(channels, width, size, stride=size, bias=bias)
        images = torch.randn(2, channels, 3 * size, 2 * size)
        right = conv(images).flatten(2).mT.detach()  # [B, N, D]
        linear = answer(learners, conv)
        expect(isinstance(linear, nn.Linear), f"an nn.Linear is wanted, but a {type(linear).__name__} came back")
        kernels, patch_dim = conv.weight, channels * size**2
        swapped = "in and out are swapped: a patch of C * P * P numbers goes in, a token of D numbers comes out"
        hints = {(patch_dim, width): swapped}
        expect_tensor(linear.weight, (width, patch_dim), "that of nn.Linear(C * P * P, D).weight", hints)
        given = linear(F.unfold(images, size, stride=size).mT)
        if close(given, right):
            continue
        slips = {
            "your weights have the channels last; a patch is flattened channel, row, column, and so must they be": (
                kernels.permute(0, 2, 3, 1).flatten(1)
            ),
            "you merged the wrong dimensions: D stays first, the others become one": kernels.reshape(-1, width).T,
        }
        otherwise = "the linear layer has weights of its own; copy those of the convolution into it"
        if _same_numbers(linear.weight, kernels):
            otherwise = "every weight of the convolution is there, but not in its place"
        compare(linear.weight, kernels.flatten(1), slips, otherwise)
        if conv.bias is None:
            expect(linear.bias is None, "this convolution has no bias, but your layer has one: use bias=False")
        else:
            expect(linear.bias is not None, "you forgot the bias: this convolution has one")
            copied = close(linear.bias, conv.bias)
            expect(copied, "the weights are right, but the bias is not the convolution's; copy it too")
        raise Mistake("weights and bias agree, but the numbers differ by more than 1e-5; what else is computed?")


@exercise("tokens", (3, 6, 5), (2, 11, 3))
def tokens(learners: Callable, batch: int, count: int, width: int) -> None:
    """Of ``tokens(patches [B, N, D], cls_token [1, 1, D], positions [1, N + 1, D]) -> [B, N + 1, D]``."""
    patches, cls_token = torch.randn(batch, count, width), torch.randn(1, 1, width)
    positions = torch.randn(1, count + 1, width)
    hints = {tuple(patches.shape): "one token is missing: N patches and CLS make N + 1"}
    wanted = {"shape": (batch, count + 1, width), "letters": "[B, N + 1, D]", "hints": hints}
    given = tensor_answer(learners, patches, cls_token, positions, **wanted)
    right = torch.cat([cls_token.expand(batch, 1, width), patches], 1) + positions
    if not close(given, right):
        _expect_each_part_in_its_place(learners, patches, cls_token, positions)
        raise Mistake("each part is in its place alone, but together they are not the sum; only add")
    expect_gradients(learners, patches.double(), cls_token.double(), positions.double())


def _expect_each_part_in_its_place(learners: Callable, patches: Tensor, cls_token: Tensor, positions: Tensor) -> None:
    """Set two of the inputs to zero in turn: then the third shows where it goes."""
    no_patches, no_cls, nowhere = (torch.zeros_like(part) for part in (patches, cls_token, positions))
    cls = tensor_answer(learners, no_patches, cls_token, nowhere)
    right = cls_token.expand_as(cls)
    in_patches = close(cls[:, 1:], right[:, 1:])
    expect(not in_patches, "the CLS token was added to the patches; it is a token of its own")
    expect(not close(cls[:, -1:], right[:, -1:]), "CLS stands at the end; it belongs in front")
    in_front = close(cls[:, :1], right[:, :1])
    expect(in_front, "the first token of each image is not CLS as it came; expand it over the batch, and only add")
    behind = tensor_answer(learners, patches, no_cls, nowhere)[:, 1:]
    expect(close(behind, patches), "behind CLS the patches should follow unchanged and in their order")
    added = tensor_answer(learners, no_patches, no_cls, positions)
    right = positions.expand_as(added)
    expect(added.any(), "the positions are not added")
    expect(not close(added, 2 * right), "the positions are added twice; once is enough")
    expect(
        not close(added[:, 1:], right[:, :-1]),
        "each patch got the position of the token before it, the first patch that of CLS; add positions after CLS",
    )
    too_early = "CLS has no position: the positions were added before CLS was there; put CLS in front first"
    expect(added[:, 0].any(), too_early)
    expect(close(added, right), "a token did not get the position of its own number")


@exercise("position interpolation", (5, 8, 7), (6, 4, 5), (3, 7, 12))
def interpolation(learners: Callable, old: int, new: int, width: int) -> None:
    """Of ``stretch_positions(positions [1, 1 + g * g, D], grid) -> [1, 1 + grid * grid, D]``, CLS first."""

    def given(cls: Tensor, patches: Tensor, grid: int = new) -> Tensor:
        hints = {
            (1, grid**2, width): "the row of CLS is lost, put it back in front",
            (1, 1 + old**2, width): "that is still the old number of places",
            (1, width, 1 + grid**2): "swap the last two dimensions back",
        }
        wanted = {"shape": (1, 1 + grid**2, width), "letters": "[1, 1 + grid * grid, D]", "hints": hints}
        return tensor_answer(learners, torch.cat([cls, patches], 1), grid, **wanted).detach()

    # with the rest at zero, each part of the positions shows where it goes, whatever the mode of the interpolation
    cls, patches = torch.randn(1, 1, width), torch.randn(1, old**2, width)
    only_cls = given(cls, torch.zeros_like(patches))
    expect(torch.equal(only_cls[:, :1], cls), "the row of CLS is not left alone; pass row 0 on as it is")
    expect(
        not only_cls[:, 1:].any(),
        "CLS was stretched along with the patches; take its row out before the resize, put it back in front after it",
    )
    nowhere, one_feature = torch.zeros_like(cls), torch.arange(width) == 2
    expect(
        not given(nowhere, patches * one_feature)[..., ~one_feature].any(),
        "places and features are mixed up, since reshape never moves a number; transpose to [1, D, g * g] before the "
        "resize, and back after it",
    )
    by_row = torch.randperm(old).view(-1, 1, 1).expand(old, old, width).reshape(patches.shape)  # the same along a row
    picture = given(nowhere, by_row)[0, 1:].unflatten(0, (new, new))
    along_rows = close(picture, picture[:, :1].expand_as(picture), 0.1)
    down_columns = close(picture, picture[:1].expand_as(picture), 0.1)
    expect(along_rows or not down_columns, "rows and columns are swapped: patches are numbered row by row")
    expect(
        along_rows,
        "the end of a row was mixed with the beginning of the next: the patches are a picture of g x g, not a line",
    )
    unchanged = torch.equal(given(cls, patches, old), torch.cat([cls, patches], 1))
    expect(unchanged, "at the same size the positions do not come back as they were, to the last bit")

    grid = patches.unflatten(1, (old, old)).permute(0, 3, 1, 2)  # [1, D, g, g]

    def resized(mode: str, **options) -> Tensor:
        return F.interpolate(grid, size=(new, new), mode=mode, **options).flatten(2).mT

    slips = {
        "each new place got a copy of one old position; bicubic mixes those around it": resized("nearest"),
        "that is bilinear interpolation, along straight lines; take the smoother mode bicubic": resized("bilinear"),
        "that is align_corners=True; this course uses align_corners=False": resized("bicubic", align_corners=True),
    }
    otherwise = "each part goes to its place, but the numbers are not those of a bicubic resize, align_corners=False"
    compare(given(cls, patches)[:, 1:], resized("bicubic"), slips, otherwise)
    expect_gradients(learners, torch.cat([cls, patches], 1).double(), new)


def _same_numbers(first: Tensor, second: Tensor) -> bool:
    """Return whether both hold the same numbers, in any order."""
    return close(first.flatten().sort().values, second.flatten().sort().values)
