"""Wrong values on the command line: one sentence that names the value, exit code 2, and no file."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from vitlib.course.cli import main
from vitlib.course.runner import COURSE_FOLDER

PATCHES = str(COURSE_FOLDER / "sweeps" / "patches.ipynb")
WRONG = [  # command, and words of the sentence
    ("pretrain --batch-size 0", r"batch_size=0 is not allowed; give a whole number of at least 1 and at most 65536\."),
    ("pretrain --batch-size many", r"batch_size='many' is not allowed; give a whole number"),
    ("pretrain --batch-size 1.5", r"batch_size='1.5' is not allowed"),
    ("pretrain --batch-size None", r"batch_size='None' is not allowed"),
    ("pretrain --pretrain-epochs 0", r"pretrain_epochs=0 is not allowed"),
    ("pretrain --train-steps-per-epoch some", r"train_steps_per_epoch='some' is not allowed; .*, or None\."),
    ("pretrain --validation-fraction 0.95", r"validation_fraction=0.95 is not allowed; .* at most 0.9\."),
    ("pretrain --validation-fraction nan", r"validation_fraction=nan is not allowed"),
    ("pretrain --seed -1", r"seed=-1 is not allowed"),
    ("pretrain --seed 4294967296", r"seed=4294967296 is not allowed"),
    ("pretrain --preset smal", r"preset='smal' is not allowed; .* \(did you mean 'small'\?\)\."),
    ("pretrain --recipe Modern", r"recipe='Modern' is not allowed"),
    ("pretrain --norm-first 1", r"norm_first='1' is not allowed; give True or False\."),
    ("pretrain --pooling max", r"pooling='max' is not allowed; give one of cls, mean\."),
    ("pretrain --precision float16", r"precision='float16' is not allowed; give one of auto, float32, bfloat16"),
    ("pretrain --device gpu", r"device='gpu' is not allowed"),
    ("pretrain --upstream shapes1000", r"'shapes1000' is neither .*did you mean"),
    ("pretrain --upstream shapes10 --image-size 30", r"image_size=30 is not a multiple of patch_size=4"),
    ("pretrain --run-dir=", r"run_dir='' is not allowed"),
    ("finetune --freeze-encoder perhaps", r"freeze_encoder='perhaps' is not allowed; give True or False\."),
    ("finetune --downstream shapes10 --weights imagenet", r"'imagenet'; choose .*shapes100-mini"),
    ("finetune --downstream shapes10 --weights None", r"weights=None names no encoder"),
    ("finetune --downstream shapes10 --weights ~/absent.safetensors", r"no checkpoint at .*[/\\]absent.safetensors"),
    ("finetune --downstream nowhere", r"'nowhere' is neither a data set nor a folder"),
    ("run --only 99", r"'99' is not a notebook of the course"),
    ("run --parameters absent.yaml", r"absent\.yaml"),
    ("run -p batch_size 0", r"batch_size=0 is not allowed"),
    ("run -p batchsize 8", r"'batchsize' is not a parameter of the notebooks \(did you mean 'batch_size'\?\)"),
    ("run --timeout soon", r"'--timeout'.* 'soon' is not a valid float"),
    (f"sweep {PATCHES} --grid seed=0,-1", r"seed=-1 is not allowed"),
    (f"sweep {PATCHES} --grid", r"'--grid' requires an argument"),
    (f"sweep {PATCHES} -p seed x", r"seed='x' is not allowed"),
    (f"sweep {PATCHES} --workers 0", r"'--workers'.* 0 is not in the range"),
    ("grade students --jobs 0", r"'--jobs'.* 0 is not in the range"),
    ("grade students -p seed x", r"seed='x' is not allowed"),
    ("download shapes1000", r"'shapes1000' is neither"),
    ("predict shapes100-mini grey.png --top 0", r"'--top'.* 0 is not in the range"),
    ("predict nothing grey.png", r"'nothing'; choose"),
    ("export shapes100-mini model.bin", r"model\.bin"),
    ("export nothing model.pt2", r"'nothing'; choose"),
    ("doctor --no-such-option", r"No such option"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "students").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "grey.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("command", "words"), WRONG, ids=[command.replace(PATCHES, "patches") for command, _ in WRONG])
def test_a_wrong_value_gets_one_sentence_and_writes_nothing(folder, command, words):
    result = CliRunner().invoke(main, command.split())
    *usage, sentence = [line for line in result.stderr.splitlines() if line]
    assert result.exit_code == 2, result.output
    assert sentence.startswith("Error: ") and re.search(words, sentence), result.stderr
    assert not usage or usage[0].startswith("Usage:"), result.stderr
    assert {path.name for path in folder.iterdir()} == {"students", "grey.png"}
