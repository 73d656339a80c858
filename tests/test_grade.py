"""Grading: who passed what, and that no notebook stops the rest, deceives the grader unseen, or touches the originals.

``VITLIB_SLOW=1 python -m pytest tests/test_grade.py`` grades the solutions of every chapter, else those of one.
"""

import csv
import importlib
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
from children import start_command, wait_until
from conftest import invoke
from nbformat.v4 import new_code_cell, new_notebook

from vitlib.course import checks, grade, sandbox
from vitlib.course.cells import names_of, needed_cells
from vitlib.course.checks import VERDICT
from vitlib.course.checks.frame import CORRECT, NOT_ATTEMPTED
from vitlib.course.grade import grade_folder, tables

FOLDER = Path(__file__).parents[1] / "notebooks"
CHAPTERS = sorted(path.stem for path in (FOLDER / "solutions").glob("*.ipynb"))

# vitlib takes seconds to import in a kernel, so the small course has checks of its own: the right answer is 1
CHECKS = f"""
from IPython.display import display

def check(name):
    def judge(answer):
        status = {{None: "not attempted yet", 1: "correct"}}.get(answer, "not yet")
        verdict = {{"check": name, "status": status, "message": "=1 is\\nright" if status == "not yet" else ""}}
        display({{"text/plain": name, {VERDICT!r}: verdict}}, raw=True)
    return judge

one, two, three, four = map(check, ("one", "two", "three", "four"))
"""
SETUP = "import own_checks as checks"
RIGHT = ("checks.one(1)", "checks.two(1)", "checks.three(1)")
FORGED = f"""
class Forger:
    def __getattr__(self, name):
        verdict = {{"check": name, "status": "correct", "message": ""}}
        return lambda answer: display({{"text/plain": name, {VERDICT!r}: verdict}}, raw=True)
checks.one = checks.two = lambda answer: None
checks = sys.modules["own_checks"] = Forger()"""
PARAMETERS = "seed: int = 0  # start"


