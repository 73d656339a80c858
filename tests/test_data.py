"""Labelled images: from named sources and folders, checked, split, measured and cached."""

import errno
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refusal
from PIL import Image

from vitlib.data import cifar, folders
from vitlib.data import images as data
from vitlib.data.folders import read_image
from vitlib.data.images import (
    SOURCES,
    LabelledImages,
    channel_statistics,
    draw_evenly,
    load_images,
    train_validation_split,
)
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


def make_folder(root, size=(8, 8), classes=("cat", "dog"), per_class=3):
    """An image folder of noise; returns it with the train images [N, 3, H, W] in the order of the file names."""
    pixels = []
    for number, name in enumerate(classes):
        for index in range(per_class):
            pixels.append(noise(*size, 3, seed=100 * number + index))
            for split in ("train", "test"):
                save_picture(root / split / name / f"{index}.png", pixels[-1])
    return root, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "pets")[0]


@pytest.fixture
def herd(tmp_path):
    """A folder of 20 images in each of two classes and splits: a tenth of it may be left out, which is 4 images."""
    return make_folder(tmp_path / "herd", per_class=20)[0]


@pytest.fixture
def load(tmp_path):
    """``load_images`` without a progress bar and with a data folder of this test."""
    return lambda source, *split, **options: load_images(
        source, *split, **({"data_dir": tmp_path / "vitlib data", "progress": False} | options)
    )


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "vitlib data" / "cache"


# --- LabelledImages ------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"images": torch.zeros(3, 2, 2, dtype=torch.uint8)}, "uint8 [3, 2, 2]"),
        ({"labels": torch.zeros(3, dtype=torch.int32)}, "int32 [3]"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "int64 [2]"),
        ({"labels": torch.tensor([0, 1, 2])}, "from 0 to 2"),
        ({"labels": torch.tensor([-1, 0, 0])}, "from -1 to 0"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, part):
    good = {"images": labelled().images, "labels": labelled().labels, "classes": ("a", "b")}
    assert part in refusal(LabelledImages, **(good | change))


# --- sources and options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["CIFAIR10", "", "~nobody-of-this-name", 300 * "x"])
def test_neither_name_nor_folder_is_refused(source, load):
    text = refusal(load, source)
    assert repr(source) in text and all(name in text for name in SOURCES)
    assert ("did you mean 'cifair10'?" in text) == (source == "CIFAIR10")


@pytest.mark.parametrize(("name", "value"), [("split", "val"), ("num_channels", 2)])
def test_option_without_meaning_is_refused(name, value):
    assert f"{name}={value!r}" in refusal(load_images, "shapes10", **{name: value})


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


def test_cache_lives_where_the_environment_says(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "elsewhere"))
    load_images(folder, progress=False)
    assert len(list((tmp_path / "elsewhere" / "cache").iterdir())) == 1


# --- image folders -------------------------------------------------------------------------------------------------


def test_folder_gives_pixels_labels_and_classes(tmp_path, load):
    root, pixels = make_folder(tmp_path / "Bilder für ViT 猫", (5, 7), ("große Katze", "chien à poil"), per_class=2)
    for _ in ("decoded", "from the cache"):
        loaded = load(root)
        assert torch.equal(loaded.images, pixels[[2, 3, 0, 1]])
        assert loaded.labels.tolist() == [0, 0, 1, 1] and loaded.classes == ("chien à poil", "große Katze")


def test_test_split_has_the_classes_of_train(tmp_path, load, capsys):
    root, _ = make_folder(tmp_path / "pets", classes=("ant", "bee", "cat"), per_class=1)
    (root / "test" / "ant" / "0.png").unlink()
    (root / "test" / "ant").rmdir()
    (root / "test" / "bee" / "0.png").unlink()
    loaded = load(root, "test")
    assert loaded.labels.tolist() == [2] and loaded.classes == ("ant", "bee", "cat")
    assert capsys.readouterr().out == f"All images in {root / 'test'} are of one class, cat.\n"


def test_test_class_that_train_lacks_is_named(folder, load):
    save_picture(folder / "test" / "emu" / "0.png")
    assert "train/ lacks: emu;" in refusal(load, folder, "test")
    assert len(load(folder)) == 6


def test_class_names_are_compared_in_unicode_nfc(tmp_path, load):
    root = tmp_path / "menu"
    for split, name in [("train", "caf\u00e9"), ("train", "cafe\u0301"), ("train", "the"), ("test", "cafe\u0301")]:
        save_picture(root / split / name / f"{len(name)}.png")
    if len(os.listdir(root / "train")) < 3:
        pytest.skip("this file system has one form for names")
    assert load(root).classes == ("caf\u00e9", "the") and load(root).labels.tolist() == [0, 0, 1]
    assert load(root, "test").labels.tolist() == [0]


