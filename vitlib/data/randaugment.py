"""RandAugment (Cubuk et al. 2020, arXiv:1909.13719): random operations on uint8 images, for whole batches at once.

The operations, their strengths and their arithmetic are those of ``torchvision.transforms.v2.RandAugment``, which
applies one operation to one image at a time; here every image of a batch has its own. Five operations move pixels, six
give every grey level another value, two mix each pixel with its colours or neighbours, and one does nothing. So a batch
takes one pass of each kind, and an image goes unchanged through those that are not its own.
"""

import math
from enum import IntEnum

import torch
import torch.nn.functional as F
from torch import Tensor

MAGNITUDES = 31  # from 0, the weakest, to 30
Operation = IntEnum(  # in torchvision's order
    "Operation",
    "IDENTITY SHEAR_X SHEAR_Y TRANSLATE_X TRANSLATE_Y ROTATE BRIGHTNESS COLOR CONTRAST SHARPNESS POSTERIZE SOLARIZE "
    "AUTO_CONTRAST EQUALIZE",
    start=0,
)


def operation_strengths(magnitude: int, height: int, width: int) -> Tensor:
    """Return how strong each operation is at ``magnitude``, from 0 to 30, in images of ``height`` x ``width`` pixels.

    Returns:
        float32 ``[14]``, in the order of :class:`Operation`: for the shears the shift from one row or column to the
        next in pixels; for the translations whole pixels; for the rotation degrees; from Brightness to Sharpness the
        distance of the factor from 1; for Posterize the bits that are kept; for Solarize the lowest grey level that is
        inverted; 0 for the others.
    """

    def level(start: float, end: float) -> float:
        return torch.linspace(start, end, MAGNITUDES)[magnitude].item()

    shear, change = level(0.0, 0.3), level(0.0, 0.9)
    x, y = (int(level(0.0, 150 / 331 * size)) for size in (width, height))
    bits = round(8 - magnitude * 4 / (MAGNITUDES - 1))
    return torch.tensor([0, shear, shear, x, y, level(0.0, 30.0), *[change] * 4, bits, 255 * level(1.0, 0.0), 0, 0])


