"""The course needs 2 GiB of memory, and no kernel more than 1 GiB. In ``make test`` the plugin ``kernel_memory.py``
watches the kernels of nbval; ``VITLIB_SLOW=1 python -m pytest tests/test_memory.py`` tests that plugin, and runs the
whole course with the class parameters under 2 GiB.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import kernel_memory
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_notebooks import nbval_failures

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="takes minutes: set VITLIB_SLOW to run it")


def test_a_kernel_that_takes_more_than_a_gibibyte_fails_its_cell(tmp_path, monkeypatch):
    sources = ["big = b'x'", "big = b'x' * (1100 * 2**20)", "del big", "import os\nos.getpid() > 0"]
    cells = [new_code_cell(source, execution_count=count) for count, source in enumerate(sources, start=1)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "big.ipynb")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p kernel_memory")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), os.environ["PYTHONPATH"]]))
    first, second, third, last = nbval_failures(tmp_path / "big.ipynb", 120).values()
    assert first == ""
    assert "the kernel has had 1," in second and "of which 1,024 are allowed" in second
    assert third and last, "what a kernel once had counts to its end"


def limited(command: list[str]) -> list[str]:
    """The command in a shell in which each process may have 2 GiB of private memory."""
    return ["bash", "-c", f'ulimit -d {2 * 2**20} && exec "$@"', "bash", *command]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory so")
def test_the_course_with_the_class_parameters_finishes_within_two_gibibytes(tmp_path):
    too_much = [sys.executable, "-c", "print(len(bytearray(b'x') * (2200 * 2**20)))"]
    assert subprocess.run(limited(too_much), capture_output=True).returncode, "the limit is none"
    command = [sys.executable, "-m", "vitlib", "run", "--out", str(tmp_path)]
    process = subprocess.run(limited(command), cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    notebooks = json.loads((tmp_path / "metrics.json").read_text())["notebooks"]
    peaks = {name: entry["peak_memory_bytes"] for name, entry in notebooks.items()}
    assert len(peaks) == 7 and max(peaks.values()) < kernel_memory.LIMIT, peaks