# --- how people lay out their folders ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Validation", "TESTING"])
def test_other_names_of_splits_are_found(folder, load, capsys, name):
    (folder / "train").rename(folder / "Training")
    (folder / "test").rename(folder / name)
    assert len(load(folder)) == len(load(folder, "test")) == 6
    said = capsys.readouterr().out
    assert (said == "") if name.lower().startswith("test") else (f"are those in {name}." in said)


def test_split_beside_the_one_used_is_named(folder, load, capsys):
    make_folder(folder / "val")
    (folder / "val" / "train").rename(folder / "valid")
    load(folder, "test")
    assert f"The test images of {folder} are those in test; not used: val, valid." in capsys.readouterr().out


def test_folder_of_classes_alone_is_split_by_a_seed(folder, load, capsys):
    for index in range(3, 10):
        for name in ("cat", "dog"):
            save_picture(folder / "train" / name / f"{index}.png", noise(8, 8, 3, seed=index))
    source = folder / "train"
    train, test = load(source), load(source, "test")
    assert "a fifth of each class" in capsys.readouterr().out
    assert train.labels.tolist() == 8 * [0] + 8 * [1] and test.labels.tolist() == [0, 0, 1, 1]
    whole = torch.cat([train.images, test.images])
    assert sorted(whole.flatten(1).tolist()) == sorted(load(folder).images.flatten(1).tolist())


def test_missing_test_folder_matters_only_when_asked_for(folder, load):
    (folder / "test").rename(folder / "held back")
    assert len(load(folder)) == 6
    text = refusal(load, folder, "test")
    assert f"{folder / 'test'} does not exist" in text and f"give {folder / 'train'}" in text


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
        assert load(folder, split).classes == ("cat", "dog") and len(load(folder, split)) == 6
    assert len(load(folder / "train")) + len(load(folder / "train", "test")) == 6
    assert "passed over" not in capsys.readouterr().out


# --- which files are read ------------------------------------------------------------------------------------------


def test_every_readable_file_is_read_whatever_its_name(folder, load, capsys):
    kinds = {"a.jfif": "JPEG", "b.gif": "GIF", "c.JPE": "JPEG", "d": "PNG", "e.txt": "WEBP", "f.dib": "BMP"}
    kinds |= {"g.pnm": "PPM"} | ({"h.avif": "AVIF"} if "AVIF" in folders.FORMATS else {})
    for name, kind in kinds.items():
        save_picture(folder / "train" / "cat" / name, format=kind)
    assert len(load(folder)) == 6 + len(kinds)
    assert capsys.readouterr().out == ""


def test_files_that_are_no_images_are_counted_and_named(folder, load, capsys):
    for number in range(11):
        (folder / "train" / "cat" / f"{number:02}.txt").write_text("no image")
    (folder / "train" / "dog" / "empty").write_bytes(b"")
    for _ in ("decoded", "from the cache"):
        assert len(load(folder)) == 6
        (line,) = capsys.readouterr().out.splitlines()
        assert line.count(".txt") == 10 and "and 2 others" in line and "12 in all" in line


def test_images_outside_of_class_folders_are_named(folder, load, capsys):
    save_picture(folder / "train" / "lost.png")
    (folder / "train" / "labels.csv").write_text("0.png,cat")
    assert len(load(folder)) == 6
    assert capsys.readouterr().out.endswith(f"no class folder: {folder / 'train' / 'lost.png'} (1 in all).\n")


def test_images_of_formats_not_read_count_as_unreadable(folder, load):
    (folder / "train" / "cat" / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    text = refusal(load, folder)
    assert "1 of 7 images cannot be read" in text and "phone.HEIC" in text and "convert it to JPEG or PNG" in text


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


def test_unreadable_image_is_left_out_and_named_each_time(herd, load, capsys):
    whole = load(herd)
    bad = herd / "train" / "cat" / "3.png"
    number = sorted(bad.parent.iterdir()).index(bad)
    bad.write_bytes(bad.read_bytes()[:100])
    for _ in ("decoded", "from the cache"):
        assert capsys.readouterr().out == ""
        rest = load(herd)
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith(f"1 of 40 images cannot be read: {bad} (the first ") and "is damaged" in line
        assert torch.equal(rest.images, torch.cat([whole.images[:number], whole.images[number + 1 :]]))
        assert rest.labels.tolist() == 19 * [0] + 20 * [1] and str(bad) not in rest.names


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes among its files")
def test_pipes_and_links_to_nothing_are_left_out(herd, load, capsys):
    (herd / "train" / "cat" / "no.png").symlink_to(herd / "nowhere.png")
    (herd / "train" / "cat" / "self.png").symlink_to(herd / "train" / "cat" / "self.png")
    os.mkfifo(herd / "train" / "dog" / "pipe.png")
    assert len(load(herd)) == 40
    said = capsys.readouterr().out
    assert said.startswith("3 of 43 images cannot be read") and "no.png" in said and "pipe.png" in said


def test_more_than_one_in_ten_unreadable_is_refused(herd, load):
    for number in range(4):
        (herd / "train" / "cat" / f"{number}.png").write_bytes(b"damaged")
    assert len(load(herd)) == 36
    (herd / "train" / "dog" / "7.png").write_bytes(b"damaged")
    text = refusal(load, herd)
    assert text.startswith(f"5 of 40 images cannot be read: {herd / 'train' / 'cat' / '0.png'}, ")
    assert str(herd / "train" / "dog" / "7.png") in text and "at most 10%" in text


def test_training_class_of_unreadable_images_is_refused(herd, load):
    for split in ("train", "test"):
        (herd / split / "emu").mkdir()
        (herd / split / "emu" / "0.png").write_bytes(b"damaged")
    assert f"{herd / 'train'} holds no images of emu" in refusal(load, herd)
    loaded = load(herd, "test")
    assert len(loaded) == 40 and loaded.classes == ("cat", "dog", "emu")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="there names of files are always printable text")
