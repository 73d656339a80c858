"""What all checks share: they call the learner's function, compare what comes back, and put the verdict in one line."""

import ast
import inspect
import math
import textwrap
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitlib.course.figures import print_and_store

VERDICT = "application/vnd.vitlib.verdict+json"  # what `python -m vitlib grade` reads
CORRECT, NOT_YET, NOT_ATTEMPTED = "correct", "not yet", "not attempted yet"
UNFINISHED = "`...` came back: put your result in its place, behind `return`"
STUBS = ["...", "pass", "return", "return ...", "return None"]
DRAWS = 3  # times that an answer is tried on each case, on fresh random numbers

ALL: dict[str, Callable] = {}  # every check of the course by its name, in the order of the chapters


class Mistake(Exception):
    """An answer is wrong; the text is a sentence that starts in lower case and names the likely cause."""


class NotAttempted(Exception):
    """The exercise's stub is still as it was."""


def expect(condition, mistake: str) -> None:
    """Raise :class:`Mistake` unless ``condition`` holds."""
    if not condition:
        raise Mistake(mistake)


def reject(faults: dict[str, Any]) -> None:
    """Raise :class:`Mistake` with the first sentence whose fault was found."""
    for mistake, found in faults.items():
        expect(not found, mistake)


def is_stub(function) -> bool:
    """Return whether the function, or forward() of a model, has no line but a docstring and one of :data:`STUBS`."""
    function = getattr(function, "forward", function)
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        documented = ast.get_docstring(definition) is not None
    except (OSError, SyntaxError, TypeError, ValueError):  # no function, a lambda, or one without source
        return False
    lines = [ast.unparse(line) for line in definition.body[1 if documented else 0 :]]
    return len(lines) <= 1 and all(line in STUBS for line in lines)


def call(function: Callable, *args):
    """Call the learner's function and return its result. It may change its arguments.

    Raises:
        NotAttempted: for an untouched stub, and for ``...`` or None in place of the function.
        Mistake: if it cannot be called, raises anything, or leaves gradients switched off.
    """
    if function is None or function is Ellipsis or is_stub(function):
        raise NotAttempted
    expect(callable(function), f"give the check your function; this is a {type(function).__name__}")
    try:
        result = function(*args)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a learner's exit() must not take the notebook along
        raise Mistake(f"your code stopped with {_in_words(error)}") from None
    left_off = "gradients stay switched off after your function; use `with torch.no_grad():`, which ends by itself"
    expect(torch.is_grad_enabled(), left_off)
    return result


@contextmanager
def unchanged(*args):
    """Raise :class:`Mistake` if a tensor, model or list of ``args`` is not the same at the end as at the start."""
    before = [_state(arg) for arg in args]
    yield
    for number, (old, arg) in enumerate(zip(before, args, strict=True), start=1):
        changed = f"its input number {number}; write x = x + y for x += y, and no methods with a trailing underscore"
        if isinstance(arg, nn.Module):
            changed = "the model that it is given; leave its weights, gradients and modes as they were"
        expect(_state(arg) == old, f"your function changes {changed}")


def answer(function: Callable, *args, may_change: bool = False):
    """As :func:`call`, for a function that must return something, and change its arguments only if it may."""
    with nullcontext() if may_change else unchanged(*args):
        result = call(function, *args)
        expect(result is not None, "nothing came back: end the function with `return` and your result")
        expect(result is not Ellipsis, UNFINISHED)
    return result


def tensor_answer(function: Callable, *args, may_change: bool = False) -> Tensor:
    """As :func:`answer`, for a function that must return a tensor.

    Floats that come back must be of the type of the first tensor that goes in, if that has floats too.
    """
    result = answer(function, *args, may_change=may_change)
    expect(isinstance(result, Tensor), f"a tensor is wanted, but a {type(result).__name__} came back")
    went_in = next((arg.dtype for arg in args if isinstance(arg, Tensor)), result.dtype)
    types = [str(dtype).removeprefix("torch.") for dtype in (result.dtype, went_in)]
    kept = result.dtype == went_in or not (result.dtype.is_floating_point and went_in.is_floating_point)
    expect(kept, f"the numbers that come back are {types[0]}, but {types[1]} went in; keep the type")
    return result


def expect_grad(function: Callable, *args) -> None:
    """Raise :class:`Mistake` unless a gradient reaches each tensor of ``args`` from the result; all hold floats."""
    args = [arg.detach().clone().requires_grad_() if isinstance(arg, Tensor) else arg for arg in args]
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    result = tensor_answer(function, *args)
    reached = [None for _ in tensors]
    if result.requires_grad:
        reached = torch.autograd.grad(result.sum(), tensors, allow_unused=True)
    cut = "detach(), no_grad(), .data, numpy and lists of numbers cut the way"
    for number, grad in enumerate(reached, start=1):
        expect(grad is not None, f"the numbers are right, but no gradient comes back to tensor {number}; {cut}")


