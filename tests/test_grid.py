"""Which runs a sweep has: what the command line and a file say, what is refused, and when two runs are the same."""

import itertools
import math

import nbformat
import pytest
import yaml
from click.testing import CliRunner
from test_runner import write_notebook

from vitlib.__main__ import main
from vitlib.course import grid as grids
from vitlib.course.grid import Grid, make_plan, parse_axes, read_grid, with_options
from vitlib.course.runner import COURSE_FOLDER


@pytest.fixture
def notebook(tmp_path):
    write_notebook(tmp_path / "book", "01_lesson", "print(seed)")
    return tmp_path / "book" / "01_lesson.ipynb"


def command(*arguments):
    return CliRunner().invoke(main, ["sweep", *map(str, arguments)])


def varied(plan):
    return [tuple(run.varied.values()) for run in plan.runs]


def test_the_grid_is_the_cross_product_in_the_order_given(notebook):
    plan = make_plan(Grid(notebook, {"seed": ["0", "1", "2"], "batch_size": ["8", 4]}))
    assert plan.varied == ("seed", "batch_size")
    assert varied(plan) == list(itertools.product([0, 1, 2], [8, 4]))
    assert plan.runs[0].parameters == {"batch_size": 8, "preset": "mini", "train_steps_per_epoch": None, "seed": 0}


def test_zipped_values_go_together_and_cross_with_the_rest(notebook):
    zips = [{"batch_size": [1, 2], "preset": ["mini", "small"]}, {"train_steps_per_epoch": [None, 3]}]
    plan = make_plan(Grid(notebook, {"seed": [5, 6]}, zips))
    pairs = [(1, "mini"), (2, "small")]
    assert varied(plan) == [(seed, *pair, steps) for seed in (5, 6) for pair in pairs for steps in (None, 3)]


def test_a_notebook_alone_is_one_run_with_its_own_name(notebook):
    plan = make_plan(read_grid(notebook))
    assert len(plan.runs) == 1 and plan.runs[0].label.startswith("01_lesson-") and plan.runs[0].varied == {}


@pytest.mark.parametrize(
    "words, axes",
    [
        (["seed=0,1", "preset=mini"], {"seed": ["0", "1"], "preset": ["mini"]}),
        (['downstream="a,b",c d, e'], {"downstream": ["a,b", "c d", "e"]}),
        (["weights=a=b"], {"weights": ["a=b"]}),
        ([], {}),
    ],
)
def test_words_become_lists_of_values(words, axes):
    assert parse_axes(words) == axes


@pytest.mark.parametrize("word", ["seed", "seed=", "=1", ""])
def test_a_word_of_another_form_is_refused(word):
    with pytest.raises(ValueError, match="is not of the form name=value,value"):
        parse_axes([word])


def grid_of(**changes):
    return {"grid": {"seed": [0, 1]}} | changes


