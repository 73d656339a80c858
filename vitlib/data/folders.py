"""Image files as a model takes them; and folders of them, ``train/<class>/*`` and ``test/<class>/*``: listed, decoded
in parallel, cached.

The files may come from anywhere. Nothing in them is run, nothing outside the folder is listed, and a file that cannot
be read costs that one image, unless there are too many of them (``MOST_UNREADABLE``).
"""

import functools
import glob
import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitlib.utils import atomic_write, cache_dir, import_torchvision, printable, progress_bar

CACHE_VERSION = 3  # to be raised when the same files and options come to give other pixels
MOST_UNREADABLE = 0.1  # of a folder's images; more are no accident, and leaving them out would change the data set
NAMED = 10  # unreadable files that a message names; it counts all
# Pillow knows far more formats, hardly used and hardly tested ones among them, and hands EPS to Ghostscript, which runs
# what is written in it. It goes by the content of a file, not by its name.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")


def read_image(path: str | os.PathLike, image_size: int | None = None, num_channels: int = 3) -> np.ndarray:
    """One image file as uint8 ``[C, H, W]``, just as ``load_images`` gives the images of a folder: turned upright, in
    RGB (3 channels) or grey (1), and with ``image_size`` scaled and cut to a square of that side.

    CMYK, palettes and transparency are converted, 16 bits of grey become the upper 8, and of an animation or of several
    pages the first picture is taken. Formats: ``FORMATS``, by the content of the file.

    Raises:
        OSError: for a missing path, a folder, or a file that may not be read.
        ValueError: for a file that is no image, is damaged, holds numbers that are no 8 or 16 bits, or holds more than
            twice ``PIL.Image.MAX_IMAGE_PIXELS``, about 179 million, pixels. Either message is one sentence with the
            file, the reason and the way out.
    """
    name = printable(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} is a folder; name the images in it, for instance {Path(name, '*.jpg')}.")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name} does not exist; check the path.")
    if not os.path.isfile(path):  # reading from a pipe would wait for ever
        raise OSError(f"{name} is a device or a pipe; store the image in a file.")
    try:
        with Image.open(path, formats=_formats()) as picture:
            if picture.mode == "F" or (picture.mode == "I" and picture.format == "TIFF"):  # other formats' I: 16 bits
                raise _WrongNumbers
            return _pixels(picture, image_size, num_channels)
    except PermissionError as error:
        raise PermissionError(f"{name} may not be read; change its permissions.") from error
    except UnidentifiedImageError as error:
        if os.path.getsize(path) == 0:
            raise ValueError(f"{name} is empty; copy or download it again.") from error
        raise ValueError(f"{name} is not an image of a known format; convert it to JPEG or PNG.") from error
    except _WrongNumbers as error:
        raise ValueError(f"{name} holds numbers of 32 bits for pixels; store it with 8 or 16 bits.") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ValueError(f"{name} has too many pixels to be decoded safely; scale it down first.") from error
    except Exception as error:  # a damaged file can make PIL raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{name} is damaged ({reason:.100}); copy or download it again.") from error


class _WrongNumbers(Exception):
    """A picture whose values are not known to run from 0 to 255 or 65535, so that no shade can be given to them."""


