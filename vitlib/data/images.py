"""Images with their labels: one call for the embedded, the downloaded and the user's own data sets.

Every data set is one tensor in memory, uint8 [N, C, H, W]: 50,000 images of 32x32 take 154 MB, a quarter of what they
would take as floats. They are converted and normalised per batch.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitlib.data.cifar import kept_by_file, kept_by_index, load_cifar
from vitlib.data.folders import find_splits, load_folder, refit
from vitlib.data.shapes import draw_shapes
from vitlib.utils import near_match, printable

SOURCES = ("shapes100", "shapes10", "cifair100", "cifair10", "cifar100", "cifar10")


@dataclass(frozen=True, eq=False)  # == between tensors is not one truth value
class LabelledImages:
    """A data set in memory. Raises ValueError if its parts do not fit together.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N], indices into ``classes``.
        classes: names of the classes, in the order of the logits.
        kept: bool [N], of test images of CIFAR: False where ciFAIR flags a near-duplicate; else None.
        names: the file of each image; None if they are not from a folder.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    kept: Tensor | None = None
    names: tuple[str, ...] | None = None

    def __post_init__(self):
        _check_images(self.images)
        if self.labels.dtype != torch.int64 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels are {self.labels.dtype} {list(self.labels.shape)} but must be torch.int64 [{len(self)}], one "
                "for each image; convert them with .to(torch.int64)."
            )
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(self.classes):
            raise ValueError(
                f"labels run from {self.labels.min()} to {self.labels.max()} but must be indices into the "
                f"{len(self.classes)} classes, the first of which is 0."
            )

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        shape = "x".join(str(size) for size in self.images.shape[1:])
        return f"LabelledImages({len(self)} images of {shape}, {len(self.classes)} classes)"

    def subset(self, indices) -> "LabelledImages":
        """Return the images at ``indices``: a list or tensor of integers, a boolean mask or a slice."""
        kept = None if self.kept is None else self.kept[indices]
        numbers = torch.arange(len(self), device=self.labels.device)[indices].tolist() if self.names else []
        names = self.names and tuple(self.names[number] for number in numbers)
        return LabelledImages(self.images[indices], self.labels[indices], self.classes, kept, names)

    def to(self, device: str | torch.device) -> "LabelledImages":
        """Return the same data set on another device."""
        kept = None if self.kept is None else self.kept.to(device)
        return LabelledImages(self.images.to(device), self.labels.to(device), self.classes, kept, self.names)


def load_images(
    source: str | os.PathLike,
    split: str = "train",
    *,
    data_dir: str | os.PathLike | None = None,
    image_size: int | None = None,
    num_channels: int = 3,
    progress: bool = True,
) -> LabelledImages:
    """Load one split of a data set.

    CIFAR's own host has been throttled to under 100 kB/s since June 2026: ``cifar100`` and ``cifar10`` take half an
    hour or more. ``cifair100`` and ``cifair10`` have the same training images and come quickly.

    A folder has ``train/<class>/*`` and ``test/<class>/*``, or ``val/`` in place of ``test/``, or ``<class>/*`` alone:
    then a fifth of the images of each class, drawn with seed 0, are its test images. The classes are the folders in
    train/. Every file is tried, with any ending. Images that cannot be read are left out, counted and named, up to one
    in ten; so are files that are no images. Links to files and to class folders are followed, deeper ones are not.
    Decoded images are cached until a file changes.

    Args:
        source: a name out of ``SOURCES``, or a folder.
        split: "train" or "test".
        data_dir: for downloads and cache; None for the environment variable VITLIB_DATA, else ~/.cache/vitlib.
        image_size: pixels per side: the shorter side is scaled to it, antialiased, and the centre is cut out. None
            leaves the images as they are; then all must have one size.
        num_channels: 3 for RGB, 1 for grey (ITU-R 601 luma).
        progress: show progress bars.

    Raises:
        ValueError: for an unknown source, split or number of channels, and for a folder whose images cannot be used.
        OSError: for a missing folder or a failed download.
    """
    check_source(source)
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is not allowed; give train or test.")
    if num_channels not in (1, 3):
        raise ValueError(f"num_channels={num_channels!r} is not allowed; give 3 (RGB) or 1 (grey).")
    name, kept = str(source), None
    if name not in SOURCES:
        folder = Path(os.path.expanduser(name)).resolve()
        return _load_from_folder(folder, split, data_dir, image_size, num_channels, progress)
    if name.startswith("shapes"):
        images, labels, classes, _ = draw_shapes(name, split)
    else:
        images, labels, classes = load_cifar(name, split, data_dir, progress)
        if split == "test" and name in ("cifar100", "cifar10"):
            kept = kept_by_index(name, len(labels))
    return LabelledImages(refit(images, image_size, num_channels), labels, classes, kept)


