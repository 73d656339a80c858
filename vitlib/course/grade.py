"""Grades students' notebooks: runs each through papermill with strict checks, and says who passed what.

Each notebook has a process of its own, limits of time and memory, a scratch copy of its folder and none of the grader's
environment, and all that it started is killed afterwards; where the system can do it, it reaches no other files and
processes (:mod:`vitlib.course.contain`; docs/teaching.md, section 6.3, says what stays open). For an examination, or
people you do not trust, grade in a container without a network. The verdicts are what the student's kernel says: a
notebook that redefines ``checks`` or shows a verdict of its own making is believed. Read the executed copies of whoever
passed.
"""

import csv
import os
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_raw_cell

from vitlib.course import contain
from vitlib.course.checks import VERDICT
from vitlib.course.checks.frame import CORRECT, NOT_ATTEMPTED, NOT_YET
from vitlib.course.execution import Limits, execute_apart
from vitlib.course.parameters import PARAMETERS
from vitlib.course.runner import (
    COURSE_FOLDER,
    Lesson,
    checked_values,
    escape_formula,
    parameters_from_file,
    read_lessons,
    reason,
    text_table,
)
from vitlib.utils import atomic_write

WORDS = {CORRECT: "correct", NOT_YET: "not yet", NOT_ATTEMPTED: "open"}  # a verdict's status to the table's word
MISSING, NOT_REACHED = "missing", "not reached"
NO_CHAPTER = "no chapter of the course"
COLUMNS = ("student", "chapter", "exercise", "status", "message", "seconds", "note")
CALL = re.compile(r"^[ \t]*checks\.(?!be_strict\b)(\w+)\(", re.MULTILINE)
LARGEST = 100 * 2**20  # bytes of a notebook; a loop that printed all night makes larger ones


@dataclass
class Chapter:
    """A notebook of the course: its parameters' values for grading, and the checks that it calls, in order."""

    name: str
    exercises: tuple[str, ...]
    parameters: dict[str, object]


@dataclass
class Submission:
    """A file of a student, and what became of it: exercise to (status, message), in the order of the chapter."""

    path: Path
    student: str
    chapter: Chapter | None  # None for a file that belongs to no chapter
    notebook: NotebookNode | None  # None if it cannot be read
    copy: Path | None  # where the executed notebook goes
    note: str = ""  # why it could not be run to its end
    verdicts: dict[str, tuple[str, str]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> int:
        return sum(status == WORDS[CORRECT] for status, _ in self.verdicts.values())


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
    say: Callable[[str], None] = print,
) -> list[Submission]:
    """Run every student's notebook below ``folder``; grades.csv in ``out`` grows with each, beside executed copies.

    Args:
        folder: holds ``ada/01_patching.ipynb``, ``01_patching_ada.ipynb`` or the like.
        out: folder of the results; what is in it already is not graded.
        notebooks: folder of the course, whose notebooks say which exercises there are.
        parameters: YAML file of parameters; None for the course's ``parameters/smoke.yaml``, since training takes
            minutes and no check depends on it.
        given: values that win over those of the file. Texts are parsed.
        timeout: longest time for one notebook, in seconds.
        memory: most memory for one notebook, in GiB: of its kernel and of all that this has started.
        jobs: how many to run at once; with more than one, each computes on one thread.
        say: gets what the notebooks are kept from and what not, then one line as each is done.

    Raises:
        ValueError: for unknown or wrong parameters, an ``out`` that would overwrite originals, or if there is no
            notebook, before any kernel starts.
        OSError: for folders and files that are not there.
    """
    folder, out = Path(folder).resolve(), Path(out).resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; name the one that holds the students' notebooks.")
    if folder.is_relative_to(out):
        raise ValueError(f"Results in {out} would overwrite the students' notebooks; choose another --out.")
    chapters = _read_chapters(notebooks, parameters, given or {})
    found = _find(folder, out, chapters)
    graded = [submission for submission in found if submission.chapter]
    if not graded:
        raise ValueError(f"No notebook in {folder} belongs to the course, which has {', '.join(chapters)}.")
    _write_grades(out, [])  # better that it fails now than after the first notebook
    say(contain.in_words(contain.landlock_version()))
    limits, stopped = Limits(timeout, memory, one_thread=jobs > 1), threading.Event()
    pool = ThreadPoolExecutor(jobs)
    try:
        others = {submission.path for submission in found}
        futures = {pool.submit(_grade, one, others - {one.path}, out, limits, stopped): one for one in graded}
        for count, future in enumerate(as_completed(futures), start=1):
            future.result()
            done = futures[future]
            say(f"[{count}/{len(graded)}] {_in_one_line(done)}")
            _write_grades(out, [one for one in graded if one.verdicts])
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
    return found


def _read_chapters(
    notebooks: str | Path, parameters: str | Path | None, given: Mapping[str, object]
) -> dict[str, Chapter]:
    lessons = read_lessons(notebooks)
    smoke = Path(notebooks) / "parameters" / "smoke.yaml"
    shared = parameters_from_file(parameters or smoke) if parameters or smoke.exists() else {}
    values = checked_values(lessons, lessons, shared, given)
    return {lesson.name: Chapter(lesson.name, _exercises(lesson), _parameters(lesson, values)) for lesson in lessons}


