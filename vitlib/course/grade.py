"""Grade students' notebooks: run each under limits, and say who passed which exercise.

The verdict on an exercise comes from a cell of the grader's own, which follows the student's: it loads the checks anew
and hands them what the student handed them. So a notebook that redefines ``checks``, or displays a verdict in a cell,
gains nothing. It still runs in the student's kernel: one that alters torch, imports, IPython's hooks or its own
executed file can deceive it.
"""

import os
import re
import threading
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from vitlib.course import checks
from vitlib.course.cells import names_of, needed_cells
from vitlib.course.checks import frame
from vitlib.course.kernels import reason
from vitlib.course.parameters import PARAMETERS
from vitlib.course.runner import COURSE_FOLDER, checked_values, parameters_from_file, read_lessons
from vitlib.course.sandbox import run_apart, why_not_contained
from vitlib.data.folders import SYSTEM_NAME
from vitlib.utils import atomic_write, text_table, write_csv

CORRECT, NOT_YET, OPEN, MISSING, NOT_REACHED = "correct", "not yet", "open", "missing", "not reached"
WORDS = {frame.CORRECT: CORRECT, frame.NOT_YET: NOT_YET, frame.NOT_ATTEMPTED: OPEN}  # the table's word for a check's
COLUMNS = ("student", "file", "chapter", "exercise", "status", "message", "seconds", "note")
MOST_CODE = 200_000  # letters in a notebook: to read off the names of a long one can take hours
LISTED = 50  # files that are not graded, each on a line
# Words of a file's name that are neither chapter nor student: marks of copies and of versions.
NOISE = re.compile(
    r"(?<![^\W_])(copy( of)?|copy\d+|final|fixed|new|version|v\d+|submission|homework|hw\d*|assignment\d*|solutions?|"
    r"backup|old|draft|done|solved|executed|checkpoint|notebook|untitled\d*)(?![^\W_])([_ -]\d{1,2}$)?|\(\d+\)",
    re.IGNORECASE,
)
CHECK_CELL = """\
# the grader's own check
import importlib, sys
for _name in [name for name in sys.modules if name.startswith({checks.__name__!r})]:
    del sys.modules[_name]
_checks = importlib.import_module({checks.__name__!r})
assert _checks.__file__ == {checks.__file__!r}, "these are not the course's checks"  # but a file beside the notebook
_checks.{exercise}({arguments})"""


@dataclass(frozen=True)
class Chapter:
    """A notebook of the course."""

    name: str
    exercises: dict[str, str]  # each check that it calls, to the arguments as text
    parameters: dict[str, object]

    @property
    def pattern(self) -> re.Pattern:
        """The chapter's name as paths have it, with the number that a system gives to a copy."""
        return re.compile(re.sub("_", "[ _-]*", re.escape(self.name)) + r"([ _-]+\d{1,2}$)?", re.IGNORECASE)


@dataclass
class Submission:
    """A file that was handed in, and its results: exercise to (status, message), in the order of the chapter."""

    path: Path
    file: str  # the path below the graded folder, printable
    student: str
    chapter: Chapter | None = None  # None for a file that belongs to no chapter
    notebook: NotebookNode | None = None  # None if it cannot be read
    copy: Path | None = None  # where the executed notebook goes
    remark: str = ""
    stopped: str = ""  # why it did not run to its end
    first_error: str = ""
    verdicts: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def note(self) -> str:
        return "; ".join(filter(None, (self.stopped, self.first_error, self.remark)))

    @property
    def passed(self) -> int:
        return sum(status == CORRECT for status, _ in self.verdicts.values())


