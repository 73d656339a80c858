"""Random changes to training images, drawn for each image on its own and applied to whole batches.

Every augmentation is a pure function of images and drawn numbers; :class:`Augmentation` draws the numbers. Everything
runs on the device that holds the images.

The published pipeline normalises first and then moves pixels. Here pixels move while they are still uint8, four times
smaller; the result is the same. Only erasing comes last: it fills with 0, the mean colour of normalised images.
"""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vitlib.data.randaugment import draw_operations, randaugment

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)  # the published system normalises every data set with these
CIFAR10_STD = (0.2471, 0.2435, 0.2616)
MIXUP, CUTMIX = 0.8, 1.0  # alpha of the Beta distribution of an image's own share


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return uint8 ``[B, C, H, W]`` as float32: (x / 255 - mean) / std, channel by channel.

    ``mean`` and ``std`` are in [0, 1]. A channel of std 0 is only centred.

    Raises:
        ValueError: for images of another dtype or numbers that do not go with their channels.
    """
    if images.dtype != torch.uint8:  # floats would pass, 255 times too dark
        raise ValueError(f"images are {images.dtype}, but must be uint8 [B, C, H, W] with values from 0 to 255.")
    if not len(mean) == len(std) == images.shape[1]:
        raise ValueError(
            f"mean={mean} and std={std} do not go with images of {images.shape[1]} channels; give one number of each "
            f"per channel, or load the images with num_channels={len(mean)}."
        )
    mean = _per_channel(tuple(float(m) for m in mean), images.device)
    std = _per_channel(tuple(float(s) or 1.0 for s in std), images.device)
    return (images.float() / 255 - mean) / std


@functools.lru_cache(maxsize=32)  # so that training does not send the same numbers to the GPU at every step
def _per_channel(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, device=device).view(1, -1, 1, 1)


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flipped: Tensor, padding: int) -> Tensor:
    """Pad by reflection, cut out a window of the original size, mirror some windows left to right.

    All three only say which pixel goes where, so they are one look-up of row and column numbers. The border is
    mirrored without repeating the edge pixel (reflect-101).

    Args:
        images: ``[B, C, H, W]`` of any dtype.
        top, left: ``[B]`` int64, the window's corner in the padded image, from 0 to ``2 * padding``.
        flipped: ``[B]`` bool.
        padding: pixels added on each side, less than ``min(H, W)``.

    Raises:
        ValueError: for a larger padding.
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


