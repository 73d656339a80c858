"""Image files as a model takes them, and folders of them: listed, decoded in threads, cached.

The files may come from anywhere. Nothing in them is run, no link to a folder inside a class folder is followed, and
an unreadable file costs one image, unless there are too many of them (``MOST_UNREADABLE``).
"""

import hashlib
import json
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitlib.utils import atomic_write, cache_dir, first_line, printable, progress_bar

CACHE_VERSION = 6  # raise it when the same files and options come to give other pixels
MOST_UNREADABLE = 0.1  # of a folder's images; leaving out more would change the data set
NAMED = 10  # files that a message names; it counts all
Image.init()  # registers the formats that this Pillow was built with
# by the content of a file, not by its name; Pillow knows far more, and hands EPS to Ghostscript, which runs it
FORMATS = [name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF") if name in Image.OPEN]
# a file that cannot be read counts as an image if its name ends like one, also of a format that is not read
IMAGE_NAME = re.compile(
    r".+\.(jpe?g|jpe|jfif|a?png|webp|gif|bmp|dib|tiff?|p[pgbn]m|avif|hei[cf]|jxl|jp2|j2k|svg|ico|psd|tga|pcx|eps|dcm|"
    r"raw|dng|cr[23]|nef|arw|orf|rw2|raf)",
    re.IGNORECASE | re.DOTALL,
)
SYSTEM_NAME = re.compile(  # of hidden files, and of what systems and network disks leave in folders
    r"\..*|__macosx|@eadir|.*@syno\w+|@recycle|@recently-snapshot|@__thumb|@tmp|#recycle|#snapshot|\$recycle\.bin|"
    r"recycle[rd]|system volume information|network trash folder|temporary items|lost\+found|found\.\d{3}|icon\r|"
    r"desktop\.ini|(eh)?thumbs(_vista)?\.db|__pycache__",
    re.IGNORECASE | re.DOTALL,
)
SPLIT_NAMES = {"train": ("train", "training"), "test": ("test", "testing", "val", "valid", "validation")}

# ---------- One file ----------


class UnknownFormat(ValueError):
    """A file that does not begin like an image of one of the ``FORMATS``."""


def read_image(path: str | os.PathLike, image_size: int | None = None, num_channels: int = 3) -> np.ndarray:
    """Return an image file as uint8 [C, H, W], just as ``load_images`` gives the images of a folder.

    It is turned upright, converted to RGB (3 channels) or grey (1), and with ``image_size`` scaled and cut to a square
    of that side. 16 bits of grey become the upper 8. Of an animation or of several pages the first is taken.

    Raises:
        OSError: for a missing path, a folder, or a file that may not be read.
        ValueError: for a file that is no image of the ``FORMATS``, is damaged, or has pixels of 32 bits or more than
            twice ``PIL.Image.MAX_IMAGE_PIXELS``, about 179 million, of them.
    """
    path = os.path.expanduser(path)
    name = printable(path)
    if os.path.isdir(path):
        raise IsADirectoryError(f"{name} is a folder; name the images in it, for instance {Path(name, '*.jpg')}.")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{name} does not exist; check the path.")
    if not os.path.isfile(path):  # reading from a pipe would wait for ever
        raise OSError(f"{name} is a device or a pipe; store the image in a file.")
    if os.path.getsize(path) == 0:
        raise UnknownFormat(f"{name} is empty; copy or download it again.")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.mode != "F" and (picture.mode, picture.format) != ("I", "TIFF"):  # other formats' I: 16 bits
                return _pixels(picture, image_size, num_channels)
        problem = "has pixels of 32 bits; store it with 8 or 16 bits"
    except PermissionError as error:
        raise PermissionError(f"{name} may not be read; change its permissions.") from error
    except UnidentifiedImageError as error:
        raise UnknownFormat(f"{name} is not an image of a known format; convert it to JPEG or PNG.") from error
    except (Image.DecompressionBombError, MemoryError):
        problem = "has too many pixels to be decoded safely; scale it down first"
    except Exception as error:  # a damaged file can make PIL raise almost anything
        problem = f"is damaged ({first_line(error):.100}); copy or download it again"
    raise ValueError(f"{name} {problem}.")


def _pixels(picture: Image.Image, image_size: int | None, num_channels: int) -> np.ndarray:
    picture.load()
    with suppress(Exception):  # damaged EXIF turns nothing
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):  # 16 bits of grey: convert() would cut everything above 255 off to white
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:  # the same pixels, but PIL asks for this step
        picture = picture.convert("RGBA")
    picture = picture.convert("RGB" if num_channels == 3 else "L")
    if image_size is not None:
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(picture.height, picture.width, num_channels).transpose(2, 0, 1)


