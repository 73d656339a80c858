"""The door to torchvision: opens a mixed installation, and leaves a whole one alone."""

import subprocess
import sys
from unittest.mock import Mock, call

import pytest
import torch

from vitlib import utils


def torchvision_modules():
    return [name for name in sys.modules if name.partition(".")[0] == "torchvision"]


@pytest.fixture
def library(monkeypatch):
    """Stands in for torch.library.Library and records what is declared."""
    monkeypatch.setattr(utils, "_declared", [])
    monkeypatch.setattr(torch.library, "Library", Mock())
    return torch.library.Library


@pytest.fixture
def fake_torchvision(tmp_path, monkeypatch, library):
    """``fake_torchvision(source)`` puts a package of this source in place of the real torchvision.

    It returns a list with an entry for each import of the package's module ``extension``.
    """
    for name in torchvision_modules():
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "extension_imports", [], raising=False)

    def install(source):
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(f"import sys\nfrom . import extension\n{source}\n")
        (tmp_path / "torchvision" / "extension.py").write_text("import sys\nsys.extension_imports.append(1)\n")
        return sys.extension_imports

    yield install
    for name in torchvision_modules():
        del sys.modules[name]


def test_the_installed_torchvision_imports_and_its_python_parts_work():
    program = """
import sys, torch, vitlib.utils
assert "torchvision" not in sys.modules, "importing vitlib.utils must not import torchvision"
torchvision = vitlib.utils.import_torchvision()
from torchvision.transforms import v2
from torchvision import datasets, models
assert v2.functional.horizontal_flip(torch.arange(3)[None, None])[0, 0].tolist() == [2, 1, 0]
whole = torchvision.extension._has_ops()
assert (not vitlib.utils._declared) == whole, "operators must be declared exactly where they are missing"
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_missing_operators_are_declared_and_the_import_starts_afresh(fake_torchvision, library):
    missing = "raise RuntimeError('operator torchvision::nms does not exist')"
    imports = fake_torchvision(f"if len(sys.extension_imports) == 1: {missing}")
    assert utils.import_torchvision() is sys.modules["torchvision"]
    assert len(imports) == 2, "the half-built torchvision.extension must be imported again"
    arguments = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    declared = [call().define(name + arguments) for name in ("nms", "qnms")]
    assert library.mock_calls == [call("torchvision", "FRAGMENT"), *declared]
    assert utils._declared == [library()], "torch forgets the operators with this object"


def test_another_runtime_error_is_passed_on_and_nothing_is_declared(fake_torchvision, library):
    fake_torchvision("raise RuntimeError('compiled with different CUDA major versions')")
    with pytest.raises(RuntimeError, match="different CUDA major versions"):
        utils.import_torchvision()
    assert not library.called