def grade_folder(
    folder: str | Path,
    out: str | Path,
    *,
    notebooks: str | Path = COURSE_FOLDER,
    parameters: str | Path | None = None,
    given: Mapping[str, object] | None = None,
    timeout: float = 600,
    memory: float = 4,
    jobs: int = 1,
    whole: bool = False,
    say: Callable[[str], None] = print,
) -> list[Submission]:
    """Grade every notebook below ``folder``; grades.csv in ``out`` grows with each, beside executed copies.

    Args:
        folder: holds ``ada/01_patching.ipynb``, ``01_patching_ada.ipynb`` or the like.
        out: folder of the results; what is in it already is not graded.
        notebooks: folder of the course, whose notebooks say which exercises there are. The solutions below it are
            tried first, for one of the chapters that were handed in.
        parameters: YAML file of parameters; None for the course's ``parameters/smoke.yaml``.
        given: values that win over those of the file. Texts are parsed.
        timeout, memory: limits of one notebook and all that it has started, in seconds and GiB.
        jobs: number of notebooks at once, each on one thread.
        whole: whether all cells run. Without it only those that the checks need do.
        say: gets one line on containment, then one line for each notebook that is done.

    Returns:
        All files; those that were not graded have no chapter.

    Raises:
        ValueError: for unknown or wrong parameters, an ``out`` that would overwrite originals, a folder without
            notebooks of the course, or if the course's own solutions fail here; nobody is graded then.
        OSError: for files and folders that are not there.
    """
    folder, out = Path(folder).expanduser().resolve(), Path(out).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the one that holds the students' notebooks.")
    if folder.is_relative_to(out):
        raise ValueError(f"Results in {out} would overwrite the students' notebooks; choose another --out.")
    chapters = _read_chapters(Path(notebooks).expanduser(), parameters, given or {})
    found = _find(folder, out, chapters)
    graded = [one for one in found if one.chapter]
    if not graded:
        names = ", ".join(chapter.name for chapter in chapters)
        raise ValueError(f"No notebook in {folder} belongs to the course, which has {names}.")
    if why := why_not_contained():
        say(
            f"Notebooks are NOT contained ({why}): they can use the network, read and change your files, and leave "
            "programs running; see Grading in docs/teaching.md."
        )
    else:
        say("Notebooks are contained by bwrap: no network, no files but a copy of their own, no other processes.")
    limits, stopped = {"timeout": timeout, "memory": memory}, threading.Event()
    grade = partial(_grade, found=found, hidden=(folder, out), limits=limits, whole=whole, stopped=stopped)
    _try_solutions(Path(notebooks).expanduser() / "solutions", graded, grade, say)
    _write_grades(out, [])  # better that it fails now than after the first notebook
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = {pool.submit(grade, one): one for one in graded}
        for count, future in enumerate(as_completed(futures), start=1):
            future.result()
            one = futures[future]
            marks = f"{one.passed} of {len(one.verdicts)} correct  {one.seconds:.0f} s"
            say("  ".join(filter(None, (f"[{count}/{len(graded)}] {one.student}", one.chapter.name, marks, one.note))))
            _write_grades(out, [one for one in graded if one.verdicts])
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
    return found


def _try_solutions(solutions: Path, graded: list[Submission], grade: Callable, say: Callable[[str], None]) -> None:
    """Grade the course's own solutions of one chapter; where they fail, students cannot do better."""
    chapters = {one.chapter.name: one.chapter for one in graded}
    path = next((path for path in sorted(solutions.glob("*.ipynb")) if path.stem in chapters), None)
    if path is None:
        say("The course's own solutions are missing, so nothing shows that this environment works.")
        return
    own = Submission(path, path.name, "", chapters[path.stem], _read(path))
    grade(own)
    failed = [f"{name} is {status}. {said}" for name, (status, said) in own.verdicts.items() if status != CORRECT]
    if failed or own.stopped:
        raise ValueError(
            f"The course's own solutions of {path.stem} fail here, so nobody is graded; look at "
            f"`python -m vitlib doctor` and the parameters: {own.note or failed[0]}"
        )
    say(f"The course's own solutions of {path.stem} pass in {own.seconds:.0f} s.")


# What was handed in


