"""The runs of a sweep: what the command line and a file say, what is refused, and when two runs are the same."""

import re

import nbformat
import pytest
import yaml
from conftest import invoke
from test_runner import write_notebook

from vitlib.course import grid as grids
from vitlib.course.grid import make_plan, parse_axes
from vitlib.course.runner import COURSE_FOLDER, parameters_from_file


@pytest.fixture
def notebook(tmp_path):
    write_notebook(tmp_path / "book", "01_lesson", "print(seed)")
    return tmp_path / "book" / "01_lesson.ipynb"


def varied(plan):
    return [tuple(run.varied.values()) for run in plan.runs]


def test_grids_cross_and_zipped_values_go_together(notebook):
    zips = [{"batch_size": ["1", 2], "preset": ["mini", "small"]}, {"train_steps_per_epoch": [None, 3]}]
    plan = make_plan(notebook, {"seed": ["5", "6"]}, zips)
    pairs = [(1, "mini"), (2, "small")]
    assert varied(plan) == [(seed, *pair, steps) for seed in (5, 6) for pair in pairs for steps in (None, 3)]
    assert plan.runs[0].parameters == {"seed": 5, "batch_size": 1, "preset": "mini", "train_steps_per_epoch": None}
    assert varied(make_plan(notebook, {"seed": ["1", 1, 2]})) == [(1,), (2,)], "each run takes place once"
    (alone,) = make_plan(notebook).runs
    assert alone.label.startswith("01_lesson-") and alone.varied == {}


def test_words_of_the_command_line_become_lists():
    words = ['path="a,b",c d', "weights=a=b", "path=e, f"]
    assert parse_axes(words) == {"path": ["a,b", "c d", "e", "f"], "weights": ["a=b"]}
    for word in ("seed", "seed=", "=1", ""):
        with pytest.raises(ValueError, match="is not of the form name=value,value"):
            parse_axes([word])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grid": {"sed": [0]}}, r"'sed' is not a parameter of 01_lesson \(did you mean 'seed'\?\)"),
        ({"grid": {"seed": [0, -1]}}, "seed=-1 is not allowed; give a whole number of at least 0"),
        ({"grid": {"seed": []}}, "A parameter needs values, .* but seed has 0"),
        ({"grid": {"run_dir": ["a"]}}, "run_dir cannot be given as a parameter"),
        ({"grid": {"seed": [0]}, "given": {"seed": "3"}}, "seed is given twice"),
        ({"zips": [{"batch_size": [1, 2], "preset": ["mini"]}]}, "batch_size has 2, preset has 1"),
        ({"parameters": {"batch": 3}}, "'batch' is not a parameter"),
    ],
)
def test_mistakes_are_named_before_anything_runs(notebook, options, words):
    with pytest.raises(ValueError, match=words):
        make_plan(notebook, **options)


def test_labels_are_different_names_for_folders(notebook):
    write_notebook(notebook.parent, "02_text", parameters='path: str = "x"  # a text')
    texts = ["../up", "/etc/passwd", "a b", "ä" * 200, "ä" * 201, ".", "..", "CON", "a:b*?", "<x>", "\x00\n"]
    labels = [run.label for run in make_plan(notebook.parent / "02_text.ipynb", {"path": texts}).runs]
    assert len({label.casefold() for label in labels}) == len(texts)
    for label in labels:
        assert len(label) <= 110 and not set(label) & set('/\\:*?"<>|\x00\n ') and label.strip(". ") == label


def test_the_key_holds_content_parameters_and_version(notebook, monkeypatch):
    def key(**options):
        return make_plan(notebook, **options).runs[0].key

    first = key(grid={"seed": [1]})
    assert key(parameters={"seed": 1}) == first != key(grid={"seed": [2]}) and key(grid={"seed": [3]}) == key()
    content = nbformat.read(notebook, as_version=4)
    content.cells[1].execution_count, content.metadata["x"] = 7, "y"
    content.cells.append(nbformat.v4.new_markdown_cell("words"))
    nbformat.write(content, notebook)
    assert key(grid={"seed": [1]}) == first, "outputs, words and metadata do not matter"
    with monkeypatch.context() as patch:
        patch.setattr(grids, "version", lambda package: "9.9")
        assert key(grid={"seed": [1]}) != first
    content.cells[2].source += "\n# changed"
    nbformat.write(content, notebook)
    assert key(grid={"seed": [1]}) != first


def test_a_yaml_file_says_the_same_as_options(notebook, tmp_path):
    file = tmp_path / "sweep.yaml"
    zips = {"batch_size": [1, 2], "train_steps_per_epoch": [3, None]}
    content = {"notebook": "book/01_lesson.ipynb", "grid": {"seed": [0, 1], "preset": "mini"}, "zip": zips}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    options = ["--grid", "seed=0,1", "preset=mini", "--zip", "batch_size=1,2", "train_steps_per_epoch=3,None"]
    by_options = invoke("sweep", notebook, *options, "--dry-run", "--out", tmp_path / "out")
    by_file = invoke("sweep", file, "--dry-run", "--out", tmp_path / "out")
    assert by_options.exit_code == 0 and by_options.output == by_file.output, by_options.output
    assert "Runs: 4; to run: 4." in by_file.output and not (tmp_path / "out").exists()
    (run,) = make_plan(file, {"seed": ["7"]}, [{"batch_size": ["5"]}], {"train_steps_per_epoch": 2}).runs
    assert run.parameters == {"preset": "mini", "seed": 7, "batch_size": 5, "train_steps_per_epoch": 2}, "options win"
    assert [run.parameters["seed"] for run in make_plan(file, given={"seed": "9"}).runs] == [9, 9], "over a grid, too"


def test_a_file_for_the_whole_course_may_be_given(notebook, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("finetune_epochs: 3\nbatch_size: 2")
    done = invoke("sweep", "~/book/01_lesson.ipynb", "--parameters", "~/mine.yaml", "--grid", "seed=0", "--dry-run")
    assert done.exit_code == 0, done.output
    smoke = parameters_from_file(COURSE_FOLDER / "parameters" / "smoke.yaml")
    plan = make_plan(COURSE_FOLDER / "04_finetuning.ipynb", {"seed": [0, 1, 2]}, parameters=smoke)
    assert len({run.key for run in plan.runs}) == 3 and plan.runs[0].parameters["finetune_epochs"] == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("notebok: x.ipynb", r"has 'notebok' \(did you mean 'notebook'\?\); a sweep has notebook, grid"),
        ("grid: {seed: [0]}", "names no notebook"),
        ("notebook: book/01_lesson.ipynb\nzip: [3]", "has 3 where names and values belong"),
        ("notebook: book/99.ipynb", "There is no notebook"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(notebook, tmp_path, text, words):
    (tmp_path / "sweep.yaml").write_text(text)
    refused = invoke("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "out")
    assert refused.exit_code == 2 and re.search(words, refused.output) and not (tmp_path / "out").exists()


def test_workers_are_not_asked_of_a_cluster(notebook):
    refused = invoke("sweep", notebook, "--workers", "2", "--scheduler", "tcp://127.0.0.1:1")
    assert refused.exit_code == 2 and "--workers is about this machine" in refused.output