def _load_from_folder(folder: Path, split: str, *options) -> LabelledImages:
    """Load a split of a folder, found or made as :func:`load_images` says; options as in ``load_folder``."""
    train, tests = find_splits(folder, tested=split == "test")
    place, kept = train, None
    if split == "test" and train != folder:
        place, *unused = tests
        if unused or not place.name.lower().startswith("test"):
            others = f"; not used: {', '.join(other.name for other in unused)}" if unused else ""
            print(f"The test images of {printable(folder)} are those in {place.name}{others}.")
    images, labels, classes, files = load_folder(place, train, *options)
    if place != train:
        kept = kept_by_file(files, labels, classes)
    data = LabelledImages(images, labels, classes, kept, tuple(map(str, files)))
    if train != folder:
        return data
    print(f"{printable(folder)} has no train folder: a fifth of each class, drawn with seed 0, is for testing.")
    return train_validation_split(data, 0.2)[split == "test"]


def check_source(source: str | os.PathLike, name: str = "source", tested: bool = False) -> None:
    """Check that ``source`` is one of ``SOURCES`` or a folder of images, without loading anything.

    Raises:
        ValueError: if it is neither, with ``name`` for the argument.
        OSError: if it is a folder without classes, with ``tested`` one without test images, or one that may not be
            read.
    """
    text = str(source)
    if text in SOURCES:
        return
    folder = os.path.expanduser(text)
    if os.path.isdir(folder):  # unlike pathlib's, it takes any text
        find_splits(Path(folder).resolve(), tested)
        return
    raise ValueError(
        f"{name}={text!r} is neither a data set nor a folder{near_match(text.lower(), SOURCES)}; "
        f"give one of {', '.join(SOURCES)}, or a folder with train/<class>/* and test/<class>/*."
    )


def train_validation_split(
    data: LabelledImages, fraction: float = 0.1, seed: int = 0
) -> tuple[LabelledImages, LabelledImages]:
    """Split a training set into a training and a validation part, disjoint and with the same mixture of classes.

    Args:
        fraction: share of the validation part, between 0 and 1, rounded within each class. A class of two or more
            images has at least one in each part; a single image goes to the training part.
        seed: the same seed gives the same split. Both parts keep the order of the images.

    Raises:
        ValueError: if fraction is not between 0 and 1, or if no class has two images.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction!r} is not allowed; give a share between 0 and 1.")
    held_out = torch.zeros(len(data), dtype=torch.bool)
    for members in _shuffled_classes(data, seed):
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    if not held_out.any():
        raise ValueError(f"{data} cannot be split; at least one class must have two images.")
    return data.subset(~held_out), data.subset(held_out)


def draw_evenly(data: LabelledImages, count: int, seed: int = 0) -> LabelledImages:
    """Draw ``count`` images, equally many of each class, for a measurement with few labels.

    The classes take turns. With the same seed a smaller count gives the first images of a larger one.

    Raises:
        ValueError: if the classes cannot share the count.
    """
    classes = len(data.classes)
    fewest = data.labels.bincount(minlength=classes).min().item()
    if count % classes or not 0 < count <= fewest * classes:
        raise ValueError(
            f"{count!r} images cannot be drawn evenly; give a multiple of {classes} (the number of classes) from "
            f"{classes} to {fewest * classes} (the smallest class has {fewest})."
        )
    drawn = [members[: count // classes] for members in _shuffled_classes(data, seed)]
    return data.subset(torch.stack(drawn, 1).flatten())


def _shuffled_classes(data: LabelledImages, seed: int) -> list[Tensor]:
    """Return the indices of the images of each class that has some, in an order drawn with the seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = data.labels.cpu()
    classes = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
    return [members[torch.randperm(len(members), generator=generator)] for members in classes]


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of uint8 [N, C, H, W], in units of [0, 1].

    Both follow from how often each of the 256 values occurs, so the images need not be converted to floats.

    Raises:
        ValueError: for images of another dtype or shape, or no image.
    """
    _check_images(images)
    if images.numel() == 0:
        raise ValueError(f"images {list(images.shape)} hold no pixels; give at least one image.")
    values = torch.linspace(0, 1, 256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        counts = torch.bincount(channel.flatten().cpu(), minlength=256)
        share = counts.double() / channel.numel()
        mean = share @ values
        means.append(mean.item())
        deviations.append((share @ (values - mean) ** 2).sqrt().item())
    return tuple(means), tuple(deviations)


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)} but must be uint8 [N, C, H, W] with values from 0 to 255; "
            "convert floats between 0 and 1 with (images * 255).round().to(torch.uint8)."
        )
