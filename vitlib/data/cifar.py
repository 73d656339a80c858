"""CIFAR and ciFAIR: downloaded, checked against fixed md5 sums, unpacked and read.

Nothing is unpacked or unpickled before its md5 is right, and nothing unfinished ever has a final name. Out of an
archive come the files of the data set and nothing else, within limits (``MOST_BYTES``, ``MOST_MEMBERS``).
"""

import hashlib
import http.client
import json
import os
import pickle
import posixpath
import re
import shutil
import tarfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from vitlib.utils import cache_dir, import_torchvision, progress_bar

# ciFAIR is CIFAR with another archive and other test images: Barz and Denzler, "Do We Train on Test Data? Purging
# CIFAR of Near-Duplicates", Journal of Imaging 6(6), 2020.
CIFAIR_URL = "https://github.com/cvjena/cifair/releases/download/v1.0"
CIFAIR_MD5 = {  # of the archive, and of the file with the test images
    "cifair100": ("ddc236ab4b12eeb8b20b952614861a33", "8130dae8d6fc6a436437f0ebdb801df1"),
    "cifair10": ("ca08fd390f0839693d3fc45c4e49585f", "01290e6b622a1977a000eff13650aca2"),
}
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken
MOST_BYTES = 2**29  # of a download, and of all that is in an archive; 60,000 images of 32x32 pixels are 184 million
MOST_MEMBERS = 1000  # of an archive; a data set has eight files at most


def prepare_cifar(name: str, data_dir: str | os.PathLike | None, progress: bool) -> None:
    """Download, check and unpack one of the four data sets, unless that is done already.

    The archive's md5 is checked before it is unpacked, and the unpacked files are checked before they are moved into
    place. An interrupted download goes on where it stopped. Of several processes one works and the others wait for it.

    Raises:
        OSError: if the download fails or is not what it should be, or the folder cannot be written or is full; the
            message says what to do. What was in place before still is.
    """
    dataset, folder = cifar_class(name), cache_dir(data_dir)
    if _is_whole(dataset, folder):
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, name):
            if not _is_whole(dataset, folder):  # else another kernel has done it while we waited
                _prepare(name, dataset, folder, progress)
    except OSError as error:
        if error.errno is None:  # one of our own sentences
            raise
        raise OSError(
            f"{name} cannot be made ready in {folder} ({error.strerror}); see that it can be written and has room, or "
            "give another folder as data_dir or in the environment's VITLIB_DATA."
        ) from error


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    """Keeps other processes out; the system lets go of the lock even of one that is killed."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"Another process is preparing data in {folder}; {name} waits for it.", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(name: str, dataset: type, folder: Path, progress: bool) -> None:
    archive = _fetch_archive(name, dataset, folder, progress)
    unpacked, damaged = folder / ".unpacking", folder / ".damaged"  # a killed process leaves them; we hold the lock
    try:
        _remove(unpacked, damaged)
        _unpack(archive, dataset, unpacked)
        if not _is_whole(dataset, unpacked):
            raise OSError(f"{archive} does not hold the files of {name}; delete it and try again.")
        if os.path.lexists(folder / dataset.base_folder):  # a damaged one, or we would not be here
            os.replace(folder / dataset.base_folder, damaged)
        os.replace(unpacked / dataset.base_folder, folder / dataset.base_folder)
    finally:
        _remove(unpacked, damaged)


def _remove(*paths: Path) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def load_cifar(
    name: str, split: str, data_dir: str | os.PathLike | None, progress: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 [N, 3, 32, 32], labels int64 [N] and class names; see :func:`prepare_cifar` for errors."""
    prepare_cifar(name, data_dir, progress)
    dataset = cifar_class(name)
    folder = cache_dir(data_dir) / dataset.base_folder
    batches = [_unpickle(folder / file, md5) for file, md5 in getattr(dataset, f"{split}_list")]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    labels = [label for batch in batches for label in batch["labels" if "labels" in batch else "fine_labels"]]
    classes = _unpickle(folder / dataset.meta["filename"], dataset.meta["md5"])[dataset.meta["key"]]
    return torch.from_numpy(images), torch.tensor(labels), tuple(classes)


