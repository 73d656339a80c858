"""Labelled images: from named sources and folders, checked, split, measured and cached."""

import errno
import io
import itertools
import math
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

from vitlib.data import cifar, folders
from vitlib.data import images as data
from vitlib.data.folders import read_image
from vitlib.data.images import LabelledImages, channel_statistics, draw_evenly, load_images, train_validation_split
from vitlib.data.shapes import draw_shapes


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_picture(path, pixels=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(8, 8, 3) if pixels is None else pixels).save(path, **options)


def content_of(picture, kind):
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A folder of 10 cats and 10 dogs for each split, noise of 8x8 pixels: a tenth of 20 images may be left out."""
    for number, (split, name, index) in enumerate(itertools.product(("train", "test"), ("cat", "dog"), range(10))):
        save_picture(tmp_path / "pets" / split / name / f"{index}.png", noise(8, 8, 3, seed=number))
    return tmp_path / "pets"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of the decoded images, in a data folder of this test."""
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "vitlib data"))
    return tmp_path / "vitlib data" / "cache"


@pytest.fixture
def load(cache):
    """``load_images`` without a progress bar."""
    return partial(load_images, progress=False)


# --- LabelledImages, sources, what is refused at once --------------------------------------------------------------


def labelled(labels=(0, 1, 1), names=None):
    images = torch.arange(len(labels) * 12).to(torch.uint8).reshape(-1, 3, 2, 2)
    return LabelledImages(images, torch.tensor(labels), ("a", "b"), names=names)


@pytest.mark.parametrize(
    ("indices", "numbers"),
    [([2, 0], [2, 0]), (torch.tensor([True, False, True]), [0, 2]), (slice(1, None), [1, 2])],
)
def test_subset_holds_images_labels_and_names(indices, numbers):
    whole = labelled(names=("x", "y", "z"))
    part = whole.subset(indices)
    assert torch.equal(part.images, whole.images[numbers]) and torch.equal(part.labels, whole.labels[numbers])
    assert part.classes == whole.classes and part.names == tuple("xyz"[number] for number in numbers)
    assert repr(part) == f"LabelledImages({len(numbers)} images of 3x2x2, 2 classes)"


def test_to_moves_images_and_labels():
    moved = labelled().subset([]).to("meta")  # a device that every machine has; it holds no values to check
    assert moved.images.device.type == moved.labels.device.type == "meta"


GOOD = {"images": labelled().images, "labels": labelled().labels, "classes": ("a", "b")}
SEVEN = labelled((0, 1, 1, 0, 1, 0, 1))
EVEN = "cannot be drawn evenly; give a multiple of 2 (the number of classes) from 2 to 6 "


