"""The mutation score of the stored outputs: is every compared cell caught whose stored output is not what comes out?

nbval runs each notebook once, as ``make test`` does, on a copy in which the stored outputs of all compared cells are
altered at once: each text by one character, and where a cell prints nothing, a text is stored. All of these cells have
to fail, by their outputs, and no other.

``VITLIB_SLOW=1 python -m pytest tests/test_compared_outputs.py`` does it for all notebooks, else for the quickest.
"""

import copy
import os
import shutil

import nbformat
import pytest
from nbformat.v4 import new_output
from test_notebooks import FOLDER, STORED, code_cells, compared_cells, nbval_failures, read, text_places

QUICK = [FOLDER / "solutions" / "00_orientation.ipynb"]
slow = pytest.mark.skipif("VITLIB_SLOW" not in os.environ, reason="takes minutes: set VITLIB_SLOW to run it")
LONGEST = 1800  # seconds for one notebook, on a machine that does other work too


def altered_at_once(outputs):
    """A compared cell's outputs with each text one character longer, or with a text where there was none; how many."""
    changed = copy.deepcopy(outputs)
    places = [(holder, key) for output in changed for holder, key in text_places(output)]
    for holder, key in places:
        holder[key] = f"{holder[key]}?" if isinstance(holder[key], str) else ["altered"]
    return (changed, len(places)) if places else ([*changed, new_output("stream", text="?")], 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the notebooks and of what they read, without what runs have left."""
    ignored = shutil.ignore_patterns("runs", ".*")
    return shutil.copytree(FOLDER, tmp_path_factory.mktemp("altered") / "notebooks", ignore=ignored)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.relative_to(FOLDER).as_posix(), marks=[] if path in QUICK else slow)
        for path in STORED
    ],
)
def test_nbval_catches_every_altered_cell_and_no_other(path, folder, request, capsys):
    compared = {item.cell_num for item in compared_cells(request, path)}
    notebook = read(path)
    texts = 0
    for number in compared:
        cell = code_cells(notebook)[number]
        cell.outputs, changed = altered_at_once(cell.outputs)
        texts += changed
    place = folder / path.relative_to(FOLDER)
    nbformat.write(notebook, place)
    failures = nbval_failures(place, LONGEST)
    caught = {number for number, said in failures.items() if "Cell outputs differ" in said}
    with capsys.disabled():
        score = f"{len(caught & compared)} of {len(compared)} cells caught ({texts} texts altered)"
        print(f"\n{place.relative_to(folder)}: {score}, {len(caught & compared) / len(compared):.0%}")
    assert len(failures) == len(code_cells(notebook))
    assert {number: said for number, said in failures.items() if said and number not in caught} == {}
    assert caught == compared
