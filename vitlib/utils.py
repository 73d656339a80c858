"""Helpers of all parts of vitlib: folders, locks, atomic writes, tables, progress bars, the import of torchvision."""

import csv
import difflib
import importlib
import os
import platform
import secrets
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from types import ModuleType

from filelock import FileLock, Timeout
from tqdm import tqdm

_declared: list = []  # keeps the declaration of torchvision's operators, which torch forgets with the object
SHORT_BAR = "{l_bar}{bar:6}| {elapsed}<{remaining}, {rate_fmt}{postfix}"  # fits into one line of a notebook's page


def cache_dir(data_dir: str | os.PathLike | None = None) -> Path:
    """Return the folder of downloads and caches: ``data_dir``, the environment's VITLIB_DATA, or ~/.cache/vitlib."""
    return Path(data_dir or os.environ.get("VITLIB_DATA") or "~/.cache/vitlib").expanduser().absolute()


def printable(path: str | os.PathLike) -> str:
    """Return a path that is safe to show. Line breaks and commands to a terminal are escaped; bytes that are no text
    become replacement characters."""
    text = os.fsencode(path).decode(errors="replace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without its full stop, or the error's name if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and move the file to ``path`` when the block has succeeded.

    If the block fails, the temporary file is removed, and an earlier file at ``path`` stays as it is.

    >>> with atomic_write("history.json") as temporary:
    ...     temporary.write_text("{}")
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")  # each writer has its own
    try:
        yield temporary
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Move a file. Windows refuses while a program, such as Excel, has ``path`` open: then wait up to a minute."""
    for second in range(61):
        try:
            return os.replace(temporary, path)
        except PermissionError:
            if sys.platform != "win32" or second == 60:
                raise
            if second == 1:
                print(f"{path} is open in another program; close it there.")
            time.sleep(1)


@contextmanager
def alone_in(folder: str | Path, work: str, option: str) -> Iterator[None]:
    """Make a folder, and lock it against other processes until the block ends.

    Args:
        work, option: words for the error, such as "training" and "--run-dir".

    Raises:
        ValueError: if another process has locked it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(Path(folder) / ".lock").acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"Another {work} is at work in {folder}; wait for it, or give another {option}.") from error
    with lock:
        yield


def progress_bar(
    iterable: Iterable | None = None, *, description: str, total: int | None = None, unit: str = "it", show: bool = True
) -> tqdm:
    """Return a tqdm bar that is written as text to stdout.

    A widget would be lost in papermill's logs, and its saved state makes notebooks invalid on GitHub. Notebooks paint
    stderr red, which beginners read as an error.
    """
    return tqdm(
        iterable, description, total, file=sys.stdout, mininterval=0.5, disable=not show, unit=unit,
        bar_format=SHORT_BAR if "images" in unit else None,
    )  # fmt: skip


def import_torchvision() -> ModuleType:
    """Import torchvision, even if it was built for another build of torch.

    Then its compiled library does not load, and the import fails because two operators do not exist. Its Python parts
    (data sets, transforms, models) never call them, so it is enough to declare them. Call this before anything else
    imports torchvision; afterwards ``from torchvision.transforms import v2`` works.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):  # as in torchvision/csrc/ops/nms.cpp
        library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the failed import has left some of them half built
    return importlib.import_module("torchvision")


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return the lines of a table with aligned columns; the columns numbered in ``right`` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:{'>' if n in right else '<'}{widths[n]}}" for n, text in enumerate(row)).rstrip()
        for row in rows
    ]


def versions(*more: str) -> dict[str, str]:
    """Return the versions that the record of a run names: of Python, torch, vitlib and ``more``, where installed."""
    found = {name: next(iter(distributions(name=name)), None) for name in ("torch", "vitlib", *more)}
    return {"python": platform.python_version(), **{name: one.version for name, one in found.items() if one}}


def near_match(value: object, choices: Iterable[str]) -> str:
    """Return the words ``(did you mean 'small'?)`` when one of ``choices`` is close to ``value``, else nothing."""
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def write_csv(path: str | Path, header: Sequence[str], rows: Iterable[Iterable], encoding: str = "utf-8") -> None:
    """Write a table, whole or not at all. Bytes in the names of files that are no text stay as they are."""
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", newline="", encoding=encoding, errors="surrogateescape") as file,
    ):
        csv.writer(file).writerows([header, *rows])