@pytest.mark.parametrize(
    ("call", "arguments", "said"),
    [
        (LabelledImages, GOOD | {"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, "uint8 [3, 2, 2]"),
        (LabelledImages, GOOD | {"labels": torch.zeros(3, dtype=torch.int32)}, "int32 [3]"),
        (LabelledImages, GOOD | {"labels": torch.zeros(2, dtype=torch.int64)}, "int64 [2]"),
        (LabelledImages, GOOD | {"labels": torch.tensor([0, 1, 2])}, "from 0 to 2"),
        (LabelledImages, GOOD | {"labels": torch.tensor([-1, 0, 0])}, "from -1 to 0"),
        (load_images, {"source": "shapes10", "split": "val"}, "split='val'"),
        (load_images, {"source": "shapes10", "num_channels": 2}, "num_channels=2"),
        (channel_statistics, {"images": torch.zeros(2, 3, 4, 4)}, "float32 [2, 3, 4, 4]"),
        (channel_statistics, {"images": torch.zeros(0, 3, 4, 4, dtype=torch.uint8)}, "[0, 3, 4, 4]"),
        *((train_validation_split, {"data": SEVEN, "fraction": f}, f"fraction={f!r}") for f in (0, 1, math.nan)),
        *((draw_evenly, {"data": SEVEN, "count": count}, f"{count} images {EVEN}") for count in (0, 3, 8)),
    ],
)
def test_what_does_not_fit_is_refused(call, arguments, said):
    assert said in refusal(call, **arguments)


@pytest.mark.parametrize("source", ["CIFAIR10", "", "~nobody-of-this-name", 300 * "x"])
def test_neither_name_nor_folder_is_refused(source, load):
    text = refusal(load, source)
    assert repr(source) in text and all(name in text for name in data.SOURCES)
    assert ("did you mean 'cifair10'?" in text) == (source == "CIFAIR10")


def test_named_source_comes_in_size_and_channels(monkeypatch):
    drawn = draw_shapes("shapes10", count=3)
    monkeypatch.setattr(data, "draw_shapes", lambda name, split: drawn)
    assert load_images("shapes10", image_size=48).images.shape == (3, 3, 48, 48)
    assert load_images("shapes10", image_size=16, num_channels=1).images.shape == (3, 1, 16, 16)
    loaded = load_images("shapes10", image_size=32)
    assert loaded.images is drawn.images and loaded.labels is drawn.labels and loaded.classes == drawn.classes
    grey = load_images("shapes10", num_channels=1).images[:, 0].double()
    luma = (drawn.images.double() * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    assert (grey - luma).abs().max() <= 0.51


# --- image folders, and how people lay them out --------------------------------------------------------------------


def test_folder_gives_pixels_labels_and_classes(tmp_path, load):
    root, pixels = tmp_path / "Bilder für ViT 猫", noise(3, 5, 7, 3)
    for file, picture in zip(("große Katze/0.png", "chien à poil/0.png", "chien à poil/1.png"), pixels, strict=True):
        save_picture(root / "train" / file, picture)
    loaded = load(root)
    assert np.array_equal(loaded.images, pixels[[1, 2, 0]].transpose(0, 3, 1, 2))
    assert loaded.labels.tolist() == [0, 0, 1] and loaded.classes == ("chien à poil", "große Katze")


def test_test_split_has_the_classes_of_train(folder, load, capsys):
    save_picture(folder / "train" / "ant" / "0.png")
    (folder / "test" / "ant").mkdir()
    shutil.rmtree(folder / "test" / "cat")
    loaded = load(folder, "test")
    assert loaded.labels.tolist() == 10 * [2] and loaded.classes == ("ant", "cat", "dog")
    assert capsys.readouterr().out == f"All images in {folder / 'test'} are of one class, dog.\n"


def test_wrong_test_folder_matters_only_when_asked_for(folder, load):
    save_picture(folder / "test" / "emu" / "0.png")
    assert "train/ lacks: emu;" in refusal(load, folder, "test") and len(load(folder)) == 20
    (folder / "test").rename(folder / "held back")
    text = refusal(load, folder, "test")
    assert f"{folder / 'test'} does not exist" in text and f"give {folder / 'train'}" in text
    assert len(load(folder)) == 20


def test_class_names_are_compared_in_unicode_nfc(tmp_path, load):
    root = tmp_path / "menu"
    for split, name in [("train", "caf\u00e9"), ("train", "cafe\u0301"), ("train", "the"), ("test", "cafe\u0301")]:
        save_picture(root / split / name / f"{len(name)}.png")
    if len(os.listdir(root / "train")) < 3:
        pytest.skip("this file system has one form for names")
    assert load(root).classes == ("caf\u00e9", "the") and load(root).labels.tolist() == [0, 0, 1]
    assert load(root, "test").labels.tolist() == [0]


@pytest.mark.parametrize(
    ("names", "said"),
    [(["TESTING"], ""), (["Validation"], "Validation"), (["test", "val", "valid"], "test; not used: val, valid")],
)
def test_other_names_of_splits_are_found_and_the_unused_named(folder, load, capsys, names, said):
    (folder / "train").rename(folder / "Training")
    (folder / "test").rename(folder / "a split")
    for name in names:
        shutil.copytree(folder / "a split", folder / name)
    assert len(load(folder)) == len(load(folder, "test")) == 20
    assert capsys.readouterr().out == (f"The test images of {folder} are those in {said}.\n" if said else "")


def test_folder_of_classes_alone_is_split_by_a_seed(folder, load, capsys):
    train, test = load(folder / "train"), load(folder / "train", "test")
    assert "a fifth of each class" in capsys.readouterr().out
    assert train.labels.tolist() == 8 * [0] + 8 * [1] and test.labels.tolist() == [0, 0, 1, 1]
    whole = torch.cat([train.images, test.images])
    assert sorted(whole.flatten(1).tolist()) == sorted(load(folder).images.flatten(1).tolist())


WRONG = {  # the files of a folder, and what its refusal names
    "nothing": ([], "train does not exist"),
    "splits without classes": (["train/0.png", "test/1.png", "cat/0.png"], "train does not exist or holds no class"),
    "no train folder": (["test/cat/0.png", "test/dog/0.png", "cat/0.png"], "train does not exist"),
    "one class": (["train/cat/0.png", "test/cat/0.png"], "one class, cat,"),
    "one level too deep": (["train/images/cat/0.png", "train/images/dog/0.png"], "each of them the folders cat, dog;"),
    "splits of other names": ([f"{a}_set/{b}/0.png" for a in "xy" for b in ("cat", "dog")], "the folders cat, dog;"),
}


@pytest.mark.parametrize(("files", "said"), WRONG.values(), ids=WRONG)
def test_folder_that_holds_no_data_set_is_refused(tmp_path, load, files, said):
    root = tmp_path / "pets"
    root.mkdir()
    for file in files:
        save_picture(root / file)
    message = refusal(load, root)
    assert str(root) in message and said in message


def test_folders_inside_class_folders_are_read_too(tmp_path, load):
    for file in ("cat/day 1/0.png", "cat/day 2/0.png", "dog/0.png", "dog/day 1/0.png", "dog/day 2/0.png"):
        save_picture(tmp_path / "pets" / "train" / file)
    assert load(tmp_path / "pets").labels.tolist() == [0, 0, 1, 1, 1]


SYSTEM = (
    *("@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/0.png", "__MACOSX/0.png", "lost+found/0.png", "@Recycle/0.png"),
    *("$RECYCLE.BIN/0.png", "System Volume Information/0.png", "Network Trash Folder/0.png", "0.png@SynoResource"),
    *(".ipynb_checkpoints/0-checkpoint.png", "._0.png", "Thumbs.db", "desktop.ini"),
)


def test_what_systems_leave_in_folders_is_passed_over(folder, load, capsys):
    for file in SYSTEM:
        for place in (folder, folder / "train", folder / "test", folder / "train" / "cat"):
            save_picture(place / file, format="PNG")
    for split in ("train", "test"):
        assert load(folder, split).classes == ("cat", "dog") and len(load(folder, split)) == 20
    assert len(load(folder / "train")) + len(load(folder / "train", "test")) == 20
    assert "passed over" not in capsys.readouterr().out


def test_links_are_followed_to_files_and_classes_only(tmp_path, folder, load):
    whole, train, emu = load(folder), folder / "train", tmp_path / "elsewhere" / "0.png"
    save_picture(emu)
    (train / "emu").symlink_to(emu.parent, target_is_directory=True)
    (train / "cat" / "link.png").symlink_to(emu)
    inside = train / "dog" / "inside"
    save_picture(inside / "0.png")
    for number, place in enumerate((folder, folder / "test", train / "dog", inside, Path("/"))):
        (inside / f"link {number}").symlink_to(place, target_is_directory=True)
    loaded = load(folder)
    assert loaded.labels.tolist() == 11 * [0] + 11 * [1] + [2] and loaded.classes == ("cat", "dog", "emu")
    assert torch.equal(loaded.images[[*range(10), *range(11, 21)]], whole.images)
    assert torch.equal(loaded.images[10], loaded.images[22])


def test_class_that_links_back_up_is_refused(folder, load):
    (folder / "train" / "loop").symlink_to(folder, target_is_directory=True)
    assert f"{folder / 'train' / 'loop'} is a link that leads back up" in refusal(load, folder)


@pytest.mark.parametrize("shut", ["train", "train/cat"])
def test_folder_that_may_not_be_read_is_named(folder, load, monkeypatch, shut):
    """root may read everything, so reading is made to fail."""
    scan = os.scandir

    def refuse(path="."):
        if Path(path) == folder / shut:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    text = refusal(load, folder)
    assert str(folder / shut) in text and "change its permissions" in text


# --- which files are read ------------------------------------------------------------------------------------------


def test_every_readable_file_is_read_whatever_its_name(folder, load, capsys):
    kinds = {"a.jfif": "JPEG", "b.gif": "GIF", "c.JPE": "JPEG", "d": "PNG", "e.txt": "WEBP", "f.dib": "BMP"}
    kinds |= {"g.pnm": "PPM"} | ({"h.avif": "AVIF"} if "AVIF" in folders.FORMATS else {})
    for name, kind in kinds.items():
        save_picture(folder / "train" / "cat" / name, format=kind)
    assert len(load(folder)) == 20 + len(kinds)
    assert capsys.readouterr().out == ""


def test_no_images_and_images_outside_of_class_folders_are_counted_and_named(folder, load, capsys):
    for number in range(11):
        (folder / "train" / "cat" / f"{number:02}.txt").write_text("no image")
    (folder / "train" / "dog" / "empty").write_bytes(b"")
    save_picture(folder / "train" / "lost.png")
    (folder / "train" / "labels.csv").write_text("0.png,cat")
    for _ in ("decoded", "from the cache"):
        assert len(load(folder)) == 20
        others, loose = capsys.readouterr().out.splitlines()
        assert others.count(".txt") == 10 and "and 2 others (12 in all)" in others
        assert loose.endswith(f"no class folder: {folder / 'train' / 'lost.png'} (1 in all).")


UNREADABLE = {
    "a page": (b"<html>404 not found</html>", "is not an image"),
    "nothing": (b"", "is empty"),
    "too many pixels": (content_of(Image.new("1", (20_000, 10_000)), "PNG"), "too many pixels"),
    "fractions": (content_of(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "32 bits"),
    "numbers of 32 bits": (content_of(Image.fromarray(np.ones((8, 8), np.int32)), "TIFF"), "32 bits"),
    "a program, which Pillow hands to Ghostscript": (content_of(Image.new("L", (8, 8)), "EPS"), "is not an image"),
}


@pytest.mark.parametrize(("content", "reason"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable_image_is_refused_with_the_reason(tmp_path, content, reason):
    (tmp_path / "0.png").write_bytes(content)
    text = refusal(read_image, tmp_path / "0.png")
    assert text.startswith(f"{tmp_path / '0.png'} ") and reason in text


def test_a_file_that_may_not_be_read_is_said_to_be_that(tmp_path, monkeypatch):
    save_picture(tmp_path / "0.png")
    monkeypatch.setattr(folders.Image, "open", mock.Mock(side_effect=PermissionError(13, "Permission denied")))
    assert refusal(read_image, tmp_path / "0.png") == f"{tmp_path / '0.png'} may not be read; change its permissions."


def test_unreadable_image_is_left_out_and_named_each_time(folder, load, capsys):
    others = load(folder).subset([number for number in range(20) if number != 3])
    bad = folder / "train" / "cat" / "3.png"
    bad.write_bytes(bad.read_bytes()[:100])
    for _ in ("decoded", "from the cache"):
        rest = load(folder)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"1 of 20 images cannot be read: {bad} (the first ") and "is damaged" in line
        assert torch.equal(rest.images, others.images) and torch.equal(rest.labels, others.labels)
        assert rest.names == others.names


def test_more_than_one_in_ten_unreadable_is_refused(folder, load):
    for number in range(2):
        (folder / "train" / "cat" / f"{number}.png").write_bytes(b"damaged")
    assert len(load(folder)) == 18
    phone = folder / "train" / "dog" / "phone.HEIC"  # an image, of a format that is not read
    phone.write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    text = refusal(load, folder)
    assert text.startswith(f"3 of 21 images cannot be read: {folder / 'train' / 'cat' / '0.png'}, ")
    assert str(phone) in text and "convert it to JPEG or PNG" in text and "at most 10%" in text


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes among its files")
def test_pipes_and_links_to_nothing_cannot_be_read(folder, load):
    (folder / "train" / "cat" / "no.png").symlink_to(folder / "nowhere.png")
    (folder / "train" / "cat" / "self.png").symlink_to(folder / "train" / "cat" / "self.png")
    os.mkfifo(folder / "train" / "dog" / "pipe.png")
    text = refusal(load, folder)
    assert text.startswith("3 of 23 images cannot be read") and "no.png" in text and "pipe.png" in text


def test_training_class_of_unreadable_images_is_refused(folder, load):
    for split in ("train", "test"):
        (folder / split / "emu").mkdir()
        (folder / split / "emu" / "0.png").write_bytes(b"damaged")
    assert f"{folder / 'train'} holds no images of emu" in refusal(load, folder)
    loaded = load(folder, "test")
    assert len(loaded) == 20 and loaded.classes == ("cat", "dog", "emu")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there names of files are always printable text")
def test_names_cannot_break_the_line_or_command_the_terminal(folder, load, capsys):
    for name in (b"line\nbreak \x1b[2Jclear.png", b"caf\xe9.png"):
        Path(os.fsdecode(os.fsencode(folder / "train" / "cat") + b"/" + name)).write_bytes(b"damaged")
    load(folder)
    (line,) = capsys.readouterr().out.splitlines()
    assert "line\\nbreak \\x1b[2Jclear.png" in line and "caf\ufffd.png" in line and line.isprintable()


def test_folder_larger_than_memory_is_refused(folder, load, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 55, raising=False)  # 55 pages of 55 bytes
    assert "20 decoded images of 8x8 pixels take 0.0 GB" in refusal(load, folder)
    assert len(load(folder, image_size=4)) == 20


# --- pixels --------------------------------------------------------------------------------------------------------


def test_images_of_different_sizes_need_image_size(folder, load):
    large = folder / "train" / "dog" / "large.png"
    save_picture(large, noise(10, 20, 3))
    text = refusal(load, folder)
    assert "8x8" in text and f"{large} 20x10" in text and "give image_size" in text
    assert load(folder, image_size=12).images.shape == (21, 3, 12, 12)


def test_resizing_cuts_out_the_centre(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200  # the centre square
    save_picture(tmp_path / "0.png", wide)
    for size in (16, 64):
        image = read_image(tmp_path / "0.png", size)
        assert image.shape == (3, size, size)
        assert image.mean() > 195, "the dark sides must be cut off, not squeezed in"


@pytest.mark.filterwarnings("error")  # PIL warns of a palette with transparency
def test_grey_and_rgb_come_as_asked(tmp_path):
    grey, colour = Image.fromarray(noise(8, 8)), Image.fromarray(noise(8, 8, 3))
    palette, transparent = colour.quantize(16), colour.quantize(16)
    transparent.info["transparency"] = bytes(range(16))
    for number, picture in enumerate([grey, colour, colour.convert("RGBA"), palette, transparent]):
        picture.save(tmp_path / f"{number}.png")
    rgb = [read_image(file) for file in sorted(tmp_path.iterdir())]
    assert all(np.array_equal(channel, grey) for channel in rgb[0])
    assert np.array_equal(rgb[1], rgb[2]) and np.array_equal(rgb[3], rgb[4]) and rgb[3].shape == (3, 8, 8)
    one = [read_image(file, num_channels=1) for file in sorted(tmp_path.iterdir())]
    assert np.array_equal(one[0][0], grey) and np.array_equal(one[1][0], colour.convert("L"))


def test_16_bits_give_their_upper_8_in_every_format(tmp_path):
    grey = np.random.default_rng(0).integers(2**16, size=(8, 8), dtype=np.uint16)
    high_byte_first = grey.astype(">u2").tobytes()
    contents = {
        "PNG": content_of(Image.fromarray(grey), "PNG"),
        "TIFF, high byte first": content_of(Image.frombytes("I;16B", (8, 8), high_byte_first), "TIFF"),
        "PGM": b"P5 8 8 65535\n" + high_byte_first,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_image(tmp_path / name, num_channels=1)[0], grey >> 8, err_msg=name)


@pytest.mark.parametrize("bits", [12, 14])
def test_12_bits_in_16_bit_files_are_named(tmp_path, load, capsys, bits):
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * ((2**bits - 1) // 63)
    for name in ("cat", "dog"):
        save_picture(tmp_path / "scans" / "train" / name / "0.png", values)
    for _ in ("decoded", "from the cache"):
        load(tmp_path / "scans", num_channels=1)
        assert ("nearly black" in capsys.readouterr().out) == (bits == 12)


def test_exif_turns_images_upright_and_damaged_exif_turns_nothing(tmp_path):
    pixels, turned = noise(4, 6, 3), Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: a quarter turn clockwise
    for exif, upright in ((turned, np.rot90(pixels, -1)), (b"Exif\0\0has no TIFF header", pixels)):
        save_picture(tmp_path / "0.png", pixels, exif=exif)
        assert np.array_equal(read_image(tmp_path / "0.png"), upright.transpose(2, 0, 1))


# --- cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one whenever a folder is decoded."""
    calls, decode = [], folders._decode
    monkeypatch.setattr(folders, "_decode", lambda *arguments: calls.append(1) or decode(*arguments))
    return calls


def test_decoding_shows_progress_unless_told_not_to(folder, load, capsys):
    load(folder)
    assert capsys.readouterr() == ("", "")
    load(folder, "test", progress=True)
    assert "decoding images: 100%" in capsys.readouterr().out


def test_each_choice_of_options_is_decoded_once(folder, load, decoded):
    for options in ({}, {"image_size": 4}, {"num_channels": 1}, {"split": "test"}):
        first, again = load(folder, **options), load(folder, **options)
        assert torch.equal(again.images, first.images) and torch.equal(again.labels, first.labels)
        again.images.zero_()
        assert torch.equal(load(folder, **options).images, first.images), "the cache is not changed with the images"
    assert len(decoded) == 4


def test_changed_added_renamed_or_removed_file_is_noticed(folder, load, decoded, cache):
    load(folder)
    picture = folder / "train" / "cat" / "0.png"
    before = picture.stat()
    save_picture(picture, np.full((8, 8, 3), 9, np.uint8))
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))  # another size tells
    assert load(folder).images[0].max() == 9
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))
    load(folder)
    picture.chmod(0o600)
    load(folder)
    save_picture(folder / "train" / "cat" / "new.png")
    assert len(load(folder)) == 21
    (folder / "train" / "cat" / "new.png").rename(folder / "train" / "dog" / "+.png")  # its place in the list stays
    assert load(folder).labels.tolist() == 10 * [0] + 11 * [1]
    (folder / "train" / "dog" / "+.png").unlink()
    assert len(load(folder)) == 20
    assert len(decoded) == 7 and len(list(cache.iterdir())) == 1, "a later state takes the place of an earlier one"


def test_folders_of_one_name_have_their_own_caches(folder, tmp_path, load, cache):
    for root in (folder, shutil.copytree(folder, tmp_path / "copy" / "pets")):  # which keeps the times of the files
        load(root)
    assert len(list(cache.iterdir())) == 2


def test_damaged_cache_file_is_rebuilt(folder, load, decoded, cache):
    first = load(folder)
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    for _ in range(2):
        assert torch.equal(load(folder).images, first.images)
    assert len(decoded) == 2


def test_cache_that_cannot_be_written_stops_nothing(folder, load, tmp_path, capsys):
    (tmp_path / "file").write_text("where the data folder should be")
    assert len(load(folder, data_dir=tmp_path / "file")) == 20
    assert "not cached" in capsys.readouterr().out


# --- what ciFAIR kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count", "classes"), [("cifar100", 959, 100), ("cifar10", 329, 10)])
def test_lists_of_flagged_images_have_the_published_counts(name, count, classes):
    flagged = cifar.flagged_by_cifair()[name]
    indices = [index for stems in flagged.values() for index in stems.values()]
    assert len(flagged) == classes and len(set(indices)) == len(indices) == count
    kept = cifar.kept_by_index(name, 10_000)
    assert kept.sum() == 10_000 - count and not kept[indices].any()


def test_folder_of_cifar_knows_what_cifair_kept(tmp_path, load):
    for name in cifar.flagged_by_cifair()["cifar10"]:
        save_picture(tmp_path / "part" / "train" / name / "one_s_000001.png")
    for file in ("cat/pekingese_s_000608.png", "dog/pug_s_000001.png"):
        save_picture(tmp_path / "part" / "test" / file)
    assert load(tmp_path / "part").kept is load(tmp_path / "part", "test").kept is None
    save_picture(tmp_path / "part" / "test" / "dog" / "pekingese_s_000608.png")  # flagged is a file of its class
    test = load(tmp_path / "part", "test")
    assert test.kept.tolist() == test.to("cpu").kept.tolist() == [True, False, True]
    assert test.subset([1, 0]).kept.tolist() == [False, True]


# --- splits, draws, channel statistics -----------------------------------------------------------------------------


def uneven():
    """Classes of 1, 2, 3, 10 and 40 images, mixed; the first pixel of each image is its number."""
    labels = torch.tensor([0] + [1] * 2 + [2] * 3 + [3] * 10 + [4] * 40)
    labels = labels[torch.randperm(56, generator=torch.Generator().manual_seed(1))]
    images = torch.arange(56, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return LabelledImages(images, labels, tuple("abcde"))


def numbers(part):
    return part.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(0.001, [0, 1, 1, 1, 1]), (0.1, [0, 1, 1, 1, 4]), (0.999, [0, 1, 2, 9, 39])]
)
def test_split_is_disjoint_complete_in_order_and_stratified(fraction, held_out):
    whole = uneven()
    train, validation = train_validation_split(whole, fraction)
    assert numbers(validation) == sorted(numbers(validation))
    assert numbers(train) == sorted(set(range(56)) - set(numbers(validation)))
    for part in (train, validation):
        assert part.classes == whole.classes and torch.equal(part.labels, whole.labels[numbers(part)])
    assert validation.labels.bincount(minlength=5).tolist() == held_out


def test_splits_and_draws_of_a_seed_never_change():
    """Stored outputs of notebooks depend on them."""
    assert numbers(train_validation_split(uneven(), 0.2, 3)[1]) == [8, 10, 11, 17, 27, 36, 37, 39, 40, 42, 47, 54]
    part = uneven().subset(uneven().labels > 2)
    two = LabelledImages(part.images, part.labels - 3, ("d", "e"))
    many, few = (draw_evenly(two, count, 1) for count in (6, 2))
    assert numbers(many) == [32, 46, 34, 21, 5, 7] and many.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert numbers(few) == [32, 46], "a smaller draw begins a larger one"


def test_channel_statistics_are_mean_and_population_deviation():
    images = torch.from_numpy(noise(50, 3, 9, 11)) // torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=0, abs=1e-7)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), rel=0, abs=1e-7)
    assert all(type(value) is float for value in mean + std)
    assert channel_statistics(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)) == ((1.0,), (0.0,))
