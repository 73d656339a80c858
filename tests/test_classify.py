"""Predictions for image files: the same as for a folder's images; broken files are named and stop nothing."""

import csv
import errno
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, invoke, refusal
from PIL import Image

import vitlib.classify as classify_module
from vitlib.classify import Prediction, confident_mistakes, predict_files
from vitlib.data.folders import read_image
from vitlib.data.images import load_images
from vitlib.model import ViTModel
from vitlib.training.loop import predict
from vitlib.weights.checkpoint import ModelCard, save_checkpoint

CLASSES = ("ant", "bee", "crab", "dog", "eel", "fox", "gnu")


def tiny(num_channels=3) -> tuple[ViTModel, ModelCard]:
    torch.manual_seed(0)
    model = ViTModel(len(CLASSES), num_channels=num_channels, **TINY)
    return model, ModelCard(CLASSES, (0.4,) * num_channels, (0.2,) * num_channels)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Pictures of several sizes and kinds, in the order of their names, in a data set's folder."""
    place = tmp_path_factory.mktemp("pictures") / "train" / "a"
    place.mkdir(parents=True)
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(256, size=(20, 31, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(place / "0.jpg", exif=turned)
    colour.convert("L").save(place / "1.png")
    Image.fromarray(random.integers(2**16, size=(9, 40), dtype=np.uint16)).save(place / "2.png")
    colour.quantize(16).save(place / "3.png")
    (place.parent / "b").mkdir()  # a data set has two classes
    colour.save(place.parent / "b" / "0.png")
    return sorted(place.iterdir())


@pytest.fixture
def broken(tmp_path, images) -> dict[Path, str]:
    """Paths that cannot be predicted, each with what has to be said about it."""
    whole = images[2].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "folder.jpg").mkdir()
    return {
        tmp_path / "cut.png": "is damaged (",
        tmp_path / "folder.jpg": "is a folder; name the images in it, for instance ",
        tmp_path / "missing.jpg": "does not exist; check the path.",
    }


# --- from Python ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 3])
def test_files_are_predicted_as_the_images_of_a_folder_are(images, num_channels):
    model, card = tiny(num_channels)
    data = load_images(images[0].parents[2], image_size=8, num_channels=num_channels, progress=False)
    expected = predict(model, data.images[: len(images)], card).softmax(dim=1)
    found = list(predict_files(model, card, images, batch_size=3, top=9))
    assert [prediction.path for prediction in found] == [str(path) for path in images]
    for prediction, probabilities in zip(found, expected, strict=True):
        assert prediction.error is None
        order = probabilities.argsort(descending=True)
        assert [name for name, _ in prediction.classes] == [CLASSES[number] for number in order]
        assert [share for _, share in prediction.classes] == pytest.approx(probabilities[order].tolist(), abs=1e-6)


def test_broken_files_are_reported_in_their_places(images, broken):
    mixed = [path for pair in zip(images[:3], broken, strict=True) for path in pair]
    found = list(predict_files(*tiny(), mixed, batch_size=3))
    assert [prediction.path for prediction in found] == [str(path) for path in mixed]
    for prediction, alone in zip(found[::2], predict_files(*tiny(), images[:3]), strict=True):
        assert dict(prediction.classes) == pytest.approx(dict(alone.classes), abs=1e-6)
    for prediction, (path, words) in zip(found[1::2], broken.items(), strict=True):
        assert prediction.classes == () and prediction.error.startswith(f"{path} ") and words in prediction.error
        assert prediction.error.endswith(".") and "\n" not in prediction.error
    assert all(prediction.error for prediction in predict_files(*tiny(), broken)), "nothing but broken files"


def test_only_a_batch_is_read_at_a_time(images, monkeypatch):
    read = mock.Mock(side_effect=read_image)
    monkeypatch.setattr(classify_module, "read_image", read)
    predictions = predict_files(*tiny(), itertools.repeat(images[1], 100), batch_size=4)
    for number in range(1, 10):
        next(predictions)
        assert read.call_count == 4 * -(-number // 4)


@pytest.mark.parametrize(("classes", "named"), [(0, 0), (7, 3)])
def test_a_card_of_another_model_is_refused(classes, named):
    model, card = ViTModel(classes, **TINY), replace(tiny()[1], classes=CLASSES[:named])
    assert f"has {classes} classes and its card names {named} of them" in refusal(next, predict_files(model, card, []))


def test_the_most_confident_mistakes_come_first():
    logits = torch.tensor([[9.0, 0, 0], [0, 2, 0], [0, 5, 0], [0, 0, 3], [19, 18.9, 18.9]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert confident_mistakes(logits, labels).tolist() == [2, 3, 1, 4], "by probability, not by logit"
    assert confident_mistakes(logits, labels, count=2).tolist() == [2, 3]
    assert confident_mistakes(logits, logits.argmax(1)).tolist() == []


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_checkpoint(path, *tiny())
    return path


def blocks(predictions) -> str:
    """The lines that the command prints of images that it can read."""
    lines = []
    for one in predictions:
        if not one.error:
            lines += [one.path, *(f"  {100 * share:5.1f}%  {name}" for name, share in one.classes)]
    return "\n".join(lines) + "\n"


def test_the_command_prints_a_block_of_five_classes_for_each_image(weights, images, monkeypatch):
    for name in ("torchvision", "matplotlib", "onnx", "onnxruntime"):  # not needed
        monkeypatch.setitem(sys.modules, name, None)
    result = invoke("predict", weights, *images)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout == blocks(predict_files(*tiny(), images, top=5))
    assert len(result.stdout.splitlines()) == 6 * len(images)


def test_broken_images_give_a_line_each_and_the_table_has_every_class_and_error(weights, images, broken, tmp_path):
    given, table = (images[0], *broken, images[1]), tmp_path / "new" / "table.csv"
    result = invoke("predict", weights, *given, "--top", 2, "--batch-size", 1, "--csv", table)
    found = list(predict_files(*tiny(), given, top=2, batch_size=1))
    assert result.exit_code == 1 and result.stdout == blocks(found)
    assert result.stderr.splitlines() == [one.error for one in found if one.error]
    rows = [["file", "rank", "class", "probability", "error"]]
    for one in found:
        ranked = enumerate(one.classes, start=1)
        rows += [[one.path, str(rank), name, f"{share:.4f}", ""] for rank, (name, share) in ranked]
        rows += [[one.path, "", "", "", one.error]] if one.error else []
    with open(table, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == rows


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there names of files are always text")
def test_undecodable_file_names_are_shown(weights, tmp_path, images):
    named = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(named)).write_bytes(images[1].read_bytes())
    result = invoke("predict", weights, os.fsdecode(named), os.fsdecode(named + b"x"))
    assert result.exit_code == 1 and result.stdout.splitlines()[0].endswith("caf�.png")
    assert result.stderr.endswith("caf�.pngx does not exist; check the path.\n")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [(KeyboardInterrupt(), 130, "Interrupted.\n"), (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "")],
    ids=["Ctrl-C", "closed pipe"],
)
def test_results_are_printed_as_they_come_and_a_closed_pipe_is_no_error(weights, images, monkeypatch, end, code, said):
    def one_then_the_end(*arguments, **options):
        yield Prediction("a.jpg", (("ant", 1.0),))
        raise end

    monkeypatch.setattr(classify_module, "predict_files", one_then_the_end)
    result = invoke("predict", weights, images[0])
    assert (result.exit_code, result.stdout, result.stderr) == (code, "a.jpg\n  100.0%  ant\n", said)