def refit(images: Tensor, image_size: int | None, num_channels: int) -> Tensor:
    """Return RGB images uint8 [N, 3, H, W] in another size or in grey, as ``read_image`` gives those of a folder."""
    if num_channels == 3 and image_size in (None, images.shape[-1]):
        return images
    pictures = map(Image.fromarray, images.permute(0, 2, 3, 1).numpy())
    return torch.from_numpy(np.stack([_pixels(picture, image_size, num_channels) for picture in pictures]))


# ---------- Which files ----------


def find_splits(folder: Path, tested: bool = False) -> tuple[Path, list[Path]]:
    """Return the folder with the classes for training, and those for testing, of which the first is used.

    They are named as in ``SPLIT_NAMES``, in any case. A folder of classes alone is itself the one for training.

    Raises:
        FileNotFoundError: for a folder that has neither splits nor classes, or with ``tested`` only train/.
    """
    named = {name.lower(): folder / name for name in _folders(folder)}
    trains, tests = ([named[name] for name in names if name in named] for names in SPLIT_NAMES.values())
    train, used = next(filter(_folders, trains), None), list(filter(_folders, tests))
    if train and tested and not used:
        raise FileNotFoundError(
            f"{printable(folder / 'test')} does not exist or holds no class folders; add the images in "
            f"test/<class>/*, or give {printable(train)}, and a fifth of its images become test images."
        )
    if train:
        return train, used
    has_splits = used or (trains and tests)
    has_classes = len(named) > len(trains + tests)
    if has_classes and not has_splits:
        return folder, []
    raise FileNotFoundError(
        f"{printable(trains[0] if trains else folder / 'train')} does not exist or holds no class folders; a data set "
        "is a folder with the images in train/<class>/* and test/<class>/*, or in <class>/*."
    )


def list_files(place: Path, train: Path) -> tuple[list[Path], Tensor, tuple[str, ...]]:
    """Return paths, labels int64 [N] and classes of the split in ``place``, whose classes are the folders in ``train``.

    The files come in the order of class, folder and name. Class names are in Unicode NFC: a Mac writes them in NFD.

    Raises:
        ValueError: for folders that hold no data set: a single class, classes one level too deep.
        OSError: for a folder that may not be read.
    """
    classes, folders = tuple(_class_folders(train)), _class_folders(place)
    files = {name: [file for folder in folders[name] for file in _files(folder, place)] for name in folders}
    inside = [_folders_instead_of_images(folders[name], files[name]) for name in folders]
    where = printable(place)
    if len(both := set.intersection(*inside)) > 1:
        raise ValueError(
            f"{where} holds no images in its folders {_named(list(folders))}, but in each of them the folders "
            f"{_named(sorted(both))}; move these up by one level, or name the splits train and test."
        )
    if unknown := [name for name in folders if name not in classes]:
        raise ValueError(f"{where} holds classes that train/ lacks: {_named(unknown)}; add them there or remove them.")
    if len(classes) == 1:
        raise ValueError(
            f"{where} holds one class, {_named(classes)}, but a model learns to tell two or more apart; add a class."
        )
    labels = torch.tensor([classes.index(name) for name in folders for _ in files[name]], dtype=torch.int64)
    return [file for name in folders for file in files[name]], labels, classes


def _check_classes(place: Path, classes: tuple[str, ...], labels: Tensor, all_needed: bool) -> None:
    """Raise ValueError if no class has images, or with ``all_needed`` if one has none."""
    empty = sorted(set(classes) - {classes[label] for label in labels})
    if len(empty) == len(classes) or (empty and all_needed):
        raise ValueError(f"{printable(place)} holds no images of {_named(empty)}; add some, or remove the class.")


def _class_folders(place: Path) -> dict[str, list[Path]]:
    """Return the folders of each class, in the order of the names; two folders may have one name in NFC."""
    classes = {}
    for name in _folders(place):
        classes.setdefault(unicodedata.normalize("NFC", name), []).append(place / name)
    return dict(sorted(classes.items()))


