"""CIFAR and ciFAIR: downloaded, checked against fixed md5 sums, unpacked and read.

Nothing is unpacked or unpickled before its md5 is right, and nothing unfinished ever has a final name.
"""

import http.client
import os
import shutil
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from .compat import import_torchvision
from .files import data_folder
from .progress import progress_bar

# ciFAIR is CIFAR with another archive and other test images: Barz and Denzler, "Do We Train on Test Data? Purging
# CIFAR of Near-Duplicates", Journal of Imaging 6(6), 2020.
CIFAIR_URL = "https://github.com/cvjena/cifair/releases/download/v1.0"
CIFAIR_MD5 = {  # of the archive, and of the file with the test images
    "cifair100": ("ddc236ab4b12eeb8b20b952614861a33", "8130dae8d6fc6a436437f0ebdb801df1"),
    "cifair10": ("ca08fd390f0839693d3fc45c4e49585f", "01290e6b622a1977a000eff13650aca2"),
}
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken


def prepare_cifar(name: str, data_dir: str | os.PathLike | None, progress: bool) -> None:
    """Download, check and unpack one of the four data sets, unless that is done already.

    The archive's md5 is checked before it is unpacked, and the unpacked files are checked before they are moved into
    place. An interrupted download goes on where it stopped.

    Raises:
        OSError: if the download fails or is not what it should be; the message says what to do.
    """
    dataset, folder = cifar_class(name), data_folder(data_dir)
    if _is_whole(dataset, folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"), tempfile.TemporaryDirectory(dir=folder) as temporary:
        if _is_whole(dataset, folder):  # while we waited, another kernel has done it
            return
        archive = _fetch_archive(name, dataset, folder, progress)
        # "data" keeps a tar file from writing outside its folder; Python before 3.11.4 lacks it, zip files need none.
        options = {"filter": "data"} if archive.suffix == ".gz" and hasattr(tarfile, "data_filter") else {}
        shutil.unpack_archive(archive, temporary, **options)
        if not _is_whole(dataset, Path(temporary)):
            raise OSError(f"{archive} does not hold the files of {name}; delete it and try again.")
        if (folder / dataset.base_folder).exists():  # a damaged one, or we would not be here
            os.replace(folder / dataset.base_folder, Path(temporary) / "damaged")
        os.replace(Path(temporary) / dataset.base_folder, folder / dataset.base_folder)


def load_cifar(
    name: str, split: str, data_dir: str | os.PathLike | None, progress: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 [N, 3, 32, 32], labels int64 [N] and class names; see :func:`prepare_cifar` for errors."""
    prepare_cifar(name, data_dir, progress)
    # Opening a pickle can run code: torchvision compares the md5 of every file first, and raises if one differs.
    dataset = cifar_class(name)(data_folder(data_dir), train=split == "train", download=False)
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(dataset.targets), tuple(dataset.classes)


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
    partial = archive.with_name(f"{archive.name}.partial")
    try:
        _fetch(dataset.url, partial, progress)
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"{dataset.filename} could not be downloaded from {dataset.url} ({error}); try again to go on where it "
            f"stopped, or put the file into {folder} by hand, or use shapes100, which needs no download."
        ) from error
    try:
        _check_md5(partial, dataset.tgz_md5, "it has been removed, so try again or put the right file there by hand")
    except OSError:
        partial.unlink()
        raise
    os.replace(partial, archive)
    return archive


def _check_md5(file: Path, expected: str, way_out: str) -> None:
    found = import_torchvision().datasets.utils.calculate_md5(file)
    if found != expected:
        raise OSError(
            f"{file} has the md5 {found} instead of {expected}, so it is damaged or something else, for instance "
            f"the login page of a network; {way_out}."
        )


def _fetch(url: str, partial: Path, progress: bool) -> None:
    """Download ``url`` into ``partial``, going on where an earlier attempt stopped.

    Not torch.hub.download_url_to_file: it takes a connection that breaks off for the end of the file, waits without
    end for one that stalls, and always starts from nothing.
    """
    # One byte again, so that there is always something to ask for.
    start = max(partial.stat().st_size - 1, 0) if partial.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "vitlib", "Range": f"bytes={start}-"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0  # this server cannot go on in the middle and sends the whole file
        total = None if response.length is None else start + response.length
        with (
            partial.open("r+b" if start else "wb") as file,
            progress_bar(total=total, description=partial.stem, unit="B", show=progress) as bar,
        ):
            file.seek(start)
            bar.n = bar.initial = start
            while chunk := response.read(2**16):
                bar.update(file.write(chunk))
        if response.length:
            raise ConnectionError(f"the connection broke off {response.length} bytes before the end")
