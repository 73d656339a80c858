"""The checks of notebook 01: right answers pass, and each typical wrong one is told what is wrong with it."""

import sys

import pytest
import torch
import torch.nn.functional as F

from vitlib.course import checks
from vitlib.model import patchify


def cut(images, size):
    """[B, C, H, W] to [B, rows, columns, C, P, P], a pixel block at a time."""
    rows = [torch.stack(row.split(size, 3), 1) for row in images.split(size, 2)]  # each [B, columns, C, P, P]
    return torch.stack(rows, 1)


def in_front(patches, cls_token):
    return torch.cat([cls_token.expand(len(patches), -1, -1), patches], 1)


def at_the_end(patches, cls_token):
    return torch.cat([patches, cls_token.expand(len(patches), -1, -1)], 1)


@pytest.mark.parametrize("check", [checks.patch_numbers, checks.patchify, checks.tokens])
@pytest.mark.parametrize("learners", [None, 3, lambda: 1, lambda *given: "word", lambda *given: ([], []), sys.exit])
def test_no_answer_makes_a_check_crash(check, learners, verdict):
    assert verdict(check, learners).startswith("not yet: ")


PATCH_NUMBERS = {
    "a float": (lambda h, w, c, p: (h / p * (w / p), c * p * p), "divide with //"),
    "float dimension": (lambda h, w, c, p: (h // p * (w // p), float(c * p * p)), "divide with //"),
    "rows only": (lambda h, w, c, p: (h // p, c * p * p), "one column of patches"),
    "columns only": (lambda h, w, c, p: (w // p, c * p * p), "one row of patches"),
    "height squared": (lambda h, w, c, p: ((h // p) ** 2, c * p * p), "squared the number of rows"),
    "width squared": (lambda h, w, c, p: ((w // p) ** 2, c * p * p), "squared the number of columns"),
    "divided once": (lambda h, w, c, p: (h * w // p, c * p * p), "divide twice"),
    "counted CLS": (lambda h, w, c, p: (h * w // p**2 + 1, c * p * p), "CLS token is no patch"),
    "nonsense": (lambda h, w, c, p: (h * w, c * p * p), "not the number of rows times"),
    "no channels": (lambda h, w, c, p: (h * w // p**2, p * p), "forgot the channels"),
    "not squared": (lambda h, w, c, p: (h * w // p**2, c * p), "forgot to square"),
    "a row": (lambda h, w, c, p: (h * w // p**2, p), "one row of pixels"),
    "wrong order": (lambda h, w, c, p: (c * p * p, h * w // p**2), "wrong order"),
    "one number": (lambda h, w, c, p: h * w // p**2, "two numbers are wanted"),
    "half done": (lambda h, w, c, p: (h * w // p**2, ...), "still missing"),
}


@pytest.mark.parametrize(("wrong", "hint"), PATCH_NUMBERS.values(), ids=PATCH_NUMBERS)
def test_patch_numbers_names_the_mistake(wrong, hint, verdict):
    for _ in range(5):  # whatever sizes are drawn
        assert hint in verdict(checks.patch_numbers, wrong)


def test_two_dots_for_two_numbers_count_as_not_attempted(verdict):
    assert verdict(checks.patch_numbers, lambda h, w, c, p: (..., ...)) == "not attempted yet"


@pytest.mark.parametrize(
    "right", [patchify, lambda x, p: cut(x, p).flatten(3).flatten(1, 2), lambda x, p: F.unfold(x, p, stride=p).mT]
)
def test_patchify_accepts_every_way_there(right, verdict):
    assert verdict(checks.patchify, right) == "correct"


PATCHIFY = {
    "reshape alone": (
        lambda x, p: x.reshape(len(x), -1, x.shape[1] * p * p),
        "reshape alone never moves a number",
    ),
    "channels last": (
        lambda x, p: cut(x, p).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2),
        "channels come last",
    ),
    "numbered by column": (
        lambda x, p: cut(x, p).transpose(1, 2).flatten(3).flatten(1, 2),
        "numbered down the columns",
    ),
    "mirrored": (lambda x, p: cut(x, p).mT.flatten(3).flatten(1, 2), "mirrored"),
    "transposed image": (lambda x, p: cut(x.mT, p).flatten(3).flatten(1, 2), "transposed image"),
    "shuffled": (lambda x, p: patchify(x, p).flip(1), "not in its place"),
    "scaled": (lambda x, p: patchify(x, p) / 255, "lost or changed"),
    "unfold as it comes": (lambda x, p: F.unfold(x, p, stride=p), "swap the last two dimensions"),
    "batch lost": (lambda x, p: patchify(x, p).flatten(0, 1), "keep the images of the batch apart"),
    "grid left": (lambda x, p: cut(x, p).flatten(3), "merge the two grid dimensions"),
    "patches left": (lambda x, p: cut(x, p).flatten(1, 2), "flatten each patch"),
    "channels apart": (lambda x, p: cut(x, p).flatten(4).flatten(1, 3), "side by side"),
    "one size only": (lambda x, p: patchify(x, 4), "stopped with ValueError"),
    "a list": (lambda x, p: list(patchify(x, p)), "a tensor is wanted, but a list"),
}


@pytest.mark.parametrize(("wrong", "hint"), PATCHIFY.values(), ids=PATCHIFY)
def test_patchify_names_the_mistake(wrong, hint, verdict):
    assert hint in verdict(checks.patchify, wrong)


TOKENS = {
    "CLS at the end": (lambda x, cls, p: at_the_end(x, cls) + p, "CLS stands at the end"),
    "broken as in the notebook": (lambda x, cls, p: at_the_end(x + p[:, :-1], cls), "CLS stands at the end"),
    "CLS without position": (lambda x, cls, p: in_front(x + p[:, 1:], cls), "CLS has no position"),
    "shifted positions": (lambda x, cls, p: in_front(x + p[:, :-1], cls), "the token before it"),
    "no positions": (lambda x, cls, p: in_front(x, cls), "positions are not added"),
    "mixed positions": (lambda x, cls, p: in_front(x, cls) + p.flip(1), "of its own number"),
    "no CLS": (lambda x, cls, p: x + p[:, 1:], "one token is missing"),
    "CLS added": (lambda x, cls, p: in_front(x + cls, cls) + p, "a token of its own"),
    "zeros for CLS": (lambda x, cls, p: in_front(x, 0 * cls) + p, "first token is not CLS"),
    "CLS once": (
        lambda x, cls, p: torch.cat([torch.cat([cls, 0 * cls.expand(len(x) - 1, -1, -1)]), x], 1) + p,
        "only the first image",
    ),
    "patches reversed": (lambda x, cls, p: in_front(x.flip(1), cls) + p, "unchanged and in their order"),
    "multiplied": (lambda x, cls, p: in_front(x, cls) * (1 + p) + p, "only add"),
    "wrong shape": (lambda x, cls, p: in_front(x, cls).mT, "the shape is"),
}


@pytest.mark.parametrize(("wrong", "hint"), TOKENS.values(), ids=TOKENS)
def test_tokens_names_the_mistake(wrong, hint, verdict):
    assert hint in verdict(checks.tokens, wrong)
