"""CIFAR and ciFAIR: checked before anything is opened, and clear about what went wrong.

The archives are tiny fakes in CIFAR's format, served on this machine.
"""

import os
import pickle
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import invoke

from vitlib.data import cifar
from vitlib.data.images import load_images

ONCE = 2  # requests of one download by torchvision: where the file is, and the file


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder, and keeps its log of requests as a list of its server."""

    def log_message(self, *arguments):
        self.server.requests.append(self.path)


class Fake:
    """A tiny fake of a data set, in the folder ``served`` and described as the real one is."""

    def __init__(self, name, folder, server):
        real = cifar.cifar_class(name)
        self.name, self.folder, self.requests = name, folder / "my data ü", server.requests
        self.served, self.unpacked = folder / "served" / real.filename, self.folder / real.base_folder
        key = "fine_labels" if name.endswith("100") else "labels"
        self.files = {}
        for seed, (file, _) in enumerate(real.train_list + real.test_list):
            pixels = np.random.default_rng(seed).integers(0, 256, (4, 3072), dtype=np.uint8)
            self.files[file] = pickle.dumps({"data": pixels, key: [0, 1, 2, 0]})
        self.files[real.meta["filename"]] = pickle.dumps({real.meta["key"]: ["ant", "bee", "cat"]})
        to_pack = folder / "to pack" / real.base_folder
        to_pack.mkdir(parents=True)
        for file, content in self.files.items():
            (to_pack / file).write_bytes(content)
        stem, kind = real.filename.split(".", 1)
        shutil.make_archive(self.served.with_name(stem), kind.replace("tar.gz", "gztar"), to_pack.parent)
        *train, test, meta = [[file, md5(content).hexdigest()] for file, content in self.files.items()]
        url = f"http://127.0.0.1:{server.server_port}/{real.filename}"
        described = {"train_list": train, "test_list": [test], "meta": real.meta | {"md5": meta[1]}, "url": url}
        described["tgz_md5"] = md5(self.served.read_bytes()).hexdigest()
        self.described = type("Fake", (real,), described)

    def load(self, split="train"):
        return load_images(self.name, split, data_dir=self.folder, progress=False)

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


@pytest.fixture
def name():
    return "cifair100"


@pytest.fixture
def fake(name, monkeypatch, tmp_path):
    """A fake of the data set ``name``, which is downloaded in place of the real one."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "served").mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path / "served")) as server:
        server.requests = []
        server.handle_error = lambda *request: None  # a client may hang up early; that is not what vitlib says
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        fake = Fake(name, tmp_path, server)
        monkeypatch.setattr(cifar, "cifar_class", {name: fake.described}.get)
        yield fake
        server.shutdown()


@pytest.mark.parametrize("name", ["cifair100", "cifair10", "cifar100", "cifar10"])
def test_data_set_is_downloaded_once_and_loaded(fake, name, capsys):
    *train, test, _ = fake.files
    loaded = fake.load()
    said = capsys.readouterr()
    assert torch.equal(loaded.images, fake.pixels(*train)) and loaded.images.is_contiguous()
    assert loaded.labels.tolist() == [0, 1, 2, 0] * len(train) and loaded.kept is None
    assert loaded.classes == ("ant", "bee", "cat")
    tested = fake.load("test")
    assert torch.equal(tested.images, fake.pixels(test))
    assert (None if tested.kept is None else tested.kept.tolist()) == (None if "fair" in name else [True] * 4)
    assert fake.requests == ONCE * [f"/{fake.served.name}"], "one download serves all later calls"
    assert said.out.count("\n") == 1 and ("100 kB/s since June 2026" in said.out) == ("fair" not in name)
    assert said.err == capsys.readouterr().out == ""


def test_the_command_makes_a_data_set_ready_with_progress_on_stdout(fake):
    result = invoke("download", fake.name, "--data-dir", fake.folder)
    assert result.exit_code == 0 and "100%" in result.stdout and result.stderr == ""
    fake.served.unlink()
    assert len(fake.load()) == 4


def test_an_archive_put_there_by_hand_needs_no_network_and_ready_data_no_write_permission(fake, monkeypatch):
    """root may write anywhere, so whatever would write is made to fail."""
    fake.folder.mkdir()
    shutil.move(fake.served, fake.folder)
    assert len(fake.load()) == 4
    for place, name in [(cifar, "FileLock"), (type(fake.folder), "mkdir"), (os, "makedirs"), (os, "mkdir")]:
        monkeypatch.setattr(place, name, None)
    assert len(fake.load()) == len(fake.load("test")) == 4 and fake.requests == []


def test_two_loads_at_once_download_once(fake):
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(len, pool.map(fake.load, ["train", "test"]))) == [4, 4]
    assert len(fake.requests) == ONCE


# --- when something is wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("listens", "said"), [(False, "refused"), (True, "timed out")])
def test_host_that_is_not_there_or_says_nothing_gives_one_sentence_with_the_way_out(fake, monkeypatch, listens, said):
    with socket.socket() as host:
        host.bind(("127.0.0.1", 0))  # connections to it are refused, unless it listens
        if listens:
            host.listen()
            monkeypatch.setattr(cifar, "TIMEOUT", 0.2)
        monkeypatch.setattr(fake.described, "url", f"http://127.0.0.1:{host.getsockname()[1]}/{fake.served.name}")
        fake.refused(said)
    assert socket.getdefaulttimeout() is None


def test_wrong_archive_is_never_unpacked_and_fetched_anew(fake):
    right = fake.served.read_bytes()
    fake.served.write_bytes(right[:-9])
    fake.refused("corrupted")
    assert not fake.unpacked.exists()
    fake.served.write_bytes(right)
    assert len(fake.load("test")) == 4


def test_pickle_with_the_wrong_md5_is_never_opened(fake, trap):
    fake.load()
    (fake.unpacked / "meta").write_bytes(pickle.dumps(trap))
    assert torch.equal(fake.load().images, fake.pixels("train")), "it is replaced from the archive"
    assert len(fake.requests) == ONCE


def test_file_in_place_of_the_data_folder_is_left_alone(fake):
    fake.folder.write_text("mine")
    fake.refused("VITLIB_DATA")
    assert fake.folder.read_text() == "mine" and fake.requests == []
