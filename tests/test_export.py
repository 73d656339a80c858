"""Exported models: the same logits for the same decoded images, in one file, checked before it is kept."""

import doctest
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, invoke, refusal
from PIL import Image

from vitlib import export
from vitlib.__main__ import main
from vitlib.classify import predict_files
from vitlib.data.folders import read_image
from vitlib.export import TOLERANCE, Deployable, export_model
from vitlib.model import ViTModel
from vitlib.training.loop import predict
from vitlib.weights.checkpoint import ModelCard, save_checkpoint

CLASSES = ("ant", "bee", "café", "dog")
OPTIONS = {  # of the model in a file of each kind
    ".onnx": {},
    ".pt2": {"norm_first": False, "pooling": "mean", "pre_logits": 12, "num_channels": 1, "drop_path": 0.2},
}


def trained(**options) -> tuple[ViTModel, ModelCard]:
    """A small model with logits far apart, as after training; in training mode, which must make no difference."""
    torch.manual_seed(0)
    model = ViTModel(len(CLASSES), **TINY, drop=0.5, **options)
    torch.nn.init.normal_(model.linear_classifier.weight, std=1.0)
    channels = model.config["num_channels"]
    return model.train(), ModelCard(CLASSES, (0.3, 0.4, 0.5)[:channels], (0.2, 0.0, 0.3)[:channels])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """``exported(suffix)``: a model, its card, the file that was written of it, and the difference."""

    @cache
    def write(suffix: str) -> tuple[ViTModel, ModelCard, Path, float]:
        model, card = trained(**OPTIONS[suffix])
        path = tmp_path_factory.mktemp("exported") / f"model{suffix}"
        return model, card, path, export_model(model, card, path)

    return write


def opened(path: Path):
    """A function that gives the logits of images by a file, and the JSON in the file, without vitlib."""
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        about = session.get_modelmeta().custom_metadata_map
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), about
    about = dict.fromkeys(("classes", "mean", "std", "image_size", "num_channels"), "")
    return torch.export.load(path, extra_files=about).module(), about


# --- what is in the file -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", OPTIONS)
def test_a_file_alone_gives_equal_logits_for_any_batch_size_and_its_card_as_json(exported, suffix):
    model, card, path, difference = exported(suffix)
    assert 0 <= difference <= TOLERANCE <= 1e-4
    assert model.training and all(parameter.requires_grad for parameter in model.parameters()), "it does not change"
    assert [file.name for file in path.parent.iterdir()] == [path.name], "the file stands alone"
    logits_of, about = opened(path)
    for count in (1, 2, 17):
        images = torch.randint(256, (count, len(card.mean), 8, 8), dtype=torch.uint8)
        logits = logits_of(images)
        assert logits.dtype == torch.float32 and logits.shape == (count, len(CLASSES))
        torch.testing.assert_close(logits, predict(model, images, card), rtol=0, atol=TOLERANCE)
    assert {name: json.loads(text) for name, text in about.items()} == {
        "classes": list(CLASSES), "mean": [*card.mean], "std": [*card.std], "image_size": 8,
        "num_channels": len(card.mean),
    }  # fmt: skip


EXAMPLES = doctest.DocTestParser().get_examples(export.__doc__)


def test_the_docstrings_example_runs_without_torch(exported):
    model, card, path, _ = exported(".onnx")
    folder = path.parent.parent
    Image.fromarray(np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)).save(folder / "cat.jpg")
    (folder / "model.onnx").write_bytes(path.read_bytes())
    code = "import sys; sys.modules.update(torch=None, vitlib=None)\n" + "".join(one.source for one in EXAMPLES)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (prediction,) = predict_files(model, card, [folder / "cat.jpg"])
    assert done.stdout == f"{prediction.classes[0][0]}\n"


@pytest.mark.parametrize("num_channels", [1, 3])
def test_the_docstrings_example_prepares_files_as_predict(tmp_path, num_channels):
    random, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6  # to be turned
    colour = Image.fromarray(random.integers(256, size=(20, 31, 3), dtype=np.uint8))
    pictures = {
        "rgb.jpg": colour, "grey.png": colour.convert("L"), "cmyk.jpg": colour.convert("CMYK"),
        "palette.png": colour.quantize(16), "alpha.png": colour.convert("RGBA"),
        "transparent.webp": Image.merge("RGBA", (*colour.split(), colour.convert("L"))),
        "16-bit.png": Image.fromarray(random.integers(2**16, size=(9, 40), dtype=np.uint16)),
        "1-bit.png": colour.convert("1"),
    }  # fmt: skip
    example = {"about": {"num_channels": num_channels, "image_size": 8}}
    exec("".join(one.source for one in EXAMPLES if "session" not in one.source and "print" not in one.source), example)
    for name, picture in pictures.items():
        picture.save(tmp_path / name, exif=exif)
        expected = read_image(tmp_path / name, 8, num_channels)
        np.testing.assert_array_equal(example["prepare"](tmp_path / name), expected, err_msg=name)


# --- nothing half done ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "added", "said"),
    [
        (torch.inf, 0, "logits are not finite"),
        (0, torch.nan, "logits differ from the model's by nan, more than 0.0001, so model.pt2 is not written;"),
        (0, 2 * TOLERANCE, "logits differ from the model's by 0.0002, more than 0.0001, so model.pt2 is not written;"),
    ],
)
def test_a_file_with_wrong_logits_does_not_replace_a_former_one(tmp_path, monkeypatch, bias, added, said):
    (former := tmp_path / "model.pt2").write_text("a former export")
    model, card = trained()
    torch.nn.init.constant_(model.linear_classifier.bias, bias)
    right = Deployable(model, card)

    def write(deployable, example, path, about):  # in place of PyTorch's exporter, which takes seconds
        path.write_text("a new export")

    def load(path):  # wrong for one batch size only
        return lambda images: right(images) + (added if len(images) == 5 else 0)

    monkeypatch.setitem(export.FORMATS, ".pt2", (write, load))
    assert said in refusal(export_model, model, card, former)
    assert list(tmp_path.iterdir()) == [former] and former.read_text() == "a former export"


@pytest.mark.parametrize("name", ["model.onnx.txt", "folder.pt2"])
def test_another_ending_or_a_folder_is_refused(tmp_path, name):
    (tmp_path / "folder.pt2").mkdir()
    said = refusal(export_model, *trained(), tmp_path / name)
    assert said.endswith("cannot be written; name a file that ends in .onnx or .pt2.")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.pt2"]


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_checkpoint(path, *trained())
    return path


def test_a_missing_package_is_one_line_with_its_command(weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = invoke("export", weights, tmp_path / "model.onnx")
    assert result.exit_code == 2 and list(tmp_path.iterdir()) == []
    assert result.stderr == (
        'Error: onnxscript is not installed; install it with `pip install "vitlib[export]"`, or export to .pt2.\n'
    )


def test_the_command_prints_one_line_and_nothing_else(weights, tmp_path, capfd):
    """Whatever PyTorch's exporters write to stdout and stderr."""
    out = tmp_path / "model.onnx"
    main(["export", str(weights), str(out)], standalone_mode=False)
    captured = capfd.readouterr()
    (line,) = captured.out.splitlines()
    assert captured.err == ""
    assert line.startswith(f"{out} ({out.stat().st_size / 1e6:.1f} MB) takes uint8 images [batch, 3, 8, 8] and gives ")
    measured = r"logits \[batch, 4\].* they differ from the model's by at most (\S+) \(allowed: 0\.0001\)\.$"
    assert 0 <= float(re.search(measured, line)[1]) <= TOLERANCE
