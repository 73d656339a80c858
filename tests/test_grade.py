"""Grading: who passed what, and that no notebook, whatever is in it, stops the rest or touches the originals."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from click.testing import CliRunner
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vitlib.__main__ import main
from vitlib.course import checks, contain, execution, grade
from vitlib.course.grade import grade_folder, tables

FOLDER = Path(__file__).parents[1] / "notebooks"
SOLUTIONS = sorted((FOLDER / "solutions").glob("*.ipynb"))

PARAMETERS = 'seed: int = 0  # start\npreset: str = "mini"  # size\nstrict_checks: bool = False  # stop'
# vitlib takes seconds to import in a kernel, so these notebooks have checks of their own: the right answer is 1
CHECKS = f"""
from IPython.display import display

def check(name):
    def judge(answer):
        status = {{None: "not attempted yet", 1: "correct"}}.get(answer, "not yet")
        verdict = {{"check": name, "status": status, "message": "=1 is\\nright" if status == "not yet" else ""}}
        display({{"text/plain": name, {checks.VERDICT!r}: verdict}}, raw=True)
        assert status == "correct" or not strict_checks, status
    return staticmethod(judge)

class checks:
    one, two, three, four = map(check, ("one", "two", "three", "four"))
"""
RIGHT = ("checks.one(1)", "checks.two(1)", "checks.three(1)")
OPEN = ("checks.one(None)", "checks.two(None)", "checks.three(None)")

MESS = """
import os, shutil, subprocess, sys, time
print(open("data/numbers.txt").read(), seed, preset, strict_checks)
left = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("left behind", left.pid)
---
for _ in range(20):
    print("x" * 1_000_000, flush=True)
    time.sleep(0.01)
