"""The door to torchvision: opens a mixed installation, and leaves a whole one alone."""

import os
import subprocess
import sys
from pathlib import Path

WHOLE_OR_MIXED = """
import sys, torch, vitlib.utils
assert "torchvision" not in sys.modules, "importing vitlib.utils must not import torchvision"
torchvision = vitlib.utils.import_torchvision()
from torchvision.transforms import v2
from torchvision import datasets, models
assert v2.functional.horizontal_flip(torch.arange(3)[None, None])[0, 0].tolist() == [2, 1, 0]
whole = torchvision.extension._has_ops()
assert (not vitlib.utils._declared) == whole, "operators must be declared exactly where they are missing"
"""
MIXED = """
import torch
from . import extension
for operator in ("nms", "qnms"):
    torch.library.register_fake(f"torchvision::{operator}", print)  # as torchvision does
"""
BROKEN = "from . import extension\nraise RuntimeError('compiled with different CUDA major versions')"
IMPORT = "import vitlib.utils as u; u.import_torchvision(); print(len(u._declared))"


def run(program: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a program that finds packages in ``folder`` first."""
    path = os.pathsep.join([str(folder), os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)


def fake_torchvision(folder: Path, source: str) -> Path:
    (folder / "torchvision").mkdir()
    (folder / "torchvision" / "__init__.py").write_text(source)
    (folder / "torchvision" / "extension.py").write_text("print('built')")
    return folder


def test_the_installed_torchvision_imports_and_its_python_parts_work(tmp_path):
    done = run(WHOLE_OR_MIXED, tmp_path)
    assert done.returncode == 0, done.stderr


def test_missing_operators_are_declared_and_the_import_starts_afresh(tmp_path):
    done = run(IMPORT, fake_torchvision(tmp_path, MIXED))
    assert done.stdout.split() == ["built", "built", "1"], done.stderr


def test_another_error_is_passed_on_at_once(tmp_path):
    done = run(IMPORT, fake_torchvision(tmp_path, BROKEN))
    assert done.stdout.split() == ["built"] and "different CUDA major versions" in done.stderr