def _exercises(lesson: Lesson) -> tuple[str, ...]:
    calls = (name for cell in nbformat.read(lesson.path, as_version=4).cells for name in _calls(cell))
    return tuple(dict.fromkeys(calls))


def _calls(cell: NotebookNode) -> list[str]:
    """Names of the checks that a cell calls."""
    return CALL.findall(cell.source) if cell.cell_type == "code" else []


def _parameters(lesson: Lesson, values: Mapping[str, object]) -> dict[str, object]:
    """What a chapter's notebooks run with: all of its parameters, whatever a student has set or removed."""
    defaults = {name: value for name, value in lesson.defaults.items() if name in PARAMETERS}
    fixed = {"strict_checks": True, "run_dir": "../run"}  # not the student's own training, made with other parameters
    return {name: value for name, value in {**defaults, **values, **fixed}.items() if name in lesson.parameters}


def _find(folder: Path, out: Path, chapters: Mapping[str, Chapter]) -> list[Submission]:
    """The students' files, by student and chapter. What cannot be read, or is no chapter, is among them with a note."""
    found, copies = [], set()
    for path in sorted(_files(folder, out)):
        notebook, note = None, ""
        try:
            notebook = _read(path)
        except Exception as error:  # there is no end to what a broken file can raise
            note = f"not a notebook: {_plain(reason(error).removeprefix('ValueError: '))}"
        chapter = _chapter_of(path, notebook, chapters)
        student = _student(path.relative_to(folder), chapter, folder.name)
        copy = _free(out / student / f"{chapter.name}.ipynb", copies) if chapter else None
        found.append(Submission(path, student, chapter, notebook, copy, note))
    return sorted(found, key=lambda one: (one.student.casefold(), one.chapter.name if one.chapter else "", one.path))


def _files(folder: Path, out: Path) -> Iterator[Path]:
    """Notebooks below ``folder``, and what may hold some but cannot be entered: links, folders without permission.

    Hidden files and folders are Jupyter's checkpoints or the leftovers of unpacking, not submissions.
    """
    closed: list[OSError] = []
    for here, folders, files in os.walk(folder, onerror=closed.append):
        folders[:] = [name for name in folders if not name.startswith(".") and Path(here, name) != out]
        if Path(here) == folder:
            yield from (folder / name for name in folders if (folder / name).is_symlink())
        yield from (Path(here, name) for name in files if name.endswith(".ipynb") and not name.startswith("."))
    yield from (Path(error.filename) for error in closed)


def _read(path: Path) -> NotebookNode:
    """A notebook of any format as nbformat 4, with nothing but sources and the tags that papermill needs.

    What students' editors and extensions leave beside these can stop or mislead papermill.
    """
    if path.is_symlink():
        raise ValueError("it is a link, and links are not followed")
    if not path.is_file():
        raise ValueError("it cannot be read as a file")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it is larger than {LARGEST >> 20} MiB")
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError("it is empty")
    cells = [_copied(cell) for cell in nbformat.convert(nbformat.reader.reads(text), 4).cells]
    if not any("parameters" in cell.metadata.tags for cell in cells):  # the tag was lost, perhaps not the cell
        setting = re.compile(r"^strict_checks\b.*=", re.MULTILINE)
        for cell in [cell for cell in cells if cell.cell_type == "code" and setting.search(cell.source)][:1]:
            cell.metadata.tags.append("parameters")
    return new_notebook(cells=cells)


def _copied(cell: NotebookNode) -> NotebookNode:
    create = {"code": new_code_cell, "raw": new_raw_cell}.get(cell.cell_type, new_markdown_cell)
    tags = [tag for tag in cell.get("metadata", {}).get("tags", ()) if tag in ("parameters", "injected-parameters")]
    return create("".join(cell.source), metadata={"tags": tags})


def _chapter_of(path: Path, notebook: NotebookNode | None, chapters: Mapping[str, Chapter]) -> Chapter | None:
    """By the file's name, else by the checks that it calls."""
    for name, chapter in chapters.items():
        if name.casefold() in path.stem.casefold():
            return chapter
    calls = {name for cell in (notebook.cells if notebook else ()) for name in _calls(cell)}
    best = max(chapters.values(), key=lambda chapter: len(calls.intersection(chapter.exercises)))
    return best if calls.intersection(best.exercises) else None


def _student(path: Path, chapter: Chapter | None, otherwise: str) -> str:
    """The first part of a path that says more than the chapter's name: ``ada`` of ada/01_patching.ipynb, of
    01_patching_ada.ipynb and of 01_patching/ada.ipynb. It is fit to be the name of a folder.
    """
    for part in (*path.parts[:-1], path.stem):
        if chapter and chapter.name.casefold() in part.casefold():
            part = re.sub(re.escape(chapter.name), "", part, flags=re.IGNORECASE).strip(" _-()")
        name = _plain(unicodedata.normalize("NFC", part)).replace("/", "_").replace("\\", "_").strip(". ")
        if name:
            return name
    return otherwise or "unnamed"


