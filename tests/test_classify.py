"""Predictions for image files: the same as for a folder's images; broken files are named and stop nothing."""

import csv
import errno
import itertools
import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import TINY, invoke
from PIL import Image

import vitlib.classify as classify_module
from vitlib.classify import Prediction, confident_mistakes, predict_files
from vitlib.data import folders
from vitlib.data.folders import read_image
from vitlib.data.images import load_images
from vitlib.model import ViTModel
from vitlib.training.loop import predict
from vitlib.weights.checkpoint import ModelCard, save_checkpoint

CLASSES = ("ant", "bee", "crab")


def tiny_model(num_classes: int = 3, num_channels: int = 3) -> ViTModel:
    torch.manual_seed(0)
    return ViTModel(num_classes, num_channels=num_channels, **TINY).eval()


def card_of(model: ViTModel) -> ModelCard:
    channels, classes = model.config["num_channels"], model.config["num_classes"]
    return ModelCard(("ant", "bee", "crab", "dog", "eel", "fox", "gnu")[:classes], (0.4,) * channels, (0.2,) * channels)


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


# --- predict_files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 3])
def test_files_are_predicted_as_the_images_of_a_folder_are(images, num_channels):
    model = tiny_model(num_channels=num_channels)
    card = card_of(model)
    data = load_images(images[0].parents[2], image_size=8, num_channels=num_channels, progress=False)
    expected = predict(model, data.images[: len(images)], card).softmax(dim=1)
    found = list(predict_files(model, card, images, batch_size=3))
    assert [prediction.path for prediction in found] == [str(path) for path in images]
    for prediction, probabilities in zip(found, expected, strict=True):
        assert prediction.error is None
        order = probabilities.argsort(descending=True)
        assert [name for name, _ in prediction.classes] == [CLASSES[number] for number in order]
        assert [share for _, share in prediction.classes] == pytest.approx(probabilities[order].tolist(), abs=1e-6)