def as_indices(value) -> Tensor:
    """Return the numbers of images ``[n]``, given as a tensor, an array, a list, a tuple or a range."""
    try:
        numbers = np.asarray(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):  # rows of unequal length
        numbers = np.asarray(None)
    mask = "a mask of True and False came back; torch.nonzero(mask).flatten() gives the numbers of the images"
    expect(numbers.dtype != bool, mask)
    row = numbers.ndim == 1 and (numbers.dtype.kind in "iu" or not numbers.size)
    found = f"{numbers.dtype} {list(numbers.shape)}" if numbers.ndim else f"a {type(value).__name__}"
    expect(row, f"a row of whole numbers is wanted, one for each image, but {found} came back")
    return torch.from_numpy(numbers.astype(int))


def as_number(value) -> int | float:
    """Return one number, given as Python's, NumPy's or a tensor's."""
    if hasattr(value, "dtype"):
        count = math.prod(value.shape)
        expect(count == 1, f"one number is wanted, but {count} came back")
        value = value.item()
    expect(value is not Ellipsis, UNFINISHED)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    expect(is_number, f"a number is wanted, but a {type(value).__name__} came back")
    return value


def number_answer(function: Callable, *args) -> int | float:
    """As :func:`answer`, for a function that must return one number."""
    return as_number(answer(function, *args))


def close(first, second, tolerance: float = 1e-5) -> bool:
    """Return whether tensors of one shape differ by ``tolerance`` at most, or numbers by this share of the larger."""
    if not isinstance(first, Tensor):
        return math.isclose(first, second, rel_tol=tolerance)
    if first.shape != second.shape or first.is_complex():
        return False
    return torch.allclose(first.double(), second.double(), rtol=0, atol=tolerance)


def expect_shape(given: Tensor, right: Tensor, slips: dict[str, Any], letters: str = "") -> None:
    """Raise :class:`Mistake` unless the shapes agree, with the sentence of the first slip that has the given shape.

    ``letters`` are what it calls the right shape, such as ``[B, N, D]``.
    """
    wanted = f"{letters} = {list(right.shape)}" if letters else str(list(right.shape))
    named = [f": {mistake}" for mistake, wrong in slips.items() if getattr(wrong, "shape", None) == given.shape]
    hint = "".join(named[:1])
    expect(given.shape == right.shape, f"the shape is {list(given.shape)}, but should be {wanted}{hint}")


def compare(given, right, slips: dict[str, Any], otherwise: str, *, letters: str = "", tolerance: float = 1e-5) -> None:
    """Return if ``given``, a tensor or a number, is right; else raise the sentence of the slip that it fits.

    Args:
        slips: for each sentence, the typical wrong answer that it names, or a function that recognises it.
        otherwise: the sentence for any other wrong answer.
        letters: as in :func:`expect_shape`.
        tolerance: as in :func:`close`.
    """
    if isinstance(given, Tensor):
        expect_shape(given, right, slips, letters)
    if not close(given, right, tolerance):
        for mistake, wrong in slips.items():
            found = wrong(given) if callable(wrong) else close(given, wrong, tolerance)
            expect(not found, mistake)
        raise Mistake(otherwise)


def exercise(title: str, *cases: tuple):
    """Turn a function that raises :class:`Mistake` into a check, which shows its verdict in one line.

    For each of ``cases`` in turn the function gets ``learners``, which is the learner's answer, and the numbers of the
    case, such as sizes.
    """

    def decorate(body: Callable):
        @wraps(body)
        def check(learners) -> None:
            status, message = _judge(body, learners, cases or ((),))
            line = f"{title}: {status}: {message}" if message else f"{title}: {status}"
            print_and_store(line, VERDICT, {"check": body.__name__, "status": status, "message": message})

        ALL[body.__name__] = check
        return check

    return decorate


def _judge(body: Callable, learners, cases: tuple) -> tuple[str, str]:
    """Return status and message. Nothing that a learner can hand over makes this raise."""
    try:
        # fresh numbers every time, none taken from the notebook's own random state, and gradients as usual
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.default_generator.seed()  # torch.seed would seed the GPUs anew as well
            for case in DRAWS * cases:
                body(learners, *case)
    except NotAttempted:
        return NOT_ATTEMPTED, ""
    except Mistake as mistake:
        return NOT_YET, str(mistake)
    except Exception as error:
        return NOT_YET, f"what your code gave back could not be examined ({_in_words(error)})"
    return CORRECT, ""


def _state(thing):
    """Return all that a function could change in its argument, in a form that can be compared."""
    if isinstance(thing, Tensor):
        return thing.dtype, thing.shape, thing.requires_grad, thing.detach().numpy().tobytes()
    if isinstance(thing, nn.Module):
        tensors = [*thing.named_parameters(), *thing.named_buffers()]
        modes = [(name, part.training) for name, part in thing.named_modules()]
        return [(name, _state(tensor), _state(tensor.grad)) for name, tensor in tensors], modes
    return list(thing) if isinstance(thing, list) else None


def _in_words(error: BaseException) -> str:
    """Return ``Name: text`` on one line, and not a long one."""
    text = " ".join(str(error).split()[:30])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