---
input("your name? ")
---
sys.exit(3)
---
1 / 0
---
this is not Python
---
here = os.getcwd()
os.chdir("/")
shutil.rmtree(here)
"""


def write(path, *cells, parameters=PARAMETERS, setup=CHECKS):
    path.parent.mkdir(parents=True, exist_ok=True)
    first = [new_code_cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []
    notebook = new_notebook(cells=[new_markdown_cell("# A lesson"), *first, *map(new_code_cell, (setup, *cells))])
    nbformat.write(notebook, path)
    return path


def write_course(folder):
    write(folder / "01_first.ipynb", *OPEN)
    write(folder / "02_second.ipynb", "checks.four(None)", "checks.be_strict")
    (folder / "parameters").mkdir()
    (folder / "parameters" / "smoke.yaml").write_text("preset: small\n")
    return folder


def command(*arguments):
    return CliRunner().invoke(main, ["grade", *map(str, arguments)])


def contents(folder):
    """Every file below a folder, with what is in it."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(out):
    with open(out / "grades.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def marks(rows, student, chapter="01_first"):
    return [row["status"] for row in rows if (row["student"], row["chapter"]) == (student, chapter)]


def note(rows, student):
    (said,) = {row["note"] for row in rows if row["student"] == student}
    return said


def printed_by(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


def has_ended(pid):
    """Whether a process is gone, or dead and not yet taken note of by its parent, which may be a slow init."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A class of students, good and bad, graded once: (folder, out, rows of grades.csv, what was printed, result)."""
    top = tmp_path_factory.mktemp("class {braces} ü")
    course, folder = write_course(top / "course"), top / "hand in"
    out = folder / "results"
    write(folder / "ada" / "01_first.ipynb", "checks.one(5)\n", *RIGHT)
    write(folder / "ada" / "02_second.ipynb", "checks.four(2)")
    write(folder / "ada" / ".ipynb_checkpoints" / "01_first-checkpoint.ipynb", *OPEN)
    write(folder / "01_first_Zoë {0} Ünal.ipynb", "checks.one(None)", "checks.two(2)", "checks.three(1)")
    write(folder / "=cmd()" / "homework.ipynb", "checks.one(1)", "# checks.two(1)", "checks.three(1 +)")
    write(folder / "-dash" / "01_first (1).ipynb", *RIGHT, parameters=None)
    write(folder / "messy" / "01_first.ipynb", *MESS.split("---"), *RIGHT)
    (folder / "messy" / "data").mkdir()
    (folder / "messy" / "data" / "numbers.txt").write_text("1 2 3")
    write(folder / "exits" / "01_first.ipynb", "checks.one(1)", "import os\nos._exit(0)", "checks.two(1)")
    killed = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)  # as the system does when memory runs out"
    write(folder / "killed" / "01_first.ipynb", "checks.one(1)", "checks.two(1)", killed, "checks.three(1)")
    silent = "class checks:\n    one = two = three = print"
    write(folder / "silent" / "01_first.ipynb", silent, *RIGHT)
    write(folder / "notes.ipynb", "print('not homework')")
    broken = {"empty": "", "text": "no JSON", "list": "[1]", "deep": "[" * 100_000}
    broken |= {"new": '{"nbformat": 99, "cells": []}', "bare": '{"nbformat": 4}'}
    for student, text in broken.items():
        (folder / student).mkdir()
        (folder / student / "01_first.ipynb").write_text(text)
    (folder / "copier").mkdir()
    (folder / "copier" / "01_first.ipynb").symlink_to(folder / "ada" / "01_first.ipynb")
    (folder / "linked").symlink_to(folder / "ada")
    if hasattr(os, "mkfifo"):
        (folder / "pipe").mkdir()
        os.mkfifo(folder / "pipe" / "01_first.ipynb")
    before = contents(folder)
    result = command(folder, "--notebooks", course, "--out", out, "--jobs", 2, "--timeout", 300, "-p", "seed", 7)
    after = {path: bytes for path, bytes in contents(folder).items() if out not in path.parents}
    assert before == after, "an original was changed"
    return folder, out, rows_of(out), result


def test_the_last_verdict_of_each_exercise_counts(graded):
    rows = graded[2]
    assert marks(rows, "ada") == ["correct"] * 3
    assert marks(rows, "ada", "02_second") == ["not yet"]
    assert marks(rows, "Zoë {0} Ünal") == ["open", "not yet", "correct"]
    assert note(rows, "Zoë {0} Ünal") == ""


def test_a_notebook_is_known_by_its_checks_and_an_exercise_that_is_gone_is_missing(graded):
    rows = [row for row in graded[2] if row["student"] == "'=cmd()"]
    assert [row["status"] for row in rows] == ["correct", "missing", "not yet"]
    assert rows[2]["message"].startswith("its cell stopped before the check with SyntaxError")


def test_a_lost_parameters_cell_is_made_up_for(graded):
    assert marks(graded[2], "'-dash") == ["correct"] * 3


def test_foreign_texts_are_one_line_and_no_formulas(graded):
    assert {row["message"] for row in graded[2] if row["status"] == "not yet"} >= {"'=1 is right"}
    assert not any(text.startswith(("=", "+", "-", "@")) for row in graded[2] for text in row.values())


def test_a_students_own_errors_input_exit_and_deleted_folder_do_not_matter(graded):
    _, out, rows, _ = graded
    assert marks(rows, "messy") == ["correct"] * 3
    assert note(rows, "messy") == ""
    # the file beside the notebook; -p, smoke.yaml and strict checks
    assert "1 2 3 7 small True" in printed_by(out / "messy" / "01_first.ipynb")


def test_output_is_kept_to_a_limit(graded):
    executed = graded[1] / "messy" / "01_first.ipynb"
    assert 1_000_000 < executed.stat().st_size < 2 * execution.KEPT
    assert printed_by(executed).count("[further output is left out]") == 1


def test_what_a_notebook_leaves_running_is_killed(graded):
    pid = int(re.search(r"left behind (\d+)", printed_by(graded[1] / "messy" / "01_first.ipynb")).group(1))
    assert has_ended(pid)


def test_a_dead_kernel_leaves_the_rest_unreached(graded):
    rows = graded[2]
    assert marks(rows, "exits") == ["correct", "not reached", "missing"]
    assert marks(rows, "killed") == ["correct", "correct", "not reached"]
    assert "the kernel died" in note(rows, "exits") and "the kernel died" in note(rows, "killed")


def test_checks_that_were_taken_away_give_no_mark(graded):
    rows = [row for row in graded[2] if row["student"] == "silent"]
    assert {(row["status"], row["message"]) for row in rows} == {("not reached", "its cell ran, but no check spoke")}


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ("empty", "not a notebook: it is empty"),
        ("text", "does not appear to be JSON"),
        ("new", "Unsupported nbformat version 99"),
        ("list", "not a notebook"),
        ("bare", "not a notebook"),
        ("deep", "RecursionError"),
        ("copier", "it is a link"),
        pytest.param("pipe", "cannot be read", marks=pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")),
    ],
)
def test_a_file_that_is_no_notebook_is_named_with_its_reason(graded, student, said):
    _, out, rows, result = graded
    assert marks(rows, student) == ["not reached"] * 3
    assert said in note(rows, student)
    assert re.search(rf"^{student} .* 0/3  .*{re.escape(said)}", result.output, re.MULTILINE)
    assert not (out / student).exists()


