"""The exercises of all chapters: an untouched one stops nothing, and its folded solution is right."""

import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

from vitlib.course import checks
from vitlib.model import ViTModel

CHAPTERS = sorted((Path(__file__).parents[1] / "notebooks").glob("[0-9]*.ipynb"))
CALL = re.compile(r"^checks\.(?!be_strict)\w+\(\w+\)$", re.MULTILINE)
SOLUTION = re.compile(r"<summary>Solution</summary>.*?```python\n(.*?)```", re.DOTALL)


def exercises():
    """(chapter and check, code of the stub, code of the folded solution) of every exercise."""
    found = []
    for path in CHAPTERS:
        cells = nbformat.read(path, as_version=4).cells
        stubs = [cell.source for cell in cells if cell.cell_type == "code" and CALL.search(cell.source)]
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        solutions = SOLUTION.findall(text)
        assert len(stubs) == len(solutions) == text.count("### Exercise"), path.name
        for stub, solution in zip(stubs, solutions, strict=True):
            found.append(pytest.param(stub, solution, id=f"{path.stem} {CALL.search(stub).group()}"))
    return found


def run(code: str) -> None:
    exec(code, {"checks": checks, "math": math, "torch": torch, "F": F, "ViTModel": ViTModel})


def test_every_chapter_has_at_least_three_exercises():
    chapters = [param.id.split()[0] for param in exercises()]
    assert all(chapters.count(path.stem) >= 3 for path in CHAPTERS)


@pytest.mark.parametrize(("stub", "solution"), exercises())
def test_an_untouched_stub_is_not_attempted_yet(stub, solution, capsys):
    run(stub)
    assert capsys.readouterr().out.endswith(": not attempted yet\n")


@pytest.mark.parametrize(("stub", "solution"), exercises())
def test_a_strict_check_stops_at_an_untouched_stub(stub, solution):
    checks.be_strict(True)
    with pytest.raises(AssertionError, match="not attempted yet"):
        run(stub)


@pytest.mark.parametrize(("stub", "solution"), exercises())
def test_the_folded_solution_passes_strictly(stub, solution, capsys):
    checks.be_strict(True)
    run(f"{solution}\n{CALL.search(stub).group()}")
    assert capsys.readouterr().out.endswith(": correct\n")
