"""Random changes to training images, drawn for each image on its own and applied to whole batches of tensors.

Every augmentation comes as a pure function of images and drawn numbers, which can be tested against another library
with the same numbers; :class:`Augmentation` draws the numbers. Everything runs on the device that holds the images.

The published pipeline normalises first and then moves pixels about. Here the pixels are moved while they are still
uint8, four times smaller; the result is the same, since normalisation treats every pixel alike. Only the erased hole
has to come last: it is filled with 0, which is the mean colour of normalised images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # the published system normalises with these, whatever the data set
CIFAR10_STD = (0.2471, 0.2435, 0.2616)


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 ``[B, C, H, W]`` to float32 with (x / 255 - mean) / std, channel by channel.

    ``mean`` and ``std`` are in [0, 1]. A channel whose std is 0 never varies, and is only centred.
    """
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"The images have {images.shape[1]} channels, but the normalisation has {len(mean)} means and "
            f"{len(std)} standard deviations; give one of each per channel."
        )
    mean = torch.tensor(mean, device=images.device).view(1, -1, 1, 1)
    std = torch.tensor([s or 1.0 for s in std], device=images.device).view(1, -1, 1, 1)
    return (images.float() / 255 - mean) / std


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flipped: Tensor, padding: int) -> Tensor:
    """Pad by reflection, cut out a window of the original size, mirror some windows left to right.

    Padding, cropping and flipping only say which pixel goes where, so all three are one look-up of row and column
    numbers. The border is mirrored without repeating the edge pixel (reflect-101).

    Args:
        images: ``[B, C, H, W]`` of any dtype.
        top, left: ``[B]`` int64, the window's corner in the padded image, from 0 to ``2 * padding``.
        flipped: ``[B]`` bool.
        padding: pixels added on each side, less than ``min(H, W)``.
    """
    height, width = images.shape[-2:]
    if padding >= min(height, width):
        raise ValueError(
            f"padding={padding} cannot be reflected in images of {height}x{width} pixels; "
            f"it must be less than {min(height, width)}."
        )
    columns = torch.arange(width, device=images.device)
    columns = torch.where(flipped[:, None], width - 1 - columns, columns)  # [B, W]
    rows = _reflect(top[:, None] + torch.arange(height, device=images.device) - padding, height)  # [B, H]
    columns = _reflect(left[:, None] + columns - padding, width)  # [B, W]
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    return images.permute(0, 2, 3, 1)[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def erase_hole(images: Tensor, top: Tensor, left: Tensor, size: int) -> Tensor:
    """Set a square of ``size`` x ``size`` pixels to 0 in every image (coarse dropout with one hole).

    Args:
        images: ``[B, C, H, W]``, normalised, so that 0 is the mean colour.
        top, left: ``[B]`` int64, the hole's corner.
    """
    rows = torch.arange(images.shape[-2], device=images.device) - top[:, None]  # [B, H], 0 at the hole's first row
    columns = torch.arange(images.shape[-1], device=images.device) - left[:, None]
    in_rows = (rows >= 0) & (rows < size)
    in_columns = (columns >= 0) & (columns < size)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # [B, 1, H, W]
    return images.masked_fill(hole, 0)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images. Every number is drawn anew for every image.

    Args:
        padding: pixels of reflected border before a random crop to the original size; 0 for no crop.
        flip: probability of mirroring left to right.
        hole: side in pixels of the one square that is erased from every image; 0 for none.
    """

    padding: int = 4
    flip: float = 0.5
    hole: int = 8

    def __post_init__(self):
        if self.padding < 0 or self.hole < 0 or not 0 <= self.flip <= 1:
            raise ValueError(f"{self} is not possible; padding and hole are pixels, flip is a share from 0 to 1.")

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """The random numbers for ``count`` images of ``height`` x ``width`` pixels, by name, each ``[count]``.

        ``generator`` lives on the CPU, so that the same seed draws the same numbers whatever the device. Training
        draws for a whole epoch at once: what happens to an image then depends neither on the size of the batches nor
        on the number of processes, and no step waits for numbers to reach the device.
        """
        self._check_size(height, width)

        def draw(end: int) -> Tensor:  # whole numbers from 0 to end, the latter included
            return torch.randint(end + 1, (count,), generator=generator)

        drawn = {}
        if self.padding or self.flip:
            drawn["flipped"] = torch.rand(count, generator=generator) < self.flip
            drawn["top"], drawn["left"] = draw(2 * self.padding), draw(2 * self.padding)
        if self.hole:
            drawn["hole_top"], drawn["hole_left"] = draw(height - self.hole), draw(width - self.hole)
        return drawn

    def apply(
        self, images: Tensor, drawn: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Tensor:
        """uint8 ``[B, C, H, W]`` to augmented, normalised float32 of the same shape, with numbers drawn before.

        The drawn numbers, each ``[B]``, are on the device of the images.
        """
        if "top" in drawn:
            images = crop_and_flip(images, drawn["top"], drawn["left"], drawn["flipped"], self.padding)
        images = normalise(images, mean, std)
        if "hole_top" in drawn:
            images = erase_hole(images, drawn["hole_top"], drawn["hole_left"], self.hole)
        return images

    def __call__(
        self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], generator: torch.Generator
    ) -> Tensor:
        """:meth:`draw` and :meth:`apply` in one: uint8 ``[B, C, H, W]`` to float32 of the same shape."""
        drawn = self.draw(len(images), *images.shape[-2:], generator)
        return self.apply(images, {name: numbers.to(images.device) for name, numbers in drawn.items()}, mean, std)

    def _check_size(self, height: int, width: int) -> None:
        if self.hole > min(height, width):
            raise ValueError(
                f"hole={self.hole} is larger than the images of {height}x{width} pixels; "
                f"it must be at most {min(height, width)}."
            )


PUBLISHED = Augmentation(padding=4, flip=0.5, hole=8)  # pad to 40, crop 32, flip, one 8x8 hole on every image


def _reflect(index: Tensor, length: int) -> Tensor:
    """Fold indices from -(length - 1) to 2 * (length - 1) back into 0 to length - 1, as a mirror at each end does."""
    return (length - 1) - ((length - 1) - index.abs()).abs()