def test_executed_copies_are_whole_and_show_the_strict_checks(graded):
    _, out, _, _ = graded
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == sorted(
        ["grades.csv", "ada/01_first.ipynb", "ada/02_second.ipynb", "Zoë {0} Ünal/01_first.ipynb"]
        + [f"{name}/01_first.ipynb" for name in ("=cmd()", "-dash", "messy", "exits", "killed", "silent")]
    )
    executed = nbformat.read(out / "ada" / "02_second.ipynb", as_version=4)
    assert executed.cells[-1].outputs[-1].ename == "AssertionError"


def test_the_table_has_a_row_for_each_student_and_names_what_was_not_graded(graded):
    result = graded[3]
    assert result.exit_code == 1, result.output
    table = result.output[result.output.index("\n\n01_first") :]
    assert re.search(r"^01_first +one +two +three +passed$", table, re.MULTILINE)
    assert re.search(r"^ada +correct +correct +correct +3/3$", table, re.MULTILINE)
    assert re.search(r"^Zoë \{0\} Ünal +open +not yet +correct +1/3$", table, re.MULTILINE)
    assert re.search(r"^exits +correct +not reached +missing +1/3 +the kernel died", table, re.MULTILINE)
    students = re.findall(r"^(\S.*?)  .*\d/3", table, re.MULTILINE)
    assert students == sorted(students, key=str.casefold) and len(students) >= 15
    assert "notes.ipynb: no chapter of the course" in table
    assert "linked: not a notebook: it is a link" in table
    assert len(re.findall(r"^\[\d+/\d+\] ", result.output, re.MULTILINE)) == len(students) + 1  # ada has two


def test_endless_loops_and_endless_printing_end_at_the_time_limit(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))

    def now():
        saved = [path.read_text() for path in tmp_path.glob("scratch/vitlib-grade-*/executed.ipynb")]
        over.extend([True] * (sum('"check": "two"' in text for text in saved) == 2))
        return 1000.0 if over else 0.0

    # time stands still until both are in their loops, and is over then: a slow machine makes no difference
    over = []
    monkeypatch.setattr(execution, "clock", now)
    for name, loop in {"loop": "while True: pass", "print": "while True: print('x' * 1000)"}.items():
        cell = f"checks.two(1)\n{loop}"
        write(tmp_path / "class" / name / "01_first.ipynb", "checks.one(1)", cell, "checks.three(1)")
    write(tmp_path / "class" / "zoe" / "01_first.ipynb", *RIGHT)
    *endless, zoe = grade_folder(
        tmp_path / "class", tmp_path / "out", notebooks=write_course(tmp_path / "course"), timeout=9, jobs=2
    )
    for one in endless:
        assert one.note == "stopped after 9 s"
        assert [status for status, _ in one.verdicts.values()] == ["correct", "correct", "not reached"]
        assert nbformat.read(one.copy, as_version=4).cells[-1].execution_count is None
    assert (zoe.passed, zoe.note) == (3, "")
    assert "3 notebooks of 3 students; 2 could not be run to the end." in tables([*endless, zoe], tmp_path / "class")


# What a notebook may not do, and what becomes of one that does it. Each tries and says what came of it.