@pytest.mark.parametrize(
    "options, words",
    [
        (grid_of(grid={"sed": [0]}), r"'sed' is not a parameter of the course \(did you mean 'seed'\?\)"),
        (grid_of(grid={"seed": [0, -1]}), "seed=-1 is not allowed; give a whole number of at least 0"),
        (grid_of(grid={"seed": ["0", "1.5"]}), "seed='1.5' is not allowed"),
        (grid_of(grid={"preset": ["mini", "smal"]}), r"preset='smal' is not allowed; .* \(did you mean 'small'\?\)"),
        (grid_of(grid={"batch_size": [True]}), "batch_size=True is not allowed"),
        (grid_of(grid={"seed": []}), "seed has no values"),
        (grid_of(grid={"seed": [0, 1, 0]}), "seed=0 comes twice"),
        (grid_of(grid={"seed": ["1", 1]}), "seed=1 comes twice"),
        (grid_of(grid={"run_dir": ["a"]}), "run_dir cannot be given as a parameter"),
        (grid_of(zips=[{"seed": [3]}]), "seed is given twice"),
        (grid_of(zips=[{"batch_size": [1, 2], "preset": ["mini"]}]), "batch_size has 2, preset has 1"),
        (grid_of(parameters={"batch": 3}), "'batch' is not a parameter"),
        (grid_of(parameters={"batch_size": 0}), "batch_size=0 is not allowed"),
        (
            grid_of(grid={"seed": list(range(101)), "batch_size": list(range(1, 101))}),
            "has 10,100 runs; at most 10,000",
        ),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(notebook, options, words):
    with pytest.raises(ValueError, match=words):
        make_plan(Grid(notebook, **options))


def test_a_parameter_for_all_and_in_the_grid_is_refused(notebook):
    with pytest.raises(ValueError, match="seed is given twice"):
        make_plan(Grid(notebook, {"seed": [0, 1]}), {"seed": "3"})


def test_every_label_is_a_name_for_a_folder_and_no_two_are_equal(notebook):
    write_notebook(notebook.parent, "02_text", parameters='path: str = "x"  # a text\nn: int = 0  # a number')
    texts = ["../up", "/etc/passwd", "a b", "ä" * 200, "ä" * 201, ".", "..", "CON", "a:b*?", "<x>", "\x00\n"]
    plan = make_plan(Grid(notebook.parent / "02_text.ipynb", {"path": texts}))
    labels = [run.label for run in plan.runs]
    assert len({label.casefold() for label in labels}) == len(texts)
    for label in labels:
        assert len(label) <= 110 and not set(label) & set('/\\:*?"<>|\x00\n ') and label.strip(". ") == label


def test_the_key_holds_content_parameters_and_version_and_nothing_else(notebook, monkeypatch):
    def key(**options):
        return make_plan(Grid(notebook, **options)).runs[0].key

    first = key(grid={"seed": [1]})
    assert key(parameters={"seed": 1}) == first, "however it is given"
    assert key(grid={"seed": [3]}) == key(), "the default, given or not"
    assert key(grid={"seed": [2]}) != first
    content = nbformat.read(notebook, as_version=4)
    content.cells[1].execution_count, content.metadata["x"] = 7, "y"
    content.cells.append(nbformat.v4.new_markdown_cell("words"))
    nbformat.write(content, notebook)
    assert key(grid={"seed": [1]}) == first, "outputs, words and metadata do not matter"
    monkeypatch.setattr(grids, "version", lambda package: "9.9")
    assert key(grid={"seed": [1]}) != first
    monkeypatch.undo()
    content.cells[2].source += "\n# changed"
    nbformat.write(content, notebook)
    assert key(grid={"seed": [1]}) != first


def test_a_yaml_file_says_the_same_as_the_options(notebook, tmp_path):
    file = tmp_path / "sweep.yaml"
    content = {
        "notebook": "book/01_lesson.ipynb",
        "grid": {"seed": [0, 1], "preset": "mini"},
        "zip": {"batch_size": [1, 2], "train_steps_per_epoch": [3, None]},
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    plan = make_plan(read_grid(file))
    assert varied(plan) == [(s, "mini", *pair) for s in (0, 1) for pair in ((1, 3), (2, None))]
    options = ["--grid", "seed=0,1", "preset=mini", "--zip", "batch_size=1,2", "train_steps_per_epoch=3,None"]
    by_options = command(notebook, *options, "--dry-run", "--out", tmp_path / "out")
    by_file = command(file, "--dry-run", "--out", tmp_path / "out")
    assert by_options.exit_code == 0, by_options.output
    assert by_options.output == by_file.output and "Runs: 4; to run: 4." in by_file.output
    assert not (tmp_path / "out").exists()


def test_options_win_over_the_file(notebook, tmp_path):
    described = Grid(notebook, {"seed": [0], "preset": ["mini"]}, [{"batch_size": [1]}], {"train_steps_per_epoch": 1})
    changed = with_options(described, {"seed": ["7"]}, [{"batch_size": ["5"]}], {"train_steps_per_epoch": 2})
    plan = make_plan(changed)
    assert [run.parameters for run in plan.runs] == [
        {"seed": 7, "preset": "mini", "batch_size": 5, "train_steps_per_epoch": 2}
    ]


@pytest.mark.parametrize(
    "text, words",
    [
        (
            "notebok: x.ipynb",
            r"has 'notebok' \(did you mean 'notebook'\?\); a sweep has notebook, grid, zip, parameters",
        ),
        ("grid: {seed: [0]}", "names no notebook"),
        ("notebook: book/01_lesson.ipynb\ngrid: 3", "grid in .* 3 is not a mapping"),
        ("notebook: book/01_lesson.ipynb\nzip: [3]", "zip in .* 3 is not a mapping"),
        ("notebook: book/01_lesson.ipynb\nparameters: [3]", "parameters=.3.; write one"),
        ("- 1", "not a mapping"),
        ("{", "is not YAML"),
        ("notebook: book/99.ipynb", "There is no notebook"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_in_one_sentence(notebook, tmp_path, text, words):
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises((ValueError, OSError), match=words) as error:
        make_plan(read_grid(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--grid"], "--grid says nothing"),
        (["--grid", "seed"], "is not of the form"),
        (["--grid", "seed=0", "sed=1"], "did you mean 'seed'?"),
        (["--grid", "seed=0", "--grid", "seed=1"], "seed is given twice"),
        (["--workers", "0"], "0 is not in the range"),
        (["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"], "--workers is about this machine"),
        (["--retries", "-1"], "-1 is not in the range"),
        (["--timeout", "-1"], "-1.0 is not in the range"),
        (["-p", "batch_size", "0"], "batch_size=0 is not allowed"),
        (["--parameters", "nowhere.yaml"], "There is no file nowhere.yaml"),
    ],
)
def test_wrong_commands_end_with_2_and_leave_nothing(notebook, tmp_path, arguments, words):
    result = command(notebook, *arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert words in result.output, result.output
    assert not (tmp_path / "out").exists()


def test_the_course_s_own_notebooks_can_be_swept():
    plan = make_plan(Grid(COURSE_FOLDER / "04_finetuning.ipynb", {"seed": [0, 1, 2], "finetune_epochs": [1, 2]}))
    assert len(plan.runs) == math.prod((3, 2)) == len({run.key for run in plan.runs})
