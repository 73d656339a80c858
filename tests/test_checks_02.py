"""The checks of notebook 02: right answers pass, and each typical wrong one is told what is wrong with it."""

import math
import re
import sys
from itertools import permutations
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

from vitlib.course import checks

NOTEBOOK = nbformat.read(Path(__file__).parents[1] / "notebooks" / "02_attention.ipynb", as_version=4)
ASIDES = [
    code
    for cell in NOTEBOOK.cells
    if cell.cell_type == "markdown"
    for code in re.findall(r"<summary>Aside.*?</summary>.*?```python\n(.*?)```", cell.source, re.S)
]
CHECKS = [checks.attention, checks.split_heads, checks.attend, checks.block_order]


def test_the_folded_aside_about_masks_holds_for_any_scores():
    (aside,) = ASIDES
    query, key, value = torch.randn(3, 3, 2)
    names = {"torch": torch, "math": math, "F": F, "query": query, "key": key, "value": value}
    exec(aside, {**names, "scores": query @ key.T / math.sqrt(2)})


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("learners", [3, torch.eye(3), lambda: 1, lambda *given: "word", lambda *given: [], sys.exit])
def test_no_answer_makes_a_check_crash(check, learners, verdict):
    assert verdict(check, learners).startswith("not yet: ")


@pytest.mark.parametrize("check", CHECKS)
def test_a_check_leaves_the_notebooks_random_numbers_alone(check):
    before = torch.get_rng_state()
    for learners in (F.scaled_dot_product_attention, "CDBFAE"):
        check(learners)
    assert torch.equal(torch.get_rng_state(), before)


def weighted(query, key, value, divisor, dim=-1):
    return (query @ key.mT / divisor).softmax(dim) @ value


ATTENTION = {
    "over the queries": (lambda q, k, v: weighted(q, k, v, 2, dim=-2), "sum to 1 over the queries, not over the keys"),
    "over the heads": (lambda q, k, v: weighted(q, k, v, 2, dim=1), "sum to 1 over the heads"),
    "over the batch": (lambda q, k, v: weighted(q, k, v, 2, dim=0), "sum to 1 over the batch"),
    "not scaled": (lambda q, k, v: weighted(q, k, v, 1), "the scores are not scaled"),
    "scaled by K": (lambda q, k, v: weighted(q, k, v, q.shape[-1]), "divided by K; divide them by the square root"),
    "scaled by T": (lambda q, k, v: weighted(q, k, v, math.sqrt(q.shape[-2])), "square root of T"),
    "swapped": (lambda q, k, v: weighted(k, q, v, 2), "queries and keys are swapped"),
    "no softmax": (lambda q, k, v: q @ k.mT / 2 @ v, "never normalised"),
    "nonsense": (lambda q, k, v: q + v, "not those of F.scaled_dot_product_attention"),
    "not a number": (lambda q, k, v: v * math.nan, "not those of F.scaled_dot_product_attention"),
    "weights alone": (lambda q, k, v: (q @ k.mT / 2).softmax(-1), r"the shape is \[2, 3, 5, 5\], but should be"),
    "weights too": (lambda q, k, v: (v, q), "a tuple came back"),
    "wrong transpose": (lambda q, k, v: q @ k.transpose(0, 1), "your code stopped with RuntimeError"),
}


@pytest.mark.parametrize(("wrong", "hint"), ATTENTION.values(), ids=ATTENTION)
def test_attention_names_the_mistake(wrong, hint, verdict):
    assert re.match(f"not yet: .*{hint}", verdict(checks.attention, wrong))


SPLIT_HEADS = {
    "view alone": (lambda x, h: x.view(x.shape[0], h, x.shape[1], -1), "tokens and heads are mixed up"),
    "interleaved": (lambda x, h: x.unflatten(2, (-1, h)).permute(0, 3, 1, 2), "every H-th feature"),
    "not swapped": (lambda x, h: x.unflatten(2, (h, -1)), "now swap the axes of tokens and heads"),
    "swapped twice": (lambda x, h: x.unflatten(2, (h, -1)).permute(0, 2, 3, 1), r"the shape is \[2, 3, 4, 5\]"),
    "heads reversed": (lambda x, h: x.unflatten(2, (h, -1)).transpose(1, 2).flip(1), "head h of a token is not its"),
}


@pytest.mark.parametrize(("wrong", "hint"), SPLIT_HEADS.values(), ids=SPLIT_HEADS)
def test_split_heads_names_the_mistake(wrong, hint, verdict):
    assert re.match(f"not yet: .*{hint}", verdict(checks.split_heads, wrong))


def test_split_heads_takes_a_view_that_is_followed_by_a_transpose(verdict):
    def learners(x, num_heads):
        return x.view(x.shape[0], x.shape[1], num_heads, -1).transpose(1, 2)

    assert verdict(checks.split_heads, learners) == "correct"