TRY = """
import glob, os, signal, socket, subprocess, sys, time
def attempt(name, act):
    try:
        print(f"{name}: {act()}")
    except OSError as error:
        print(f"{name}: refused by {type(error).__name__}")
"""
ATTEMPTS = {
    "writer": """
attempt("home", lambda: open(os.path.expanduser("~/planted"), "w").write("x"))
attempt("home by its name", lambda: open("@top@/home/planted", "w").write("x"))
attempt("temporary file", lambda: __import__("tempfile").NamedTemporaryFile().write(b"x"))
attempt("work of another", lambda: open("@top@/class/ada/01_first.ipynb", "w").write("x"))
attempt("removed work", lambda: os.remove("@top@/class/ada/01_first.ipynb"))
attempt("moved folder", lambda: os.rename("@top@/class/ada", "@top@/class/eve"))
attempt("marks", lambda: open("@top@/out/grades.csv", "a").write("x"))
attempt("own copy", lambda: open("../../executed.ipynb", "a").write("x"))
attempt("beside the notebook", lambda: open("here.txt", "w").write("x"))
attempt("very large file", lambda: open("large", "w").truncate(2**40))
""",
    "reader": """
attempt("variable", lambda: os.environ.get("API_TOKEN"))
attempt("variable of another process", lambda: open("/proc/@pid@/environ").read())
attempt("work of another", lambda: open("@top@/class/ada/01_first.ipynb").read())
attempt("solutions", lambda: open(glob.glob("@notebooks@/solutions/*.ipynb")[0]).read())
attempt("vitlib", lambda: len(open(__import__("vitlib").__file__).read()) > 0)
attempt("connection", lambda: socket.create_connection(("127.0.0.1", @port@), timeout=5))
attempt("signal", lambda: os.kill(@pid@, signal.SIGTERM))
attempt("shell", lambda: None)
!echo the shell answers
""",
    "forks": """
for _ in range(8):
    os.fork()
time.sleep(300)
""",
    "memory": """
held = []
while len(held) < 40:
    held.append(bytearray(64 * 2**20))
    time.sleep(0.05)
print("all of it")
""",
    "leaver": """
line = "env -i setsid sleep 300 > /dev/null 2>&1 & echo $!"
print("left behind", subprocess.run(["sh", "-c", line], capture_output=True, text=True).stdout)
""",
}


@pytest.fixture(scope="module")
def contained(tmp_path_factory):
    """A class of notebooks that try everything, graded once: (folder, what was printed, what was found)."""
    if sys.platform != "linux":
        pytest.skip("only Linux contains notebooks")
    top = tmp_path_factory.mktemp("c")
    (top / "home").mkdir()
    (top / "class").mkdir()
    bystander = subprocess.Popen(["sleep", "300"], env={"API_TOKEN": "hunter2"})
    said = []
    with socket.socket() as server, pytest.MonkeyPatch.context() as patch:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0)
        patch.setenv("API_TOKEN", "hunter2")
        patch.setenv("HOME", str(top / "home"))
        words = {"@pid@": bystander.pid, "@top@": top, "@port@": server.getsockname()[1], "@notebooks@": FOLDER}
        write(top / "class" / "ada" / "01_first.ipynb", *RIGHT)
        for student, cell in ATTEMPTS.items():
            for word, value in words.items():
                cell = cell.replace(word, str(value))
            write(top / "class" / student / "01_first.ipynb", "checks.one(1)", TRY + cell, "checks.two(1)")
        package = (
            top / "class" / "writer" / "vitlib"
        )  # would stand before ours, if the door were opened from its folder
        package.mkdir()
        (package / "__init__.py").write_text(f"open({str(top / 'home' / 'planted')!r}, 'w')")
        before = contents(top / "class")
        found = grade_folder(
            top / "class", top / "out", notebooks=write_course(top / "course"), timeout=300, memory=0.75, jobs=2,
            say=said.append,
        )  # fmt: skip
        assert contents(top / "class") == before, "an original was changed"
        with pytest.raises(BlockingIOError):  # nobody called
            server.accept()
    yield top, said, {one.student: one for one in found}
    assert bystander.poll() is None, "a notebook ended another process"
    bystander.kill()
    bystander.wait()


def came_of(contained, student):
    """What each attempt of a student came to."""
    one = contained[2][student]
    assert (one.passed, one.note) == (2, ""), "the rest of its notebook was run and checked"
    return dict(re.findall(r"^(.+?): (.*)$", printed_by(one.copy), re.MULTILINE))


def landlock(version):
    """Skips a test where the system's Landlock is older than this version."""
    found = contain.landlock_version()
    return pytest.mark.skipif(found < version, reason=f"needs Landlock {version}, this system has {found or 'none'}")


def test_a_notebook_sees_no_secret_of_the_environment(contained):
    assert came_of(contained, "reader")["variable"] == "None"


@landlock(1)
def test_nor_the_environment_of_another_process(contained):
    assert came_of(contained, "reader")["variable of another process"] == "refused by PermissionError"


