"""The form that every chapter has: what a reader meets at its top, between its cells, in its exercises and at its end.

What comes out of the cells is nbval's business (``make test``): it compares every stored verdict with a fresh one.
"""

import math
import re
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F
from prose import outside_blocks
from torch import nn

from vitlib.course import checks
from vitlib.course.cells import names_of

FOLDER = Path(__file__).parents[1] / "notebooks"
CHAPTERS = sorted(FOLDER.glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))

LONGEST_CELL = 15
CELLS_BETWEEN_PROMPTS = 3
EXERCISE = re.compile(r"^### (Exercise \d: .+)\n+(★☆☆|★★☆|★★★) · (\d+) minutes · (\S.*)$", re.MULTILINE)
KINDS = {"fill in", "predict", "repair", "reorder", "extend"}
HTML_IMAGE = re.compile(r"<img\b[^>]*>")
MARKDOWN_IMAGE = re.compile(r"!\[([^\]]*)\]\(")

MORE = "## If you want more"

by_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def cells_of(path):
    return nbformat.read(path, as_version=4).cells


def prose_of(cells):
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def is_setup(cell):
    """Imports and the parameters cell are as long as they are."""
    return "parameters" in cell.metadata.get("tags", ()) or "from vitlib.course.parameters import" in cell.source


def is_folded(cell):
    return "hide-input" in cell.metadata.get("tags", ())


def start_of(cells):
    """The number of the first cell behind the set-up."""
    return 1 + next(number for number, cell in enumerate(cells) if "check_parameters(globals())" in cell.source)


def exercise_cells(path):
    """Name of the check to the code cell that calls it."""
    return {name: cell for cell in cells_of(path) for name in names_of(cell).calls}


def verdict_of(cell):
    """The status that the stored output of an exercise's cell shows."""
    (verdict,) = [output.data[checks.VERDICT] for output in cell.outputs if checks.VERDICT in output.get("data", {})]
    return verdict["status"]


@by_chapter
def test_the_top_says_what_it_is_for_what_it_needs_and_what_to_expect(path):
    top = cells_of(path)[0].source
    assert top.startswith(f"# {path.stem[:2]} ")
    for heading in ("**Afterwards you can**", "**You need**", "**Time**", "**Expect**"):
        assert heading in top, heading
    minutes, seconds = re.search(r"\*\*Time\*\* (\d+) minutes for you, about (\S+ \w+) for the computer", top).groups()
    assert int(minutes) <= 60 and seconds


def minutes_of(cells):
    """How long these cells take: reading, code, predictions, figures, and exercises at 1.3 times their minutes."""
    prose = prose_of(cells)
    code = [cell.source for cell in cells if cell.cell_type == "code" and not is_setup(cell) and not is_folded(cell)]
    lines = sum(bool(line.strip()) for source in code for line in source.splitlines())
    figures = len(MARKDOWN_IMAGE.findall(prose)) + sum(len(re.findall(r"plots\.show\(|explorer\(", c)) for c in code)
    exercises = sum(int(minutes) for _, _, minutes, _ in EXERCISE.findall(prose))
    return len(prose.split()) / 180 + lines / 20 + 0.6 * prose.count("**Predict.**") + 0.3 * figures + 1.3 * exercises


@by_chapter
def test_the_minutes_of_the_header_are_honest(path):
    cells = cells_of(path)
    end = next((number for number, cell in enumerate(cells) if cell.source.startswith(MORE)), len(cells))
    (spine,) = re.findall(r"\*\*Time\*\* (\d+) minutes", cells[0].source)
    assert abs(int(spine) - minutes_of(cells[:end])) <= 2
    if end < len(cells):
        (more,) = re.findall(r"Another (\d+) minutes wait behind", cells[0].source)
        assert abs(int(more) - minutes_of(cells[end:])) <= 3
        assert cells[end].source.startswith(f"{MORE} ({more} minutes)")


@by_chapter
def test_the_way_to_the_lesson_is_short(path):
    """A picture at the head, the set-up folded, and vitlib before torch."""
    cells = cells_of(path)
    assert f"](figures/vit-{path.stem[:2]}.svg)" in cells[0].source
    parameters = next(cell for cell in cells if "parameters" in cell.metadata.get("tags", ()))
    assert all(is_folded(cell) for cell in cells[1 : start_of(cells)] if cell is not parameters)
    imports = next(cell.source for cell in cells if "course.parameters import" in cell.source)
    assert imports.index("from vitlib") < imports.index("import torch")