@functools.cache
def _formats() -> list[str]:
    """Those of ``FORMATS`` that this Pillow was built with; it would stop at the name of another."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def load_folder(
    folder: Path,
    split: str,
    data_dir: str | os.PathLike | None,
    image_size: int | None,
    num_channels: int,
    progress: bool,
) -> tuple[Tensor, Tensor, tuple[str, ...], list[Path]]:
    """Images uint8 [N, C, H, W], labels int64 [N], class names and files of one split; options as in ``load_images``.

    Images that cannot be read are left out, and a line on stdout counts and names them.

    Raises:
        ValueError: if more than ``MOST_UNREADABLE`` of the images cannot be read, or all of a class in train/; for
            images that differ in size or would not fit into memory, and for classes that train/ lacks.
        OSError: for a missing train or test folder, or one that may not be read.
    """
    folder = folder.resolve()
    paths, labels, classes = _list_pictures(folder, split)

    def read(index: int) -> np.ndarray | str:
        try:
            return read_image(paths[index], image_size, num_channels)
        except (ValueError, OSError) as error:
            return str(error)

    cache = _cache_file(folder, split, paths, data_dir, image_size, num_channels)
    images, kept = _read_cache(cache, len(paths))
    left_out = {index: read(index) for index in torch.nonzero(~kept).flatten().tolist()}
    if images is None or not all(isinstance(found, str) for found in left_out.values()):  # some can be read by now
        images, left_out = _decode(read, paths, progress)
        kept = torch.ones(len(paths), dtype=torch.bool)
        kept[list(left_out)] = False
        _check_left_out(left_out, paths, labels, classes if split == "train" else ())
        _write_cache(cache, images, kept)
    if left_out:
        print(f"{_summary(left_out, paths)}; the rest is used.")
    return images, labels[kept], classes, [path for path, is_kept in zip(paths, kept.tolist(), strict=True) if is_kept]


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the class folders. Hidden folders, such as Jupyter's checkpoints, are no classes."""
    try:
        names = [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
    except PermissionError as error:
        raise PermissionError(f"{folder} may not be read; change its permissions.") from error
    classes = tuple(sorted(name for name in names if not name.startswith(".")))
    if not classes:
        raise FileNotFoundError(
            f"{folder} does not exist or holds no class folders; "
            "a data set is a folder with the images in train/<class>/* and test/<class>/*."
        )
    return classes


def _list_pictures(folder: Path, split: str) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """Paths, labels int64 [N] and classes of one split, in the order of the names."""
    classes = class_names(folder / "train")
    unknown = sorted(set(class_names(folder / split)) - set(classes))
    if unknown:
        raise ValueError(
            f"{folder / split} holds classes that train/ lacks: {', '.join(map(printable, unknown))}; "
            "add them there or remove them."
        )
    extensions = import_torchvision().datasets.folder.IMG_EXTENSIONS
    paths, targets = [], []
    for index, name in enumerate(classes):
        if (folder / split).is_relative_to((folder / split / name).resolve()):
            raise ValueError(f"{printable(folder / split / name)} is a link that leads back up; remove it.")
        found = _pictures(folder / split / name, extensions)
        paths += found
        targets += [index] * len(found)
    empty = sorted(set(classes) - {classes[target] for target in targets})
    if empty == sorted(classes) or (empty and split == "train"):
        raise ValueError(
            f"{folder / split} holds no images of {', '.join(map(printable, empty))}; "
            f"add files that end in {', '.join(extensions)}, or remove the class."
        )
    return paths, torch.tensor(targets), classes


def _pictures(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    """The image files in a class folder and the folders in it, in the order of their names.

    A class folder may be a link, and so may a file. A link to a folder further inside is not followed: it could lead
    back up, so that images are counted twice or test images get among those for training, or out into the whole disk.
    What is hidden is passed over: Jupyter and macOS leave copies that end like images.
    """

    def refuse(error):
        if not isinstance(error, FileNotFoundError):  # test/ need not have every class
            raise OSError(f"{printable(error.filename)} cannot be read ({error.strerror}); change its permissions.")

    listed = []
    for here, inside, files in os.walk(folder, onerror=refuse):
        inside[:] = [name for name in inside if not name.startswith(".")]
        names = (name for name in files if Path(name).suffix.lower() in extensions and not name.startswith("."))
        listed.append((here, sorted(names)))
    return [Path(here, name) for here, names in sorted(listed) for name in names]


def _decode(
    read: Callable[[int], np.ndarray | str], paths: list[Path], progress: bool
) -> tuple[Tensor | None, dict[int, str]]:
    """Decode image files in threads: PIL lets go of Python's lock while it works.

    Args:
        read: gives the pixels of the image with this index, or says why they cannot be read.

    Returns:
        The readable images, uint8 [at most N, C, H, W], None if there are none; and what was said of the others.
    """
    images, first, count, left_out = None, None, 0, {}
    pool = ThreadPoolExecutor()
    try:
        decoded = pool.map(read, range(len(paths)))
        decoded = progress_bar(decoded, total=len(paths), description="decoding images", show=progress)
        for index, pixels in enumerate(decoded):
            if isinstance(pixels, str):
                left_out[index] = pixels
                continue
            if images is None:  # filled as the images come: a list of them and its copy would take twice the memory
                images, first = _room(len(paths), pixels.shape), paths[index]
            if pixels.shape != images.shape[1:]:
                raise ValueError(
                    f"the images differ in size: {printable(first)} has {images.shape[3]}x{images.shape[2]} "
                    f"pixels and {printable(paths[index])} {pixels.shape[2]}x{pixels.shape[1]} pixels; "
                    "give image_size, for instance image_size=32, to bring all to one size."
                )
            images[count] = pixels
            count += 1
    finally:
        pool.shutdown(cancel_futures=True)
    return None if images is None else torch.from_numpy(images[:count]), left_out


def _room(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Memory for so many decoded images. A system that has less often gives it all the same and ends the process later,
    without a word."""
    size = count * math.prod(shape)
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())  # not under Windows, whose numpy refuses by itself
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if known else math.inf
    try:
        if size < memory:
            return np.empty((count, *shape), np.uint8)
    except MemoryError:
        pass
    raise ValueError(
        f"{count} decoded images of {shape[2]}x{shape[1]} pixels take {size / 1e9:.1f} GB, more than the memory of "
        "this machine; give image_size, for instance image_size=224, to make them smaller."
    )


def _check_left_out(left_out: dict[int, str], paths: list[Path], labels: Tensor, needed: tuple[str, ...]) -> None:
    """Refuse a folder of which too much cannot be read, or all of one of the ``needed`` classes."""
    if len(left_out) > MOST_UNREADABLE * len(paths):
        raise ValueError(f"{_summary(left_out, paths)}; at most {MOST_UNREADABLE:.0%} may be left out.")
    readable = {label for index, label in enumerate(labels.tolist()) if index not in left_out}
    lost = [name for label, name in enumerate(needed) if label not in readable]
    if lost:
        raise ValueError(f"{_summary(left_out, paths)}; no image of {', '.join(map(printable, lost))} is left.")


def _summary(left_out: dict[int, str], paths: list[Path]) -> str:
    """How many images cannot be read, which, and what to do about the first."""
    names = [printable(paths[index]) for index in left_out]
    reason = next(iter(left_out.values())).removeprefix(names[0]).rstrip(".")
    others = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
    return f"{len(names)} of {len(paths)} images cannot be read: {', '.join(names[:NAMED])}{others} (the first{reason})"


def _pixels(picture: Image.Image, image_size: int | None, num_channels: int) -> np.ndarray:
    """One picture as uint8 [C, H, W]: turned upright, in RGB or grey, and if asked scaled and cut to a square."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits of grey: convert() would cut everything above 255 off to white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:  # the same pixels, but PIL asks for this step
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB" if num_channels == 3 else "L")
    if image_size is not None:
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(picture.height, picture.width, num_channels).transpose(2, 0, 1)


def refit(images: Tensor, image_size: int | None, num_channels: int) -> Tensor:
    """RGB images of a named source in another size or in grey, just as images of a folder would be."""
    size = image_size or images.shape[-1]
    if (num_channels, size) == (3, images.shape[-1]):
        return images
    refitted = np.empty((len(images), num_channels, size, size), np.uint8)
    for index, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
        refitted[index] = _pixels(Image.fromarray(image), size, num_channels)
    return torch.from_numpy(refitted)


def _cache_file(folder: Path, split: str, paths: list[Path], data_dir: str | os.PathLike | None, *options) -> Path:
    """Where the decoded images are kept: a name of the folder, a key of what was asked for, a key of its files."""
    asked = _key(str(folder), split, options)
    files = _key(CACHE_VERSION, [(str(path.relative_to(folder)), *_state(path)) for path in paths])
    return cache_dir(data_dir) / "cache" / f"{folder.name}-{asked}-{files}.safetensors"


def _key(*parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _state(path: Path) -> tuple[int, int]:
    """Size and time of the last change, which tell that a file has become another."""
    try:
        status = path.stat()
    except OSError:  # a link to nothing is listed too, and found unreadable later
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _read_cache(cache: Path, count: int) -> tuple[Tensor | None, Tensor]:
    """The images cached of ``count`` files, and which of the files they are of, bool [count]: None and all of them
    where there is no cache or the file is damaged."""
    try:
        with safe_open(cache, framework="pt") as file:
            images, kept = file.get_tensor("images"), file.get_tensor("kept")
            expected = (file.metadata() or {}).get("crc32")
        fits = (images.dtype, images.dim(), kept.dtype, kept.shape) == (torch.uint8, 4, torch.bool, (count,))
        if fits and len(images) == kept.sum() and expected == _checksum(images, kept):
            return images, kept
    except (OSError, SafetensorError):
        pass
    return None, torch.ones(count, dtype=torch.bool)


def _write_cache(cache: Path, images: Tensor, kept: Tensor) -> None:
    """Cache the images, and remove what was cached for an earlier state of the same folder's files."""
    try:
        with atomic_write(cache) as temporary:
            save_file({"images": images, "kept": kept}, temporary, metadata={"crc32": _checksum(images, kept)})
    except (OSError, SafetensorError) as error:  # a full or read-only disk is no reason to stop
        print(f"The decoded images are not cached and will be decoded again next time ({error}).")
        return
    _remove_earlier(cache)


def _remove_earlier(cache: Path) -> None:
    """Remove what the same call cached of an earlier state of the folder, and what a killed process left behind."""
    same_call = glob.escape(cache.stem.rsplit("-", 1)[0])
    for file in cache.parent.glob(f"{same_call}-*{cache.suffix}"):
        if file != cache:
            with suppress(OSError):  # in use under Windows, or another user's
                file.unlink()
    for file in cache.parent.glob(".*"):  # atomic_write's and safetensors' own
        with suppress(OSError):
            if time.time() - file.stat().st_mtime > 3600:  # no other process is writing it at this moment
                file.unlink()


def _checksum(images: Tensor, kept: Tensor) -> str:
    return str(zlib.crc32(kept.numpy(), zlib.crc32(images.numpy())))