def _read_chapters(notebooks: Path, parameters: str | Path | None, given: Mapping[str, object]) -> list[Chapter]:
    """Read the course. A chapter sets all of its parameters, so that what a student has set or removed is no matter."""
    lessons, smoke = read_lessons(notebooks), notebooks / "parameters" / "smoke.yaml"
    shared = parameters_from_file(parameters or smoke) if parameters or smoke.exists() else {}
    values = checked_values(lessons, shared, given)
    values["run_dir"] = "../run"  # not the student's own training, made with other parameters
    chapters = []
    for lesson in lessons:
        known = {name: value for name, value in lesson.defaults.items() if name in PARAMETERS} | values
        exercises = {}
        for cell in nbformat.read(lesson.path, as_version=4).cells:
            exercises |= names_of(cell).calls
        parameters = {name: known[name] for name in lesson.parameters if name in known}
        chapters.append(Chapter(lesson.name, exercises, parameters))
    return chapters


def _find(folder: Path, out: Path, chapters: Sequence[Chapter]) -> list[Submission]:
    """Return all files by student and chapter. One that cannot be read, or belongs to no chapter, says why.

    Links and folders that cannot be entered count as files; what Jupyter, archives and systems leave does not.
    """
    found = []
    for path in folder.rglob("*"):
        name, is_folder = path.relative_to(folder), os.path.isdir(path) and not os.path.islink(path)
        is_left_over = path.is_relative_to(out) or any(map(SYSTEM_NAME.fullmatch, name.parts))
        if is_left_over or (is_folder and os.access(path, os.R_OK | os.X_OK)):
            continue
        one = Submission(path, _plain(str(name)), _student(name, chapters), copy=out / name)
        found.append(one)
        if os.path.isfile(path) and ".ipynb" not in path.name.casefold():
            one.remark = "not a notebook"
            continue
        try:
            one.notebook = _read(path)
        except Exception as error:  # there is no end to the ways in which a file can be broken
            one.stopped = f"not a notebook: {_plain(reason(error).removeprefix('ValueError: '))}"
        one.chapter, one.remark = _chapter_of(name, one.notebook, chapters)
    return sorted(found, key=lambda one: (one.student.casefold(), one.chapter.name if one.chapter else "", one.path))


def _read(path: Path) -> NotebookNode:
    """Read a notebook of any format: sources and tags of parameters only, since other metadata can stop papermill."""
    if path.is_symlink():
        raise ValueError("it is a link, and links are not followed")
    if not path.is_file():
        raise ValueError("it cannot be read as a file")
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError("it is empty")
    cells = []
    for cell in nbformat.convert(nbformat.reader.reads(text), 4).cells:
        tags = [tag for tag in cell.get("metadata", {}).get("tags", ()) if tag in ("parameters", "injected-parameters")]
        create = new_code_cell if cell.cell_type == "code" else new_markdown_cell
        cells.append(create("".join(cell.source), metadata={"tags": tags}))
    if (count := sum(len(cell.source) for cell in cells if cell.cell_type == "code")) > MOST_CODE:
        raise ValueError(f"it has {count:,} letters of code, and may have {MOST_CODE:,}")
    return new_notebook(cells=cells)


def _chapter_of(path: Path, notebook: NotebookNode | None, chapters: Iterable[Chapter]) -> tuple[Chapter | None, str]:
    """Return the chapter that the path names, unless only another's checks are called, and a remark if they differ."""
    texts = (unicodedata.normalize("NFC", text) for text in (path.name, str(path)))
    named = next((chapter for text in texts for chapter in chapters if chapter.pattern.search(text)), None)
    calls = {name for cell in (notebook.cells if notebook else ()) for name in names_of(cell).calls}
    best = max(chapters, key=lambda chapter: len(calls.intersection(chapter.exercises)))
    if not calls.intersection(best.exercises) or (named and calls.intersection(named.exercises)):
        return named, "" if named else "belongs to no chapter of the course"
    return best, f"named {named.name}, but it calls the checks of {best.name}" if named else ""