@landlock(3)
def test_a_notebook_writes_into_its_own_copy_and_nowhere_else(contained):
    attempts = came_of(contained, "writer")
    allowed = {name: attempts.pop(name) for name in ("home", "temporary file", "beside the notebook")}
    assert set(allowed.values()) == {"1"}, "it has a home and temporary files of its own"
    assert attempts.pop("very large file") == "refused by OSError"
    assert len(attempts) == 6 and set(attempts.values()) == {"refused by PermissionError"}
    assert not list(contained[0].rglob("planted")) and not (contained[0] / "class" / "writer" / "here.txt").exists()


@landlock(1)
def test_a_notebook_reads_neither_the_work_of_others_nor_the_solutions(contained):
    attempts = came_of(contained, "reader")
    assert attempts["work of another"] == attempts["solutions"] == "refused by PermissionError"
    assert attempts["vitlib"] == "True"


@landlock(6)
def test_a_notebook_reaches_no_address_and_no_process_but_has_a_shell(contained):
    attempts = came_of(contained, "reader")
    assert attempts["connection"] == attempts["signal"] == "refused by PermissionError"
    assert "the shell answers" in printed_by(contained[2]["reader"].copy)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ("forks", r"stopped with \d{3} processes at once, of which it may have 100"),
        ("memory", r"stopped with \d\.\d GiB of memory, of which it may have 0\.75"),
    ],
)
def test_a_notebook_that_takes_too_much_is_ended_and_keeps_what_was_checked(contained, student, said):
    one = contained[2][student]
    assert re.fullmatch(said, one.note)
    assert [status for status, _ in one.verdicts.values()] == ["correct", "not reached", "missing"]
    assert "all of it" not in printed_by(one.copy)


def test_what_a_notebook_cuts_loose_from_itself_is_killed(contained):
    assert contained[2]["leaver"].note == ""
    pid = int(re.search(r"left behind (\d+)", printed_by(contained[2]["leaver"].copy)).group(1))
    assert has_ended(pid)


def test_the_others_are_graded_all_the_same(contained):
    _, said, found = contained
    assert found["ada"].passed == 3 and len(found) == len(ATTEMPTS) + 1
    assert said[0] == contain.in_words(contain.landlock_version())


def test_where_the_system_cannot_contain_it_says_so_and_home_and_environment_are_still_others(tmp_path, monkeypatch):
    monkeypatch.setattr(contain, "landlock_version", lambda: 0)
    monkeypatch.setenv("API_TOKEN", "hunter2")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    cell = f"attempt('a', lambda: open({str(tmp_path / 'reached')!r}, 'w').write(str(os.environ.get('API_TOKEN'))))"
    write(
        tmp_path / "class" / "eve" / "01_first.ipynb", f"{TRY}\n{cell}\nos.mkdir(os.path.expanduser('~/new'))", *RIGHT
    )
    said = []
    (one,) = grade_folder(
        tmp_path / "class", tmp_path / "out", notebooks=write_course(tmp_path / "course"), say=said.append
    )
    assert said[0].splitlines()[:2] == [
        "Notebooks are NOT kept from (this system has no Landlock; Linux 6.12 does it all):",
        "  writing outside a copy of their folder",
    ]
    assert (one.passed, one.note) == (3, "")
    assert (tmp_path / "reached").read_text() == "None" and not (tmp_path / "home" / "new").exists()


@pytest.fixture
def no_kernel(tmp_path, monkeypatch):
    """A course, a class of one, and an execution that gives the notebook back as it is."""
    monkeypatch.setattr(grade, "execute_apart", lambda notebook, *_: (notebook, ""))
    write(tmp_path / "class" / "ada" / "01_first.ipynb", *RIGHT)
    write_course(tmp_path / "course")
    return tmp_path


def names_of(no_kernel, *paths):
    """Student and executed copy that each of these paths gets."""
    shutil.rmtree(no_kernel / "class")
    for path in paths:
        write(no_kernel / "class" / path, *RIGHT)
    found = grade_folder(no_kernel / "class", no_kernel / "out", notebooks=no_kernel / "course")
    assert all(one.copy.is_file() for one in found)
    return [(one.student, str(one.copy.relative_to((no_kernel / "out").resolve()))) for one in found]


