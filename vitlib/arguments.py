"""What arguments may be: one that is not allowed gives one sentence with its name, its value and what is allowed.

Public functions ask here first, so that a wrong value is named where it was given, before anything is computed or
written, and not by PyTorch in the middle of the work.
"""

import math
import os
from collections.abc import Collection
from pathlib import Path
from types import UnionType

from torch import Tensor

LARGEST_SEED = 2**32 - 1  # what NumPy takes, too


def brief(value: object, most: int = 80) -> str:
    """A value on one line of at most ``most`` characters; a tensor, whose numbers would fill the page, by its dtype
    and shape: ``uint8 [8, 3, 32, 32]``."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # Python does not write out whole numbers of thousands of digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def check(name: str, value: object, fits: bool, allowed: str) -> None:
    """Raise ValueError with a sentence about the argument unless its value ``fits``; ``allowed`` says what does."""
    if not fits:
        raise ValueError(f"{name}={brief(value)} is not allowed; give {allowed}.")


def check_whole(name: str, value: object, least: int = 1, most: int | None = None, *, optional: bool = False) -> None:
    """A whole number from ``least`` to ``most``, both included; with ``optional`` None as well."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)  # a batch size of True is a mistake
    fits = is_whole and value >= least and (most is None or value <= most)
    limit = "" if most is None else f" and at most {most}"
    words = f"a whole number of at least {least}{limit}{', or None' if optional else ''}"
    check(name, value, fits or (optional and value is None), words)


def check_multiple(name: str, value: object, part_name: str, part: object) -> None:
    """Two whole numbers of at least 1, the first a multiple of the second."""
    check_whole(name, value)
    check_whole(part_name, part)
    if value % part:
        raise ValueError(
            f"{name}={value} is not a multiple of {part_name}={part}; choose a {part_name} that divides it."
        )


def check_seed(name: str, value: object) -> None:
    """The start of random draws: a whole number that PyTorch and NumPy take."""
    check_whole(name, value, 0, LARGEST_SEED)


def check_number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, most: float | None = None,
    below: float | None = None, optional: bool = False, noun: str = "a number",
) -> None:  # fmt: skip
    """A finite number within the limits that are given; ``noun`` is what it is called."""
    limits = {"of at least": least, "above": above, "at most": most, "below": below}
    fits = is_number(value) and (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )
    words = " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)
    words = f"{noun} {words}{', or None' if optional else ''}"
    check(name, value, fits or (optional and value is None), words)


def is_number(value: object) -> bool:
    """Whether a value is a finite number, and one that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def check_flag(name: str, value: object) -> None:
    """True or False, and not what Python takes for it."""
    check(name, value, isinstance(value, bool), "True or False")


def check_choice(name: str, value: object, choices: Collection[str], otherwise: str = "") -> None:
    """One of some texts; ``otherwise`` is what else is allowed, in words."""
    if not isinstance(value, str) or value not in choices:
        words = " or ".join(choices) if len(choices) == 2 else f"one of {', '.join(choices)}"
        raise ValueError(f"{name}={brief(value)} is not known; choose {words}{otherwise}.")


def check_text(name: str, value: object, *, optional: bool = False) -> None:
    """A text."""
    fits = isinstance(value, str) or (optional and value is None)
    check(name, value, fits, f"a text{', or None' if optional else ''}")


def check_path(name: str, value: object, *, optional: bool = False) -> None:
    """A path that a file could have, whether or not there is one."""
    is_path = isinstance(value, str | os.PathLike) and isinstance(text := os.fspath(value), str)
    fits = is_path and bool(text.strip()) and "\0" not in text
    check(name, value, fits or (optional and value is None), f"a path{', or None' if optional else ''}")


def check_folder(name: str, value: str | os.PathLike) -> None:
    """A folder that exists, or can be made, and can be written to.

    Raises:
        OSError: one sentence, for any other.
    """
    folder = Path(value).absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{name}={brief(str(value))} cannot be a folder: {there} is a file; name another one.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{name}={brief(str(value))} cannot be written to; choose another folder.")


def check_type(name: str, value: object, kind: type | UnionType, allowed: str) -> None:
    """An object of a class; ``allowed`` says how to come by one."""
    check(name, value, isinstance(value, kind), allowed)


def check_tensor(name: str, value: object, dimensions: str) -> None:
    """A tensor with as many dimensions as ``dimensions`` has letters, such as ``"L B H T T"``."""
    letters = dimensions.split()
    fits = isinstance(value, Tensor) and value.ndim == len(letters)
    check(name, value, fits, f"a tensor [{', '.join(letters)}]")
