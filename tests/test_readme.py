"""README, CONTRIBUTING and docs/: their Python runs, their commands exist, and their tables are those of the course."""

import re
import shutil
import textwrap

import click
import pytest
from prose import outside_blocks, words_after
from safetensors.torch import save_file
from test_lessons import CHAPTERS, cells_of, exercise_cells, prose_of

from tools.address import ROOT
from vitlib.__main__ import main
from vitlib.course.parameters import PARAMETERS
from vitlib.course.runner import read_lesson, read_lessons
from vitlib.model import create_model
from vitlib.weights.convert import to_state_dict

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
GUIDE = TEXTS["docs/teaching.md"] + TEXTS["docs/run-sheet.md"]

by_page = pytest.mark.parametrize("page", TEXTS)


def blocks(page):
    """Language and text of the page's fenced blocks, also of those that are indented in a list."""
    found = re.findall(r"^ *```(\w*)[^\n]*\n(.*?)^ *```", TEXTS[page], re.MULTILINE | re.DOTALL)
    return [(language, textwrap.dedent(text)) for language, text in found]


def lines(page):
    """The page's commands, one a line: those of its blocks and those in backquotes."""
    spans = re.findall(r"`([^`\n]+)`", outside_blocks(TEXTS[page]))
    code = [text for language, text in blocks(page) if language in ("bash", "powershell", "")] + spans
    return [line.strip() for text in code for line in text.splitlines()]


@by_page
def test_every_python_snippet_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    downloaded = to_state_dict(create_model("Ti/16", 2, num_layers=1, image_size=32), "huggingface")
    save_file(downloaded, "model.safetensors")
    namespace = {"__name__": "__main__"}
    for number, (language, text) in enumerate(blocks(page), start=1):
        if language == "python":
            exec(compile(text, f"{page}, block {number}", "exec"), namespace)


@by_page
def test_every_command_is_understood(page, tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / "FOLDER" / split / "class").mkdir(parents=True)  # the reader's images
    for folder in ("notebooks/parameters", "notebooks/sweeps"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for path in [*CHAPTERS, tmp_path / "notebooks/sweeps/labels.yaml"]:
        shutil.copy(path, tmp_path / ("notebooks" if path in CHAPTERS else "my_sweep.yaml"))
    (tmp_path / "handed-in").mkdir()
    monkeypatch.chdir(tmp_path)
    for words in words_after("-m vitlib", [line.removesuffix(" --help") for line in lines(page)]):
        command = main.get_command(click.Context(main), words[0])
        assert command is not None, f"python -m vitlib has no command {words[0]}"
        options = command.make_context(words[0], words[1:]).params if words[1:] else {}
        for name, text in options.get("given") or ():
            parameter = PARAMETERS[name]
            parameter.check(parameter.parse(text))


@by_page
def test_no_command_has_a_comment_which_zsh_and_cmd_would_take_for_words(page):
    assert not [line for line in lines(page) if re.search(r"(^|\s)#", line)]


@by_page
def test_make_targets_and_scripts_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in words_after("make", lines(page)):
        assert "=" in words[0] or re.search(rf"^{re.escape(words[0])}:", makefile, re.MULTILINE), words
    scripts = re.findall(r"python ((?:\w+/)+\w+\.py)", "\n".join(lines(page)))
    assert not [script for script in scripts if not (ROOT / script).exists()]


def parameter_rows():
    """The rows of docs/parameters.md as the notebooks want them."""
    lessons = [(lesson.name[:2], lesson) for lesson in read_lessons(ROOT / "notebooks")]
    lessons += [(path.stem, read_lesson(path)) for path in sorted((ROOT / "notebooks" / "sweeps").glob("*.ipynb"))]
    for name, parameter in PARAMETERS.items():
        taking = {shown: lesson.defaults[name] for shown, lesson in lessons if name in lesson.parameters}
        if taking:
            (default,) = set(taking.values())
            yield f"| `{name}` | `{default}` | {', '.join(taking)} | {parameter.help} |"


def test_the_table_of_parameters_is_the_notebooks():
    rows = re.findall(r"^\| `\w+` \| `.*", TEXTS["docs/parameters.md"], re.MULTILINE)
    assert rows == list(parameter_rows())


@pytest.mark.parametrize("page", ["README.md", "docs/teaching.md"])
def test_chapters_have_the_minutes_of_their_notebooks(page):
    rows = dict(re.findall(r"^\| \[(\d\d)[^\]]*\]\(\S+\.ipynb\) \| .+? \| (\d+)[ |]", TEXTS[page], re.MULTILINE))
    minutes = {path.stem[:2]: re.search(r"\*\*Time\*\* (\d+)", cells_of(path)[0].source)[1] for path in CHAPTERS}
    assert rows == minutes


def test_the_guide_names_exercises_that_exist():
    for path in CHAPTERS:
        chapter = path.stem[:2]
        exercises = {f"{chapter}.{number}" for number in range(1, len(exercise_cells(path)) + 1)}
        assert set(re.findall(rf"\b{chapter}\.\d\b", GUIDE)) <= exercises


def test_the_numbers_of_the_guide_were_measured():
    texts = [TEXTS["README.md"], (ROOT / "RESULTS.md").read_text(encoding="utf-8")]
    measured = "".join(texts + [prose_of(cells_of(path)) for path in CHAPTERS])
    assert not [number for number in re.findall(r"\d+\.\d(?= %)", GUIDE) if number not in measured]
