"""CIFAR and ciFAIR: checked before anything is opened, and clear about what went wrong.

The archives are tiny fakes in CIFAR's format, served on this machine.
"""

import hashlib
import os
import pickle
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import invoke

from vitlib.data import cifar
from vitlib.data.images import load_images

ONCE = 2  # requests of one download by torchvision: where the file is, and the file
NAMES = ("cifair100", "cifair10", "cifar100", "cifar10")


def md5(content):
    return hashlib.md5(content).hexdigest()


def make_files(name):
    """The files of a tiny data set of three classes, by their names in the archive."""
    if name.endswith("100"):
        key, names = "fine_labels", ("train", "test", "meta")
        classes = {"fine_label_names": ["apple", "bear", "clock"]}
    else:
        key, names = "labels", (*[f"data_batch_{number}" for number in range(1, 6)], "test_batch", "batches.meta")
        classes = {"label_names": ["ant", "bee", "cat"]}
    files = {names[-1]: pickle.dumps(classes)}
    for seed, file in enumerate(names[:-1]):
        pixels = np.random.default_rng(seed).integers(0, 256, (4, 3072), dtype=np.uint8)
        files[file] = pickle.dumps({"data": pixels, key: [0, 1, 2, 0]})
    return {file: files[file] for file in names}


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder, and keeps its log of requests as a list."""

    requests = []

    def log_message(self, *arguments):
        self.requests.append(self.path)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """``fake(name)`` serves a tiny fake of a data set in place of the real one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    monkeypatch.setattr(Handler, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served"))
    server.handle_error = lambda *request: None  # a client may hang up early; that is not what vitlib says
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    original = cifar.cifar_class

    class Fake:
        def __init__(self, name):
            described = original(name)
            self.name, self.base, self.filename = name, described.base_folder, described.filename
            self.files, self.folder = make_files(name), tmp_path / "my data ü"
            self.served, self.archive = tmp_path / "served" / self.filename, self.folder / self.filename
            unpacked = tmp_path / "to pack" / self.base
            unpacked.mkdir(parents=True, exist_ok=True)
            for file, content in self.files.items():
                (unpacked / file).write_bytes(content)
            kind = "zip" if self.filename.endswith(".zip") else "gztar"
            packed = shutil.make_archive(str(tmp_path / "packed"), kind, unpacked.parent, self.base)
            shutil.move(packed, self.served)
            sums = [[file, md5(content)] for file, content in self.files.items()]
            attributes = {
                "train_list": sums[:-2],
                "test_list": sums[-2:-1],
                "meta": described.meta | {"md5": sums[-1][1]},
                "url": f"http://127.0.0.1:{server.server_port}/{self.filename}",
                "tgz_md5": md5(self.served.read_bytes()),
            }
            self.described = type("Fake", (described,), attributes)
            monkeypatch.setattr(cifar, "cifar_class", lambda name: self.described)

        def load(self, split="train", **options):
            return load_images(self.name, split, data_dir=self.folder, **({"progress": False} | options))

        def pixels(self, *files):
            entries = [pickle.loads(self.files[file])["data"] for file in files]
            return torch.from_numpy(np.concatenate(entries)).reshape(-1, 3, 32, 32)

        def refused(self, *parts):
            with pytest.raises(OSError) as error:
                self.load()
            text = str(error.value)
            assert "\n" not in text and text.endswith(".")
            for part in (self.described.url, self.folder, self.described.tgz_md5, "by hand", "shapes100", *parts):
                assert str(part) in text, f"{part!r} is not in: {text}"

    yield Fake
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", NAMES)
def test_data_set_is_downloaded_once_and_loaded(fake, name, capsys):
    fake = fake(name)
    *train, test, _ = fake.files
    loaded = fake.load()
    said = capsys.readouterr()
    assert torch.equal(loaded.images, fake.pixels(*train)) and loaded.images.is_contiguous()
    assert loaded.labels.tolist() == [0, 1, 2, 0] * len(train) and loaded.kept is None
    assert loaded.classes == (("apple", "bear", "clock") if name.endswith("100") else ("ant", "bee", "cat"))
    tested = fake.load("test")
    assert torch.equal(tested.images, fake.pixels(test))
    assert (None if tested.kept is None else tested.kept.tolist()) == (None if "fair" in name else [True] * 4)
    assert Handler.requests == ONCE * [f"/{fake.filename}"], "one download serves all later calls"
    assert said.out.count("\n") == 1 and ("100 kB/s since June 2026" in said.out) == ("fair" not in name)
    assert said.err == capsys.readouterr().out == ""


def test_progress_is_shown_on_stdout_when_asked_for(fake, capsys):
    fake("cifair10").load(progress=True)
    shown = capsys.readouterr()
    assert "100%" in shown.out and shown.err == ""


def test_the_command_makes_a_data_set_ready(fake):
    fake = fake("cifair10")
    assert invoke("download", "cifair10", "--data-dir", fake.folder).exit_code == 0
    fake.served.unlink()
    assert len(fake.load()) == 20


def test_archive_put_there_by_hand_needs_no_network(fake):
    fake = fake("cifair100")
    fake.folder.mkdir()
    shutil.move(fake.served, fake.archive)
    assert len(fake.load()) == 4 and Handler.requests == []


def test_ready_data_loads_from_a_folder_without_write_permission(fake, monkeypatch):
    """root may write anywhere, so whatever would write is made to fail."""
    fake = fake("cifair100")
    fake.load()
    for place, name in [(cifar, "FileLock"), (type(fake.folder), "mkdir"), (os, "makedirs"), (os, "mkdir")]:
        monkeypatch.setattr(place, name, None)
    assert len(fake.load()) == len(fake.load("test")) == 4


def test_two_loads_at_once_download_once(fake):
    fake = fake("cifair100")
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(len, pool.map(fake.load, ["train", "test"]))) == [4, 4]
    assert len(Handler.requests) == ONCE


# --- when something is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("listens", "said"), [(False, "refused"), (True, "timed out")])
def test_host_that_is_not_there_or_says_nothing_gives_one_sentence_with_the_way_out(fake, monkeypatch, listens, said):
    fake = fake("cifair100")
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))  # connections to it are refused, unless it listens
        if listens:
            host.listen()
            monkeypatch.setattr(cifar, "TIMEOUT", 0.2)
        monkeypatch.setattr(fake.described, "url", f"http://127.0.0.1:{host.getsockname()[1]}/{fake.filename}")
        fake.refused(said)
    assert socket.getdefaulttimeout() is None


def test_wrong_archive_is_never_unpacked_and_fetched_anew(fake):
    fake = fake("cifair100")
    right = fake.served.read_bytes()
    fake.served.write_bytes(right[:-9])
    fake.refused("corrupted")
    assert not (fake.folder / fake.base).exists()
    fake.served.write_bytes(right)
    assert len(fake.load("test")) == 4


def test_pickle_with_the_wrong_md5_is_never_opened(fake, trap):
    fake = fake("cifair100")
    fake.load()
    (fake.folder / fake.base / "meta").write_bytes(pickle.dumps(trap))
    assert torch.equal(fake.load().images, fake.pixels("train")), "it is replaced from the archive"
    assert len(Handler.requests) == ONCE


def test_file_in_place_of_the_data_folder_is_left_alone(fake):
    fake = fake("cifair100")
    fake.folder.write_text("mine")
    fake.refused("VITLIB_DATA")
    assert fake.folder.read_text() == "mine" and Handler.requests == []