def sequence_first(tokens, to_qkv, num_heads):
    """The notebook's buggy function: right for [T, B, D]."""
    length, batch, _ = tokens.shape
    qkv = (tokens @ to_qkv).view(length, batch, 3, num_heads, -1)
    query, key, value = qkv.permute(2, 1, 3, 0, 4)
    return F.scaled_dot_product_attention(query, key, value).permute(2, 0, 1, 3).flatten(2)


def one_by_one(tokens, to_qkv, num_heads):
    return torch.cat([sequence_first(image[:, None], to_qkv, num_heads).transpose(0, 1) for image in tokens])


def heads_left_apart(tokens, to_qkv, num_heads):
    batch, length, width = tokens.shape
    qkv = (tokens @ to_qkv).view(batch, length, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(*qkv).reshape(batch, length, width)


ATTEND = {
    "not repaired": (sequence_first, "to the tokens at its own place in the other images"),
    "not swapped back": (
        lambda tokens, *rest: sequence_first(tokens.transpose(0, 1), *rest),
        r"the result is \[T, B, D\]",
    ),
    "view for transpose": (
        lambda tokens, *rest: sequence_first(tokens.view(5, 3, -1), *rest).reshape(tokens.shape),
        "output changes when the other images change",
    ),
    "heads left apart": (heads_left_apart, "the heads are not put back side by side"),
    "one head": (lambda tokens, to_qkv, heads: one_by_one(tokens, to_qkv, 1), "each image is on its own now"),
    "last image lost": (lambda tokens, *rest: one_by_one(tokens[:2], *rest), r"the shape is \[2, 5, 8\]"),
}


@pytest.mark.parametrize(("wrong", "hint"), ATTEND.values(), ids=ATTEND)
def test_attend_names_the_mistake(wrong, hint, verdict):
    assert re.match(f"not yet: .*{hint}", verdict(checks.attend, wrong))


@pytest.mark.parametrize(
    "right",
    [
        one_by_one,
        lambda tokens, *rest: sequence_first(tokens.transpose(0, 1), *rest).transpose(0, 1),
    ],
    ids=["one image after the other", "swapped in and out"],
)
def test_attend_takes_any_right_repair(right, verdict):
    assert verdict(checks.attend, right) == "correct"


def test_the_buggy_function_of_the_notebook_is_the_one_that_the_check_knows(verdict):
    (source,) = (cell.source for cell in NOTEBOOK.cells if cell.source.startswith("def attend_sequence_first"))
    names = {"F": F}
    exec(source.split("\n\n\n")[0], names)
    assert "in the other images" in verdict(checks.attend, names["attend_sequence_first"])


BLOCK_ORDER = {
    "a sublayer first": ("DCBFAE", "the first line, y = attention(y), uses y"),
    "the sum first": ("BCDFAE", "the first line, x = x + y, uses y"),
    "sum before sublayer": ("CBDEFA", "x = x + y right after y = norm1(x) adds the normalised tokens themselves"),
    "first sum too late": ("CDFABE", "y = norm2(x) right after y = attention(y) throws away a y"),
    "sublayers in a row": ("CDBAFE", "y = mlp(y) right after x = x + y works on a y that is not normalised"),
    "norms swapped": ("FDBCAE", "norm1 belongs to the attention"),
    "MLP first": ("FABCDE", "the attention comes before the MLP"),
    "a line lost": ("CDBFA", "each of the letters A to F exactly once"),
    "a line twice": ("CDBFAA", "each of the letters A to F exactly once"),
    "the lines themselves": (list(checks.PRE_NORM_LINES.values()), "each of the letters A to F exactly once"),
    "a number": (123456, "give the six letters as a text"),
}


@pytest.mark.parametrize(("wrong", "hint"), BLOCK_ORDER.values(), ids=BLOCK_ORDER)
def test_block_order_names_the_mistake(wrong, hint, verdict):
    said = verdict(checks.block_order, wrong)
    assert said.startswith("not yet: ") and hint in said


@pytest.mark.parametrize("right", ["CDBFAE", "CDEFAB", "cdbfae", list("CDBFAE"), tuple("CDEFAB")])
def test_block_order_takes_every_way_to_write_the_right_order(right, verdict):
    assert verdict(checks.block_order, right) == "correct"


def test_no_other_order_of_the_lines_is_correct(verdict):
    # B and E are the same line, and the norms change places in a test above: 60 orders that begin with C are left
    orders = ("C" + "".join(rest) for rest in permutations("ABDEF"))
    tried = [order for order in orders if order.index("B") < order.index("E")]
    assert len(tried) == 60
    assert [order for order in tried if verdict(checks.block_order, order) == "correct"] == ["CDBFAE"]