@pytest.mark.parametrize(
    ("path", "student"),
    [
        ("ada/01_first.ipynb", "ada"),
        ("ada/late/01_first.ipynb", "ada"),
        ("01_first/ada.ipynb", "ada"),
        ("01_first_ada.ipynb", "ada"),
        ("ada_01_First.ipynb", "ada"),
        ("01_first.ipynb", "class"),
        ("-a-/01_first.ipynb", "-a-"),
        ("01_first_...ipynb", "class"),
        ("a\nb\x1b[2J/01_first.ipynb", "a b [2J"),
        ("Zoe\u0308/01_first.ipynb", "Zoë"),
    ],
)
def test_the_student_is_what_the_path_says_beside_the_chapter(no_kernel, path, student):
    assert names_of(no_kernel, path) == [(student, str(Path(student, "01_first.ipynb")))]


def test_two_files_of_one_student_keep_a_copy_each(no_kernel):
    assert names_of(no_kernel, "ada/01_first (1).ipynb", "ada/01_first.ipynb", "ADA/01_first.ipynb") == [
        ("ADA", "ADA/01_first.ipynb"), ("ada", "ada/01_first_2.ipynb"), ("ada", "ada/01_first_3.ipynb"),
    ]  # fmt: skip


def test_results_of_an_earlier_grading_are_not_graded_again_and_do_not_stay(no_kernel):
    out = no_kernel / "class" / "results"
    for _ in range(2):
        assert command(no_kernel / "class", "--notebooks", no_kernel / "course", "--out", out).exit_code == 0
    assert len(rows_of(out)) == 3
    (no_kernel / "class" / "ada" / "01_first.ipynb").write_text("broken since")
    assert command(no_kernel / "class", "--notebooks", no_kernel / "course", "--out", out).exit_code == 1
    assert not (out / "ada" / "01_first.ipynb").exists()


def test_an_outcome_stored_by_the_student_is_no_verdict(no_kernel):
    data = {checks.VERDICT: {"check": "one", "status": "correct", "message": ""}}
    forged = new_code_cell("checks.one(None)", outputs=[new_output("display_data", data=data)])
    nbformat.write(new_notebook(cells=[forged]), no_kernel / "class" / "ada" / "01_first.ipynb")
    (one,) = grade_folder(no_kernel / "class", no_kernel / "out", notebooks=no_kernel / "course")
    assert one.passed == 0


@pytest.mark.parametrize("verdict", [[], "correct", {"status": []}, {"status": "correct", "check": []}, {}])
def test_a_verdict_of_a_students_own_making_stops_nothing(no_kernel, monkeypatch, verdict):
    cell = new_code_cell("checks.one(1)", outputs=[new_output("display_data", data={checks.VERDICT: verdict})])
    monkeypatch.setattr(grade, "execute_apart", lambda *_: (new_notebook(cells=[cell]), ""))
    (one,) = grade_folder(no_kernel / "class", no_kernel / "out", notebooks=no_kernel / "course")
    assert one.passed == 0


def test_a_notebook_whose_execution_fails_is_noted(no_kernel, monkeypatch):
    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(grade, "execute_apart", fail)
    result = command(no_kernel / "class", "--notebooks", no_kernel / "course", "--out", no_kernel / "out")
    assert result.exit_code == 1
    assert "not run: OSError: no space left" in result.output


def test_the_parameters_cell_is_found_without_its_tag_and_no_tag_skips_a_check(tmp_path):
    cells = [new_code_cell("strict_checks: bool = False"), new_code_cell("checks.one(0)")]
    cells[1].metadata.tags = ["skip-execution", "raises-exception"]
    nbformat.write(new_notebook(cells=cells), tmp_path / "a.ipynb")
    assert [cell.metadata.tags for cell in grade._read(tmp_path / "a.ipynb").cells] == [["parameters"], []]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "sed", "1"], "did you mean 'seed'"),
        (["-p", "seed", "one"], "seed='one' is not allowed"),
        (["-p", "run_dir", "here"], "run_dir"),
        (["--parameters", "absent.yaml"], "There is no file absent.yaml"),
        (["--notebooks", "absent"], "No notebook [0-9]*.ipynb in absent"),
        (["--out", "class"], "would overwrite"),
        (["--out", "."], "would overwrite"),
    ],
)
def test_a_wrong_command_is_one_sentence_before_anything_runs(no_kernel, monkeypatch, arguments, said):
    monkeypatch.chdir(no_kernel)
    monkeypatch.setattr(grade, "execute_apart", lambda *_: pytest.fail("a notebook was run"))
    result = command("class", "--notebooks", "course", *arguments)
    assert result.exit_code == 2
    assert result.output.startswith("Error: ") and said in result.output
    assert not (no_kernel / "runs").exists()


