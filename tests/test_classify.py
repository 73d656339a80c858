"""What a model says about image files: the same as about a folder's images, whatever lies beside them."""

import csv
import errno
import os
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import vitlib.classify as classify_module
from vitlib.__main__ import main
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
    return ViTModel(
        num_classes, num_layers=1, image_size=8, patch_size=4, num_channels=num_channels, em_dim=8, num_heads=2,
        ff_dim=16,
    ).eval()  # fmt: skip


def card_of(model: ViTModel) -> ModelCard:
    channels, classes = model.config["num_channels"], model.config["num_classes"]
    return ModelCard(("ant", "bee", "crab", "dog", "eel", "fox", "gnu")[:classes], (0.4,) * channels, (0.2,) * channels)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> list[Path]:
    """Pictures of many sizes and kinds, in the order of their names, in a data set's folder."""
    place = tmp_path_factory.mktemp("pictures") / "train" / "a"
    place.mkdir(parents=True)
    random = np.random.default_rng(0)
    colour = Image.fromarray(random.integers(256, size=(20, 31, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    colour.save(place / "0.jpg", exif=turned)
    colour.convert("L").save(place / "1.png")
    colour.convert("CMYK").save(place / "2.jpg")
    colour.quantize(16).save(place / "3.png")
    colour.putalpha(colour.convert("L"))
    colour.save(place / "4.png")
    deep = random.integers(2**16, size=(9, 40), dtype=np.uint16)
    Image.fromarray(deep).save(place / "5.png")
    Image.fromarray(deep).save(place / "6.png", exif=turned)
    colour.convert("L").convert("1").resize((3, 5)).save(place / "7.png")
    (place.parent / "b").mkdir()  # a data set has two classes
    colour.convert("RGB").save(place.parent / "b" / "0.png")
    return sorted(place.iterdir())


@pytest.fixture
def broken(tmp_path, images) -> dict[Path, str]:
    """Paths that cannot be predicted, each with what has to be said about it."""
    whole = images[4].read_bytes()
    contents = {
        "empty.jpg": (b"", "is empty; copy or download it again."),
        "page.jpg": (b"<html>404</html>", "is not an image of a known format; convert it to JPEG or PNG."),
        "head.png": (whole[:12], "is not an image of a known format; convert it to JPEG or PNG."),
        "cut.png": (whole[: len(whole) // 2], "is damaged ("),
        "cut.jpg": (images[0].read_bytes()[:-200], "is damaged (image file is truncated"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    bomb = Image.new("1", (20_000, 10_000))  # 200 million pixels in 25 kB
    bomb.save(tmp_path / "bomb.png")
    (tmp_path / "folder.jpg").mkdir()
    said = {tmp_path / name: words for name, (_, words) in contents.items()}
    return said | {
        tmp_path / "bomb.png": "has too many pixels to be decoded safely; scale it down first.",
        tmp_path
        / "folder.jpg": f"is a folder; name the images in it, for instance {tmp_path / 'folder.jpg' / '*.jpg'}.",
        tmp_path / "missing.jpg": "does not exist; check the path.",
    }


# --- reading one picture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_channels", [1, 3])
def test_a_picture_is_read_as_load_images_reads_it(images, num_channels):
    folder = images[0].parents[2]
    loaded = load_images(folder, image_size=8, num_channels=num_channels, progress=False).images.numpy()[: len(images)]
    assert loaded.shape == (len(images), num_channels, 8, 8)
    for path, expected in zip(images, loaded, strict=True):
        np.testing.assert_array_equal(read_image(path, 8, num_channels), expected, err_msg=str(path))


def test_a_picture_keeps_its_size_unless_another_is_asked_for(images):
    assert read_image(images[1]).shape == (3, 20, 31)


def test_a_palette_with_transparency_is_read_without_a_warning(images, tmp_path):
    with Image.open(images[3]) as palette:
        palette.save(tmp_path / "p.png", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(read_image(tmp_path / "p.png"), read_image(images[3]))


def test_grey_of_16_bits_is_turned_upright_too(images):
    np.testing.assert_array_equal(
        read_image(images[6], num_channels=1)[0], np.rot90(read_image(images[5], num_channels=1)[0], -1)
    )


def test_a_broken_file_is_refused_with_the_reason_and_the_way_out(broken):
    for path, words in broken.items():
        with pytest.raises((ValueError, OSError)) as error:
            read_image(path, 8)
        message = str(error.value)
        assert message.startswith(f"{path} ") and words in message, message
        assert message.endswith(".") and "\n" not in message


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes among its files")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(OSError, match="is a device or a pipe"):
        read_image(tmp_path / "pipe.jpg")


def test_a_file_that_may_not_be_read_is_said_to_be_that(images, monkeypatch):
    def refuse(path, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders.Image, "open", refuse)
    with pytest.raises(PermissionError, match=r"0.jpg may not be read; change its permissions\.$"):
        read_image(images[0])


# --- predict_files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_files_are_predicted_as_the_images_of_a_folder_are(images, batch_size, num_channels):
    model = tiny_model(num_channels=num_channels)
    card = card_of(model)
    data = load_images(images[0].parents[2], image_size=8, num_channels=num_channels, progress=False)
    data = data.subset(slice(len(images)))
    expected = predict(model, data.images, card).softmax(dim=1)
    found = list(predict_files(model, card, images, batch_size=batch_size))
    assert [prediction.path for prediction in found] == [str(path) for path in images]
    for prediction, probabilities in zip(found, expected, strict=True):
        assert prediction.error is None
        order = probabilities.argsort(descending=True)
        assert [name for name, _ in prediction.classes] == [CLASSES[number] for number in order]
        assert [share for _, share in prediction.classes] == pytest.approx(probabilities[order].tolist(), abs=1e-6)


@pytest.mark.parametrize(("top", "given"), [(1, 1), (2, 2), (7, 7), (8, 7)])
def test_top_limits_the_classes(images, top, given):
    model = tiny_model(num_classes=7)
    (prediction,) = predict_files(model, card_of(model), images[:1], top=top)
    shares = [share for _, share in prediction.classes]
    assert len(shares) == given and shares == sorted(shares, reverse=True)


def test_five_classes_are_given_by_default(images):
    model = tiny_model(num_classes=7)
    assert len(next(predict_files(model, card_of(model), images)).classes) == 5


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_broken_files_are_reported_in_their_places(images, broken, batch_size):
    model = tiny_model()
    alone = list(predict_files(model, card_of(model), images))
    mixed = [path for pair in zip(images, broken, strict=True) for path in pair]
    found = list(predict_files(model, card_of(model), mixed, batch_size=batch_size))
    assert [prediction.path for prediction in found] == [str(path) for path in mixed]
    for prediction, expected in zip(found[::2], alone, strict=True):
        assert [name for name, _ in prediction.classes] == [name for name, _ in expected.classes]
        assert [s for _, s in prediction.classes] == pytest.approx([s for _, s in expected.classes], abs=1e-6)
    for prediction, words in zip(found[1::2], broken.values(), strict=True):
        assert prediction.classes == () and words in prediction.error


def test_nothing_but_broken_files_is_no_error(broken):
    model = tiny_model()
    assert all(prediction.error for prediction in predict_files(model, card_of(model), broken))
    assert list(predict_files(model, card_of(model), [])) == []


def test_only_a_batch_is_read_at_a_time(images, monkeypatch):
    taken, read = [], []

    def paths():
        for number in range(1000):
            taken.append(number)
            yield images[1]

    def counted(*arguments):
        read.append(1)
        return read_image(*arguments)

    monkeypatch.setattr(classify_module, "read_image", counted)
    model = tiny_model()
    predictions = predict_files(model, card_of(model), paths(), batch_size=4)
    assert taken == []
    for number in range(1, 10):
        next(predictions)
        assert len(taken) == len(read) == 4 * -(-number // 4)


def test_images_are_decoded_by_several_threads(images, monkeypatch):
    meeting = threading.Barrier(2)

    def wait_for_another(*arguments):
        meeting.wait(timeout=10)
        return read_image(*arguments)

    monkeypatch.setattr(classify_module, "read_image", wait_for_another)
    model = tiny_model()
    assert not any(prediction.error for prediction in predict_files(model, card_of(model), images[:2]))


def test_a_card_of_another_model_is_refused(images):
    with pytest.raises(ValueError, match="The model has 0 classes and its card names 0 of them"):
        next(predict_files(tiny_model(num_classes=0), ModelCard((), (0.4,) * 3, (0.2,) * 3), images))
    with pytest.raises(ValueError, match="The model has 3 classes and its card names 7 of them"):
        next(predict_files(tiny_model(), card_of(tiny_model(num_classes=7)), images))


def test_logits_that_are_not_finite_are_refused(images):
    model = tiny_model()
    torch.nn.init.constant_(model.linear_classifier.bias, torch.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        next(predict_files(model, card_of(model), images))


# --- the most confident mistakes -----------------------------------------------------------------------------------

LOGITS = torch.tensor([[9.0, 0, 0], [0, 2, 0], [0, 5, 0], [0, 0, 3], [4, 0, 0]])


def test_the_most_confident_mistakes_come_first():
    labels = torch.tensor([0, 0, 0, 1, 1])
    assert confident_mistakes(LOGITS, labels).tolist() == [2, 4, 3, 1]
    assert confident_mistakes(LOGITS, labels, count=2).tolist() == [2, 4]


def test_confidence_is_a_probability_and_no_logit():
    logits = torch.tensor([[9.0, 8.9, 8.9], [1.0, -5, -5]])
    assert confident_mistakes(logits, torch.tensor([1, 1])).tolist() == [1, 0]


def test_without_mistakes_there_are_no_confident_ones():
    assert confident_mistakes(LOGITS, LOGITS.argmax(1)).tolist() == []


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    model = tiny_model(num_classes=7)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_checkpoint(path, model, card_of(model))
    return path


def call(*words: object):
    result = CliRunner().invoke(main, ["predict", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def expected_blocks(paths, top: int) -> str:
    model = tiny_model(num_classes=7)
    lines = []
    for prediction in predict_files(model, card_of(model), paths, top=top):
        lines.append(prediction.path)
        lines += [f"  {100 * share:5.1f}%  {name}" for name, share in prediction.classes]
    return "\n".join(lines) + "\n"


def test_the_command_prints_a_block_for_each_image(weights, images):
    result = call(weights, *images)
    assert result.exit_code == 0 and result.stderr == ""
    assert result.stdout == expected_blocks(images, 5)
    assert len(result.stdout.splitlines()) == 6 * len(images)


def test_the_command_gives_as_many_classes_as_asked_for(weights, images):
    result = call(weights, images[0], "--top", 2, "--batch-size", 1)
    assert result.exit_code == 0 and result.stdout == expected_blocks(images[:1], 2)


def test_the_command_takes_a_shipped_model(images):
    result = call("shapes100-mini", images[0])
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 6


def test_broken_images_give_a_line_each(weights, images, broken):
    result = call(weights, images[0], *broken, images[1])
    assert result.exit_code == 1 and result.stdout == expected_blocks(images[:2], 5)
    lines = result.stderr.splitlines()
    assert len(lines) == len(broken)
    for line, (path, words) in zip(lines, broken.items(), strict=True):
        assert line.startswith(f"{path} ") and words in line


@pytest.mark.parametrize(
    ("model", "words"),
    [("absent.safetensors", "There is no checkpoint at absent.safetensors"), ("resnet", "no pretrained weights named")],
)
def test_a_wrong_model_gives_one_line(images, model, words):
    result = call(model, images[0])
    assert result.exit_code == 2 and result.stdout == ""
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_an_image_given_as_the_model_is_refused(images):
    result = call(images[1], images[0])
    assert result.exit_code == 2 and "is not a checkpoint of vitlib" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("words", [["--top", "0"], ["--batch-size", "many"]])
def test_a_wrong_number_is_exit_code_2(weights, images, words):
    result = call(weights, images[0], *words)
    assert result.exit_code == 2 and "Invalid value" in result.stderr


def test_the_table_has_every_class_and_error(weights, images, tmp_path):
    table = tmp_path / "new" / "table.csv"
    result = call(weights, images[0], tmp_path / "absent.png", "--top", 2, "--csv", table)
    assert result.exit_code == 1
    (prediction,) = predict_files(tiny_model(7), card_of(tiny_model(7)), images[:1], top=2)
    with open(table, encoding="utf-8", newline="") as file:
        first, second, error = csv.DictReader(file)
    assert [(row["file"], row["rank"], row["class"]) for row in (first, second)] == [
        (str(images[0]), str(rank), name) for rank, (name, _) in enumerate(prediction.classes, start=1)
    ]
    assert float(first["probability"]) == pytest.approx(prediction.classes[0][1], abs=1e-4)
    assert error["file"].endswith("absent.png") and "does not exist" in error["error"] and error["class"] == ""


def test_no_image_is_exit_code_2(weights):
    assert call(weights).exit_code == 2


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there names of files are always text")
def test_undecodable_file_names_are_shown(weights, tmp_path, images):
    named = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(named)).write_bytes(images[1].read_bytes())
    result = call(weights, os.fsdecode(named), os.fsdecode(named + b"x"))
    assert result.exit_code == 1 and result.stdout.splitlines()[0].endswith("caf�.png")
    assert result.stderr.endswith("caf�.pngx does not exist; check the path.\n")


def test_results_are_printed_as_they_come(weights, images, monkeypatch):
    def one_then_ctrl_c(*arguments, **options):
        yield Prediction("a.jpg", (("ant", 1.0),))
        raise KeyboardInterrupt

    monkeypatch.setattr(classify_module, "predict_files", one_then_ctrl_c)
    result = call(weights, images[0])
    assert result.exit_code == 130 and result.stdout == "a.jpg\n  100.0%  ant\n"


def test_a_closed_pipe_ends_the_command_quietly(weights, images, monkeypatch):
    def nobody_reads(*arguments, **options):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(classify_module, "predict_files", nobody_reads)
    result = call(weights, images[0])
    assert (result.exit_code, result.output) == (1, "")


def test_predicting_needs_no_torchvision_or_matplotlib(weights, images, monkeypatch):
    for name in ("torchvision", "matplotlib", "onnx", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert call(weights, *images).stdout == expected_blocks(images, 5)
