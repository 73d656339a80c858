"""What several tests share: no network, own data folders, small data, commands in this process."""

import os
import pickle
import runpy
from pathlib import Path

import kernel_memory
import pytest
from click.testing import CliRunner
from PIL import Image

import vitlib  # noqa: F401  before torch, whose threads shall not spin beside other programs

# isort: split
import torch

from vitlib.course.cli import main
from vitlib.data import LabelledImages
from vitlib.model import PRESETS

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


def invoke(*words: object):
    """The result of ``python -m vitlib`` in this process; an error that is not meant for its user fails the test."""
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(call, *arguments, **options) -> str:
    """The one sentence that a call is refused with."""
    with pytest.raises((ValueError, OSError)) as error:
        call(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    return text


TINY = {"num_layers": 2, "image_size": 8, "patch_size": 4, "em_dim": 16, "num_heads": 2, "ff_dim": 32}
COLOURS = ("red", "green", "blue")


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def coloured(count=60, classes=3, seed=0, size=8) -> LabelledImages:
    """Images of one plain colour each: the class is the brightest channel, so a few steps are enough to learn it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    images = torch.randint(0, 100, (count, 3, size, size), generator=generator)
    images[torch.arange(count), labels] += 120
    return LabelledImages(images.to(torch.uint8), labels, COLOURS[:classes])


def image_folder(root: Path, train: int, test: int, classes=3, size=8) -> Path:
    """The images of :func:`coloured` as files: so many for training and for testing, in folders of their classes."""
    for split, count in (("train", train), ("test", test)):
        data = coloured(count, classes, seed=len(split), size=size)
        for index, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            place = root / split / data.classes[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{index // classes}.png")
    return root


class Trap:
    """Its pickle makes a folder when it is opened."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.fixture
def trap(tmp_path):
    """An object whose pickle runs code when it is opened; the test fails if that has happened."""
    trap = Trap(tmp_path / "sprung")
    yield trap
    assert not trap.folder.exists(), "a pickle was opened"
    pickle.loads(pickle.dumps(trap))
    assert trap.folder.is_dir(), "the trap itself must work"
