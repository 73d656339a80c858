"""CIFAR and ciFAIR through torchvision's classes, and the test images of CIFAR that ciFAIR kept.

torchvision checks the md5 of every file before it opens it. ciFAIR is CIFAR with other test images in place of
near-duplicates: Barz and Denzler, "Do We Train on Test Data? Purging CIFAR of Near-Duplicates", Journal of Imaging
6(6), 41, 2020.
"""

import http.client
import io
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, suppress
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from vitlib.utils import cache_dir, first_line, import_torchvision

CIFAIR_URL = "https://github.com/cvjena/cifair/releases/download/v1.0"
TIMEOUT = 30  # seconds without a byte after which a connection counts as broken


def cifar_class(name: str) -> type:
    """Return torchvision's class for one of the four data sets; ciFAIR's are subclasses, as by its authors."""
    datasets = import_torchvision().datasets

    class CiFAIR100(datasets.CIFAR100):
        base_folder = "ciFAIR-100"
        filename = "ciFAIR-100.zip"
        url = f"{CIFAIR_URL}/{filename}"
        tgz_md5 = "ddc236ab4b12eeb8b20b952614861a33"
        test_list = [["test", "8130dae8d6fc6a436437f0ebdb801df1"]]

    class CiFAIR10(datasets.CIFAR10):
        base_folder = "ciFAIR-10"
        filename = "ciFAIR-10.zip"
        url = f"{CIFAIR_URL}/{filename}"
        tgz_md5 = "ca08fd390f0839693d3fc45c4e49585f"
        test_list = [["test_batch", "01290e6b622a1977a000eff13650aca2"]]

    found = {"cifair100": CiFAIR100, "cifair10": CiFAIR10, "cifar100": datasets.CIFAR100, "cifar10": datasets.CIFAR10}
    return found[name]


def load_cifar(
    name: str, split: str, data_dir: str | os.PathLike | None, progress: bool
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Return images uint8 [N, 3, 32, 32], labels int64 [N] and class names; what is missing or damaged is downloaded.

    Raises:
        OSError: if the download fails or is not what it should be, or the folder cannot be written.
    """
    dataset, folder = cifar_class(name), cache_dir(data_dir)
    try:
        data = dataset(folder, train=split == "train")
    except RuntimeError:  # torchvision's for a file that is missing or has another md5
        _download(dataset, name, folder, progress)
        data = dataset(folder, train=split == "train")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return images, torch.tensor(data.targets), tuple(data.classes)


def _download(dataset: type, name: str, folder: Path, progress: bool) -> None:
    """Download, check and unpack a data set. Of several processes one does it, and the others wait."""
    hint = f" Its host has given less than 100 kB/s since June 2026: {name.replace('cifar', 'cifair')} is quicker."
    hint = hint if name.startswith("cifar") else ""
    print(f"{name} is prepared in {folder}; if another process is at it, this one waits.{hint}")
    bar = sys.stdout if progress else io.StringIO()  # torchvision's, which it writes to stderr
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"), redirect_stderr(bar), ExitStack() as afterwards:
            afterwards.callback(socket.setdefaulttimeout, socket.getdefaulttimeout())
            socket.setdefaulttimeout(TIMEOUT)
            with suppress(RuntimeError):
                dataset(folder, train=False)
                return  # another process has done it while this one waited
            fetch = import_torchvision().datasets.utils.download_and_extract_archive
            fetch(dataset.url, folder, filename=dataset.filename, md5=dataset.tgz_md5)
            dataset(folder, train=False)  # RuntimeError if what came is not what it should be
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = first_line(error)
        raise OSError(
            f"{name} could not be downloaded from {dataset.url} into {folder} ({reason}); try again, put the file with "
            f"md5 {dataset.tgz_md5} there by hand, for instance with `curl -L -C - -O {dataset.url}`, which goes on "
            "where it stopped, name another folder in VITLIB_DATA, or use shapes100, which needs no download."
        ) from error


# ---------- What ciFAIR kept ----------


@cache
def flagged_by_cifair() -> dict[str, dict[str, dict[str, int]]]:
    """Return the test indices of near-duplicates in CIFAR that ciFAIR flags, by data set, class and file stem.

    They are 959 of CIFAR-100 and 329 of CIFAR-10. The others are the same images in CIFAR and in ciFAIR.
    """
    lists = json.loads(Path(__file__).with_name("cifair_flagged.json").read_text(encoding="utf-8"))
    return {name: lists[name] for name in ("cifar100", "cifar10")}


def kept_by_index(name: str, count: int) -> Tensor:
    """Return whether ciFAIR kept each of the first ``count`` test images of CIFAR: bool [count]."""
    flagged = {index for stems in flagged_by_cifair()[name].values() for index in stems.values()}
    return torch.tensor([index not in flagged for index in range(count)])


def kept_by_file(paths: Sequence[Path], labels: Tensor, classes: tuple[str, ...]) -> Tensor | None:
    """Return whether ciFAIR kept each test image of a folder of CIFAR: bool [N]; None for any other folder."""
    for flagged in flagged_by_cifair().values():
        if set(classes) == set(flagged):
            named = zip(paths, labels.tolist(), strict=True)
            kept = torch.tensor([path.stem not in flagged[classes[label]] for path, label in named])
            return None if kept.all() else kept  # none flagged: no part of CIFAR, or nothing to tell
    return None
