"""The stored notebooks: executed, free of traces of a machine, and compared by nbval down to the last character."""

import ast
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import nbformat
import papermill
import pytest
import yaml
from nbval.plugin import IPyNbFile
from prose import MACHINE_PATH
from test_lessons import CHAPTERS, FOLDER, SOLUTIONS, by_chapter

from vitlib.course.parameters import PARAMETERS, check_parameters
from vitlib.course.runner import read_lessons

SWEEPS = sorted((FOLDER / "sweeps").glob("*.ipynb"))
STORED = CHAPTERS + SOLUTIONS + SWEEPS

TRACE = re.compile(rf"{MACHINE_PATH.pattern}|\b0x[0-9a-fA-F]{{6,}}|site-packages")
PROGRESS = re.compile(r"\r|\d+%\||\bit/s\b|\bs/it\b")
NOT_COMPARED = {"image/png", "image/jpeg", "application/vnd.jupyter.widget-view+json"}

by_notebook = pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts_of(output):
    """The texts of one output that nbval compares."""
    return [str(holder[key]) for holder, key in text_places(output)]


def count_problems(notebook):
    """What is wrong with the execution counts: nbval lets a cell without a count pass, whatever it printed."""
    counts = [cell.execution_count for cell in code_cells(notebook)]
    problems = [f"code cell {number} was not run" for number, count in enumerate(counts) if count is None]
    counts = [count for count in counts if count is not None]
    return problems + [f"cell {b} ran after cell {a}" for a, b in zip(counts, counts[1:], strict=False) if b <= a]


def output_problems(notebook):
    """What is in the stored outputs that should not be there."""
    problems = ["the notebook stores widget state"] * ("widgets" in notebook.metadata)
    for number, cell in enumerate(code_cells(notebook)):
        for output in cell.outputs:
            if output.output_type == "error":
                problems.append(f"code cell {number} stopped with {output.ename}")
            for text in texts_of(output):
                problems += [f"code cell {number} shows {found}" for found in TRACE.findall(text)]
        if "execution" in cell.metadata:
            problems.append(f"code cell {number} stores its timings")
    return problems


def compared_problems(number, cell):
    """What is in a compared cell's outputs that differs from run to run or machine to machine."""
    problems = []
    for output in cell.outputs:
        if output.get("name") == "stderr":
            problems.append(f"text on stderr: {output.text[:60]}")
        problems += [f"progress: {text[:60]!r}" for text in texts_of(output) if PROGRESS.search(text)]
        problems += [f"{kind} is compared" for kind in output.get("data", {}) if kind == "image/svg+xml"]
    return [f"code cell {number}: {problem}" for problem in problems]


def compared_cells(request, path):
    """The code cells that nbval compares, as it collects them, without a kernel."""
    return [item for item in IPyNbFile.from_parent(request.session, path=path).collect() if item.options["check"]]


def text_places(output):
    """Where the compared texts of one output are: pairs of a mapping and its key."""
    places = [(output, "text")] if "text" in output else []
    return places + [(output["data"], kind) for kind in output.get("data", {}) if kind not in NOT_COMPARED]


def nbval_failures(path, seconds):
    """Code cell number to what nbval says about its failure, "" if it passed; within so many seconds."""
    report = path.with_suffix(".xml")
    options = ["--nbval", "--nbval-current-env", f"--nbval-cell-timeout={seconds}", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--rootdir={path.parent}", f"--junitxml={report}", str(path)],
        cwd=path.parent, capture_output=True, timeout=seconds,
    )  # fmt: skip
    cases = ElementTree.parse(report).iter("testcase")
    return {
        int(case.get("name").split()[-1]): "".join(part.text or part.tag for part in case if part.tag != "properties")
        for case in cases
    }


@by_notebook
def test_stored_outputs_are_of_one_run_and_of_no_machine(path, request):
    problems = count_problems(read(path)) + output_problems(read(path))
    for item in compared_cells(request, path):
        problems += compared_problems(item.cell_num, item.cell)
    assert problems == []


@pytest.mark.parametrize("path", CHAPTERS + SWEEPS, ids=lambda path: path.stem)
def test_parameters_agree_with_the_table(path):
    cells = read(path).cells
    (place,) = [number for number, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])]
    assert cells[place + 1].cell_type == "code"
    assert "check_parameters(globals())" in cells[place + 1].source

    declared = papermill.inspect_notebook(str(path))
    assigned = [
        node for node in ast.walk(ast.parse(cells[place].source)) if isinstance(node, ast.AnnAssign | ast.Assign)
    ]
    assert len(assigned) == len(declared), "papermill does not see every parameter"
    for name, entry in declared.items():
        parameter = PARAMETERS[name]
        written = f"Optional[{parameter.type.__name__}]" if parameter.optional else parameter.type.__name__
        assert (entry["inferred_type_name"], entry["help"]) == (written, parameter.help), name
    check_parameters({name: ast.literal_eval(entry["default"]) for name, entry in declared.items()})


@by_chapter
def test_a_lesson_needs_only_lessons_before_it(path):
    earlier = {other.stem for other in CHAPTERS if other < path}
    assert set(read(path).metadata.get("vitlib", {}).get("needs", [])) <= earlier


def parameters_file(name):
    return yaml.safe_load((FOLDER / "parameters" / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", ["smoke", "full"])
def test_parameters_files_hold_known_names_and_allowed_values(name):
    values = parameters_file(name)
    assert set(values) <= set().union(*(lesson.parameters for lesson in read_lessons(FOLDER)))
    check_parameters(values)


def test_full_yaml_is_the_published_setting():
    published = {"upstream": "cifair100", "downstream": "cifair10", "preset": "small", "recipe": "published"}
    published |= {"norm_first": False, "batch_size": 128, "pretrain_epochs": 100, "finetune_epochs": 1}
    published |= {"train_steps_per_epoch": None, "eval_steps_per_epoch": None}
    assert published.items() <= parameters_file("full").items()