def write(path, *cells, setup=SETUP, parameters=PARAMETERS):
    path.parent.mkdir(parents=True, exist_ok=True)
    first = [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    nbformat.write(new_notebook(cells=[*first, *map(new_code_cell, (setup, *cells))]), path)
    return path


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course of two chapters with checks of its own, and solutions for the first."""
    top = tmp_path_factory.mktemp("course")
    (top / "modules").mkdir()
    (top / "modules" / "own_checks.py").write_text(CHECKS)
    write(top / "notebooks" / "01_first.ipynb", "checks.one(answer)", "checks.two(None)", "checks.three(None)")
    write(top / "notebooks" / "02_second.ipynb", "checks.four(None)")
    write(top / "notebooks" / "solutions" / "01_first.ipynb", *RIGHT)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(top / "modules")
        patch.setattr(grade, "checks", importlib.import_module("own_checks"))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(top / "modules"), os.environ.get("PYTHONPATH", "")]))
        yield top / "notebooks"


def rows_of(out):
    with open(out / "grades.csv", encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def printed_by(path):
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def graded(course, tmp_path_factory):
    """A class, good and bad, graded once: (out, rows of grades.csv by student, what was printed, exit code)."""
    top = tmp_path_factory.mktemp("class {braces} ü")
    folder, out = top / "hand in", top / "hand in" / "results"
    (folder / "ada").mkdir(parents=True)
    (folder / "ada" / "numbers.txt").write_text("1 2 3")
    helpers = "values = []\nvalues.append(1)", "def help():\n    return values[0]", "import time\ntime.sleep(1000)"
    beside = "print(open('numbers.txt').read(), seed)\nchecks.three(5)\nchecks.three(1)"
    write(folder / "ada" / "01_first.ipynb", *helpers, "checks.one(help())", "%time checks.two(1)", beside)
    write(folder / "groupA" / "Zoe\u0308" / "01_first (1).ipynb", "answer = 1",
          "import os\nchecks.two(1)\nos._exit(1)", RIGHT[2])  # fmt: skip
    write(folder / "groupB" / "early" / "hw.ipynb", "import mathh", "checks.one(mathh.pi)", "checks.two(1 +)")
    write(folder / "01_first_forger.ipynb", f"import sys\nfrom IPython.display import display{FORGED}",
          "checks.one(0)", "checks.two(0)", "from IPython.display import display\nchecks.three(0)")  # fmt: skip
    write(folder / "shadow" / "01_first.ipynb", "checks.one(1)", setup=f"import sys\nsys.path.insert(0, '')\n{SETUP}")
    (folder / "shadow" / "own_checks.py").write_text(CHECKS)
    hog = "held = []\nwhile len(held) < 40:\n    held.append(bytearray(64 * 2**20))\nchecks.four(1)"
    write(folder / "hog" / "01_first.ipynb", hog)
    write(folder / "notes.ipynb", "print('not homework')")
    for name in ("ada/work.py", "ada/work.zip", "text/01_first.ipynb"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("no JSON")
    (folder / "linked").symlink_to(folder / "ada")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (top / "roster.txt").write_text("Ada\nZoë\nEarly, Eva\nIvan\n", encoding="utf-8")
    limits = ["--jobs", 2, "--memory", 0.8, "-p", "seed", 7, "--roster", top / "roster.txt"]
    result = invoke("grade", folder, "--notebooks", course, "--out", out, *limits)
    assert before.items() <= {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}.items()
    rows = {}
    for row in rows_of(out):
        rows.setdefault(row["student"], []).append(row)
    return out, rows, result.output, result.exit_code


def marks(graded, student):
    return [row["status"] for row in graded[1][student]]


def test_only_needed_cells_run_and_the_last_call_counts(graded):
    assert marks(graded, "ada") == ["correct"] * 3
    assert "1 2 3 7" in printed_by(graded[0] / "ada" / "01_first.ipynb")
    cells = nbformat.read(graded[0] / "ada" / "01_first.ipynb", as_version=4).cells
    assert [cell.execution_count for cell in cells if "sleep" in cell.source] == [None]


def test_an_answer_whose_check_is_gone_is_checked_and_kept_when_the_kernel_dies(graded):
    assert marks(graded, "groupA/Zoë") == ["correct", "not reached", "not reached"]
    assert "the kernel died" in graded[1]["groupA/Zoë"][0]["note"]


def test_the_first_error_is_the_reason(graded):
    first, second, third = graded[1]["groupB/early"]
    assert first["status"] == second["status"] == "not yet" and third["status"] == "missing"
    assert "NameError" in first["message"] and "SyntaxError" in second["message"]
    assert first["note"].startswith("first error: In [") and "No module named 'mathh'" in first["note"]


def test_redefined_checks_and_forged_verdicts_gain_nothing(graded):
    assert marks(graded, "forger") == ["not yet"] * 3
    assert graded[1]["shadow"][0]["message"].endswith("these are not the course's checks")


def test_too_much_memory_ends_a_notebook_and_its_checks_name_the_chapter(graded):
    (row,) = graded[1]["hog"]
    assert (row["chapter"], row["status"]) == ("02_second", "not reached")
    assert re.search(r"stopped with \d\.\d GiB of memory, of which it may have 0\.8", row["note"])
    assert row["note"].endswith("named 01_first, but it calls the checks of 02_second")


def test_the_table_names_files_missing_students_and_totals(graded):
    _, rows, printed, code = graded
    assert code == 1 and marks(graded, "text") == ["not reached"] * 3
    assert "The course's own solutions of 01_first pass" in printed
    assert re.search(r"^01_first +one +two +three +passed$", printed, re.MULTILINE)
    assert re.search(r"^ada +correct +correct +correct +3/3$", printed, re.MULTILINE)
    for line in (
        "Missing: Early, Eva, Ivan",
        "ada/work.py: not a notebook",
        "ada/work.zip: not a notebook",
        "notes.ipynb: belongs to no chapter of the course",
        "linked: not a notebook: it is a link, and links are not followed",
        "7 notebooks of 7 students; 3 could not be run to the end.",
    ):
        assert line in printed.splitlines()
    assert rows["ada"][0]["file"] == "ada/01_first.ipynb"
    assert {row["message"] for student in rows.values() for row in student} >= {"'=1 is right"}


contained = pytest.mark.skipif(bool(sandbox.why_not_contained()), reason=sandbox.why_not_contained() or "contained")
ATTEMPTS = """
import glob, os, signal, socket, subprocess
def attempt(name, act):
    try:
        print(f"{name}: {act()}")
    except OSError as error:
        print(f"{name}: refused by {type(error).__name__}")
attempt("token", lambda: os.environ.get("API_TOKEN"))
attempt("own home", lambda: open(os.path.expanduser("~/planted"), "w").write("x"))
attempt("own folder", lambda: open("here.txt", "w").write("x"))
attempt("huge file", lambda: open("huge", "w").truncate(2**40))
attempt("home", lambda: open("@home@/secret").read())
attempt("another's work", lambda: open("@class@/ada/secret").read())
attempt("marks", lambda: open("@out@/grades.csv", "a").write("x"))
attempt("solutions", lambda: open("@solutions@").read())
attempt("root", lambda: open("/planted", "w").write("x"))
attempt("connection", lambda: socket.create_connection(("127.0.0.1", @port@), timeout=5))
attempt("signal", lambda: os.kill(@pid@, signal.SIGTERM))
subprocess.Popen(["setsid", "sleep", "@sleep@"])
checks.one(1)
"""


@contained
def test_a_contained_notebook_reaches_nothing_and_ends(course, tmp_path, monkeypatch):
    for folder in ("home", "class/ada"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "secret").write_text("hunter2")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("API_TOKEN", "hunter2")
    monkeypatch.setattr(grade, "_try_solutions", lambda *_: None)
    bystander = subprocess.Popen(["sleep", "300"])
    seconds = f"{300 + os.getpid() / 1e6}"  # by which its process is found
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        words = {"home": tmp_path / "home", "class": tmp_path / "class", "out": tmp_path / "out", "sleep": seconds,
                 "solutions": FOLDER / "solutions" / "01_patching.ipynb", "pid": bystander.pid,
                 "port": server.getsockname()[1]}  # fmt: skip
        cell = re.sub(r"@(\w+)@", lambda found: str(words[found[1]]), ATTEMPTS)
        write(tmp_path / "class" / "eve" / "01_first.ipynb", cell)
        _, eve = grade_folder(tmp_path / "class", tmp_path / "out", notebooks=course)
    came = dict(re.findall(r"^(.+?): (.*)$", printed_by(eve.copy), re.MULTILINE))
    assert eve.verdicts["one"] == ("correct", "") and came.pop("token") == "None"
    assert came.pop("own home") == came.pop("own folder") == "1"
    assert len(came) == 8 and all(said.startswith("refused by") for said in came.values()), came
    assert bystander.poll() is None
    bystander.kill()
    assert not any(seconds in " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"]))


FORGE = "import os\nopen('../executed_.ipynb', 'w').write('{}')\nos.utime('../executed_.ipynb', (4e9, 4e9))"
END = "import os, time\nos.mkfifo('../executed.ipynb')\nos.kill(os.getppid(), 9)\ntime.sleep(1000)"


@contained
@pytest.mark.parametrize(
    ("code", "passed", "stopped"), [(FORGE, 2, ""), (END, 0, "no result: its process was ended")], ids=["forge", "end"]
)
def test_what_a_notebook_writes_beside_its_result_is_not_read(course, tmp_path, monkeypatch, code, passed, stopped):
    monkeypatch.setattr(grade, "_try_solutions", lambda *_: None)
    write(tmp_path / "class" / "eve" / "01_first.ipynb", RIGHT[0], f"{code}\n{RIGHT[1]}")
    (eve,) = grade_folder(tmp_path / "class", tmp_path / "out", notebooks=course)
    assert (eve.passed, eve.stopped) == (passed, stopped)


def test_without_bwrap_limits_hold_and_one_line_says_so(course, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    sandbox.why_not_contained.cache_clear()
    write(tmp_path / "class" / "ada" / "01_first.ipynb", "import os", f"{RIGHT[0]}\nprint(os.environ['HOME'])",
          "import time\nchecks.two(1)\ntime.sleep(1000)")  # fmt: skip
    said = []
    monkeypatch.setattr(grade, "_try_solutions", lambda *_: None)
    (one,) = grade_folder(tmp_path / "class", tmp_path / "out", notebooks=course, timeout=8, say=said.append)
    sandbox.why_not_contained.cache_clear()
    assert said[0].startswith("Notebooks are NOT contained (bwrap is not installed)") and "\n" not in said[0]
    assert one.stopped.endswith("stopped after 8 s; allow more with --timeout")
    assert one.verdicts["two"][0] != "correct" and os.path.expanduser("~") not in printed_by(one.copy).split()


def test_harmless_variables_are_passed_and_no_secrets(tmp_path, monkeypatch):
    harmless = {"PATH": "/bin", "LC_ALL": "C", "KMP_BLOCKTIME": "2", "GOMP_SPINCOUNT": "7"}
    secrets = ("API_TOKEN", "AWS_SECRET_ACCESS_KEY", "SSH_AUTH_SOCK", "MY_PATH_TOKEN", "LD_PRELOAD")
    for name, value in {**harmless, **dict.fromkeys(secrets, "secret")}.items():
        monkeypatch.setenv(name, value)
    passed = sandbox._environment(tmp_path)
    assert passed.items() >= harmless.items() and "secret" not in passed.values()


@pytest.fixture
def no_kernel(course, tmp_path, monkeypatch):
    """A class of one, and a run that gives the notebook back as it is."""
    monkeypatch.setattr(grade, "run_apart", lambda notebook, *_: (notebook, ""))
    monkeypatch.setattr(grade, "_try_solutions", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "course").symlink_to(course)
    write(tmp_path / "class" / "ada" / "01_first.ipynb", *RIGHT)
    return tmp_path


def test_a_student_is_what_the_path_says(no_kernel):
    paths = {
        "ada/01_first.ipynb": "ada",
        "groupA/ada/01_first.ipynb": "groupA/ada",
        "groupA/01_first_ben.ipynb": "groupA/ben",
        "groupA/eva.ipynb": "groupA/eva",
        "01_first/finn.ipynb": "finn",
        "01_first_gus.ipynb": "gus",
        "01_first_group_3.ipynb": "group_3",
        "01_first/student_07.ipynb": "student_07",
        "lea/01_first 2.ipynb": "lea",
        "hal_01-First_final.ipynb": "hal",
        "Copy of 01_first_Ida {0} (2).ipynb": "Ida {0}",
        "jo/01_first-Copy1.ipynb": "jo",
        "kim/01_first.ipynb.txt": "kim",
        "01_first (1).ipynb": "01_first (1)",
        "a\nb\x1b[2J/01_first.ipynb": "a b [2J",
        "Zoe\u0308 v2/01_first.IPYNB": "Zoë v2",
    }
    for path in paths:
        write(no_kernel / "class" / path, *RIGHT)
    found = grade_folder("class", "out", notebooks="course")
    assert {str(one.path.relative_to(no_kernel / "class")): one.student for one in found} == paths
    assert all(one.copy.is_file() and one.copy.is_relative_to(no_kernel / "out") for one in found)


def test_an_untouched_copy_of_the_stub_replaces_no_verdict():
    def graded(status):
        verdict = {"check": "one", "status": status, "message": ""}
        shown = nbformat.v4.new_output("display_data", data={VERDICT: verdict})
        return new_code_cell(outputs=[shown], metadata={"vitlib": {"exercise": "one"}})

    executed = new_notebook(cells=[graded(CORRECT), graded(NOT_ATTEMPTED)])
    assert grade._judge(executed, ["one"]) == ({"one": ("correct", "")}, "")


def test_names_of_a_roster_are_found_in_what_platforms_make_of_them():
    roster = ["Ada Lovelace", "Müller, Karl-Heinz", "Ada"]
    students = ["lovelaceada_LATE_1234_56789", "müllerkarlheinz_7_8"]
    assert grade._missing(roster, students) == ["Ada"]


def test_two_files_of_one_student_have_own_rows(no_kernel):
    write(no_kernel / "class" / "ada" / "01_first (1).ipynb", *RIGHT)
    found = grade_folder("class", "out", notebooks="course")
    assert {row["file"] for row in rows_of(no_kernel / "out")} == {"ada/01_first.ipynb", "ada/01_first (1).ipynb"}
    assert len({one.copy for one in found}) == 2 and "(ada/01_first (1).ipynb)" in tables(found)


def test_an_earlier_result_is_replaced_and_not_graded(no_kernel):
    for _ in range(2):
        assert invoke("grade", "class", "--notebooks", "course", "--out", "class/out").exit_code == 0
    (no_kernel / "class" / "ada" / "01_first.ipynb").write_text("broken since")
    assert invoke("grade", "class", "--notebooks", "course", "--out", "class/out").exit_code == 1
    assert not (no_kernel / "class" / "out" / "ada" / "01_first.ipynb").exists()


@pytest.mark.parametrize(("text", "said"), [("", "it is empty"), ("[" * 100_000, "RecursionError")])
def test_a_broken_file_is_named_with_a_reason(no_kernel, text, said):
    (no_kernel / "class" / "ada" / "01_first.ipynb").write_text(text)
    (one,) = grade_folder("class", "out", notebooks="course")
    assert said in one.note and set(one.verdicts.values()) == {("not reached", "")}


@pytest.mark.parametrize("arguments", ["+".join(["1"] * 3000), "0x" + "f" * 9000, "-" * 100_000 + "1"])
def test_a_call_that_cannot_be_read_off_stops_nobody(arguments):
    assert "one" in names_of(new_code_cell(f"checks.one({arguments})")).calls


@pytest.mark.parametrize("data", ["correct", {VERDICT: "correct"}, {VERDICT: {"status": [], "check": "one"}}])
def test_a_malformed_verdict_gives_no_mark(no_kernel, monkeypatch, data):
    cell = new_code_cell(metadata={"vitlib": {"exercise": "one"}})
    cell.outputs = [nbformat.v4.new_output("display_data")]
    cell.outputs[0].data = data
    monkeypatch.setattr(grade, "run_apart", lambda *_: (new_notebook(cells=[cell]), ""))
    (one,) = grade_folder("class", "out", notebooks="course")
    assert one.passed == 0


def test_where_the_solutions_fail_nobody_is_graded(course, tmp_path, monkeypatch):
    write(tmp_path / "class" / "ada" / "01_first.ipynb", *RIGHT)
    broken = new_code_cell("import vitlib", outputs=[nbformat.v4.new_output("error", ename="PermissionError")])
    monkeypatch.setattr(grade, "run_apart", lambda *_: (new_notebook(cells=[broken]), ""))
    result = invoke("grade", tmp_path / "class", "--notebooks", course, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "own solutions of 01_first fail here, so nobody is graded" in result.output
    assert "PermissionError" in result.output and not (tmp_path / "out" / "grades.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--out", "class"], "would overwrite"), (["--roster", "absent.txt"], "absent.txt")]
)
def test_a_wrong_command_is_one_sentence(no_kernel, arguments, said):
    result = invoke("grade", "class", "--notebooks", "course", *arguments)
    assert result.exit_code == 2 and result.output.startswith("Error: ") and said in result.output
    assert not (no_kernel / "runs").exists()


@pytest.mark.parametrize(
    ("sources", "run"),
    [
        (["x = f()", "import os", "checks.one(y)"], {1, 2}),
        (["x = f()", "y = x + 1", "x = 3 * z", "checks.one(y)"], {0, 1, 2, 3}),
        (["def f(): return g()", "g = lambda: h", "for h in range(9): pass", "checks.one(f)"], {0, 1, 2, 3}),
        (["x = []", "x.append(1)", "print(x)", "checks.one(x)"], {0, 1, 3}),
        (["import sys", "sys.path.append('helpers')", "from mine import f", "checks.one(f)"], {0, 1, 2, 3}),
        (["import torch", "torch.manual_seed(0)", "model.fit()", "checks.one(torch)"], {0, 3}),
        (["%run helpers.py", "%matplotlib inline", "!pip install x", "checks.one(1)"], {0, 3}),
        (["!ls\n" * 50_000, "\n" * 199_000 + "x = 2", "y = (\n    x\n    != 1\n)", "checks.one(y)"], {0, 1, 2, 3}),
        (["%%writefile a.py\nx = 1", "%%time\ntrain()", "def broken(:", "checks.one(1)"], {0, 2, 3}),
        (["def f(images): return images", "images = load()", "checks.one(f)"], {0, 2}),
        (["def f(x): 1 / 0", "f(3)", "def g(y): y.train()", "y = 1", "def f(x): return y\nchecks.one(f)"], {3, 4}),
    ],
)
def test_needed_cells_are_those_of_the_names(sources, run):
    assert needed_cells([names_of(new_code_cell(source)) for source in sources], {len(sources) - 1}) == run


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_ends_what_runs_and_exits_with_130(course, tmp_path):
    (tmp_path / "scratch").mkdir()
    write(
        tmp_path / "class" / "ada" / "02_second.ipynb",
        "checks.four(open('begun', 'w').write(''))\nimport time; time.sleep(1000)",
    )
    process = start_command("grade", "class", "--out", "out", "--notebooks", course,
                            cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path / "scratch")})  # fmt: skip
    wait_until(lambda: list(tmp_path.glob("scratch/vitlib-grade-*/folder/begun")), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and printed.splitlines()[-1] == "Interrupted."
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("chapter", CHAPTERS if "VITLIB_SLOW" in os.environ else CHAPTERS[1:2])
def test_a_solved_chapter_is_correct_and_an_untouched_one_open(tmp_path, chapter, monkeypatch):
    monkeypatch.setattr(grade, "checks", checks)
    if "VITLIB_SLOW" not in os.environ:
        monkeypatch.setattr(grade, "_try_solutions", lambda *_: None)
    solutions = nbformat.read(FOLDER / "solutions" / f"{chapter}.ipynb", as_version=4)
    solved = {name: cell for cell in solutions.cells for name in names_of(cell).calls}
    notebook = nbformat.read(FOLDER / f"{chapter}.ipynb", as_version=4)
    for student in ("ben", "ada"):
        (tmp_path / student).mkdir()
        nbformat.write(notebook, tmp_path / student / f"{chapter}.ipynb")
        for cell in notebook.cells:
            for name in names_of(cell).calls:
                cell.source = solved[name].source
    ada, ben = grade_folder(tmp_path, tmp_path / "out", jobs=2)
    assert ada.note == "" and set(ada.verdicts.values()) == {("correct", "")}
    assert ben.note == "" and {status for status, _ in ben.verdicts.values()} <= {"open", "not yet"}
    assert ben.passed == 0