def test_names_cannot_break_the_line_or_command_the_terminal(herd, load, capsys):
    for name in (b"line\nbreak.png", b"\x1b[2Jclear.png", b"caf\xe9.png"):
        Path(os.fsdecode(os.fsencode(herd / "train" / "cat") + b"/" + name)).write_bytes(b"damaged")
    load(herd)
    (line,) = capsys.readouterr().out.splitlines()
    assert "line\\nbreak.png" in line and "\\x1b[2Jclear.png" in line and "caf\ufffd.png" in line
    assert line[:-1].isprintable()


def test_folder_larger_than_memory_is_refused(folder, load, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 30, raising=False)  # 30 pages of 30 bytes
    assert "6 decoded images of 8x8 pixels take 0.0 GB" in refusal(load, folder)
    assert len(load(folder, image_size=4)) == 6


# --- pixels --------------------------------------------------------------------------------------------------------


def test_images_of_different_sizes_need_image_size(folder, load):
    save_picture(folder / "train" / "dog" / "9.png", noise(10, 20, 3))
    text = refusal(load, folder)
    assert "8x8" in text and f"{folder / 'train' / 'dog' / '9.png'} 20x10" in text and "give image_size" in text
    assert load(folder, image_size=12).images.shape == (7, 3, 12, 12)


def test_resizing_cuts_out_the_centre(tmp_path):
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 200  # the centre square
    save_picture(tmp_path / "0.png", wide)
    for size in (16, 64):
        image = read_image(tmp_path / "0.png", size)
        assert image.shape == (3, size, size)
        assert image.mean() > 195, "the dark sides must be cut off, not squeezed in"


def test_grey_and_rgb_come_as_asked(tmp_path):
    grey, colour = Image.fromarray(noise(8, 8)), Image.fromarray(noise(8, 8, 3))
    for number, picture in enumerate([grey, colour, colour.convert("RGBA"), colour.quantize(16)]):
        picture.save(tmp_path / f"{number}.png")
    rgb = [read_image(file) for file in sorted(tmp_path.iterdir())]
    assert all(np.array_equal(channel, grey) for channel in rgb[0])
    assert np.array_equal(rgb[1], rgb[2]) and rgb[3].shape == (3, 8, 8)
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


def test_decoding_shows_progress_unless_told_not_to(folder, load, capsys):
    load(folder)
    assert capsys.readouterr() == ("", "")
    load(folder, "test", progress=True)
    assert "decoding images: 100%" in capsys.readouterr().out


# --- links, and folders that may not be read -----------------------------------------------------------------------


def test_links_are_followed_to_files_and_classes_only(tmp_path, folder, load):
    make_folder(tmp_path / "elsewhere", classes=("emu",))
    whole = load(folder)
    (folder / "train" / "emu").symlink_to(tmp_path / "elsewhere" / "train" / "emu", target_is_directory=True)
    (folder / "train" / "cat" / "9.png").symlink_to(tmp_path / "elsewhere" / "train" / "emu" / "0.png")
    inside = folder / "train" / "dog" / "inside"
    inside.mkdir()
    for number, place in enumerate((folder, folder / "test", folder / "train" / "dog", inside, Path("/"))):
        (inside / f"link {number}").symlink_to(place, target_is_directory=True)
    save_picture(inside / "0.png")
    loaded = load(folder)
    assert loaded.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2] and loaded.classes == ("cat", "dog", "emu")
    assert torch.equal(loaded.images[[0, 1, 2, 4, 5, 6]], whole.images)
    assert torch.equal(loaded.images[3], loaded.images[8])


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