def _folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders in a folder that are neither hidden nor a system's."""
    try:
        return sorted(
            item.name for item in os.scandir(folder) if item.is_dir() and not SYSTEM_NAME.fullmatch(item.name)
        )
    except PermissionError as error:
        raise PermissionError(f"{printable(folder)} may not be read; change its permissions.") from error


def _files(folder: Path, place: Path) -> list[Path]:
    """Return the files in a class folder and in the folders in it, in the order of folder and name.

    A link to a folder further inside is not followed: it could lead back up, so that images count twice or test images
    are trained on, or out into the whole disk.
    """

    def refuse(error):
        raise OSError(f"{printable(error.filename)} cannot be read ({error.strerror}); change its permissions.")

    if place.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{printable(folder)} is a link that leads back up; remove it.")
    listed = []
    for here, inside, files in os.walk(folder, onerror=refuse):
        inside[:] = [name for name in inside if not SYSTEM_NAME.fullmatch(name)]
        listed.append((here, sorted(name for name in files if not SYSTEM_NAME.fullmatch(name))))
    return [Path(here, name) for here, names in sorted(listed) for name in names]


def _folders_instead_of_images(folders: list[Path], files: list[Path]) -> set[str]:
    """Return the names of the folders that hold a class's files one level too deep.

    A class with images in the right place has none.
    """
    if any(file.parent in folders and IMAGE_NAME.fullmatch(file.name) for file in files):
        return set()
    depth = len(folders[0].parts)
    return {file.parts[depth] for file in files if len(file.parts) > depth + 1}


def _named(names: Sequence[str | Path]) -> str:
    others = f" and {len(names) - NAMED} others" if len(names) > NAMED else ""
    return ", ".join(map(printable, names[:NAMED])) + others


# ---------- All of them ----------


def load_folder(
    place: Path,
    train: Path,
    data_dir: str | os.PathLike | None,
    image_size: int | None,
    num_channels: int,
    progress: bool,
) -> tuple[Tensor, Tensor, tuple[str, ...], list[Path]]:
    """Return images uint8 [N, C, H, W], labels int64 [N], class names and files of the split in ``place``.

    The classes are the folders in ``train``; the other options are as in ``load_images``. What is left out is counted
    and named on stdout.

    Raises:
        ValueError: if more than ``MOST_UNREADABLE`` of the images cannot be read, or all of a class in train/; for
            images that differ in size or would not fit into memory, and for what :func:`list_files` refuses.
        OSError: for a folder that may not be read.
    """
    paths, labels, classes = list_files(place, train)
    _check_classes(place, classes, labels, place == train)  # now, and again when what cannot be read is left out
    cache, state = _cache_of(place, paths, data_dir, image_size, num_channels)
    found = _read_cache(cache, state)
    images, problems = found or _decode(paths, image_size, num_channels, progress)
    used = [index for index, problem in enumerate(problems) if problem is None]
    labels = labels[used]
    _report(place, paths, problems)
    _check_classes(place, classes, labels, place == train)
    if place != train and len(labels.unique()) == 1:
        print(f"All images in {printable(place)} are of one class, {printable(classes[labels[0]])}.")
    if images.max() < 32:  # as 12 bits in files of 16 are
        print(f"The images in {printable(place)} are nearly black; scale the values in their files to the whole range.")
    if not found:
        _write_cache(cache, state, images, problems)
    return images, labels, classes, [paths[index] for index in used]


def _report(place: Path, paths: list[Path], problems: list[str | None]) -> None:
    """Print what is left out, and refuse too many unreadable images; ``problems`` are those of :func:`_decode`."""
    others = [path for path, problem in zip(paths, problems, strict=True) if problem == ""]
    unreadable = {path: problem for path, problem in zip(paths, problems, strict=True) if problem}
    if unreadable:
        count, names = len(paths) - len(others), list(unreadable)
        reason = unreadable[names[0]].removeprefix(printable(names[0])).rstrip(".")
        text = f"{len(names)} of {count} images cannot be read: {_named(names)} (the first{reason})"
        if len(names) > MOST_UNREADABLE * count:
            raise ValueError(f"{text}; at most {MOST_UNREADABLE:.0%} may be left out.")
        print(f"{text}; the rest is used.")
    if others:
        print(f"Files passed over, since they are no images: {_named(others)} ({len(others)} in all).")
    files = (path for path in sorted(place.iterdir()) if path.is_file() and not SYSTEM_NAME.fullmatch(path.name))
    if loose := [path for path in files if IMAGE_NAME.fullmatch(path.name)]:
        print(f"Images passed over, since they lie in no class folder: {_named(loose)} ({len(loose)} in all).")


