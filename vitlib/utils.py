"""What every room needs: atomic writes, the cache folder, one progress bar, and the door to torchvision."""

import importlib
import os
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

_OPERATORS = ("nms", "qnms")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"  # torchvision/csrc/ops/nms.cpp
_declared: list = []  # torch forgets the operators when this object goes
SHORT = "{l_bar}{bar:6}| {elapsed}<{remaining}, {rate_fmt}{postfix}"  # fits into one line of a notebook's page


def cache_dir(data_dir: str | os.PathLike | None = None) -> Path:
    """Where downloads and caches live: ``data_dir``, else the environment's VITLIB_DATA, else ~/.cache/vitlib."""
    return Path(data_dir or os.environ.get("VITLIB_DATA") or "~/.cache/vitlib").expanduser().absolute()


def printable(path: str | os.PathLike) -> str:
    """A path as a message may show it. Names in a folder from elsewhere can hold line breaks and commands to a
    terminal, which are escaped, and bytes that are no text, which become question marks."""
    text = os.fsencode(path).decode(errors="replace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to, and moves it into place when the block ends well.

    If the block fails, the temporary file is removed and whatever stood at ``path`` before is still there.

    >>> with atomic_write("history.json") as temporary:
    ...     temporary.write_text("{}")
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this process and thread, so that two which write the same file at once do not write into each other's
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield temporary
        os.umask(mask := os.umask(0))  # safetensors hides its files from other users; a shared class folder needs them
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def progress_bar(iterable=None, *, description: str, total: int | None = None, unit: str = "it", show: bool = True):
    """A tqdm bar written as text to stdout.

    Text, not a widget: a widget's output is lost in papermill logs and its saved state makes stored notebooks
    invalid on GitHub. Stdout, not stderr: notebooks paint stderr red, and a beginner reads red as an error.
    """
    return tqdm(
        iterable,
        desc=description,
        total=total,
        unit=unit,
        unit_scale=unit == "B",
        bar_format=SHORT if "images" in unit else None,
        file=sys.stdout,
        mininterval=0.5,
        disable=not show,
    )


def import_torchvision() -> ModuleType:
    """Import torchvision, also beside a build of torch that it was not made for.

    Beside another build, say a CPU build of torch, its compiled library does not load, and the import stops because
    two operators do not exist. Its Python parts (data sets, transforms, models) need no such operator, so declaring the
    two is enough; calling one still raises torchvision's own error. Where torchvision is whole this is a plain import.
    Call it before anything else imports torchvision; afterwards ``from torchvision.transforms import v2`` works.

    Raises:
        ModuleNotFoundError: if torchvision is not installed.
        Exception: whatever else torchvision's import raises, unchanged.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        message = "torchvision is not installed; install it with `pip install torchvision`."
        raise ModuleNotFoundError(message, name="torchvision") from error
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    _declare_operators()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # the failed import has left some of torchvision's modules half built
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in _OPERATORS:
        library.define(operator + _SCHEMA)
    _declared.append(library)


def text_table(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return the lines of a table with aligned columns; those numbered in ``right`` to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(f"{text:{'>' if n in right else '<'}{widths[n]}}" for n, text in enumerate(row)).rstrip()
        for row in rows
    ]
