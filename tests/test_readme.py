"""README's promises: its Python runs, and the commands it names exist."""

import re
from pathlib import Path

import click
import pytest
from prose import words_after

from vitlib.__main__ import main
from vitlib.course.parameters import PARAMETERS
from vitlib.course.runner import read_lesson, read_lessons

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
OUTSIDE = re.sub(r"^```.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
SNIPPETS = [block for language, block in FENCED if language == "python"]
# one command a line, a backslash joins two; in the prose, commands are in backquotes
LINES = [
    re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ")
    for block in [block for language, block in FENCED if language != "python"] + re.findall(r"`([^`\n]+)`", OUTSIDE)
    for line in block.replace("\\\n", " ").splitlines()
]


def test_readme_has_python_snippets_and_commands():
    assert SNIPPETS
    assert list(words_after("make", LINES))
    assert list(words_after("python -m vitlib", LINES))
    assert any("torchrun" in line for line in LINES)


def test_every_python_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    namespace = {"__name__": "__main__"}
    for number, snippet in enumerate(SNIPPETS, start=1):
        exec(compile(snippet, f"README.md, Python snippet {number}", "exec"), namespace)


@pytest.mark.parametrize("words", list(words_after("make", LINES)), ids=" ".join)
def test_every_make_target_exists(words):
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        assert "=" in word or re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("words", list(words_after("-m vitlib", LINES)), ids=" ".join)
def test_every_vitlib_command_is_understood(words, tmp_path, monkeypatch):
    (tmp_path / "FOLDER" / "train" / "class").mkdir(parents=True)  # the reader's images
    monkeypatch.chdir(tmp_path)
    if words[0].startswith("-"):
        main.make_context("vitlib", list(words), resilient_parsing=True)
        return
    command = main.get_command(click.Context(main), words[0])
    assert command is not None, f"python -m vitlib has no command {words[0]}"
    options = command.make_context(words[0], words[1:]).params
    assert {name for name, _ in options.get("given", ())} <= set(PARAMETERS)
    file = options.get("parameters")
    assert file is None or (ROOT / file).exists(), file


def parameter_table():
    """The table of parameters as README should have it, a row per parameter of the notebooks."""
    lessons = read_lessons(ROOT / "notebooks")
    sweeps = [read_lesson(path) for path in sorted((ROOT / "notebooks" / "sweeps").glob("*.ipynb"))]
    takers = [(lesson.name[:2], lesson) for lesson in lessons] + [(lesson.name, lesson) for lesson in sweeps]
    for name, parameter in PARAMETERS.items():
        taking = {shown: lesson.defaults[name] for shown, lesson in takers if name in lesson.parameters}
        if taking:
            default = next(iter(taking.values()))
            yield f"| `{name}` | `{default}` | {', '.join(taking)} | {parameter.help} |"


def test_the_table_of_parameters_is_that_of_the_notebooks():
    assert [line for line in TEXT.splitlines() if re.match(r"\| `\w+` \| `", line)] == list(parameter_table())


def test_scripts_that_readme_runs_exist():
    scripts = re.findall(r"python ((?:\w+/)+\w+\.py)", "\n".join(LINES))
    assert not [script for script in scripts if not (ROOT / script).exists()]