@cache
def flagged_by_cifair() -> dict[str, dict[str, dict[str, int]]]:
    """Return the test images of CIFAR that ciFAIR flags as near-duplicates: data set, class, file stem, test index.

    959 of CIFAR-100 and 329 of CIFAR-10. The others, 9,041 and 9,671, are the same images in CIFAR and in ciFAIR.
    """
    lists = json.loads(Path(__file__).with_name("cifair_flagged.json").read_text())
    return {name: lists[name] for name in ("cifar100", "cifar10")}


def kept_by_index(name: str, count: int) -> Tensor:
    """Return which of the first ``count`` test images of CIFAR ciFAIR kept, bool [count]."""
    flagged = {index for stems in flagged_by_cifair()[name].values() for index in stems.values()}
    return torch.tensor([index not in flagged for index in range(count)])


def kept_by_file(paths: Sequence[Path], labels: Tensor, classes: tuple[str, ...]) -> Tensor | None:
    """Return which test images of a folder ciFAIR kept, bool [N], if the folder holds CIFAR or a part of it.

    It does if its classes are CIFAR's and all its files have CIFAR's own names. For any other folder return None.
    """
    own_name = re.compile(r".+_s_\d{6}|manual2?-(beaver|shrew|skunk)\d+")
    stems = [path.stem for path in paths]
    for flagged in flagged_by_cifair().values():
        if set(classes) == set(flagged) and all(map(own_name.fullmatch, stems)):
            named = zip(stems, labels.tolist(), strict=True)
            return torch.tensor([stem not in flagged[classes[label]] for stem, label in named])
    return None


def _unpickle(file: Path, md5: str) -> dict:
    """What a pickle holds. Opening one can run code: the very bytes that are opened are checked before, not the file,
    which whoever may write to the folder could exchange in between."""
    content = file.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise OSError(f"{file} has changed while it was loaded, so it was not opened; try again.")
    return pickle.loads(content, encoding="latin1")  # of Python 2


def cifar_class(name: str) -> type:
    """torchvision's class for the data set, whose attributes say what to download and which md5 each file has."""
    datasets = import_torchvision().datasets
    original = datasets.CIFAR100 if name.endswith("100") else datasets.CIFAR10
    if name not in CIFAIR_MD5:
        return original
    archive_md5, test_md5 = CIFAIR_MD5[name]
    folder = name.replace("cifair", "ciFAIR-")
    attributes = {
        "base_folder": folder,
        "filename": f"{folder}.zip",
        "url": f"{CIFAIR_URL}/{folder}.zip",
        "tgz_md5": archive_md5,
        "test_list": [[original.test_list[0][0], test_md5]],
    }
    return type(folder, (original,), attributes)


def _is_whole(dataset: type, folder: Path) -> bool:
    """Whether every file of an unpacked data set is there with the right md5."""
    check = import_torchvision().datasets.utils.check_integrity
    files = [*dataset.train_list, *dataset.test_list, [dataset.meta["filename"], dataset.meta["md5"]]]
    return all(check(folder / dataset.base_folder / file, md5) for file, md5 in files)


def _fetch_archive(name: str, dataset: type, folder: Path, progress: bool) -> Path:
    """The data set's archive in ``folder``, downloaded unless it is there, with the right md5."""
    archive = folder / dataset.filename
    if archive.exists():
        _check_md5(archive, dataset.tgz_md5, "delete it and try again")
        return archive
    if name.startswith("cifar"):
        print(
            f"{dataset.filename} comes from a host that has been throttled to under 100 kB/s since June 2026 and may "
            f"take half an hour or more; {name.replace('cifar', 'cifair')} is the quicker choice."
        )
    unfinished = archive.with_name(f"{archive.name}.partial")
    try:
        _fetch(dataset.url, unfinished, progress)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{dataset.filename} could not be downloaded from {dataset.url} ({error}); try again to go on where it "
            f"stopped, or put the file into {folder} by hand, or use shapes100, which needs no download."
        ) from error
    try:
        _check_md5(unfinished, dataset.tgz_md5, "it has been removed, so try again or put the right file there by hand")
    except OSError:
        unfinished.unlink()
        raise
    os.replace(unfinished, archive)
    return archive


