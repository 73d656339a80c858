"""Fixtures shared by the tests: small data, and the CIFAR folders of the workplace where they are to be had."""

import os
import runpy
from pathlib import Path

import kernel_memory
import pytest

import vitlib  # noqa: F401  before torch, whose threads shall not spin beside other programs

# isort: split
import torch

from vitlib.course import checks

ROOT = Path(__file__).parent.parent

# no network for any test: in this process, in those that tests start, and in the kernels of nbval
OFFLINE = ROOT / "tests" / "offline"
runpy.run_path(str(OFFLINE / "sitecustomize.py"))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(OFFLINE), os.environ.get("PYTHONPATH")]))


def pytest_configure(config):
    # a hook in this file would hear of the tests beside it only, not of the notebooks
    config.pluginmanager.register(kernel_memory, "kernel_memory")


@pytest.fixture(autouse=True)
def _own_data_dir(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path_factory.getbasetemp() / "vitlib-data"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def verdict(capsys):
    """``verdict(check, answer)`` is what a check says about an answer, after its title; it has to be one line."""

    def say(check, answer) -> str:
        check(answer)
        (line,) = capsys.readouterr().out.splitlines()
        return line.split(": ", 1)[1]

    return say


@pytest.fixture(autouse=True)
def _lenient_checks():
    yield
    checks.be_strict(False)