# --- cache ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """A list that grows by one whenever a folder is decoded."""
    calls, decode = [], folders._decode
    monkeypatch.setattr(folders, "_decode", lambda *arguments: calls.append(1) or decode(*arguments))
    return calls


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
    save_picture(folder / "train" / "cat" / "7.png")
    assert len(load(folder)) == 7
    (folder / "train" / "cat" / "7.png").rename(folder / "train" / "dog" / "7.png")
    assert load(folder).labels.tolist() == [0, 0, 0, 1, 1, 1, 1]
    (folder / "train" / "dog" / "7.png").unlink()
    assert len(load(folder)) == 6
    assert len(decoded) == 7 and len(list(cache.iterdir())) == 1, "a later state takes the place of an earlier one"


def test_folders_of_one_name_have_their_own_caches(tmp_path, load, cache):
    for parent in ("one", "two"):
        root, _ = make_folder(tmp_path / parent / "pets")
        for file in root.rglob("*.png"):
            os.utime(file, (1, 1))
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
    assert len(load(folder, data_dir=tmp_path / "file")) == 6
    assert "not cached" in capsys.readouterr().out


# --- what ciFAIR kept ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count", "classes"), [("cifar100", 959, 100), ("cifar10", 329, 10)])
def test_lists_of_flagged_images_have_the_published_counts(name, count, classes):
    flagged = cifar.flagged_by_cifair()[name]
    indices = [index for stems in flagged.values() for index in stems.values()]
    assert len(flagged) == classes and len(set(indices)) == len(indices) == count
    assert cifar.kept_by_index(name, 10_000).sum() == 10_000 - count


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


# --- splits and draws ----------------------------------------------------------------------------------------------


def uneven():
    """Classes of 1, 2, 3, 10 and 40 images, mixed; the first pixel of each image is its number."""
    labels = torch.tensor([0] + [1] * 2 + [2] * 3 + [3] * 10 + [4] * 40)
    labels = labels[torch.randperm(56, generator=torch.Generator().manual_seed(1))]
    images = torch.arange(56, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return LabelledImages(images, labels, tuple("abcde"))


def numbers(part):
    return part.images[:, 0, 0, 0].tolist()


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.999])
def test_split_is_disjoint_complete_and_stratified(fraction):
    whole = uneven()
    train, validation = train_validation_split(whole, fraction)
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


def test_splits_and_draws_of_a_seed_never_change():
    """Stored outputs of notebooks depend on them."""
    assert numbers(train_validation_split(uneven(), 0.2, 3)[1]) == [8, 10, 11, 17, 27, 36, 37, 39, 40, 42, 47, 54]
    part = uneven().subset(uneven().labels > 2)
    drawn = draw_evenly(LabelledImages(part.images, part.labels - 3, ("d", "e")), 6, 1)
    assert numbers(drawn) == [32, 46, 34, 21, 5, 7]


def test_what_cannot_be_split_is_refused():
    for fraction in (0, 1, float("nan")):
        assert f"fraction={fraction!r}" in refusal(train_validation_split, uneven(), fraction)
    assert "2 images" in refusal(train_validation_split, labelled((0, 1)))


def test_smaller_even_draws_are_part_of_larger_ones():
    many, few = (draw_evenly(labelled((0, 1, 1, 0, 1, 0, 1)), count) for count in (6, 2))
    assert many.labels.tolist() == [0, 1, 0, 1, 0, 1] and torch.equal(few.images, many.images[:2])


@pytest.mark.parametrize("count", [0, 3, 8])
def test_count_that_cannot_be_drawn_evenly_is_refused(count):
    text = refusal(draw_evenly, labelled((0, 1, 1, 0, 1, 0, 1)), count)
    assert text.startswith(f"{count} images") and "a multiple of 2" in text and "from 2 to 6" in text


# --- channel statistics --------------------------------------------------------------------------------------------


def test_channel_statistics_are_mean_and_population_deviation():
    images = torch.from_numpy(noise(50, 3, 9, 11)) // torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1)
    mean, std = channel_statistics(images)
    scaled = images.double() / 255
    assert torch.allclose(torch.tensor(mean).double(), scaled.mean((0, 2, 3)), atol=1e-7)
    assert torch.allclose(torch.tensor(std).double(), scaled.std((0, 2, 3), correction=0), atol=1e-7)
    assert all(type(value) is float for value in mean + std)
    assert channel_statistics(torch.full((2, 1, 4, 4), 255, dtype=torch.uint8)) == ((1.0,), (0.0,))


@pytest.mark.parametrize("images", [torch.zeros(2, 3, 4, 4), torch.zeros(0, 3, 4, 4, dtype=torch.uint8)])
def test_channel_statistics_refuse_floats_and_nothing(images):
    assert str(list(images.shape)) in refusal(channel_statistics, images)
