"""Labelled images: from named sources and folders, checked, split, measured and cached."""

import errno
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import children
import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from vitlib.data import cifar, folders
from vitlib.data import images as data
from vitlib.data.images import (
    SOURCES,
    LabelledImages,
    channel_statistics,
    check_source,
    draw_evenly,
    load_images,
    train_validation_split,
)
from vitlib.data.shapes import draw_shapes

REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_images = pytest.mark.skipif(not REAL.is_dir(), reason="no real image folders in ../shared/data")


def message_of(error, *parts):
    """The text of a caught error, which must be one sentence and contain all `parts`."""
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"
    return text


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_picture(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def make_folder(root, size=(8, 8), classes=("cat", "dog"), per_class=3):
    """An image folder of noise; returns it with the train images [N, 3, H, W] in the order of the file names."""
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            for index in range(per_class):
                pixels = noise(*size, 3, seed=100 * number + index)
                save_picture(root / split / name / f"{index}.png", pixels)
    pixels = [
        noise(*size, 3, seed=100 * number + index) for number in range(len(classes)) for index in range(per_class)
    ]
    return root, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pets")[0]


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "vitlib data"


# --- LabelledImages ------------------------------------------------------------------------------------------------


def labelled(labels=(0, 1, 1), classes=("a", "b")):
    images = torch.arange(len(labels) * 12).to(torch.uint8).reshape(-1, 3, 2, 2)
    return LabelledImages(images, torch.tensor(labels), classes)


def test_a_data_set_knows_its_length_and_shows_itself_in_one_line():
    assert len(labelled()) == 3
    assert repr(labelled()) == "LabelledImages(3 images of 3x2x2, 2 classes)"


@pytest.mark.parametrize("indices", [[2, 0], torch.tensor([2, 0]), np.array([2, 0])])
def test_a_subset_holds_the_images_and_labels_at_the_indices_in_their_order(indices):
    whole = labelled((0, 1, 1))
    part = whole.subset(indices)
    assert torch.equal(part.images, whole.images[[2, 0]])
    assert part.labels.tolist() == [1, 0] and part.classes == whole.classes


def test_a_subset_can_be_given_by_mask_or_slice_and_may_be_empty():
    assert labelled().subset(torch.tensor([True, False, True])).labels.tolist() == [0, 1]
    assert labelled().subset(slice(1, None)).labels.tolist() == [1, 1]
    assert len(labelled().subset([])) == 0


def test_to_moves_images_and_labels():
    moved = labelled().subset([]).to("meta")  # a device that every machine has; it holds no values to check
    assert moved.images.device.type == moved.labels.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": torch.zeros(3, 3, 2, 2)}, "float32 [3, 3, 2, 2]"),
        ({"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, "uint8 [3, 2, 2]"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "int32 [3]"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "int64 [2]"),
        ({"labels": torch.zeros(3, 1, dtype=torch.int64)}, "int64 [3, 1]"),
        ({"labels": torch.tensor([0, 1, 2])}, "from 0 to 2"),
        ({"labels": torch.tensor([-1, 0, 0])}, "from -1 to 0"),
        ({"classes": ["a", "b"]}, "['a', 'b']"),
        ({"classes": ("a", 1)}, "('a', 1)"),
        ({"classes": "ab"}, "'ab'"),
        ({"kept": torch.ones(3)}, "float32 [3]"),
        ({"kept": torch.ones(2, dtype=torch.bool)}, "bool [2]"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused_in_one_sentence(change, part):
    good = {"images": labelled().images, "labels": labelled().labels, "classes": ("a", "b")}
    with pytest.raises(ValueError) as error:
        LabelledImages(**(good | change))
    message_of(error, part)


# --- sources and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOURCES)
def test_every_named_source_is_accepted_without_loading_it(name, monkeypatch):
    for module in (cifar, folders):
        monkeypatch.setattr(module, "import_torchvision", None)  # a call would fail
    check_source(name)


@pytest.mark.parametrize(
    ("typo", "meant"), [("cifar-100", "cifar100"), ("CIFAIR10", "cifair10"), ("shape100", "shapes100")]
)
def test_a_mistyped_source_lists_the_names_and_the_near_match(typo, meant):
    with pytest.raises(ValueError) as error:
        check_source(typo)
    text = message_of(error, repr(typo), *SOURCES, "train/<class>/*")
    assert meant in text.partition("did you mean ")[2].partition("?")[0]


@pytest.mark.parametrize(
    "source", ["no/such/folder", None, 5, ["shapes10"], "", "a\0b", "~nobody-of-this-name", 300 * "x"]
)
def test_what_is_neither_name_nor_folder_is_refused_by_check_and_load(source, data_dir):
    for call in (check_source, lambda source: load_images(source, data_dir=data_dir)):
        with pytest.raises(ValueError) as error:
            call(source)
        message_of(error, repr(str(source)), *SOURCES)


def test_a_folder_is_checked_for_class_folders_in_train(folder, tmp_path):
    check_source(folder)
    check_source(str(folder))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        check_source(tmp_path / "empty")
    message_of(error, tmp_path / "empty" / "train", "train/<class>/*")


@pytest.mark.parametrize(
    "option",
    [
        {"split": "val"},
        {"image_size": 0},
        {"image_size": 32.0},
        {"image_size": "32"},
        {"image_size": True},
        {"num_channels": 2},
        {"num_channels": 3.0},
        {"num_channels": True},
    ],
)
def test_a_bad_option_names_its_value(option):
    with pytest.raises(ValueError) as error:
        load_images("shapes10", **option)
    ((name, value),) = option.items()
    message_of(error, name, repr(value))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_embedded_data_sets_are_those_of_the_shapes_module(split, monkeypatch):
    monkeypatch.setattr(data, "draw_shapes", lambda name, split: draw_shapes(name, split, count=40))
    drawn, loaded = draw_shapes("shapes10", split, count=40), load_images("shapes10", split)
    assert torch.equal(loaded.images, drawn.images) and torch.equal(loaded.labels, drawn.labels)
    assert loaded.classes == drawn.classes


def test_a_named_source_comes_in_the_size_and_channels_asked_for(monkeypatch):
    drawn = draw_shapes("shapes10", count=3)
    monkeypatch.setattr(data, "draw_shapes", lambda name, split: drawn)
    assert load_images("shapes10", image_size=48).images.shape == (3, 3, 48, 48)
    assert load_images("shapes10", image_size=16, num_channels=1).images.shape == (3, 1, 16, 16)
    assert load_images("shapes10", image_size=32).images is drawn.images
    grey = load_images("shapes10", num_channels=1).images[:, 0].double()
    luma = (drawn.images.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert (grey - luma).abs().max() <= 0.51


def test_downloads_and_cache_live_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "elsewhere"))
    load_images(folder, progress=False)
    assert len(list((tmp_path / "elsewhere" / "cache").iterdir())) == 1
    monkeypatch.delenv("VITLIB_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))  # what Windows calls it
    load_images(folder, progress=False)
    assert len(list((tmp_path / "home" / ".cache" / "vitlib" / "cache").iterdir())) == 1


def test_importing_the_module_leaves_torchvision_and_matplotlib_alone():
    program = "import sys, vitlib.data.images; print([m for m in ('torchvision', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# --- image folders -------------------------------------------------------------------------------------------------


def test_a_folder_gives_its_pixels_labels_and_classes_in_the_order_of_the_names(tmp_path, data_dir):
    root, pixels = make_folder(tmp_path / "pets", size=(5, 7), classes=("cat", "dog"), per_class=2)
    loaded = load_images(root, data_dir=data_dir, progress=False)
    assert torch.equal(loaded.images, pixels)
    assert loaded.labels.tolist() == [0, 0, 1, 1] and loaded.classes == ("cat", "dog")


def test_unicode_and_spaces_in_every_name_do_no_harm(tmp_path):
    root, pixels = make_folder(tmp_path / "Bilder für ViT 猫", classes=("große Katze", "chien à poil"), per_class=2)
    cache = tmp_path / "Zwischen Speicher ü"
    for _ in range(2):
        loaded = load_images(root, data_dir=cache, progress=False)
        assert loaded.classes == ("chien à poil", "große Katze")
        assert torch.equal(loaded.images, pixels[[2, 3, 0, 1]])


def test_the_classes_of_test_are_those_of_train_even_if_test_lacks_one(tmp_path, data_dir):
    root, _ = make_folder(tmp_path / "pets", classes=("ant", "bee", "cat"), per_class=1)
    (root / "test" / "ant" / "0.png").unlink()
    (root / "test" / "ant").rmdir()
    (root / "test" / "bee" / "0.png").unlink()
    loaded = load_images(root, "test", data_dir=data_dir, progress=False)
    assert loaded.labels.tolist() == [2] and loaded.classes == ("ant", "bee", "cat")


def test_a_test_class_that_train_lacks_is_an_error_that_names_it(folder, data_dir):
    save_picture(folder / "test" / "emu" / "0.png", noise(8, 8, 3))
    with pytest.raises(ValueError) as error:
        load_images(folder, "test", data_dir=data_dir, progress=False)
    message_of(error, folder / "test", "emu")
    assert len(load_images(folder, "train", data_dir=data_dir, progress=False)) == 6


def test_a_missing_test_folder_is_an_error_only_when_it_is_asked_for(folder, data_dir):
    (folder / "test").rename(folder / "held back")
    assert len(load_images(folder, data_dir=data_dir, progress=False)) == 6
    with pytest.raises(FileNotFoundError) as error:
        load_images(folder, "test", data_dir=data_dir, progress=False)
    message_of(error, folder / "test")


def test_a_train_class_without_images_is_an_error_that_names_it(folder, data_dir):
    (folder / "train" / "emu").mkdir()
    (folder / "train" / "emu" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError) as error:
        load_images(folder, data_dir=data_dir, progress=False)
    text = message_of(error, folder / "train", "emu", ".png")
    assert "cat" not in text.replace(str(folder), "")


def test_files_that_are_no_images_and_hidden_copies_are_passed_over(folder, data_dir):
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    (folder / "train" / "cat" / "._0.png").write_bytes(b"what macOS leaves behind")
    save_picture(folder / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png", noise(8, 8, 3))
    save_picture(folder / "train" / ".ipynb_checkpoints" / "0.png", noise(8, 8, 3))
    save_picture(folder / "train" / "cat" / "UPPER.PNG", noise(8, 8, 3))
    loaded = load_images(folder, data_dir=data_dir, progress=False)
    assert loaded.classes == ("cat", "dog") and loaded.labels.tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_images_of_different_sizes_need_image_size_and_the_error_says_so(folder, data_dir):
    save_picture(folder / "train" / "dog" / "9.png", noise(10, 20, 3))
    with pytest.raises(ValueError) as error:
        load_images(folder, data_dir=data_dir, progress=False)
    message_of(error, "8x8", "20x10", folder / "train" / "dog" / "9.png", "image_size=")
    assert load_images(folder, data_dir=data_dir, image_size=12, progress=False).images.shape == (7, 3, 12, 12)


def test_resizing_scales_the_shorter_side_and_cuts_out_the_centre(tmp_path, data_dir):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200  # the centre square
    save_picture(tmp_path / "wide" / "train" / "a" / "0.png", wide)
    save_picture(tmp_path / "wide" / "train" / "a" / "1.png", wide.transpose(1, 0, 2).copy())
    for size in (16, 32, 64):
        images = load_images(tmp_path / "wide", data_dir=data_dir, image_size=size, progress=False).images
        assert images.shape == (2, 3, size, size)
        assert images.float().mean() > 195, "the dark sides must be cut off, not squeezed in"


def test_shrinking_is_antialiased(tmp_path, data_dir):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::4] = 240  # one column in four: picking or averaging neighbours would give 0, 120 or 240
    save_picture(tmp_path / "stripes" / "train" / "a" / "0.png", stripes)
    images = load_images(tmp_path / "stripes", data_dir=data_dir, image_size=16, progress=False).images
    assert (images.float() - 60).abs().max() < 25


def test_grey_and_rgb_come_as_asked_whatever_the_files_are(tmp_path, data_dir):
    root = tmp_path / "mixed"
    grey, colour = noise(8, 8), noise(8, 8, 3)
    save_picture(root / "train" / "a" / "0.png", grey)
    save_picture(root / "train" / "a" / "1.png", colour)
    save_picture(root / "train" / "a" / "2.png", np.dstack([colour, np.full((8, 8), 255, np.uint8)]))  # RGBA
    Image.fromarray(colour).quantize(16).save(root / "train" / "a" / "3.png")  # palette
    Image.fromarray(colour).convert("CMYK").save(root / "train" / "a" / "4.jpg")
    rgb = load_images(root, data_dir=data_dir, progress=False).images
    assert rgb.shape == (5, 3, 8, 8)
    assert all(np.array_equal(channel, grey) for channel in rgb[0])
    assert torch.equal(rgb[1], rgb[2])
    one = load_images(root, data_dir=data_dir, num_channels=1, progress=False).images
    assert one.shape == (5, 1, 8, 8)
    assert np.array_equal(one[0, 0], grey) and np.array_equal(one[1, 0], Image.fromarray(colour).convert("L"))


def test_grey_images_of_16_bits_keep_their_shades(tmp_path, data_dir):
    shades = np.arange(256, dtype=np.uint16).reshape(16, 16)
    save_picture(tmp_path / "deep" / "train" / "a" / "0.png", shades * 257)
    (image,) = load_images(tmp_path / "deep", data_dir=data_dir, num_channels=1, progress=False).images
    assert np.array_equal(image[0], shades)


def test_photographs_are_turned_upright(tmp_path, data_dir):
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, :12] = 255  # bright on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture must be turned a quarter to the right
    save_picture(tmp_path / "photos" / "train" / "a" / "0.png", pixels, exif=exif)
    (image,) = load_images(tmp_path / "photos", data_dir=data_dir, progress=False).images
    assert image.shape == (3, 24, 16) and image[:, :12].min() == 255 and image[:, 12:].max() == 0


def test_unreadable_files_are_all_counted_and_named(folder, data_dir):
    whole = (folder / "train" / "cat" / "0.png").read_bytes()
    (folder / "train" / "cat" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "train" / "dog" / "2.png").write_text("<html>not an image</html>")
    with pytest.raises(ValueError) as error:
        load_images(folder, data_dir=data_dir, progress=False)
    message_of(error, "2 of 6", folder / "train" / "cat" / "1.png", folder / "train" / "dog" / "2.png")


def test_images_are_decoded_by_several_threads_at_once(folder, data_dir, monkeypatch):
    meeting, decode = threading.Barrier(2), folders._pixels

    def wait_for_another(*arguments):
        meeting.wait(timeout=10)  # breaks, and so makes the image unreadable, if no second thread comes
        return decode(*arguments)

    monkeypatch.setattr(folders, "_pixels", wait_for_another)
    assert len(load_images(folder, data_dir=data_dir, progress=False)) == 6


def test_decoding_shows_a_progress_bar_unless_told_not_to(folder, data_dir, capsys):
    load_images(folder, data_dir=data_dir, progress=False)
    assert capsys.readouterr() == ("", "")
    load_images(folder, "test", data_dir=data_dir)
    assert "decoding images: 100%" in capsys.readouterr().out


# --- images that cannot be read ------------------------------------------------------------------------------------


@pytest.fixture
def herd(tmp_path):
    """A folder of 20 images in each of two classes and splits: a tenth of it may be left out, which is 4 images."""
    return make_folder(tmp_path / "herd", per_class=20)[0]


def content_of(picture, **options):
    buffer = io.BytesIO()
    picture.save(buffer, **options)
    return buffer.getvalue()


COLOURS = Image.fromarray(noise(8, 8, 3))
PNG, JPEG = (content_of(COLOURS, format=name) for name in ("PNG", "JPEG"))
MIDDLE = len(PNG) // 2
UNREADABLE = {
    "a PNG cut short": (PNG[:MIDDLE], "is damaged"),
    "a JPEG cut short": (JPEG[:-20], "is damaged"),
    "a PNG with a flipped bit": (PNG[:MIDDLE] + bytes([PNG[MIDDLE] ^ 1]) + PNG[MIDDLE + 1 :], "is damaged"),
    "a page": (b"<html>404 not found</html>", "is not an image"),
    "nothing": (b"", "is empty"),
    "zeros": (bytes(1000), "is not an image"),
    "too many pixels": (content_of(Image.new("1", (20_000, 10_000)), format="PNG"), "too many pixels"),
    "fractions": (content_of(Image.fromarray(np.ones((8, 8), np.float32)), format="TIFF"), "32 bits"),
    "numbers of 32 bits": (content_of(Image.fromarray(np.ones((8, 8), np.int32)), format="TIFF"), "32 bits"),
    "EPS": (content_of(COLOURS, format="EPS"), "is not an image"),
    "a rare format": (content_of(COLOURS, format="PCX"), "is not an image"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_image_that_cannot_be_read_is_left_out_counted_and_named_each_time(herd, data_dir, capsys, content, reason):
    whole = load_images(herd, data_dir=data_dir, progress=False)
    bad = herd / "train" / "cat" / "3.png"
    number = sorted(bad.parent.iterdir()).index(bad)
    bad.write_bytes(content)
    for _ in ("decoded", "from the cache"):
        assert capsys.readouterr().out == ""
        rest = load_images(herd, data_dir=data_dir, progress=False)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"1 of 40 images cannot be read: {bad} (the first ") and reason in line
        assert torch.equal(rest.images, torch.cat([whole.images[:number], whole.images[number + 1 :]]))
        assert rest.labels.tolist() == 19 * [0] + 20 * [1] and rest.classes == whole.classes


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes among its files")
def test_pipes_and_links_to_nothing_are_left_out_too(herd, data_dir, capsys):
    (herd / "train" / "cat" / "no.png").symlink_to(herd / "nowhere.png")
    (herd / "train" / "cat" / "self.png").symlink_to(herd / "train" / "cat" / "self.png")
    os.mkfifo(herd / "train" / "dog" / "pipe.png")
    for _ in range(2):
        assert len(load_images(herd, data_dir=data_dir, progress=False)) == 40
        said = capsys.readouterr().out
        assert said.startswith("3 of 43 images cannot be read") and "no.png" in said and "pipe.png" in said


@pytest.mark.parametrize("split", ["train", "test"])
def test_more_than_one_in_ten_is_an_error_that_counts_and_names_them(herd, data_dir, split):
    for number in range(4):
        (herd / split / "cat" / f"{number}.png").write_bytes(b"damaged")
    assert len(load_images(herd, split, data_dir=data_dir, progress=False)) == 36
    (herd / split / "dog" / "7.png").write_bytes(b"damaged")
    with pytest.raises(ValueError) as error:
        load_images(herd, split, data_dir=data_dir, progress=False)
    named = [herd / split / "cat" / f"{number}.png" for number in range(4)] + [herd / split / "dog" / "7.png"]
    message_of(error, "5 of 40 images", *named, "convert it to JPEG or PNG", "at most 10% may be left out")


def test_a_training_class_of_which_nothing_can_be_read_is_an_error_but_a_test_class_is_not(herd, data_dir):
    for split in ("train", "test"):
        save_picture(herd / split / "emu" / "0.png", noise(8, 8, 3))
        (herd / split / "emu" / "0.png").write_bytes(b"damaged")
    with pytest.raises(ValueError) as error:
        load_images(herd, data_dir=data_dir, progress=False)
    message_of(error, "1 of 41 images", herd / "train" / "emu" / "0.png", "no image of emu is left")
    loaded = load_images(herd, "test", data_dir=data_dir, progress=False)
    assert len(loaded) == 40 and loaded.classes == ("cat", "dog", "emu")


def test_of_many_unreadable_images_ten_are_named_and_all_counted(tmp_path, data_dir, capsys):
    root, _ = make_folder(tmp_path / "crowd", size=(2, 2), classes=("a",), per_class=120)
    for number in range(100, 112):
        (root / "train" / "a" / f"{number}.png").write_bytes(b"")
    load_images(root, data_dir=data_dir, progress=False)
    line = capsys.readouterr().out
    assert line.startswith("12 of 120 images") and line.count(".png") == 10 and " and 2 others " in line


def test_an_image_that_can_be_read_again_is_used_again(herd, data_dir, monkeypatch, capsys):
    """What made it unreadable need not show in its size and time: permissions, a network folder that was not there."""
    read, shut = folders.read_image, herd / "train" / "cat" / "3.png"

    def refuse(path, *options):
        if path == shut:
            raise PermissionError(f"{path} may not be read; change its permissions.")
        return read(path, *options)

    with monkeypatch.context() as patch:
        patch.setattr(folders, "read_image", refuse)
        assert len(load_images(herd, data_dir=data_dir, progress=False)) == 39
        assert "the first may not be read; change its permissions)" in capsys.readouterr().out
    assert len(load_images(herd, data_dir=data_dir, progress=False)) == 40 and capsys.readouterr().out == ""


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there names of files are always printable text")
def test_names_cannot_break_the_line_or_command_the_terminal(herd, data_dir, capsys):
    for name in (b"line\nbreak.png", b"\x1b[2Jclear.png", b"caf\xe9.png"):
        Path(os.fsdecode(os.fsencode(herd / "train" / "cat") + b"/" + name)).write_bytes(b"damaged")
    load_images(herd, data_dir=data_dir, progress=False)
    (line,) = capsys.readouterr().out.splitlines()
    assert "line\\nbreak.png" in line and "\\x1b[2Jclear.png" in line and "caf\ufffd.png" in line
    assert line[:-1].isprintable()


@pytest.mark.skipif(sys.platform == "win32", reason="the trap is a shell script")
def test_a_picture_that_pillow_would_hand_to_another_program_is_refused(herd, data_dir, tmp_path, monkeypatch):
    trap = tmp_path / "bin" / "gs"
    trap.parent.mkdir()
    trap.write_text(f"#!/bin/sh\ntouch '{tmp_path / 'sprung'}'\n")
    trap.chmod(0o755)
    monkeypatch.setenv("PATH", str(trap.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    bad = herd / "train" / "cat" / "3.png"
    bad.write_bytes(content_of(COLOURS, format="EPS"))
    assert len(load_images(herd, data_dir=data_dir, progress=False)) == 39
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(Exception), Image.open(bad) as picture:  # noqa: B017 (whatever comes of an empty answer)
        picture.load()
    assert (tmp_path / "sprung").exists(), "the trap of this test must work"


def test_folders_that_would_not_fit_into_memory_are_refused(folder, data_dir, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 20, raising=False)  # 20 pages of 20 bytes
    with pytest.raises(ValueError) as error:
        load_images(folder, data_dir=data_dir, progress=False)
    message_of(error, "6 decoded images of 8x8 pixels", "GB", "image_size=224")
    assert len(load_images(folder, data_dir=data_dir, image_size=4, progress=False)) == 6


# --- images of unusual kinds ---------------------------------------------------------------------------------------


def png_of_16_bits(pixels):
    """uint16 [H, W, 3] as a PNG file, which Pillow reads but does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_images_of_16_bits_give_their_upper_8_in_every_format(tmp_path, data_dir):
    deep = np.random.default_rng(0).integers(2**16, size=(8, 8, 3), dtype=np.uint16)
    grey = deep[:, :, 0]
    contents = {
        "0.png": content_of(Image.fromarray(grey), format="PNG"),
        "1.tif": content_of(Image.fromarray(grey), format="TIFF"),
        "2.tif": content_of(Image.frombytes("I;16B", (8, 8), grey.astype(">u2").tobytes()), format="TIFF"),
        "3.pgm": b"P5 8 8 65535\n" + grey.astype(">u2").tobytes(),
        "4.png": png_of_16_bits(np.repeat(grey[:, :, None], 3, axis=2)),
    }
    (tmp_path / "deep" / "train" / "a").mkdir(parents=True)
    for name, content in contents.items():
        (tmp_path / "deep" / "train" / "a" / name).write_bytes(content)
    images = load_images(tmp_path / "deep", data_dir=data_dir, num_channels=1, progress=False).images[:, 0]
    for name, image in zip(contents, images.numpy(), strict=True):
        np.testing.assert_array_equal(image, grey >> 8, err_msg=name)


def test_of_animations_pages_and_pairs_the_first_picture_is_taken(tmp_path, data_dir):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    (tmp_path / "moving" / "train" / "a").mkdir(parents=True)
    kinds = {"0.png": "GIF", "1.png": "PNG", "2.tif": "TIFF", "3.webp": "WEBP", "4.jpg": "MPO"}
    for name, kind in kinds.items():
        path = tmp_path / "moving" / "train" / "a" / name
        lossless = {"lossless": True} if kind == "WEBP" else {}
        first.save(path, format=kind, save_all=True, append_images=[second], **lossless)
        with Image.open(path) as picture:
            assert picture.n_frames == 2
    images = load_images(tmp_path / "moving", data_dir=data_dir, progress=False).images
    assert len(images) == 5
    assert images[:, 0].min() > 250 and images[:, 1:].max() < 5


def test_cmyk_is_converted_to_the_colours_it_means(tmp_path, data_dir):
    (tmp_path / "print" / "train" / "a").mkdir(parents=True)
    for number, kind in enumerate(("JPEG", "TIFF")):
        picture = Image.new("CMYK", (8, 8), (0, 255, 255, 0))  # magenta and yellow on paper are red
        picture.save(tmp_path / "print" / "train" / "a" / f"{number}.{kind.lower()}", format=kind)
    images = load_images(tmp_path / "print", data_dir=data_dir, progress=False).images
    assert images[:, 0].min() > 250 and images[:, 1:].max() < 5


# --- links, and folders that may not be read -----------------------------------------------------------------------


def test_linked_images_and_classes_are_loaded_and_linked_folders_in_a_class_are_not(tmp_path, folder, data_dir):
    make_folder(tmp_path / "elsewhere", classes=("emu",))
    whole = load_images(folder, data_dir=data_dir, progress=False)
    (folder / "train" / "emu").symlink_to(tmp_path / "elsewhere" / "train" / "emu", target_is_directory=True)
    (folder / "train" / "cat" / "9.png").symlink_to(tmp_path / "elsewhere" / "train" / "emu" / "0.png")
    inside = folder / "train" / "dog" / "inside"
    inside.mkdir()
    for number, place in enumerate((folder, folder / "test", folder / "train" / "dog", inside, Path("/"))):
        (inside / f"link {number}").symlink_to(place, target_is_directory=True)
    save_picture(inside / "0.png", noise(8, 8, 3))
    loaded = load_images(folder, data_dir=data_dir, progress=False)
    assert loaded.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2] and loaded.classes == ("cat", "dog", "emu")
    assert torch.equal(loaded.images[[0, 1, 2, 4, 5, 6]], whole.images)
    assert torch.equal(loaded.images[3], loaded.images[8])


@pytest.mark.parametrize("place", [".", "..", "../.."])
def test_a_class_that_is_a_link_back_up_is_refused(folder, data_dir, place):
    (folder / "train" / "loop").symlink_to(folder / "train" / place, target_is_directory=True)
    with pytest.raises(ValueError) as error:
        load_images(folder, data_dir=data_dir, progress=False)
    message_of(error, folder / "train" / "loop", "leads back up", "remove it")


@pytest.mark.parametrize("shut", ["train", "train/cat", "train/cat/inside"])
def test_a_folder_that_may_not_be_read_is_no_empty_folder(folder, data_dir, monkeypatch, shut):
    """root may read everything, so reading is made to fail."""
    (folder / "train" / "cat" / "inside").mkdir()
    scan, names = os.scandir, os.listdir

    def refuse(call):
        def refusing(path="."):
            if Path(path) == folder / shut:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return call(path)

        return refusing

    monkeypatch.setattr(os, "scandir", refuse(scan))
    monkeypatch.setattr(os, "listdir", refuse(names))
    with pytest.raises(OSError) as error:
        load_images(folder, data_dir=data_dir, progress=False)
    message_of(error, folder / shut, "change its permissions")


# --- cache ---------------------------------------------------------------------------------------------------------


def only_cache_file(data_dir):
    (file,) = (data_dir / "cache").iterdir()
    return file


@pytest.fixture
def cached(folder, data_dir, monkeypatch):
    """A folder that has been loaded once, as a function that loads it again and says whether that decoded."""
    first = load_images(folder, data_dir=data_dir, progress=False)
    decoded, decode = [], folders._decode
    monkeypatch.setattr(folders, "_decode", lambda *arguments: decoded.append(1) or decode(*arguments))

    def load(**options):
        decoded.clear()
        again = load_images(folder, data_dir=data_dir, progress=False, **options)
        return again, bool(decoded)

    load.first = first
    return load


def test_the_second_call_takes_the_same_images_from_the_cache_without_decoding(cached):
    again, decoded = cached()
    assert not decoded
    assert torch.equal(again.images, cached.first.images) and torch.equal(again.labels, cached.first.labels)
    assert again.classes == cached.first.classes


def test_other_options_are_not_served_from_the_cache_of_these(cached):
    for options in ({"image_size": 4}, {"num_channels": 1}, {"split": "test"}):
        assert cached(**options)[1], options
        assert not cached(**options)[1], options


def test_a_file_that_is_changed_added_renamed_or_removed_is_noticed(cached, folder):
    picture = folder / "train" / "cat" / "0.png"
    before = picture.stat()
    save_picture(picture, np.full((8, 8, 3), 9, np.uint8))
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))  # another size tells
    again, decoded = cached()
    assert decoded and again.images[0].max() == 9
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    assert cached()[1]
    save_picture(folder / "train" / "cat" / "7.png", noise(8, 8, 3))
    again, decoded = cached()
    assert decoded and len(again) == 7
    (folder / "train" / "cat" / "7.png").rename(folder / "train" / "dog" / "7.png")
    again, decoded = cached()
    assert decoded and again.labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    (folder / "train" / "dog" / "7.png").unlink()
    again, decoded = cached()
    assert len(again) == 6


def test_another_folder_of_the_same_name_and_files_has_its_own_cache(tmp_path, data_dir):
    for parent in ("one", "two"):
        root, _ = make_folder(tmp_path / parent / "pets")
        for file in root.rglob("*.png"):
            os.utime(file, (1, 1))
        load_images(root, data_dir=data_dir, progress=False)
    assert len(list((data_dir / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-7],
        lambda content: b"",
        lambda content: b"no safetensors file at all",
        lambda content: content[:-20] + bytes(20),
        lambda content: content.replace(b"crc32", b"crc23"),
    ],
    ids=["cut short", "empty", "garbage", "other pixels", "other header"],
)
def test_a_damaged_cache_file_is_rebuilt(cached, data_dir, damage):
    file = only_cache_file(data_dir)
    file.write_bytes(damage(file.read_bytes()))
    again, decoded = cached()
    assert decoded and torch.equal(again.images, cached.first.images)
    assert not cached()[1] and only_cache_file(data_dir) == file


def test_changing_loaded_images_leaves_the_cache_as_it_was(cached):
    again, _ = cached()
    again.images.zero_()
    assert torch.equal(cached()[0].images, cached.first.images) and not cached()[1]


def test_a_cache_that_cannot_be_written_is_no_reason_to_stop(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("where the data folder should be")
    assert len(load_images(folder, data_dir=tmp_path / "file", progress=False)) == 6
    assert "not cached" in capsys.readouterr().out


def test_a_failed_load_leaves_nothing_in_the_cache(folder, data_dir):
    (folder / "train" / "cat" / "0.png").write_text("broken")
    with pytest.raises(ValueError):
        load_images(folder, data_dir=data_dir, progress=False)
    assert not list(data_dir.rglob("*"))


def test_of_several_states_of_a_folder_the_last_is_kept_and_other_caches_stay(tmp_path, data_dir):
    root, _ = make_folder(tmp_path / "one" / "pets [of *]")
    other, _ = make_folder(tmp_path / "two" / "pets [of *]")
    for options in ({}, {"image_size": 4}, {"split": "test"}):
        load_images(root, data_dir=data_dir, progress=False, **options)
    load_images(other, data_dir=data_dir, progress=False)
    cache = data_dir / "cache"
    others = {file.name for file in cache.iterdir()}
    for number in range(3):
        save_picture(root / "train" / "cat" / f"new {number}.png", noise(8, 8, 3))
        assert len(load_images(root, data_dir=data_dir, progress=False)) == 7 + number
        assert len(list(cache.iterdir())) == 4
    assert len(others & {file.name for file in cache.iterdir()}) == 3


def test_what_a_killed_process_left_of_a_cache_file_is_removed_but_not_what_another_is_writing(
    cached, folder, data_dir
):
    file = only_cache_file(data_dir)
    left, written = (
        (file.with_name(f".{file.name}.{number}-1.part"), file.with_name(f".tmp{number}")) for number in "78"
    )
    for unfinished in (*left, *written):
        unfinished.write_bytes(b"half")
    for unfinished in left:
        os.utime(unfinished, (time.time() - 7200,) * 2)
    file.unlink()
    assert cached()[1]
    assert set(file.parent.iterdir()) == {file, *written}


def test_a_cache_file_that_does_not_fit_is_rebuilt_even_if_its_checksum_is_right(cached, data_dir):
    file = only_cache_file(data_dir)
    good = load_file(file)
    for change in (
        {"images": good["images"][1:]},
        {"images": good["images"].float()},
        {"images": good["images"].flatten(1)},
        {"kept": good["kept"].long()},
        {"kept": good["kept"][1:], "images": good["images"][1:]},
        {"kept": torch.zeros(6, dtype=torch.bool), "images": good["images"][:0]},
        {"more": torch.zeros(1)},
    ):
        tensors = {name: tensor.contiguous() for name, tensor in (good | change).items()}
        checksum = str(zlib.crc32(tensors["kept"].numpy(), zlib.crc32(tensors["images"].numpy())))
        save_file(tensors, file, metadata={"crc32": checksum})
        again, _ = cached()
        assert torch.equal(again.images, cached.first.images), change
        assert torch.equal(again.labels, cached.first.labels)


@pytest.mark.parametrize("size", [0, 500])
def test_a_full_disk_leaves_no_half_cache_file_and_the_one_before(cached, folder, data_dir, capsys, size):
    resource = pytest.importorskip("resource", reason="Windows has no limits on the size of files")
    file, limits = only_cache_file(data_dir), resource.getrlimit(resource.RLIMIT_FSIZE)
    save_picture(folder / "train" / "cat" / "9.png", noise(8, 8, 3))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        again, decoded = cached()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert decoded and len(again) == 7
    assert "not cached" in capsys.readouterr().out and only_cache_file(data_dir) == file
    assert cached()[1] and not cached()[1], "with room again it is cached"


def load_apart(folder, data_dir):
    load_images(folder, data_dir=data_dir, progress=False)


def test_processes_and_threads_that_decode_the_same_folder_at_once_do_not_spoil_it(herd, data_dir, tmp_path):
    logs = [tmp_path / f"{number}.log" for number in range(2)]
    processes = [children.start(load_apart, herd, data_dir, log=log) for log in logs]
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(load_images(herd, data_dir=data_dir, progress=False)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0], [log.read_text() for log in logs]
    assert [log.read_text() for log in logs] == ["", ""], "each has been able to cache what it decoded"
    first = results[0]
    assert len(results) == 4 and all(torch.equal(other.images, first.images) for other in results)
    only_cache_file(data_dir)
    assert torch.equal(load_images(herd, data_dir=data_dir, progress=False).images, first.images)


# --- what ciFAIR kept ----------------------------------------------------------------------------------------------


def test_lists_of_flagged_images_have_the_published_counts():
    for name, count, classes in (("cifar100", 959, 100), ("cifar10", 329, 10)):
        flagged = cifar.flagged_by_cifair()[name]
        indices = [index for stems in flagged.values() for index in stems.values()]
        assert len(flagged) == classes and len(set(indices)) == len(indices) == count and max(indices) < 10_000
        assert cifar.kept_by_index(name, 10_000).sum() == 10_000 - count


def make_cifar10_folder(root, test_files):
    for name in cifar.flagged_by_cifair()["cifar10"]:
        save_picture(root / "train" / name / "one_s_000001.png", noise(4, 4, 3))
    for file in test_files:
        save_picture(root / "test" / file, noise(4, 4, 3))
    return root


def test_folder_with_cifars_own_names_knows_what_cifair_kept(tmp_path, data_dir):
    files = ["dog/pekingese_s_000608.png", "dog/pug_s_000001.png", "cat/pekingese_s_000608.png"]
    root = make_cifar10_folder(tmp_path / "part", files)
    test = load_images(root, "test", data_dir=data_dir, progress=False)
    assert test.kept.tolist() == [True, False, True]  # cat, dog, dog: flagged is a file of its class
    assert test.subset([1, 0]).kept.tolist() == [False, True] and test.to("cpu").kept is not None
    assert load_images(root, "train", data_dir=data_dir, progress=False).kept is None


def test_folder_with_other_names_or_classes_knows_nothing_of_cifair(tmp_path, data_dir, folder):
    files = ["dog/pekingese_s_000608.png", "cat/my cat.png"]
    root = make_cifar10_folder(tmp_path / "own", files)
    assert load_images(root, "test", data_dir=data_dir, progress=False).kept is None
    assert load_images(folder, "test", data_dir=data_dir, progress=False).kept is None


# --- validation split ----------------------------------------------------------------------------------------------


def uneven():
    """Classes of 1, 2, 3, 10 and 40 images, mixed; the first pixel of each image is its number."""
    labels = torch.tensor([0] + [1] * 2 + [2] * 3 + [3] * 10 + [4] * 40)
    labels = labels[torch.randperm(56, generator=torch.Generator().manual_seed(1))]
    images = torch.arange(56, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return LabelledImages(images, labels, tuple("abcde"))


def numbers(part):
    return part.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_split_is_disjoint_complete_and_stratified(fraction, seed):
    whole = uneven()
    train, validation = train_validation_split(whole, fraction, seed)
    assert sorted(numbers(train) + numbers(validation)) == list(range(56))
    assert numbers(train) == sorted(numbers(train)) and numbers(validation) == sorted(numbers(validation))
    for part in (train, validation):
        assert part.classes == whole.classes and torch.equal(part.labels, whole.labels[numbers(part)])
    held = torch.bincount(validation.labels, minlength=5)
    sizes = torch.bincount(whole.labels)
    assert held[0] == 0, "a class of one image stays in the training part"
    for count, size in zip(held[1:].tolist(), sizes[1:].tolist(), strict=True):
        assert 1 <= count <= size - 1, "both parts keep an image of the class"
        assert abs(count - fraction * size) < 1


def test_the_seed_decides_the_split():
    splits = [numbers(train_validation_split(uneven(), 0.3, seed)[1]) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_the_default_split_holds_out_a_tenth():
    images = torch.zeros(1000, 1, 1, 1, dtype=torch.uint8)
    train, validation = train_validation_split(LabelledImages(images, torch.arange(1000) % 10, tuple("abcdefghij")))
    assert torch.bincount(validation.labels).tolist() == [10] * 10 and len(train) == 900


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_outside_0_to_1_is_an_error(fraction):
    with pytest.raises(ValueError) as error:
        train_validation_split(uneven(), fraction)
    message_of(error, repr(fraction))


def test_a_data_set_without_a_pair_in_any_class_cannot_be_split():
    with pytest.raises(ValueError) as error:
        train_validation_split(labelled((0, 1)))
    message_of(error, "2 images")


# --- channel statistics --------------------------------------------------------------------------------------------


def test_channel_statistics_are_mean_and_population_deviation_per_channel():
    images = torch.from_numpy(noise(50, 3, 9, 11)) // torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert torch.allclose(torch.tensor(mean).double(), scaled.mean((0, 2, 3)), atol=1e-7)
    assert torch.allclose(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0), atol=1e-7)
    assert all(type(value) is float for value in mean + std)


def test_channel_statistics_of_a_constant_image_are_exact():
    assert channel_statistics(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)) == ((1.0,), (0.0,))


def test_channel_statistics_never_convert_the_images_to_a_wider_type():
    class Widest(TorchDispatchMode):
        bytes = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor):
                self.bytes = max(self.bytes, result.numel() * result.element_size())
            return result

    images = torch.from_numpy(noise(100, 3, 16, 16))
    with Widest() as widest:
        channel_statistics(images)
    assert widest.bytes <= images.numel()


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)])
def test_channel_statistics_refuse_floats_and_nothing(images):
    with pytest.raises(ValueError) as error:
        channel_statistics(images)
    message_of(error, list(images.shape))


# --- real photographs ----------------------------------------------------------------------------------------------


@needs_real_images
@pytest.mark.parametrize(("name", "classes"), [("cifar100", 100), ("cifar10", 10)])
def test_real_photographs_load_with_the_classes_of_their_folders(name, classes, data_dir):
    loaded = load_images(REAL / name, "test", data_dir=data_dir, progress=False)
    assert loaded.images.shape == (1000, 3, 32, 32)
    assert loaded.classes == tuple(sorted(path.name for path in (REAL / name / "train").iterdir()))
    assert torch.bincount(loaded.labels).tolist() == [1000 // classes] * classes
    assert (~loaded.kept).sum() == {100: 112, 10: 45}[classes], "of those that ciFAIR flags, so many are in this part"
    mean, std = channel_statistics(loaded.images)
    assert all(0.4 < value < 0.6 for value in mean) and all(0.2 < value < 0.3 for value in std)


def seven_images_of_two_classes() -> LabelledImages:
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    return LabelledImages(torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1), labels, ("a", "b"))


def test_images_are_drawn_evenly_and_smaller_draws_are_part_of_larger_ones():
    images = seven_images_of_two_classes()
    draws = {seed: draw_evenly(images, 6, seed) for seed in range(5)}
    for seed, drawn in draws.items():
        assert drawn.labels.tolist() == [0, 1, 0, 1, 0, 1]
        assert len(drawn.images.unique()) == 6
        assert torch.equal(draw_evenly(images, 2, seed).images, drawn.images[:2])
        assert torch.equal(images.labels[drawn.images.flatten().long()], drawn.labels)
    assert len({tuple(drawn.images.flatten().tolist()) for drawn in draws.values()}) > 1


@pytest.mark.parametrize("count", [0, -2, 3, 8, 2.0, "2", None])
def test_images_that_cannot_be_drawn_evenly_are_refused(count):
    with pytest.raises(ValueError) as refused:
        draw_evenly(seven_images_of_two_classes(), count)
    message_of(refused, repr(count), "a multiple of 2", "from 2 to 6", "the smallest class has 3")