def _student(path: Path, chapters: Iterable[Chapter]) -> str:
    """Return the student's name from a path: ``ada`` of 01_patching_ada.ipynb and of ada/01_patching.ipynb."""
    stem = re.split(r"\.ipynb", path.name, maxsplit=1, flags=re.IGNORECASE)[0]
    names = []
    for part in (*path.parts[:-1], stem):
        whole = name = unicodedata.normalize("NFC", part)
        for chapter in chapters:
            name = chapter.pattern.sub(" ", name)
        if name != whole or part is stem:
            name = NOISE.sub("", name.strip()).strip(" _-().")
        names.append(_plain(name))
    return "/".join(filter(None, names)) or _plain(stem)


# What is run


def _prepared(one: Submission, whole: bool) -> NotebookNode:
    """Put the grader's checks behind the student's calls, and tag the cells that no check needs, which are skipped."""
    cells, exercises = one.notebook.cells, one.chapter.exercises
    names = [names_of(cell) for cell in cells]
    called = [{name: text for name, text in cell.calls.items() if name in exercises} for cell in names]
    for name, argument in exercises.items():
        defining = [index for index, cell in enumerate(names) if argument in cell.bound - cell.imported]
        if defining and not any(name in here for here in called):  # the call is gone
            called[defining[-1]][name] = argument
    needed = needed_cells(names, {index for index, here in enumerate(called) if here})
    prepared = []
    for index, cell in enumerate(cells):
        if cell.cell_type == "code" and not whole and index not in needed:
            cell.metadata.tags.append("skip-execution")
        prepared.append(cell)
        for name, text in called[index].items():
            source = CHECK_CELL.format(checks=checks, exercise=name, arguments=text or exercises[name])
            prepared.append(new_code_cell(source, metadata={"tags": [], "vitlib": {"exercise": name}}))
    return new_notebook(cells=prepared)


def _grade(
    one: Submission, found: list[Submission], hidden: Sequence[Path], limits: Mapping, whole: bool,
    stopped: threading.Event,
) -> None:  # fmt: skip
    """Run one notebook and fill in its verdicts. Nothing is raised: one bad notebook must not stop the rest."""
    start, verdicts = time.monotonic(), dict.fromkeys(one.chapter.exercises, (NOT_REACHED, ""))
    try:
        if one.copy:
            one.copy.unlink(missing_ok=True)  # of an earlier grading
        if one.notebook:
            beside = {other.student for other in found if other.chapter and one.path.parent in other.path.parents}
            executed, stop = run_apart(
                _prepared(one, whole), one.path.parent if beside == {one.student} else None, hidden,
                one.chapter.parameters, limits, stopped,
            )  # fmt: skip
            one.stopped = _plain(stop)
            if executed and one.copy:
                with atomic_write(one.copy) as temporary:
                    nbformat.write(executed, temporary)
            if executed:
                verdicts, one.first_error = _judge(executed, one.chapter.exercises)
    except Exception as error:
        one.stopped = f"not run: {_plain(reason(error))}"
    one.seconds, one.verdicts = time.monotonic() - start, verdicts


# What came out


def _judge(executed: NotebookNode, exercises: Iterable[str]) -> tuple[dict[str, tuple[str, str]], str]:
    """Return status and message of each exercise, and the notebook's first error."""
    verdicts, student, first_error = dict.fromkeys(exercises, (MISSING, "")), new_code_cell(), ""
    for cell in (cell for cell in executed.cells if cell.cell_type == "code"):
        if exercise := cell.metadata.get("vitlib", {}).get("exercise"):
            verdict = _verdict(exercise, cell, student)
            # a later copy of the stub, or one that was not reached, counts for nothing
            if verdict[0] not in (OPEN, NOT_REACHED) or verdicts[exercise][0] in (MISSING, OPEN):
                verdicts[exercise] = verdict
            continue
        student = cell
        if (error := _error(cell)) and not first_error:
            line = cell.source.strip().partition("\n")[0]
            first_error = _plain(f'first error: In [{cell.execution_count}] "{line}": {error}')
    return verdicts, first_error