def test_the_code_of_the_folded_asides_of_chapter_02_runs():
    prose = prose_of(cells_of(FOLDER / "02_attention.ipynb"))
    asides = re.findall(r"<summary>Aside(?:(?!</details>).)*```python\n(.*?)```", prose, re.S)
    query, key, value = torch.randn(3, 3, 2)
    names = {"torch": torch, "nn": nn, "math": math, "F": F, "query": query, "key": key, "value": value}
    assert len(asides) == 2
    for code in asides:
        assert "assert " in code
        exec(code, {**names, "scores": query @ key.T / math.sqrt(2), "D": 8, "H": 2})


@by_chapter
def test_code_cells_are_short_enough_to_read(path):
    code = [cell.source for cell in cells_of(path) if cell.cell_type == "code" and not is_setup(cell)]
    assert [source for source in code if len(source.splitlines()) > LONGEST_CELL] == []


@by_chapter
def test_the_reader_is_asked_before_being_shown(path):
    cells = cells_of(path)
    start, since_prompt = start_of(cells), 0
    for number, cell in enumerate(cells[start:], start=start):
        if cell.cell_type == "markdown":
            if "**Predict.**" in cell.source or "### Exercise" in cell.source:
                since_prompt = 0
        else:
            since_prompt += 1
            assert since_prompt <= CELLS_BETWEEN_PROMPTS, f"cell {number}: no prompt in the code cells before it"


@by_chapter
def test_every_figure_has_an_alternative_text_and_its_conclusion_beside_it(path):
    cells = cells_of(path)
    for number, cell in enumerate(cells):
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 20, f"cell {number}"
                assert cells[number + 1].cell_type == "markdown", f"cell {number}"
    prose = prose_of(cells)
    assert all(len(text) > 20 for text in MARKDOWN_IMAGE.findall(prose))
    assert all(re.search(r'alt="[^"]{20,}"', image) for image in HTML_IMAGE.findall(prose))


@by_chapter
def test_every_exercise_has_its_level_minutes_kind_stub_check_and_hint(path):
    prose = prose_of(cells_of(path))
    headed = EXERCISE.findall(prose)
    assert len(headed) == prose.count("### Exercise"), "a heading, then: ★☆☆ · 5 minutes · fill in"
    assert {kind for *_, kind in headed} <= KINDS
    stubs = exercise_cells(path).values()
    assert len(headed) == len(stubs) == prose.count("<summary>Hint</summary>")
    assert {verdict_of(cell) for cell in stubs} == {"not attempted yet"}
    assert (1 if path.stem.startswith("00") else 3) <= len(headed) <= 5
    assert prose.count(f"(solutions/{path.name})") >= 1 and "<summary>Solution</summary>" not in prose


@by_chapter
def test_the_solutions_notebook_solves_every_exercise(path):
    solved = exercise_cells(FOLDER / "solutions" / path.name)
    assert list(solved) == list(exercise_cells(path)), "the same checks in the same order"
    assert {verdict_of(cell) for cell in solved.values()} == {"correct"}
    titles = re.findall(r"^## (Exercise \d: .+)$", prose_of(cells_of(FOLDER / "solutions" / path.name)), re.MULTILINE)
    assert titles == [title for title, *_ in EXERCISE.findall(prose_of(cells_of(path)))]


def test_every_check_belongs_to_one_exercise_and_every_solution_to_a_chapter():
    used = [name for path in CHAPTERS for name in exercise_cells(path)]
    assert sorted(used) == sorted(checks.ALL)
    assert [path.name for path in SOLUTIONS] == [path.name for path in CHAPTERS]


@by_chapter
def test_the_end_has_news_an_exit_ticket_and_what_comes_next(path):
    _, end = prose_of(cells_of(path)).split("## Since 2020")
    since, ticket = end.split("## Exit ticket")
    assert since.count("](https://") >= 3 and len(since.split()) >= 60
    assert re.findall(r"<summary>Answer to (\d)</summary>", ticket) == ["1", "2", "3"] and "**Next:**" in ticket


@by_chapter
def test_headings_read_like_a_lesson_plan(path):
    levels = [len(marks) for marks in re.findall(r"^(#+) ", outside_blocks(prose_of(cells_of(path))), re.M)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:], strict=False)), "no level is left out"