def test_a_folder_that_is_absent_or_without_chapters_is_one_sentence(no_kernel, monkeypatch):
    monkeypatch.chdir(no_kernel)
    (no_kernel / "none").mkdir()
    for folder, said in (("absent", "is not a folder"), ("none", "No notebook in")):
        result = command(folder, "--notebooks", "course")
        assert result.exit_code == 2 and said in result.output


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_kills_what_runs_and_keeps_what_is_done(tmp_path):
    (tmp_path / "scratch").mkdir()
    write(tmp_path / "class" / "ada" / "01_first.ipynb", *RIGHT)
    write(tmp_path / "class" / "bob" / "01_first.ipynb", WAIT, *RIGHT)
    out, course = tmp_path / "out", write_course(tmp_path / "course")
    arguments = ["grade", str(tmp_path / "class"), "--out", str(out), "--notebooks", str(course)]
    process = subprocess.Popen(
        [sys.executable, "-m", "vitlib", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "TMPDIR": str(tmp_path / "scratch")},
        # whoever starts the tests in the background (nohup, a shell's &) has Ctrl-C ignored, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    pid = waited_for(tmp_path, "scratch/vitlib-grade-*/own/folder/pid")
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.splitlines()[-1] == "Interrupted." and "Traceback" not in printed
    assert {row["student"] for row in rows_of(out)} == {"ada"}
    assert has_ended(pid)
    assert not list((tmp_path / "scratch").iterdir())


def test_when_the_grader_is_gone_the_process_of_a_notebook_ends(tmp_path):
    rights = tmp_path / "rights.json"
    rights.write_text(json.dumps({"version": 0, "writable": [], "readable": []}))
    job = {
        "notebook": str(write(tmp_path / "a.ipynb", WAIT)), "folder": str(tmp_path), "rights": str(rights),
        "executed": str(tmp_path / "b.ipynb"), "parameters": {"seed": 1}, "verdict": checks.VERDICT,
    }  # fmt: skip
    line = [sys.executable, "-m", "vitlib.course.execution", json.dumps(job)]
    process = subprocess.Popen(line, stdin=subprocess.PIPE)
    pid = waited_for(tmp_path, "pid")
    process.stdin.close()
    assert process.wait(timeout=60) == 1
    assert has_ended(pid)


WAIT = "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(300)"


def waited_for(folder, pattern):
    """The process number in the file that fits the pattern, once it is there."""
    deadline = time.monotonic() + 120
    while not (found := [path.read_text() for path in folder.glob(pattern)]) or not found[0]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(found[0])


def test_an_untouched_chapter_is_all_open(tmp_path):
    (tmp_path / "ada").mkdir()
    shutil.copy(FOLDER / "01_patching.ipynb", tmp_path / "ada")
    (one,) = grade_folder(tmp_path, tmp_path / "out")
    assert one.note == ""
    assert {"patch_numbers", "patchify", "tokens"} <= set(one.verdicts)
    assert set(one.verdicts.values()) == {("open", "")}


@pytest.mark.parametrize("solutions", SOLUTIONS, ids=lambda path: path.stem)
def test_a_chapter_with_the_solutions_put_in_is_all_correct(tmp_path, solutions):
    solved = {name: cell for cell in nbformat.read(solutions, as_version=4).cells for name in grade._calls(cell)}
    chapter = nbformat.read(FOLDER / solutions.name, as_version=4)
    for cell in chapter.cells:
        for name in grade._calls(cell):
            cell.source = solved[name].source
    (tmp_path / "ada").mkdir()
    nbformat.write(chapter, tmp_path / "ada" / solutions.name)
    (one,) = grade_folder(tmp_path, tmp_path / "out")
    assert one.note == ""
    assert {name: verdict for name, verdict in one.verdicts.items() if verdict != ("correct", "")} == {}
    errors = [
        output.evalue
        for cell in nbformat.read(one.copy, as_version=4).cells
        for output in cell.get("outputs", [])
        if output.output_type == "error"
    ]
    assert errors == []