def _verdict(exercise: str, cell: NotebookNode, student: NotebookNode) -> tuple[str, str]:
    """Return status and message by the grader's cell, unless the student's cell before it stopped early."""
    if (error := _error(student)) and exercise not in _shown(student):
        return NOT_YET, _plain(f"its cell stopped before the check with {error}")
    if error := _error(cell):
        return NOT_YET, _plain(f"the check stopped with {error}")
    return _shown(cell).get(exercise, (NOT_REACHED, ""))


def _shown(cell: NotebookNode) -> dict[str, tuple[str, str]]:
    """Return status and message of the checks whose verdict a cell shows; one of another form is forged."""
    found = {}
    for output in cell.outputs:
        match output.get("data"):
            case {frame.VERDICT: {"check": str(check), "status": str(status), "message": str(message)}}:
                found[check] = WORDS.get(status, NOT_REACHED), _plain(message)
    return found


def _error(cell: NotebookNode) -> str:
    """Return the error that stopped a cell, or ""."""
    errors = [output for output in cell.outputs if output.output_type == "error"]
    return ": ".join(filter(None, (errors[0].ename, errors[0].evalue))) if errors else ""


def _plain(text: str) -> str:
    """Return foreign text on one line of printable characters, and not a long one: terminals obey what is in some."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[:9999]).split())[:300]


def _write_grades(out: Path, graded: Iterable[Submission]) -> None:
    rows = (
        (one.student, one.file, one.chapter.name, name, status, message, f"{one.seconds:.1f}", one.note)
        for one in graded
        for name, (status, message) in one.verdicts.items()
    )
    # a quote before what a spreadsheet would run as a formula
    escaped = ([f"'{cell}" if cell.startswith(("=", "+", "-", "@")) else cell for cell in row] for row in rows)
    write_csv(out / "grades.csv", COLUMNS, escaped, encoding="utf-8-sig")  # without the mark, Excel garbles umlauts


def tables(found: Sequence[Submission], roster: Sequence[str] = ()) -> str:
    """Return who passed what and who of the roster is missing, by chapter, then the files that were not graded."""
    graded = [one for one in found if one.chapter]
    blocks = []
    for name in sorted({one.chapter.name for one in graded}):
        rows = [one for one in graded if one.chapter.name == name]
        students = Counter(one.student for one in rows)
        lines = [(name, *rows[0].chapter.exercises, "passed", "")]
        for one in rows:
            statuses = (status for status, _ in one.verdicts.values())
            note = f"{one.note} ({one.file})" if students[one.student] > 1 else one.note
            lines.append((one.student, *statuses, f"{one.passed}/{len(one.verdicts)}", note.strip()))
        missing = ", ".join(_missing(roster, students))
        blocks.append(text_table(lines) + [f"Missing: {missing}"] * bool(missing))
    if strange := [f"{one.file}: {one.stopped or one.remark}" for one in found if not one.chapter]:
        more = [f"and {len(strange) - LISTED} more files"] if len(strange) > LISTED else []
        blocks.append(["Not graded:", *strange[:LISTED], *more])
    count, stopped = len({one.student for one in graded}), sum(bool(one.stopped) for one in graded)
    blocks.append([f"{len(graded)} notebooks of {count} students; {stopped} could not be run to the end."])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def read_roster(path: Path) -> list[str]:
    """Read the names of a class, one a line."""
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({reason(error)}); give UTF-8 text with one name a line.") from error
    return [_plain(line) for line in lines if line.strip()]


def _missing(roster: Sequence[str], students: Iterable[str]) -> list[str]:
    """Return the names on the roster that no student has.

    A student has a name if its words are all in the student's own, in any order; of several such names, the longest.
    """

    def words(name: str) -> list[str]:
        return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", name).casefold())

    def is_in(name: str, student: str) -> bool:
        own, its = words(name), set(words(student))
        # Canvas writes a name without blanks, surname first
        return set(own) <= its or any("".join(own[i:] + own[:i]) in its for i in range(len(own)))

    there = set()
    for student in students:
        known = [name for name in roster if is_in(name, student)]
        there.add(max(known, key=lambda name: len(words(name)), default=None))
    return [name for name in roster if name not in there]
