"""docs/teaching.md and the course agree: chapters, exercises, minutes, sections, commands, files and figures."""

import re
import textwrap
from pathlib import Path

import click
import pytest
from prose import words_after
from test_lessons import CHAPTERS, EXERCISE, cells_of, exercise_cells, prose_of

from vitlib.__main__ import main
from vitlib.course import grade
from vitlib.course.parameters import PARAMETERS
from vitlib.course.runner import read_lessons

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "teaching.md"
TEXT = GUIDE.read_text(encoding="utf-8")
# a block may be indented, as part of a list
FENCED = [
    (language, textwrap.dedent(block))
    for language, block in re.findall(r"^ *```(\w*)\n(.*?)^ *```", TEXT, re.MULTILINE | re.DOTALL)
]
OUTSIDE = re.sub(r"^ *```.*?^ *```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
SPANS = re.findall(r"`([^`\n]+)`", OUTSIDE)
LINES = [
    re.sub(r"(^|\s)#.*", "", line).strip()
    for source in [block for language, block in FENCED if language == "bash"] + SPANS
    for line in source.splitlines()
]
ROUTES = re.findall(r"^###+ (2\.[12] .*|Week .*)$", TEXT, re.MULTILINE)
NAMED_SECTIONS = re.compile(r"\b(0\d) (§\d+(?:(?:, | and | to )§\d+)*)")
OPTIONAL = "notebooks/solutions"  # the guide says how to take it out

by_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
by_route = pytest.mark.parametrize("heading", ROUTES)


def below(start):
    """The text from the heading that starts with these words to the next heading of its level or above."""
    marks, rest = re.search(rf"^(#+) {re.escape(start)}(.*)", TEXT, re.MULTILINE | re.DOTALL).groups()
    return re.split(rf"^#{{1,{len(marks)}}} ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def tables(text):
    """Each table as the list of its rows, each row a dict of column title to cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        titles, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        assert {len(row) for row in rows} == {len(titles)}, f"a cell too many or too few below {titles}"
        found.append([dict(zip(titles, row, strict=True)) for row in rows])
    return found


def top_of(path):
    """A chapter's minutes for the learner, and the computer's time, as its first cell has them."""
    pattern = r"\*\*Time\*\* (\d+) minutes for you, about (\S+ \w+) for the computer"
    minutes, computer = re.search(pattern, cells_of(path)[0].source).groups()
    return int(minutes), computer


def exercises_of(path):
    """``01.2`` to (title, check, level, minutes, kind, section), as the chapter has them."""
    found, section = {}, None
    checks = iter(exercise_cells(path))
    for heading in re.finditer(rf"^## (?P<section>\d+|Exit) .*$|{EXERCISE.pattern}", prose_of(cells_of(path)), re.M):
        if heading["section"]:
            section = heading["section"]
        else:
            _, title, level, minutes, kind = heading.groups()
            number, title = re.fullmatch(r"Exercise (\d): (.+)", title).groups()
            found[f"{path.stem[:2]}.{number}"] = title, next(checks), level, int(minutes), kind, section
    return found


EXERCISES = {number: row for path in CHAPTERS for number, row in exercises_of(path).items()}
SECTIONS = {
    path.stem[:2]: dict(re.findall(r"^## (\d+) (.+)$", prose_of(cells_of(path)), re.MULTILINE)) for path in CHAPTERS
}


def sections_named(text):
    """``(chapter, section)`` of every ``01 §2``, ``01 §1, §3`` and ``01 §1 to §3``."""
    found = []
    for chapter, listed in NAMED_SECTIONS.findall(text):
        for to, section in re.findall(r"(to )?§(\d+)", listed):
            first = int(found[-1][1]) + 1 if to else int(section)
            found += [(chapter, str(number)) for number in range(first, int(section) + 1)]
    return found


def numbers_named(text):
    return re.findall(r"\b0\d\.\d\b", text)


def test_the_chapters_have_the_minutes_and_times_of_their_notebooks():
    *rows, total = tables(below("1 Before you choose"))[0]
    named = [re.fullmatch(r"\[(\d\d)\]\(\.\./notebooks/(.+)\)", row["chapter"]).groups() for row in rows]
    assert named == [(path.stem[:2], path.name) for path in CHAPTERS]
    times = [(int(row["minutes"]), row["the computer needs about"]) for row in rows]
    assert times == [top_of(path) for path in CHAPTERS]
    assert int(total["minutes"]) == sum(minutes for minutes, _ in times)


def test_the_table_of_exercises_is_that_of_the_notebooks_by_level():
    (rows,) = tables(below("5 Exercises by difficulty"))
    table = {
        row["exercise"]: (row["task"], row["check"].strip("`"), row["level"], int(row["minutes"]), row["kind"])
        for row in rows
    }
    assert len(table) == len(rows)
    assert table == {number: row[:5] for number, row in EXERCISES.items()}
    levels = [level.count("★") for _, _, level, _, _ in table.values()]
    assert levels == sorted(levels)


@by_chapter
def test_the_sections_of_a_chapter_are_its_own_and_their_minutes_add_up(path):
    chapter = path.stem[:2]
    rows = tables(below(f"4.{int(chapter)} Chapter {chapter}"))[0]
    assert rows[-1]["section"] == "Exit ticket" and not rows[-1]["§"]
    assert {row["§"]: row["section"] for row in rows[:-1]} == SECTIONS[chapter]
    assert sum(int(row["minutes"]) for row in rows) == top_of(path)[0]
    for row in rows:
        here = {number for number, (*_, section) in exercises_of(path).items() if section == row["§"]}
        assert set(numbers_named(row["exercises"])) == here, row["section"]
        assert sum(EXERCISES[number][3] for number in here) <= int(row["minutes"]), row["section"]


@by_chapter
def test_a_chapter_has_what_a_teacher_needs_for_it(path):
    text = below(f"4.{int(path.stem[:2])} Chapter {path.stem[:2]}")
    timing, mistakes = tables(text)
    assert sum(bool(row["ask aloud"]) for row in timing) >= 5 and len(mistakes) >= 4
    assert all(all(row.values()) for row in mistakes)
    assert set(re.findall(r"§(\d+)", NAMED_SECTIONS.sub("", text))) <= set(SECTIONS[path.stem[:2]])
    for start in ("**The figure:**", "**Beyond the notebook:**", "**If ", "**Where they get stuck:**"):
        assert start in text, start


def test_there_are_three_routes():
    assert [" ".join(route.split()[:2]) for route in ROUTES] == [
        "2.1 90",
        "2.2 Half",
        "Week 1:",
        "Week 2:",
        "Week 3:",
        "Week 4:",
    ]


@by_route
def test_a_route_adds_up_to_what_it_states(heading):
    (stated,) = re.findall(r"\b(\d+) minutes", heading) or re.findall(r"sessions of (\d+) minutes", TEXT)
    *rows, total = tables(below(heading))[0]
    assert (total["minutes"], total["block"]) == (f"**{stated}**", "together")
    assert sum(int(row["minutes"]) for row in rows) == int(stated)


@by_route
def test_a_block_has_time_for_its_exercises_and_they_belong_to_its_sections(heading):
    *rows, _ = tables(below(heading))[0]
    for row in rows:
        where, numbers = sections_named(row["where"]), numbers_named(row["exercises"])
        assert {(number[:2], EXERCISES[number][5]) for number in numbers} <= set(where), row["block"]
        assert sum(EXERCISES[number][3] for number in numbers) <= int(row["minutes"]), row["block"]


def test_homework_takes_the_minutes_of_its_exercises_and_nobody_does_one_twice():
    homework = re.findall(r"^Homework \((\d+) minutes\): ((?:0\d\.\d(?:, |\.))+)", TEXT, re.MULTILINE)
    assert len(homework) == 4
    for minutes, numbers in homework:
        assert int(minutes) == sum(EXERCISES[number][3] for number in numbers_named(numbers))
    weeks = below("2.3 Four weeks")
    in_class = [number for table in tables(weeks) for row in table for number in numbers_named(row["exercises"])]
    at_home = [number for _, numbers in homework for number in numbers_named(numbers)]
    assert sorted(in_class + at_home) == sorted(EXERCISES)


def test_every_section_and_exercise_that_is_named_exists():
    named = sections_named(OUTSIDE)
    assert len(named) > 50 and not [name for name in named if name[1] not in SECTIONS[name[0]]]
    assert set(numbers_named(OUTSIDE)) == set(EXERCISES)


def test_files_that_are_named_exist():
    places = []
    # runs/ is what commands write to
    tops = "|".join(re.escape(path.name) for path in ROOT.iterdir() if path.name[0] != "." and path.name != "runs")
    for word in " ".join(LINES).split():
        if re.match(rf"(?:{tops})/", word) or re.fullmatch(r"[\w-]+\.(?:md|txt|toml)", word):
            places.append(ROOT / word)
    missing = {path.relative_to(ROOT).as_posix().rstrip("/") for path in places if not path.exists()}
    assert len(places) > 3 and missing <= {OPTIONAL}


@pytest.mark.parametrize("words", list(words_after("-m vitlib", LINES)), ids=" ".join)
def test_every_vitlib_command_is_understood(words, tmp_path, monkeypatch):
    (tmp_path / "FOLDER" / "train" / "class").mkdir(parents=True)  # the reader's images
    monkeypatch.chdir(tmp_path)
    command = main.get_command(click.Context(main), words[0])
    assert command is not None, f"python -m vitlib has no command {words[0]}"
    options = command.make_context(words[0], list(words[1:])).params
    lessons = [
        lesson
        for lesson in read_lessons(ROOT / "notebooks")
        if not options.get("only") or lesson.name[:2] in options["only"]
    ]
    for name, text in options.get("given", ()):
        assert any(name in lesson.parameters for lesson in lessons), name
        if text.isdigit():  # a FOLDER is the reader's
            PARAMETERS[name].check(PARAMETERS[name].parse(text))


def test_the_guide_has_commands_and_their_make_targets_exist():
    commands = {words[0] for words in words_after("-m vitlib", LINES)}
    assert commands >= {"doctor", "download", "finetune", "grade", "predict", "run"}
    targets = [words[0] for words in words_after("make", LINES)]
    assert targets
    for target in targets:
        assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_parameters_that_are_to_be_set_exist_and_may_have_these_values():
    settings = re.findall(r"`(\w+)` (?:to|at) (\d+)", OUTSIDE)
    assert len(settings) >= 5
    for name, value in settings:
        PARAMETERS[name].check(int(value))


def test_every_name_in_backquotes_is_one_of_the_course():
    sources = [*ROOT.glob("vitlib/**/*.py"), *ROOT.glob("tests/test_[lr]*.py"), *CHAPTERS]
    known = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    names = {name for span in SPANS if "/" not in span for name in re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", span)}
    assert len(names) > 20
    assert not [name for name in names if not re.search(rf"\b{name}\b", known)]


@pytest.mark.parametrize("snippet", [block for language, block in FENCED if language == "python"])
def test_every_python_snippet_runs(snippet):
    namespace = {}
    exec(compile(snippet, "docs/teaching.md", "exec"), namespace)
    trained, card = namespace["trained"], namespace["card"]  # what the next cells of chapter 03 use
    assert trained.model.linear_classifier.out_features == len(card.classes)


def test_the_options_of_grade_are_those_of_the_command():
    options, words = tables(below("6.2 The command"))
    table = {row["option"].strip("`"): row["default"].strip("`") for row in options}
    command = main.get_command(click.Context(main), "grade")
    defaults = command.make_context("grade", ["handed-in"]).params
    given = {option.opts[0]: defaults[option.name] for option in command.params if option.name != "folder"}
    assert table == {name: str(default).removesuffix(".0") if default else "" for name, default in given.items()}
    assert [row["word"] for row in words] == [*grade.WORDS.values(), grade.MISSING, grade.NOT_REACHED]


def test_what_grade_prints_and_writes_is_what_the_guide_shows():
    (shown,) = [block for _, block in FENCED if "could not be run to the end" in block]
    for path in CHAPTERS[:2]:
        assert re.search(rf"^{path.stem} +{' +'.join(exercise_cells(path))} +passed$", shown, re.MULTILINE), path.stem
    columns = re.search(r"with\s+the\s+columns (.*?);", TEXT, re.DOTALL).group(1)
    assert tuple(re.findall(r"`(\w+)`", columns)) == grade.COLUMNS


def test_every_accuracy_and_size_in_memory_was_measured():
    stored = [
        str(output.get("text", output.get("data", {}).get("text/plain", "")))
        for path in CHAPTERS
        for cell in cells_of(path)
        for output in cell.get("outputs", [])
    ]
    known = " ".join([(ROOT / "RESULTS.md").read_text(), *(prose_of(cells_of(path)) for path in CHAPTERS), *stored])
    figures = re.findall(r"\b\d+\.\d %|\b\d+ to \d+ %|\b\d+ MiB|\b\d{1,3},\d{3}(?= of)|\b\d{3},\d{3} numbers", OUTSIDE)
    assert len(figures) >= 6
    assert not [figure for figure in figures if figure.removesuffix(" numbers") not in known]


def test_every_term_of_the_glossary_stands_there_once_and_is_used_in_its_chapter():
    (rows,) = tables(below("7 Glossary with shapes"))
    assert len(rows) >= 35 and len({row["term"] for row in rows}) == len(rows)
    prose = {path.stem[:2]: prose_of(cells_of(path)).lower() for path in CHAPTERS}
    for row in rows:
        words = [word.strip() for word in re.split(r"[,()]", row["term"].lower()) if word.strip()]
        assert any(re.search(rf"\b{re.escape(word)}", prose[row["chapter"]]) for word in words), row["term"]


def test_the_guide_leaves_no_gap():
    assert "@@" not in TEXT
