"""Image files as a model takes them; and folders of them, ``train/<class>/*`` and ``test/<class>/*``: listed, decoded
in parallel, cached."""

import hashlib
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .compat import import_torchvision
from .files import data_folder, written_whole
from .progress import progress_bar

CACHE_VERSION = 2  # to be raised when the same files and options come to give other pixels


def read_picture(path: str | os.PathLike, image_size: int | None = None, num_channels: int = 3) -> np.ndarray:
    """One image file as uint8 ``[C, H, W]``, just as ``load_images`` gives the images of a folder: turned upright, in
    RGB (3 channels) or grey (1), and with ``image_size`` scaled and cut to a square of that side.

    Raises:
        OSError: for a missing path, a folder, or a file that may not be read.
        ValueError: for a file that is no image, is damaged, or holds too many pixels. Either message is one sentence
            with the file, the reason and the way out.
    """
    if os.path.isdir(path):
        raise IsADirectoryError(f"{path} is a folder; name the images in it, for instance {Path(path, '*.jpg')}.")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path} does not exist; check the path.")
    if not os.path.isfile(path):  # reading from a pipe would wait for ever
        raise OSError(f"{path} is a device or a pipe; store the image in a file.")
    try:
        with Image.open(path) as picture:
            return _pixels(picture, image_size, num_channels)
    except PermissionError as error:
        raise PermissionError(f"{path} may not be read; change its permissions.") from error
    except UnidentifiedImageError as error:
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty; copy or download it again.") from error
        raise ValueError(f"{path} is not an image of a known format; convert it to JPEG or PNG.") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise ValueError(f"{path} has too many pixels to be decoded safely; scale it down first.") from error
    except Exception as error:  # a damaged file can make PIL raise almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ValueError(f"{path} is damaged ({reason:.100}); copy or download it again.") from error


def load_folder(
    folder: Path,
    split: str,
    data_dir: str | os.PathLike | None,
    image_size: int | None,
    num_channels: int,
    progress: bool,
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 [N, C, H, W], labels int64 [N] and class names of one split; options as in ``load_images``.

    Raises:
        ValueError: for images that cannot be read or differ in size, or classes that train/ lacks.
        FileNotFoundError: for a missing train or test folder.
    """
    folder = folder.expanduser().resolve()
    paths, labels, classes = _list_pictures(folder, split)
    cache = _cache_file(folder, paths, data_dir, image_size, num_channels)
    images = _read_cache(cache)
    if images is None:
        images = _decode(paths, image_size, num_channels, progress)
        _write_cache(cache, images)
    return images, labels, classes


def class_names(folder: Path) -> tuple[str, ...]:
    """The names of the class folders. Hidden folders, such as Jupyter's checkpoints, are no classes."""
    names = [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
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
            f"{folder / split} holds classes that train/ lacks: {', '.join(unknown)}; add them there or remove them."
        )
    datasets = import_torchvision().datasets
    extensions = datasets.folder.IMG_EXTENSIONS

    class Listing(datasets.ImageFolder):
        def find_classes(self, directory):  # of train/, also where the listing is of test/
            return list(classes), {name: index for index, name in enumerate(classes)}

    def is_picture(path):  # Jupyter and macOS leave hidden copies that end like images
        path = Path(path)
        return path.suffix.lower() in extensions and not path.name.startswith(".") and path.parent.name[0] != "."

    listing = Listing(folder / split, is_valid_file=is_picture, allow_empty=True)
    empty = sorted(set(classes) - {classes[label] for label in listing.targets})
    if empty == sorted(classes) or (empty and split == "train"):
        raise ValueError(
            f"{folder / split} holds no images of {', '.join(empty)}; "
            f"add files that end in {', '.join(extensions)}, or remove the class."
        )
    return [Path(path) for path, _ in listing.samples], torch.tensor(listing.targets), classes


def _decode(paths: list[Path], image_size: int | None, num_channels: int, progress: bool) -> Tensor:
    """Decode image files to uint8 [N, C, H, W], in threads: PIL lets go of Python's lock while it works."""

    def read(path):
        try:
            return read_picture(path, image_size, num_channels)
        except (ValueError, OSError):
            return None

    images, first, unreadable = None, None, []
    pool = ThreadPoolExecutor()
    try:
        decoded = progress_bar(pool.map(read, paths), total=len(paths), description="decoding images", show=progress)
        for index, pixels in enumerate(decoded):
            if pixels is None:
                unreadable.append(str(paths[index]))
                continue
            if images is None:  # filled as the images come: a list of them and its copy would take twice the memory
                images, first = np.empty((len(paths), *pixels.shape), np.uint8), paths[index]
            if pixels.shape != images.shape[1:]:
                raise ValueError(
                    f"the images differ in size, for instance {first} with {images.shape[3]}x{images.shape[2]} and "
                    f"{paths[index]} with {pixels.shape[2]}x{pixels.shape[1]} pixels; "
                    "give image_size, for instance image_size=32, to bring all to one size."
                )
            images[index] = pixels
    finally:
        pool.shutdown(cancel_futures=True)
    if unreadable:
        names = ", ".join(unreadable[:3]) + (" and others" if len(unreadable) > 3 else "")
        raise ValueError(f"{len(unreadable)} of {len(paths)} images cannot be read: {names}; repair or remove them.")
    return torch.from_numpy(images)


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


def _cache_file(folder: Path, paths: list[Path], data_dir: str | os.PathLike | None, *options) -> Path:
    """Where the decoded images are kept, under a name that changes with every file and option."""
    files = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    key = hashlib.sha256(json.dumps([CACHE_VERSION, str(folder), options, files]).encode()).hexdigest()[:16]
    return data_folder(data_dir) / "cache" / f"{folder.name}-{key}.safetensors"


def _read_cache(cache: Path) -> Tensor | None:
    """The cached images, or None where there are none or the file is damaged."""
    try:
        with safe_open(cache, framework="pt") as file:
            images = file.get_tensor("images")
            expected = (file.metadata() or {}).get("crc32")
        return images if expected == str(zlib.crc32(images.numpy())) else None
    except (OSError, SafetensorError):
        return None


def _write_cache(cache: Path, images: Tensor) -> None:
    try:
        with written_whole(cache) as temporary:
            save_file({"images": images}, temporary, metadata={"crc32": str(zlib.crc32(images.numpy()))})
    except (OSError, SafetensorError) as error:  # a full or read-only disk is no reason to stop
        print(f"The decoded images are not cached and will be decoded again next time ({error}).")
