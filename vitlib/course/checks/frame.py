"""What every check has in common: how an answer is called, judged, and told what is wrong with it."""

import math
import sys
from collections.abc import Callable
from functools import wraps

import torch

VERDICT = "application/vnd.vitlib.verdict+json"
CORRECT, NOT_YET, NOT_ATTEMPTED = "correct", "not yet", "not attempted yet"

ALL: dict[str, Callable] = {}  # every check of the course by its name, in the order of the chapters

_strict = False


class Mistake(Exception):
    """What is wrong with an answer, in a sentence that starts in lower case and names the likely cause."""


class NotAttempted(Exception):
    """The exercise's stub is still as it was."""


def be_strict(strict: bool) -> None:
    """With True, a check raises AssertionError unless the answer is correct."""
    global _strict
    _strict = strict


def expect(condition, mistake: str) -> None:
    """Raise :class:`Mistake` unless ``condition`` holds."""
    if not condition:
        raise Mistake(mistake)


def call(function: Callable, *args, **kwargs):
    """The learner's function called, whatever it returns.

    Raises:
        NotAttempted: for a stub: ``...`` or None in place of the function, or ``raise NotImplementedError`` in it.
        Mistake: for an object that cannot be called, and for whatever the function raises.
    """
    if function is None or function is Ellipsis:
        raise NotAttempted
    expect(callable(function), f"give the check your function; this is a {type(function).__name__}")
    try:
        return function(*args, **kwargs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a learner's exit() must not take the notebook along
        # PyTorch raises NotImplementedError as well, with a text; a stub raises the bare class
        if isinstance(error, NotImplementedError) and not error.args:
            raise NotAttempted from None
        raise Mistake(f"your code stopped with {_in_words(error)}") from None


def answer(function: Callable, *args, **kwargs):
    """As :func:`call`; a stub, which returns None or ``...``, counts as not attempted."""
    result = call(function, *args, **kwargs)
    if result is None or result is Ellipsis:
        raise NotAttempted
    return result


def tensor_answer(function: Callable, *args, shape: tuple[int, ...] | None = None, **kwargs) -> torch.Tensor:
    """As :func:`answer`, for functions that must return a tensor, of a known shape unless the check looks at that."""
    result = answer(function, *args, **kwargs)
    expect(isinstance(result, torch.Tensor), f"a tensor is wanted, but a {type(result).__name__} came back")
    if shape is not None:
        expect(tuple(result.shape) == shape, f"the shape is {list(result.shape)}, but should be {list(shape)}")
    return result


def as_number(value) -> int | float:
    """One number, given as Python's, NumPy's or a tensor's."""
    if hasattr(value, "dtype"):
        count = math.prod(value.shape)
        expect(count == 1, f"one number is wanted, but {count} came back")
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    expect(is_number, f"a number is wanted, but a {type(value).__name__} came back")
    return value


def number_answer(function: Callable, *args, **kwargs) -> int | float:
    """As :func:`answer`, for functions that must return one number."""
    return as_number(answer(function, *args, **kwargs))


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Equal shapes, and no number differs by more than ``tolerance``."""
    if first.shape != second.shape or first.is_complex():
        return False
    return torch.allclose(first.float(), second.float(), rtol=0, atol=tolerance)


def compare(given: torch.Tensor, right: torch.Tensor, slips: dict[str, torch.Tensor], otherwise: str) -> None:
    """Nothing if ``given`` is right; else the sentence of the typical wrong answer that it equals."""
    if close(given, right):
        return
    for mistake, wrong in slips.items():
        expect(not close(given, wrong), mistake)
    raise Mistake(otherwise)


def exercise(title: str):
    """Turns a function that raises :class:`Mistake` into a check, which shows its verdict in one line."""

    def decorate(body: Callable):
        @wraps(body)
        def check(learners) -> None:
            status, message = _judge(body, learners)
            line = f"{title}: {status}: {message}" if message else f"{title}: {status}"
            _show(line, {"check": body.__name__, "status": status, "message": message})
            if _strict and status != CORRECT:
                raise AssertionError(line)

        check.title = title
        ALL[body.__name__] = check
        return check

    return decorate


def _judge(body: Callable, learners) -> tuple[str, str]:
    """Status and message. Nothing that a learner can hand over makes this raise."""
    try:
        # fresh numbers every time, none taken from the notebook's own random state, and gradients as usual
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.seed()
            body(learners)
    except NotAttempted:
        return NOT_ATTEMPTED, ""
    except Mistake as mistake:
        return NOT_YET, str(mistake)
    except Exception as error:
        return NOT_YET, f"what your code gave back could not be examined ({_in_words(error)})"
    return CORRECT, ""


def _in_words(error: BaseException) -> str:
    """``Name: text`` on one line, and not a long one."""
    try:
        text = " ".join(str(error).split()[:30])
    except Exception:  # an exception class of the learner's own
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _show(line: str, verdict: dict[str, str]) -> None:
    """Print the line; in a notebook store the verdict with it, for ``python -m vitlib grade``."""
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        print(line)
        return
    from IPython.display import display

    display({"text/plain": line, VERDICT: verdict}, raw=True)