def draw_operations(
    count: int, operations: int, magnitude: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw ``operations`` operations for each of ``count`` images.

    Returns:
        Two tensors ``[count, operations]`` on the CPU: int64 numbers of :class:`Operation`, and float32 strengths, see
        :func:`operation_strengths`; those up to Sharpness have a random sign.
    """
    operation = torch.randint(len(Operation), (count, operations), generator=generator)
    negative = torch.rand(count, operations, generator=generator) < 0.5
    strength = operation_strengths(magnitude, height, width)[operation]
    return operation, torch.where(negative & (operation <= Operation.SHARPNESS), -strength, strength)


def randaugment(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Apply one operation to every image; the result is uint8 of the same shape.

    It is torchvision's, but from Brightness to Sharpness fewer than one value in a hundred is one grey level off, where
    a sum falls on a whole level and its rounding decides.

    Args:
        images: uint8 ``[B, C, H, W]`` with one or three channels, at least 3 x 3 pixels.
        operation: ``[B]`` int64, numbers of :class:`Operation`.
        strength: ``[B]`` float32, see :func:`operation_strengths`, with a sign.
    """
    images = move(images, source_matrices(operation, strength, *images.shape[-2:]))
    mapped = level_tables(images, operation, strength).gather(2, images.flatten(2).long()).view(images.shape)
    operation, strength = operation[:, None, None, None], strength[:, None, None, None]
    mixed = torch.where(operation == Operation.COLOR, color(images, strength), mapped)
    return torch.where(operation == Operation.SHARPNESS, sharpness(images, strength), mixed)


def source_matrices(operation: Tensor, strength: Tensor, height: int, width: int) -> Tensor:
    """Return matrices ``[B, 2, 3]`` from (x, y, 1) in the result to (x, y) in the image, in pixels from the middle.

    The shears keep the upper left corner in place, the counter-clockwise rotation the middle. Operations that move
    nothing have the identity.
    """

    def strength_of(wanted: Operation) -> Tensor:
        return torch.where(operation == wanted, strength, 0.0)

    shear_x, shear_y = strength_of(Operation.SHEAR_X), strength_of(Operation.SHEAR_Y)
    angle = strength_of(Operation.ROTATE) * (math.pi / 180)
    shift_x = shear_x * (height / 2) - strength_of(Operation.TRANSLATE_X)
    shift_y = shear_y * (width / 2) - strength_of(Operation.TRANSLATE_Y)
    row_x = torch.stack((angle.cos(), shear_x - angle.sin(), shift_x), dim=1)
    row_y = torch.stack((shear_y + angle.sin(), angle.cos(), shift_y), dim=1)
    return torch.stack((row_x, row_y), dim=1)


def move(images: Tensor, matrices: Tensor) -> Tensor:
    """Move the pixels of uint8 ``[B, C, H, W]`` by :func:`source_matrices`; 0 comes from outside the image."""
    height, width = images.shape[-2:]
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = torch.arange(height, device=images.device)[:, None] - (height - 1) / 2

    def source(row: Tensor, size: int) -> Tensor:  # [B, H, W], from -1 to 1 between the edges of the image
        by_x, by_y, shift = (row / (size / 2))[:, :, None, None].unbind(1)
        return by_x * x + by_y * y + shift

    grid = torch.stack((source(matrices[:, 0], width), source(matrices[:, 1], height)), dim=-1)
    moved = F.grid_sample(images.float(), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return moved.to(torch.uint8)


def level_tables(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Return each grey level's new value in each image and channel, uint8 ``[B, C, 256]``: that of Brightness, Contrast
    and Posterize to Equalize, else its own."""
    levels = torch.arange(256.0, device=images.device)
    operation, strength = operation[:, None, None], strength[:, None, None]
    grey = greyscale(images).mean(dim=(2, 3))[..., None]
    spacing = 2 ** (8 - strength)  # Posterize keeps the multiples of this
    lowest, highest = images.amin((2, 3)).float()[..., None], images.amax((2, 3)).float()[..., None]
    stretched = (levels - lowest) / ((highest - lowest) * (1 / 255))
    changed = {
        Operation.BRIGHTNESS: levels * (1 + strength),
        Operation.CONTRAST: away_from(grey, levels, strength),
        Operation.POSTERIZE: (levels / spacing).floor() * spacing,
        Operation.SOLARIZE: torch.where(levels < strength, levels, 255 - levels),
        Operation.AUTO_CONTRAST: torch.where(lowest < highest, stretched, levels),
        Operation.EQUALIZE: equalized(images),
    }
    tables = levels
    for number, table in changed.items():
        tables = torch.where(operation == number, table, tables)
    return tables.clamp(0, 255).to(torch.uint8)


def equalized(images: Tensor) -> Tensor:
    """Return for each grey level the one that makes all about equally frequent: float32 ``[B, C, 256]``.

    The rounding is Pillow's. So is the rule that a channel stays as it is if fewer than 255 of its pixels are darker
    than its lightest level.
    """
    index = images.flatten(2).long()
    counts = torch.zeros(*images.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, index, torch.ones((), device=images.device).expand(index.shape))
    darker = counts.cumsum(2) - counts  # the number of pixels below each level
    step = ((index.shape[2] - counts.gather(2, index.amax(2, keepdim=True))) / 255).floor()
    levels = torch.arange(256.0, device=images.device)
    return torch.where(step == 0, levels, ((darker + (step / 2).floor()) / step).floor())


def color(images: Tensor, strength: Tensor) -> Tensor:
    """Move uint8 ``[B, C, H, W]`` away from the image in grey; strength ``[B, 1, 1, 1]``, -1 gives it in grey."""
    if images.shape[1] == 1:
        return images
    return away_from(greyscale(images), images, strength).clamp(0, 255).to(torch.uint8)


def sharpness(images: Tensor, strength: Tensor) -> Tensor:
    """Move uint8 ``[B, C, H, W]`` away from the blurred image; strength ``[B, 1, 1, 1]``, -1 gives it blurred.

    A blurred pixel is the mean of the nine around it, itself taken five times, as a whole grey level. The outermost
    pixels stay as they are.
    """
    result = images.float()
    sums = result[..., :-2, :] + result[..., 1:-1, :] + result[..., 2:, :]
    sums = sums[..., :-2] + sums[..., 1:-1] + sums[..., 2:]
    inner = result[..., 1:-1, 1:-1]
    blurred = ((sums + 4 * inner) / 13).round()
    inner += (inner - blurred) * strength  # into result, which inner is a view of; written so, even areas stay exact
    return result.clamp(0, 255).to(torch.uint8)


def away_from(other: Tensor, images: Tensor, strength: Tensor) -> Tensor:
    """Return (1 + strength) * images - strength * other, rounded in float32 as torchvision does it."""
    return torch.addcmul(images * (1 + strength), other, -strength)


def greyscale(images: Tensor) -> Tensor:
    """Return the images in whole grey levels: float32 ``[B, 1, H, W]``."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.split(1, dim=1)
    return (red * 0.2989 + green * 0.587 + blue * 0.114).floor()