def test_a_palette_with_transparency_is_read_without_a_warning(images, tmp_path):
    with Image.open(images[3]) as palette:
        palette.save(tmp_path / "p.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(tmp_path / "p.png"), read_image(images[3]))


def test_a_file_that_may_not_be_read_is_said_to_be_that(images, monkeypatch):
    monkeypatch.setattr(folders.Image, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    with pytest.raises(PermissionError, match=r"0.jpg may not be read; change its permissions\.$"):
        read_image(images[0])


def test_broken_files_are_reported_in_their_places(images, broken):
    model = tiny_model()
    card = card_of(model)
    images = images[:3]
    mixed = [path for pair in zip(images, broken, strict=True) for path in pair]
    found = list(predict_files(model, card, mixed, batch_size=3))
    assert [prediction.path for prediction in found] == [str(path) for path in mixed]
    for prediction, alone in zip(found[::2], predict_files(model, card, images), strict=True):
        assert [name for name, _ in prediction.classes] == [name for name, _ in alone.classes]
        assert [s for _, s in prediction.classes] == pytest.approx([s for _, s in alone.classes], abs=1e-6)
    for prediction, (path, words) in zip(found[1::2], broken.items(), strict=True):
        assert prediction.classes == () and prediction.error.startswith(f"{path} ") and words in prediction.error
        assert prediction.error.endswith(".") and "\n" not in prediction.error
    assert all(prediction.error for prediction in predict_files(model, card, broken)), "nothing but broken files"


def test_only_a_batch_is_read_at_a_time(images, monkeypatch):
    read = mock.Mock(side_effect=read_image)
    monkeypatch.setattr(classify_module, "read_image", read)
    model = tiny_model()
    predictions = predict_files(model, card_of(model), itertools.repeat(images[1], 100), batch_size=4)
    for number in range(1, 10):
        next(predictions)
        assert read.call_count == 4 * -(-number // 4)


def test_a_card_of_another_model_is_refused(images):
    with pytest.raises(ValueError, match="The model has 0 classes and its card names 0 of them"):
        next(predict_files(tiny_model(num_classes=0), ModelCard((), (0.4,) * 3, (0.2,) * 3), images))
    with pytest.raises(ValueError, match="The model has 3 classes and its card names 7 of them"):
        next(predict_files(tiny_model(), card_of(tiny_model(num_classes=7)), images))


# --- the most confident mistakes -----------------------------------------------------------------------------------


def test_the_most_confident_mistakes_come_first():
    logits = torch.tensor([[9.0, 0, 0], [0, 2, 0], [0, 5, 0], [0, 0, 3], [19, 18.9, 18.9]])
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert confident_mistakes(logits, labels).tolist() == [2, 3, 1, 4], "by probability, not by logit"
    assert confident_mistakes(logits, labels, count=2).tolist() == [2, 3]
    assert confident_mistakes(logits, logits.argmax(1)).tolist() == []


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    model = tiny_model(num_classes=7)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_checkpoint(path, model, card_of(model))
    return path


def expected_blocks(paths, top: int) -> str:
    model = tiny_model(num_classes=7)
    lines = []
    for prediction in predict_files(model, card_of(model), paths, top=top):
        lines.append(prediction.path)
        lines += [f"  {100 * share:5.1f}%  {name}" for name, share in prediction.classes]
    return "\n".join(lines) + "\n"


def test_the_command_prints_a_block_for_each_image(weights, images, monkeypatch):
    for name in ("torchvision", "matplotlib", "onnx", "onnxruntime"):  # not needed
        monkeypatch.setitem(sys.modules, name, None)
    result = invoke("predict", weights, *images)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout == expected_blocks(images, 5)
    assert len(result.stdout.splitlines()) == 6 * len(images)


def test_broken_images_give_a_line_each(weights, images, broken):
    result = invoke("predict", weights, images[0], *broken, images[1])
    assert result.exit_code == 1 and result.stdout == expected_blocks(images[:2], 5)
    model = tiny_model()
    assert result.stderr.splitlines() == [found.error for found in predict_files(model, card_of(model), broken)]


def test_the_table_has_every_class_and_error(weights, images, tmp_path):
    table = tmp_path / "new" / "table.csv"
    given = images[0], tmp_path / "absent.png"
    result = invoke("predict", weights, *given, "--top", 2, "--batch-size", 1, "--csv", table)
    assert result.exit_code == 1
    (prediction,) = predict_files(tiny_model(7), card_of(tiny_model(7)), images[:1], top=2)
    with open(table, encoding="utf-8", newline="") as file:
        first, second, error = csv.DictReader(file)
    assert [(row["file"], row["rank"], row["class"]) for row in (first, second)] == [
        (str(images[0]), str(rank), name) for rank, (name, _) in enumerate(prediction.classes, start=1)
    ]
    assert float(first["probability"]) == pytest.approx(prediction.classes[0][1], abs=1e-4)
    assert error["file"].endswith("absent.png") and "does not exist" in error["error"] and error["class"] == ""


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there names of files are always text")
def test_undecodable_file_names_are_shown(weights, tmp_path, images):
    named = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(named)).write_bytes(images[1].read_bytes())
    result = invoke("predict", weights, os.fsdecode(named), os.fsdecode(named + b"x"))
    assert result.exit_code == 1 and result.stdout.splitlines()[0].endswith("caf�.png")
    assert result.stderr.endswith("caf�.pngx does not exist; check the path.\n")


def test_results_are_printed_as_they_come(weights, images, monkeypatch):
    def one_then_ctrl_c(*arguments, **options):
        yield Prediction("a.jpg", (("ant", 1.0),))
        raise KeyboardInterrupt

    monkeypatch.setattr(classify_module, "predict_files", one_then_ctrl_c)
    result = invoke("predict", weights, images[0])
    assert result.exit_code == 130 and result.stdout == "a.jpg\n  100.0%  ant\n"


def test_a_closed_pipe_ends_the_command_quietly(weights, images, monkeypatch):
    def nobody_reads(*arguments, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(classify_module, "predict_files", nobody_reads)
    result = invoke("predict", weights, images[0])
    assert (result.exit_code, result.output) == (1, "")