def _unpack(archive: Path, dataset: type, folder: Path) -> None:
    """Copy the data set's own files out of its archive to where ``folder`` wants them.

    The archive's md5 has been right, so it is the one that vitlib knows; and yet it decides neither where something is
    written nor how much: of members that climb out of the folder, of links and of whatever else there is, nothing is
    written.

    Raises:
        OSError: if it is no archive, is damaged, or holds more than the limits allow.
    """
    lists = (*dataset.train_list, *dataset.test_list, [dataset.meta["filename"]])
    wanted = {f"{dataset.base_folder}/{file}" for file, *_ in lists}
    size = 0
    try:
        for count, (name, length, opened) in enumerate(_members(archive), 1):
            size += length
            if count > MOST_MEMBERS or size > MOST_BYTES:
                raise ValueError(f"it holds more than {MOST_MEMBERS} files or {MOST_BYTES} bytes")
            if posixpath.normpath(name) in wanted:
                target = folder / posixpath.normpath(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened() as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file)  # no longer than it said: both modules stop there
    except Exception as error:  # a damaged archive can make zipfile and tarfile raise almost anything
        if isinstance(error, OSError) and error.errno is not None:  # the disk
            raise
        raise OSError(f"{archive} cannot be unpacked ({error}); delete it and try again.") from error


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]]]]:
    """Name, size in bytes and a way to open it, of every plain file in a zip or tar archive."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            for entry in file.infolist():  # a link would be a short file with the path in it
                yield entry.filename, entry.file_size, partial(file.open, entry)
    else:
        with tarfile.open(archive, "r:gz") as file:
            for entry in file:
                yield (entry.name if entry.isfile() else ""), entry.size, partial(file.extractfile, entry)


def _check_md5(file: Path, expected: str, way_out: str) -> None:
    found = import_torchvision().datasets.utils.calculate_md5(file)
    if found != expected:
        raise OSError(
            f"{file} has the md5 {found} instead of {expected}, so it is damaged or something else, for instance "
            f"the login page of a network; {way_out}."
        )


def _fetch(url: str, unfinished: Path, progress: bool) -> None:
    """Download ``url`` into ``unfinished``, going on where an earlier attempt stopped.

    Not torch.hub.download_url_to_file: it takes a connection that breaks off for the end of the file, waits without
    end for one that stalls, and always starts from nothing.
    """
    # One byte again, so that there is always something to ask for.
    start = max(unfinished.stat().st_size - 1, 0) if unfinished.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "vitlib", "Range": f"bytes={start}-"})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if start == 0 or error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        unfinished.unlink()  # it is longer than the file, so it is not a part of it
        return _fetch(url, unfinished, progress)
    with response:
        if response.headers.get_content_type() == "text/html":  # seen before it replaces what is there already
            raise ConnectionError("a page came in its place, perhaps the login page of the network")
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0  # this server cannot go on in the middle and sends the whole file
        total = None if response.length is None else start + response.length
        with (
            unfinished.open("r+b" if start else "wb") as file,
            progress_bar(total=total, description=unfinished.stem, unit="B", show=progress) as bar,
        ):
            file.seek(start)
            bar.n = bar.initial = start
            while chunk := response.read(2**16):
                bar.update(file.write(chunk))
                if file.tell() > MOST_BYTES:
                    file.truncate(0)
                    raise ConnectionError(f"more than {MOST_BYTES} bytes came, which no data set here has")
        if response.length:
            raise ConnectionError(f"the connection broke off {response.length} bytes before the end")
