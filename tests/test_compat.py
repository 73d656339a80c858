"""The door to torchvision: opens a mixed installation, and leaves a whole one alone."""

import subprocess
import sys

import pytest
import torch

from vitlib import utils

MISSING_OPERATOR = "operator torchvision::nms does not exist"


class RecordingLibrary:
    """Stands in for torch.library.Library and notes what is declared."""

    made = []

    def __init__(self, namespace, kind):
        self.place, self.schemas = (namespace, kind), []
        self.made.append(self)

    def define(self, schema):
        self.schemas.append(schema)


def torchvision_modules():
    return [name for name in sys.modules if name.partition(".")[0] == "torchvision"]


@pytest.fixture
def fake_torchvision(tmp_path, monkeypatch):
    """Puts a package named torchvision in the real one's place: call it with the package's source.

    The package's module `extension` adds a letter to a file each time it is imported; the call returns that file.
    The source finds the letters written so far in the variable `imports`.
    """
    for name in torchvision_modules():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(RecordingLibrary, "made", [])
    monkeypatch.setattr(torch.library, "Library", RecordingLibrary)
    monkeypatch.setattr(utils, "_declared", [])
    monkeypatch.syspath_prepend(tmp_path)
    log, package = tmp_path / "imports", tmp_path / "torchvision"

    def install(source):
        package.mkdir()
        (package / "__init__.py").write_text(f"from .extension import imports\n{source}\n")
        (package / "extension.py").write_text(
            f"log = open({str(log)!r}, 'a+')\nlog.write('i')\nlog.seek(0)\nimports = log.read()\nlog.close()\n"
        )
        return log

    yield install
    for name in torchvision_modules():
        del sys.modules[name]


def test_the_installed_torchvision_imports_and_its_python_parts_work():
    program = """
import vitlib.utils
assert "torchvision" not in __import__("sys").modules, "importing vitlib.utils must not import torchvision"
torchvision = vitlib.utils.import_torchvision()
import gc, torch
gc.collect()
from torchvision.transforms import v2
from torchvision import datasets, models
assert v2.functional.horizontal_flip(torch.arange(3)[None, None])[0, 0].tolist() == [2, 1, 0]
assert torch.ops.torchvision.nms is not None
assert vitlib.utils.import_torchvision() is torchvision
whole = torchvision.extension._has_ops()
assert (not vitlib.utils._declared) == whole, "operators must be declared exactly where they are missing"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_whole_torchvision_is_imported_once_and_nothing_is_declared(fake_torchvision):
    log = fake_torchvision("whole = True")
    module = utils.import_torchvision()
    assert module.whole and module is sys.modules["torchvision"]
    assert utils.import_torchvision() is module
    assert log.read_text() == "i"
    assert RecordingLibrary.made == [] and not utils._declared


def test_the_missing_operators_are_declared_kept_and_the_import_starts_afresh(fake_torchvision):
    log = fake_torchvision(f"if imports == 'i': raise RuntimeError('{MISSING_OPERATOR}')")
    module = utils.import_torchvision()
    assert module is sys.modules["torchvision"]
    assert log.read_text() == "ii", "the half-built torchvision.extension must be imported again"
    (library,) = RecordingLibrary.made
    assert utils._declared == [library]
    assert library.place == ("torchvision", "FRAGMENT")
    arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    assert library.schemas == ["nms" + arguments, "qnms" + arguments]


def test_another_runtime_error_is_passed_on_and_nothing_is_declared(fake_torchvision):
    log = fake_torchvision("raise RuntimeError('compiled with different CUDA major versions')")
    with pytest.raises(RuntimeError, match="different CUDA major versions"):
        utils.import_torchvision()
    assert RecordingLibrary.made == [] and log.read_text() == "i"


def test_a_missing_torchvision_gives_one_sentence_with_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)  # Python's own way to say: not installed
    with pytest.raises(ModuleNotFoundError) as caught:
        utils.import_torchvision()
    assert str(caught.value) == "torchvision is not installed; install it with `pip install torchvision`."


def test_a_module_that_torchvision_itself_lacks_is_named_and_not_blamed_on_torchvision(fake_torchvision):
    fake_torchvision("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        utils.import_torchvision()
