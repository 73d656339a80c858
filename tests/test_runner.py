"""Running notebooks through papermill: what is refused, what is recorded, and what a failure leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import numpy as np
import psutil
import pytest
import torch
from children import start_command, wait_until
from conftest import invoke
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from vitlib.course import runner
from vitlib.course.figures import record_figures, recorded_figures
from vitlib.course.kernels import last_cell
from vitlib.course.runner import run_course

PARAMETERS = """\
from typing import Optional
batch_size: int = 4  # images per training step
preset: str = "mini"  # size of the model
train_steps_per_epoch: Optional[int] = None  # training steps per epoch; None for all images
seed: int = 3  # start of every random draw
run_dir: str = "."  # folder for what this run saves"""
# vitlib takes seconds to import in a kernel, so the notebooks here store figures the way vitlib does
SHOW = 'from IPython.display import display\ndisplay({"application/vnd.vitlib.figures+json": %s}, raw=True)'


def write_notebook(folder, name, *cells, needs=(), parameters=PARAMETERS):
    folder.mkdir(exist_ok=True)
    code = [new_code_cell(parameters, metadata={"tags": ["parameters"]}), *map(new_code_cell, cells)]
    notebook = new_notebook(cells=[new_markdown_cell("# A lesson"), *code], metadata={"vitlib": {"needs": list(needs)}})
    nbformat.write(notebook, folder / f"{name}.ipynb")


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())["notebooks"]


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A run of four small notebooks, two of which fail, in a folder with the files of earlier runs and beside a user's
    kernel that must not be taken."""
    top = tmp_path_factory.mktemp("course")
    book, out, elsewhere = top / "notebooks", top / "run", top / "elsewhere"
    show = SHOW % '[["top1", 0.51234567], ["chance", 1]]'
    where = (
        "import os, sys, time\nprint(sys.executable, os.getcwd(), batch_size, run_dir, sep='|')\n"
        "x = bytearray(200 * 2**20)\ntime.sleep(1)  # long enough to be seen"
    )
    write_notebook(book, "01_good", show, where)
    write_notebook(book, "02_bad", "", "a = 1", "# a mishap\nprint('before')\nraise ValueError('one\\ntwo')")
    write_notebook(book, "03_needs", needs=["02_bad"])
    write_notebook(book, "04_dead", "import os\nos._exit(1)", parameters="seed: int = 7  # seed")
    (top / "kernels" / "python3").mkdir(parents=True)
    spec = {"argv": ["no-such-python", "-f", "{connection_file}"], "language": "python", "display_name": "another"}
    (top / "kernels" / "python3" / "kernel.json").write_text(json.dumps(spec))
    elsewhere.mkdir()
    out.mkdir()
    (out / "metrics.json").write_text('{"notebooks": {"09_other": {"status": "ok"}}}')
    for name in ("01_good.failed.ipynb", "02_bad.ipynb"):
        (out / name).write_text("of an earlier run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        patch.setenv("JUPYTER_PATH", str(top))
        patch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
        outcomes = run_course(out, notebooks=book, given={"batch_size": "8"}, timeout=60)
    return book, out, elsewhere, outcomes


def test_a_failure_stops_only_its_dependents(course):
    outcomes = course[3]
    assert {name: outcome.status for name, outcome in outcomes.items()} == {
        "01_good": "ok", "02_bad": "failed", "03_needs": "not run", "04_dead": "failed",
    }  # fmt: skip
    # In [4]: parameters, injected parameters, "a = 1", the mishap; the empty cell has no number
    assert outcomes["02_bad"].error == 'In [4] "# a mishap": ValueError: one'
    assert outcomes["03_needs"].error == "needs 02_bad"
    assert outcomes["04_dead"].error.startswith('In [2] "import os": the kernel died')
    assert outcomes["04_dead"].seconds < 60
    table = runner.summary(outcomes)
    for words in ("top1 0.5123, chance 1", "not run (needs 02_bad)", "02_bad: In [4]"):
        assert words in table


def test_the_kernel_is_this_interpreter_in_the_callers_folder(course):
    _, out, elsewhere, _ = course
    executed = nbformat.read(out / "01_good.ipynb", as_version=4)
    printed = next(output.text for cell in executed.cells for output in cell.get("outputs", []) if "text" in output)
    executable, folder, batch_size, run_dir = printed.strip().split("|")
    assert os.path.samefile(executable, sys.executable) and os.path.samefile(folder, elsewhere)
    assert (batch_size, run_dir) == ("8", str(out.resolve()))


def test_files_and_metrics_record_the_run(course):
    _, out, _, _ = course
    files = sorted(path.name for path in out.iterdir())
    notebooks = ["01_good.ipynb", "02_bad.failed.ipynb", "02_bad.ipynb", "04_dead.failed.ipynb"]
    assert files == [".lock", *notebooks, "metrics.json"]
    assert (out / "02_bad.ipynb").read_text() == "of an earlier run", "a failure replaces nothing good"
    assert metrics_of(out)["09_other"] == {"status": "ok"} and metrics_of(out)["02_bad"]["status"] == "failed"
    good = metrics_of(out)["01_good"]
    assert good["parameters"] == {
        "batch_size": 8, "preset": "mini", "train_steps_per_epoch": None, "seed": 3, "run_dir": str(out.resolve()),
    }  # fmt: skip
    assert list(good["figures"].items()) == [("top1", 0.51234567), ("chance", 1)]  # in the order of recording
    assert good["seconds"] > 0
    assert 200 * 2**20 < good["peak_memory_bytes"] < 2000 * 2**20
    assert set(good["versions"]) == {"python", "torch", "vitlib", "papermill", "platform"}
    assert metrics_of(out)["04_dead"]["parameters"] == {"seed": 7}


def test_a_hung_notebook_ends_at_the_timeout(tmp_path):
    write_notebook(tmp_path / "notebooks", "01_hung", "import time\ntime.sleep(60)")
    result = invoke("run", "--notebooks", tmp_path / "notebooks", "--out", tmp_path / "run", "--timeout", 1)
    assert result.exit_code == 1
    assert "stopped after 1 s" in result.output


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process")
def test_ctrl_c_ends_the_kernel_and_exits_with_130(tmp_path):
    book, out = tmp_path / "notebooks", tmp_path / "run"
    write_notebook(book, "01_long", "import os, pathlib\npathlib.Path(run_dir, 'pid').write_text(str(os.getpid()))",
                   "import time\ntime.sleep(60)")  # fmt: skip
    write_notebook(book, "02_next")
    process = start_command("run", "--notebooks", book, "--out", out)
    wait_until((out / "pid").exists, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "01_long   interrupted" in printed
    assert "02_next   not run (interrupted)" in printed
    assert not (out / "01_long.ipynb").exists()
    assert not psutil.pid_exists(int((out / "pid").read_text()))


@pytest.fixture
def no_kernel(tmp_path, monkeypatch):
    """Two notebooks, and a papermill that must not be called."""
    monkeypatch.setattr(runner.papermill, "execute_notebook", lambda *a, **k: pytest.fail("a kernel was started"))
    write_notebook(tmp_path / "notebooks", "01_one")
    write_notebook(tmp_path / "notebooks", "02_two", parameters="rate: float = 0.5  # size of a step\nwords = ['a']")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "batch_sise", "8"], "there are batch_size, preset, train_steps_per_epoch"),
        (["-p", "rate", "nan"], "rate=nan is not allowed"),
        (["-p", "run_dir", "here"], "use --out"),
        (["-p", "rate", "0.1", "--only", "01"], "rate is a parameter of 02_two only"),
        (["--out", "notebooks"], "choose another with --out"),
        (["--notebooks", "."], "No notebook"),
        ("batch_size: true", "batch_size=True is not allowed"),
        ("batch_sizes: 2", "'batch_sizes' is not a parameter of the notebooks (did you mean 'batch_size'?)"),
        ("- batch_size", "not a mapping"),
        ("batch_size: [", "is not YAML"),
        ("weights: M\xfcller", "is not YAML"),  # not UTF-8
    ],
)
def test_a_wrong_command_or_file_is_one_sentence(no_kernel, monkeypatch, arguments, said):
    monkeypatch.chdir(no_kernel)
    if isinstance(arguments, str):
        (no_kernel / "wrong.yaml").write_text(arguments, encoding="latin-1")
        arguments = ["--parameters", "wrong.yaml"]
    result = invoke("run", "--notebooks", "notebooks", "--out", "run", *arguments)
    assert result.exit_code == 2 and result.output.startswith("Error: ") and said in result.output
    assert not (no_kernel / "run").exists()


@pytest.mark.parametrize("only", [(), ("--only", "1")])
def test_a_parameter_wins_over_the_file_which_may_hold_those_of_others(no_kernel, monkeypatch, only):
    passed = []
    monkeypatch.setattr(runner.papermill, "execute_notebook", lambda source, _, values, **k: passed.append(values))
    (no_kernel / "tiny.yaml").write_text("batch_size: 2\nseed: 5\nrate: 0.001")
    result = invoke("run", "--notebooks", no_kernel / "notebooks", "--out", no_kernel / "run",
                     "--parameters", no_kernel / "tiny.yaml", "-p", "seed", "6", *only)  # fmt: skip
    first = {"batch_size": 2, "seed": 6, "run_dir": str((no_kernel / "run").resolve())}
    assert result.exit_code == 0 and passed == ([first] if only else [first, {"rate": 0.001}])


def test_help_and_doctor_are_there_without_importing_torch_or_papermill():
    code = "import sys, vitlib.__main__, vitlib.course.doctor; print({'torch', 'papermill'} & sys.modules.keys())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


def test_recorded_figures_come_back_in_order(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.get_ipython", lambda: object())
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: shown.append(bundle))
    record_figures(
        top1=torch.tensor(0.5), chance=np.float32(0.25), images=np.int64(7), preset="mini", loss=float("nan")
    )
    record_figures(chance=0.1, note=None)
    cells = [new_code_cell(outputs=[new_output("display_data", data=bundle)]) for bundle in shown]
    figures = recorded_figures(new_notebook(cells=[new_markdown_cell("text"), *cells]))
    assert list(figures.items()) == [
        ("top1", 0.5), ("chance", 0.1), ("images", 7), ("preset", "mini"), ("loss", None), ("note", None),
    ]  # fmt: skip
    assert {type(value) for value in figures.values()} == {float, int, str, type(None)}
    assert shown[0]["text/plain"].splitlines()[0] == "top1    0.5"


@pytest.mark.parametrize("value", [True, [1], torch.zeros(1)])
def test_a_figure_must_be_one_number_or_text(value):
    with pytest.raises(ValueError, match="top1"):
        record_figures(top1=value)


def test_a_cell_that_ended_its_kernel_has_the_number_after_the_last_one():
    cells = [new_code_cell(source) for source in ("a", "left out", "b", "exit()", "never run")]
    for cell, count in zip(cells, (1, None, 2, None, None), strict=True):
        started = count or cell.source == "exit()"
        cell.execution_count, cell.metadata["papermill"] = count, {"start_time": "now" if started else None}
    assert last_cell(new_notebook(cells=cells)) == 'In [3] "exit()": '