def in_rectangle(images: Tensor, rectangle: Tensor) -> Tensor:
    """Return which pixels lie in a rectangle of each image: bool ``[B, 1, H, W]``.

    Args:
        images: ``[B, C, H, W]``; only their shape counts.
        rectangle: ``[B, 4]`` int64: top and left, which may lie outside the image, height and width, 0 if it is empty.
    """
    top, left, height, width = rectangle.T[..., None]
    rows = torch.arange(images.shape[-2], device=images.device) - top  # [B, H], 0 at the first row
    columns = torch.arange(images.shape[-1], device=images.device) - left
    in_rows, in_columns = (rows >= 0) & (rows < height), (columns >= 0) & (columns < width)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def neighbours(batch: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the partner of each of ``batch`` images for mixing, int64 ``[batch]``: 0 with 1, 2 with 3 and so on.

    The order of the images is random, so neighbours are random partners. A last odd image is its own partner.
    """
    return (torch.arange(batch, device=device) ^ 1).clamp(max=batch - 1)


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images. Every number is drawn anew for every image; 0 turns an option off.

    Args:
        padding: pixels of reflected border before a random crop to the original size.
        flip: probability of a horizontal flip.
        cutout: side in pixels of the square erased from every image (Cutout, DeVries & Taylor 2017, arXiv:1708.04552).
        randaugment: random operations per image (RandAugment, Cubuk et al. 2020, arXiv:1909.13719).
        magnitude: how strong these are, from 0 to 30.
        erase: probability of erasing a rectangle (random erasing, Zhong et al. 2017, arXiv:1708.04896): 2 to 33 % of
            the area, height by width from 0.3 to 3.3, as in torchvision. It becomes 0 after normalisation (the paper:
            noise). A side longer than the image is cut; the paper draws again.
        mixing: probability of mixing an image with another one, see :meth:`mix`: by mixup, where the two are blended
            (Zhang et al. 2018, arXiv:1710.09412), or, in half of the cases, by CutMix, where a rectangle comes from the
            other one (Yun et al. 2019, arXiv:1905.04899).
    """

    padding: int = 4
    flip: float = 0.5
    cutout: int = 8
    randaugment: int = 0
    magnitude: int = 9
    erase: float = 0.0
    mixing: float = 0.0

    def draw(self, count: int, height: int, width: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the numbers for ``count`` images of ``height`` x ``width`` pixels.

        ``generator`` lives on the CPU, so that a seed draws the same numbers on every device. Training draws for a
        whole epoch at once: what happens to an image then depends neither on the batch size nor on the number of
        processes (only its partner in mixing does), and no step waits for numbers to reach the device.

        Returns:
            Numbers by name, each ``[count]``, for RandAugment ``[count, randaugment]``, for rectangles ``[count, 4]``.

        Raises:
            ValueError: if ``cutout`` is larger than the images.
        """
        if self.cutout > min(height, width):
            raise ValueError(
                f"cutout={self.cutout} is larger than the images of {height}x{width} pixels; "
                f"it must be at most {min(height, width)}."
            )

        def up_to(end: int) -> Tensor:  # whole numbers from 0 to end, both included
            return torch.randint(end + 1, (count,), generator=generator)

        # in this order, so that turning on a later option leaves the numbers of earlier ones as they are
        drawn = {}
        if self.padding or self.flip:
            drawn["flipped"] = torch.rand(count, generator=generator) < self.flip
            drawn["top"], drawn["left"] = up_to(2 * self.padding), up_to(2 * self.padding)
        if self.cutout:
            top, left = up_to(height - self.cutout), up_to(width - self.cutout)
            drawn["cutout"] = torch.stack((top, left, *[torch.full_like(top, self.cutout)] * 2), dim=1)
        if self.randaugment:
            drawn["operation"], drawn["strength"] = draw_operations(
                count, self.randaugment, self.magnitude, height, width, generator
            )
        if self.erase:
            drawn["erase"] = self._draw_erased(count, height, width, generator)
        if self.mixing:
            drawn["mix_share"], drawn["cut"] = self._draw_mixing(count, height, width, generator)
        return drawn

    def _draw_erased(self, count: int, height: int, width: int, generator: torch.Generator) -> Tensor:
        """Draw rectangles to erase, see :func:`in_rectangle`; empty ones for the images that stay whole."""
        erased = torch.rand(count, generator=generator) < self.erase
        area = torch.empty(count).uniform_(0.02, 0.33, generator=generator) * height * width
        ratio = torch.empty(count).uniform_(math.log(0.3), math.log(3.3), generator=generator).exp()
        corner, sides = [], []
        for length, size in (((area * ratio).sqrt(), height), ((area / ratio).sqrt(), width)):
            length = length.round().long().clamp(max=size)
            corner.append(torch.randint(2**62, (count,), generator=generator) % (size - length + 1))
            sides.append(torch.where(erased, length, 0))
        return torch.stack(corner + sides, dim=1)

    def _draw_mixing(self, count: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the share of mixup and the rectangle of CutMix: 1 and an empty one for images that stay unmixed."""
        mixed = torch.rand(count, generator=generator) < self.mixing
        cut = torch.rand(count, generator=generator) < 0.5
        share = torch.where(mixed & ~cut, _draw_beta(MIXUP, count, generator), 1.0)
        side = (1 - torch.where(mixed & cut, _draw_beta(CUTMIX, count, generator), 1.0)).sqrt()
        half = (side[:, None] * torch.tensor([height, width]) / 2).long()
        middle = [torch.randint(size, (count,), generator=generator) for size in (height, width)]  # any pixel
        return share, torch.cat((torch.stack(middle, dim=1) - half, 2 * half), dim=1)

    def apply(
        self, images: Tensor, drawn: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Tensor:
        """Augment and normalise uint8 ``[B, C, H, W]`` to float32.

        ``drawn`` comes from :meth:`draw`, with ``B`` numbers under each name, on the device of the images.
        """
        if "top" in drawn:
            images = crop_and_flip(images, drawn["top"], drawn["left"], drawn["flipped"], self.padding)
        for step in range(self.randaugment):
            images = randaugment(images, drawn["operation"][:, step], drawn["strength"][:, step])
        images = normalise(images, mean, std)
        for rectangle in (drawn[name] for name in ("cutout", "erase") if name in drawn):
            images = images.masked_fill(in_rectangle(images, rectangle), 0)  # the mean colour
        return images

    @staticmethod
    def mix(images: Tensor, drawn: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mix every normalised image of ``[B, C, H, W]`` with its partner from :func:`neighbours`, by drawn numbers.

        Returns:
            The mixed images, and float32 ``[B]``, how much of each is its own content. This share is the weight of its
            own label, the rest that of its partner's. A last odd image stays as it is.
        """
        if "mix_share" not in drawn:
            return images, torch.ones(len(images), device=images.device)
        partner = neighbours(len(images), images.device)
        cut = in_rectangle(images, drawn["cut"])
        weight = torch.where(cut, 1.0, 1 - drawn["mix_share"][:, None, None, None])  # of the partner, [B, 1, H, W]
        own = drawn["mix_share"] * (1 - cut.float().mean((1, 2, 3)))
        own = torch.where(partner == torch.arange(len(images), device=images.device), 1.0, own)
        return images.lerp(images[partner], weight), own

    def __call__(
        self, images: Tensor, mean: tuple[float, ...], std: tuple[float, ...], generator: torch.Generator
    ) -> Tensor:
        """Draw and apply in one: uint8 ``[B, C, H, W]`` to float32, not mixed."""
        drawn = self.draw(len(images), *images.shape[-2:], generator)
        return self.apply(images, {name: numbers.to(images.device) for name, numbers in drawn.items()}, mean, std)


def mixed_cross_entropy(logits: Tensor, labels: Tensor, own_share: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each image, ``[B]``; for a mixed one the mean over its two labels, by their shares.

    Args:
        logits: ``[B, classes]``.
        labels: int64 ``[B]``, of the images' own content.
        own_share: ``[B]``, as :meth:`Augmentation.mix` gives it; the rest is the label of its :func:`neighbours`.
    """
    own = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
    partners = labels[neighbours(len(labels), labels.device)]
    others = F.cross_entropy(logits, partners, label_smoothing=label_smoothing, reduction="none")
    return own_share * own + (1 - own_share) * others


def draw_kept_patches(count: int, patches: int, share: float, generator: torch.Generator) -> Tensor:
    """Draw for each of ``count`` images the numbers of the patches that it keeps, in order.

    Returns:
        int64 ``[count, n]`` with n = ``share * patches``, rounded and at least 1.
    """
    number = max(1, round(share * patches))
    return torch.rand(count, patches, generator=generator).argsort(1)[:, :number].sort(1).values


PUBLISHED = Augmentation(padding=4, flip=0.5, cutout=8)  # pad to 40, crop 32, flip, one 8x8 hole on every image


def _reflect(index: Tensor, length: int) -> Tensor:
    """Fold indices from -(length - 1) to 2 * (length - 1) back into 0 to length - 1, as a mirror at each end does."""
    return (length - 1) - ((length - 1) - index.abs()).abs()


def _draw_beta(alpha: float, count: int, generator: torch.Generator) -> Tensor:
    """Draw float32 ``[count]`` from Beta(alpha, alpha).

    torch's distribution knows no generator but the default one, which gets a drawn seed for it.
    """
    seed = torch.randint(2**62, (), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed.item())  # torch.manual_seed would seed the GPUs anew as well
        return torch.distributions.Beta(alpha, alpha).sample((count,))
