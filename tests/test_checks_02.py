"""What the lesson of chapter 02 claims beside its cells: its folded code, its buggy function, the order of a block."""

import math
import re
from itertools import permutations
from pathlib import Path

import nbformat
import torch
import torch.nn.functional as F
from torch import nn

from vitlib.course import checks

NOTEBOOK = nbformat.read(Path(__file__).parents[1] / "notebooks" / "02_attention.ipynb", as_version=4)
ASIDES = [
    code
    for cell in NOTEBOOK.cells
    for code in re.findall(r"<summary>Aside(?:(?!</details>).)*```python\n(.*?)```", cell.source, re.S)
]


def test_the_code_of_the_two_folded_asides_runs_and_its_assertions_hold():
    query, key, value = torch.randn(3, 3, 2)
    names = {"torch": torch, "nn": nn, "math": math, "F": F, "query": query, "key": key, "value": value}
    assert len(ASIDES) == 2
    for code in ASIDES:
        assert "assert " in code
        exec(code, {**names, "scores": query @ key.T / math.sqrt(2), "D": 8, "H": 2})


def test_the_buggy_function_of_the_notebook_is_the_one_that_the_check_knows(verdict):
    (source,) = (cell.source for cell in NOTEBOOK.cells if cell.source.startswith("def attend_sequence_first"))
    names = {"F": F}
    exec(source.split("\n\n\n")[0], names)
    assert "in the other images" in verdict(checks.attend, names["attend_sequence_first"])


def test_no_other_order_of_the_lines_is_correct(verdict):
    # B and E are the same line, and the norms change places in answers_02: 60 orders that begin with C are left
    orders = ("C" + "".join(rest) for rest in permutations("ABDEF"))
    tried = [order for order in orders if order.index("B") < order.index("E")]
    assert len(tried) == 60
    assert [order for order in tried if verdict(checks.block_order, order) == "correct"] == ["CDBFAE"]
