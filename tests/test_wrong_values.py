"""Wrong values on the command line: one sentence that names the value, exit code 2, and no file."""

import re
from pathlib import Path

import pytest
from conftest import image_folder, invoke
from PIL import Image

from vitlib.course.runner import COURSE_FOLDER

PATCHES = str(COURSE_FOLDER / "sweeps" / "patches.ipynb")
WRONG = [  # command, and words of the sentence
    ("pretrain --batch-size 0", r"batch_size=0 is not allowed; give a whole number of at least 1 and at most 65536\."),
    ("pretrain --train-steps-per-epoch some", r"train_steps_per_epoch='some' is not allowed; .*, or None\."),
    ("pretrain --preset smal", r"preset='smal' is not allowed; .* \(did you mean 'small'\?\)\."),
    ("pretrain --device gpu", r"device='gpu' is not available here; choose one of auto, cpu.* .did you mean 'cpu'.*"),
    ("pretrain --upstream shapes1000", r"'shapes1000' is neither .*did you mean"),
    ("pretrain --upstream tiny --image-size 30", r"image_size=30 is not a multiple of patch_size=4"),
    ("pretrain --run-dir=", r"run_dir='' is not allowed"),
    ("finetune --downstream shapes10 --weights imagenet", r"'imagenet' is not known; give a file, .*shapes100-mini"),
    ("run --only 04 -p weights shapes100-mni", r"'shapes100-mni' is not known; .*did you mean 'shapes100-mini'"),
    ("run --only 03 -p upstream untested", r"untested.test does not exist or holds no class folders"),
    ("finetune --downstream shapes10 --weights None", r"weights=None names no encoder"),
    ("finetune --downstream shapes10 --weights ~/absent.safetensors", r"no checkpoint at .*[/\\]absent.safetensors"),
    ("run --only 99", r"'99' is not a notebook of the course"),
    ("run --parameters absent.yaml", r"absent\.yaml"),
    (f"sweep {PATCHES} --grid", r"'--grid' requires an argument"),
    ("grade students -p seed x", r"seed='x' is not allowed"),
    ("download shapes1000", r"'shapes1000' is neither"),
    ("predict nothing grey.png", r"'nothing'; choose"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "students").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "untested" / "train" / name).mkdir(parents=True)
    image_folder(tmp_path / "tiny", train=6, test=3)
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "words"), WRONG, ids=[command.replace(PATCHES, "patches") for command, _ in WRONG])
def test_a_wrong_value_gets_one_sentence_and_writes_nothing(folder, command, words):
    result = invoke(*command.split())
    *usage, sentence = [line for line in result.stderr.splitlines() if line]
    assert result.exit_code == 2, result.output
    assert sentence.startswith("Error: ") and re.search(words, sentence), result.stderr
    assert not usage or usage[0].startswith("Usage:"), result.stderr
    assert {path.name for path in folder.iterdir()} == {"students", "untested", "tiny", "grey.png"}