def _decode(
    paths: list[Path], image_size: int | None, num_channels: int, progress: bool
) -> tuple[Tensor, list[str | None]]:
    """Decode files in threads: PIL releases Python's lock while it works.

    Returns:
        The images that can be read, uint8 [n, C, H, W], and for each file why it cannot, "" for one that is no image
        and None for one that can.
    """

    def read(path: Path) -> tuple[np.ndarray | None, str | None]:
        try:
            return read_image(path, image_size, num_channels), None
        except (ValueError, OSError) as error:
            is_image = not isinstance(error, UnknownFormat) or IMAGE_NAME.fullmatch(path.name)
            return None, str(error) if is_image else ""

    images, first, count, problems = np.empty((0, num_channels, 0, 0), np.uint8), None, 0, []
    pool = ThreadPoolExecutor()
    try:
        decoded = progress_bar(pool.map(read, paths), total=len(paths), description="decoding images", show=progress)
        for path, (pixels, problem) in zip(paths, decoded, strict=True):
            problems.append(problem)
            if pixels is None:
                continue
            if first is None:  # filled as the images come: a list of them and its copy would take twice the memory
                images, first = _room(len(paths), pixels.shape), path
            if pixels.shape != images.shape[1:]:
                raise ValueError(
                    f"the images differ in size: {printable(first)} has {images.shape[3]}x{images.shape[2]} pixels and "
                    f"{printable(path)} {pixels.shape[2]}x{pixels.shape[1]} pixels; give image_size, for instance "
                    "image_size=32, to bring all to one size."
                )
            images[count] = pixels
            count += 1
    finally:
        pool.shutdown(cancel_futures=True)
    return torch.from_numpy(images[:count]), problems


def _room(count: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return memory for ``count`` images. Linux would grant more than it has, and later kill the process."""
    size, known = count * math.prod(shape), "SC_PHYS_PAGES" in getattr(os, "sysconf_names", ())  # not under Windows
    if known and 3 * size > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        raise ValueError(
            f"{count} decoded images of {shape[2]}x{shape[1]} pixels take {size / 1e9:.1f} GB, training three times "
            "as much, more than the memory of this machine; give image_size, for instance image_size=224."
        )
    return np.empty((count, *shape), np.uint8)


# ---------- Cache: one file for each split and choice of options, valid for one state of the image files ----------


def _cache_of(place: Path, paths: list[Path], data_dir: str | os.PathLike | None, *options) -> tuple[Path, str]:
    """Return the cache file, and a key of names, sizes, times and permissions of the image files."""

    def state(path: Path) -> tuple:
        with suppress(OSError):  # a link to nothing is listed too, and found unreadable later
            status = path.stat()
            return ascii(path), status.st_size, status.st_mtime_ns, status.st_mode
        return (ascii(path),)

    def key(*parts) -> str:
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    name = f"{place.parent.name[:20]}-{place.name[:20]}-{key(ascii(place), options)}.safetensors"
    return cache_dir(data_dir) / "cache" / name, key(CACHE_VERSION, [state(path) for path in paths])


def _read_cache(cache: Path, state: str) -> tuple[Tensor, list[str | None]] | None:
    with suppress(OSError, SafetensorError), safe_open(cache, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("state") == state:
            return file.get_tensor("images"), json.loads(metadata["problems"])
    return None


def _write_cache(cache: Path, state: str, images: Tensor, problems: list[str | None]) -> None:
    try:
        with atomic_write(cache) as temporary:
            save_file({"images": images}, temporary, metadata={"state": state, "problems": json.dumps(problems)})
            temporary.chmod(0o644)  # safetensors hides its files from other users; a shared class folder needs them
    except (OSError, SafetensorError) as error:  # a full or read-only disk is no reason to stop
        print(f"The decoded images are not cached and will be decoded again next time ({error}).")