def _free(path: Path, taken: set[str]) -> Path:
    """``path``, or one with a number, and added to ``taken``; some systems do not tell capitals from small letters."""
    candidate, number = path, 1
    while str(candidate).casefold() in taken:
        number += 1
        candidate = path.with_stem(f"{path.stem}_{number}")
    taken.add(str(candidate).casefold())
    return candidate


def _grade(one: Submission, others: set[Path], out: Path, limits: Limits, stopped: threading.Event) -> None:
    """Run one notebook and fill in its verdicts. Nothing is raised: one bad notebook must not stop the rest."""
    executed, start = None, time.monotonic()
    try:
        one.copy.unlink(missing_ok=True)  # of an earlier grading
        if one.notebook:
            left_out, parameters = {*others, out}, one.chapter.parameters
            executed, note = execute_apart(
                one.notebook, one.path.parent, left_out, parameters, VERDICT, limits, stopped
            )
            one.note = _plain(note)
        if executed:
            with atomic_write(one.copy) as temporary:
                nbformat.write(executed, temporary)
    except Exception as error:
        one.note = f"not run: {_plain(reason(error))}"
    if not stopped.is_set():
        one.seconds = time.monotonic() - start
        one.verdicts = _judge(one, executed)


def _judge(one: Submission, executed: NotebookNode | None) -> dict[str, tuple[str, str]]:
    """Status and message of each exercise: the last verdict, and where there is none, why."""
    cells = [cell for cell in (executed or one.notebook or new_notebook()).cells if cell.cell_type == "code"]
    said = {}
    for output in (output for cell in cells for output in cell.outputs):
        verdict = output.get("data", {}).get(VERDICT)
        if isinstance(verdict, dict) and str(verdict.get("status")) in WORDS:
            said[str(verdict.get("check"))] = WORDS[verdict["status"]], _plain(str(verdict.get("message", "")))
    return {name: said.get(name) or _without_verdict(name, cells, one) for name in one.chapter.exercises}


def _without_verdict(name: str, cells: Sequence[NotebookNode], one: Submission) -> tuple[str, str]:
    calling = [cell for cell in cells if name in _calls(cell)]
    errors = [output for cell in calling for output in cell.outputs if output.output_type == "error"]
    if errors:
        text = f"{errors[-1].ename}: {errors[-1].evalue}" if errors[-1].evalue else errors[-1].ename
        return WORDS[NOT_YET], _plain(f"its cell stopped before the check with {text}")
    if calling or not one.notebook:
        return NOT_REACHED, "" if one.note else "its cell ran, but no check spoke"
    return MISSING, ""


def _plain(text: str) -> str:
    """Foreign text on one line of printable characters, and not a long one: terminals obey what is in some."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())[:300]


def _write_grades(out: Path, graded: Iterable[Submission]) -> None:
    with (
        atomic_write(out / "grades.csv") as temporary,
        open(temporary, "w", encoding="utf-8-sig", newline="") as file,  # without the mark, Excel garbles umlauts
    ):
        rows = csv.writer(file)
        rows.writerow(COLUMNS)
        for one in graded:
            for exercise, (status, message) in one.verdicts.items():
                texts = (one.student, one.chapter.name, exercise, status, message, f"{one.seconds:.1f}", one.note)
                rows.writerow(map(escape_formula, texts))


def _in_one_line(one: Submission) -> str:
    marks = f"{one.passed} of {len(one.verdicts)} correct  {one.seconds:.0f} s"
    return "  ".join(filter(None, (one.student, one.chapter.name, marks, one.note)))


def tables(found: Sequence[Submission], folder: str | Path) -> str:
    """For each chapter who passed what, then the files that were not graded, then how many there were."""
    folder = Path(folder).resolve()
    graded = [one for one in found if one.chapter]
    chapters = {one.chapter.name: one.chapter for one in graded}
    blocks = [
        _table(chapters[name], [one for one in graded if one.chapter.name == name], folder) for name in sorted(chapters)
    ]
    strange = [one for one in found if not one.chapter]
    if strange:
        reasons = (f"{_plain(str(one.path.relative_to(folder)))}: {one.note or NO_CHAPTER}" for one in strange)
        blocks.append(["Not graded:", *reasons])
    students, stopped = len({one.student for one in graded}), sum(bool(one.note) for one in graded)
    blocks.append([f"{len(graded)} notebooks of {students} students; {stopped} could not be run to the end."])
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _table(chapter: Chapter, rows: Sequence[Submission], folder: Path) -> list[str]:
    students = [one.student for one in rows]
    lines = [(chapter.name, *chapter.exercises, "passed", "")]
    for one in rows:
        origin = f"({_plain(str(one.path.relative_to(folder)))})" if students.count(one.student) > 1 else ""
        statuses = (one.verdicts[name][0] for name in chapter.exercises)
        note = " ".join(filter(None, (one.note, origin)))
        lines.append((one.student, *statuses, f"{one.passed}/{len(chapter.exercises)}", note))
    return text_table(lines)
