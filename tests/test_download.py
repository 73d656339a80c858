"""Downloads: checked before anything is opened, whole or not there, and clear about what went wrong.

The archives are tiny fakes in CIFAR's format, served on this machine.
"""

import hashlib
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from vitlib import cifar
from vitlib.compat import import_torchvision
from vitlib.data import download, load_images

NAMES = ("cifair100", "cifair10", "cifar100", "cifar10")


def md5(content):
    return hashlib.md5(content).hexdigest()


def batch(count, key, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return pickle.dumps({"data": pixels, key: [index % 3 for index in range(count)]})


def make_files(name):
    """The files of a tiny data set of three classes, by their names in the archive."""
    if name.endswith("100"):
        key, names = "fine_labels", ("train", "test", "meta")
        classes = {"fine_label_names": ["apple", "bear", "clock"]}
    else:
        key, names = "labels", (*[f"data_batch_{number}" for number in range(1, 6)], "test_batch", "batches.meta")
        classes = {"label_names": ["ant", "bee", "cat"]}
    batches = {file: batch(4, key, seed) for seed, file in enumerate(names[:-1])}
    return batches | {names[-1]: pickle.dumps(classes)}


def pack(filename, folder, files):
    buffer = io.BytesIO()
    if filename.endswith(".zip"):
        with zipfile.ZipFile(buffer, "w") as archive:
            for file, content in files.items():
                archive.writestr(f"{folder}/{file}", content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for file, content in files.items():
                entry = tarfile.TarInfo(f"{folder}/{file}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


class Server:
    """Serves one content under any path, as badly as a test wants."""

    def __init__(self):
        self.content = b""
        self.status = 200
        self.resumes = True
        self.cut_after = None  # bytes after which the connection closes
        self.stalls = False  # says nothing more after those bytes, but keeps the connection open
        self.redirects = False  # as GitHub's releases do
        self.requests = []  # (path, first byte asked for)
        self.over = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request):
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.requests.append((request.path, start))
        if self.status != 200:
            return request.send_error(self.status)
        if self.redirects and not request.path.startswith("/elsewhere"):
            request.send_response(302)
            request.send_header("Location", f"{self.url}/elsewhere{request.path}")
            return request.end_headers()
        start = start if self.resumes else 0
        body = self.content[start:]
        request.send_response(206 if self.resumes else 200)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body[: self.cut_after])
        request.wfile.flush()
        if self.stalls:
            self.over.wait(10)

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def fake(server, monkeypatch, tmp_path):
    """Describes a tiny fake of a data set to vitlib and serves it; returns the fake."""

    class Fake:
        def __init__(self, name, **changed_files):
            self.name, self.server = name, server
            self.files = make_files(name)  # what the md5 sums are of
            self.folder = tmp_path / "my data ü"
            original = getattr(import_torchvision().datasets, name.upper().replace("CIFAIR", "CIFAR"))
            *train, test, meta = self.files
            served = self.files | changed_files  # what is in the archive
            sums = {file: md5(content) for file, content in self.files.items()}
            monkeypatch.setattr(original, "train_list", [[file, sums[file]] for file in train])
            monkeypatch.setattr(original, "meta", original.meta | {"md5": sums[meta]})
            if name.startswith("cifair"):
                self.base, self.filename = (f"{name.replace('cifair', 'ciFAIR-')}{end}" for end in ("", ".zip"))
                server.content = pack(self.filename, self.base, served)
                monkeypatch.setattr(cifar, "CIFAIR_URL", server.url)
                monkeypatch.setitem(cifar.CIFAIR_MD5, name, (md5(server.content), sums[test]))
            else:
                self.base, self.filename = original.base_folder, original.filename
                server.content = pack(self.filename, self.base, served)
                monkeypatch.setattr(original, "url", f"{server.url}/{self.filename}")
                monkeypatch.setattr(original, "tgz_md5", md5(server.content))
                monkeypatch.setattr(original, "test_list", [[test, sums[test]]])
            self.archive = self.folder / self.filename
            self.partial = self.folder / f"{self.filename}.partial"

        def load(self, split="train", **options):
            return load_images(self.name, split, data_dir=self.folder, **({"progress": False} | options))

        def pixels(self, *files):
            entries = [pickle.loads(self.files[file])["data"] for file in files]
            return torch.from_numpy(np.concatenate(entries)).reshape(-1, 3, 32, 32)

        def contents(self):
            return sorted(path.name for path in self.folder.iterdir() if path.name != ".lock")

        def assert_nothing_in_place(self):
            assert not self.archive.exists() and not (self.folder / self.base).exists()

    return Fake


def message_of(error, *parts):
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")
    for part in parts:
        assert str(part) in text, f"{part!r} is not in: {text}"


# --- when all goes well --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_data_set_is_downloaded_unpacked_and_loaded(fake, name):
    fake = fake(name)
    *train, test, _ = fake.files
    loaded = fake.load()
    assert torch.equal(loaded.images, fake.pixels(*train)) and loaded.images.is_contiguous()
    assert loaded.labels.tolist() == [0, 1, 2, 0] * len(train)
    assert loaded.classes == (("apple", "bear", "clock") if name.endswith("100") else ("ant", "bee", "cat"))
    assert torch.equal(fake.load("test").images, fake.pixels(test))
    assert fake.server.requests == [(f"/{fake.filename}", 0)], "one request serves all later calls"
    assert fake.contents() == sorted([fake.filename, fake.base]), "nothing else is left behind"


@pytest.mark.parametrize(
    ("name", "url", "folder", "archive", "test"),
    [
        (
            "cifair100",
            "https://github.com/cvjena/cifair/releases/download/v1.0/ciFAIR-100.zip",
            "ciFAIR-100",
            "ddc236ab4b12eeb8b20b952614861a33",
            ["test", "8130dae8d6fc6a436437f0ebdb801df1"],
        ),
        (
            "cifair10",
            "https://github.com/cvjena/cifair/releases/download/v1.0/ciFAIR-10.zip",
            "ciFAIR-10",
            "ca08fd390f0839693d3fc45c4e49585f",
            ["test_batch", "01290e6b622a1977a000eff13650aca2"],
        ),
    ],
)
def test_cifair_is_described_as_its_authors_describe_it(name, url, folder, archive, test):
    datasets = import_torchvision().datasets
    original = datasets.CIFAR100 if name == "cifair100" else datasets.CIFAR10
    described = cifar.cifar_class(name)
    assert (described.url, described.base_folder, described.tgz_md5) == (url, folder, archive)
    assert described.test_list == [test] and described.filename == f"{folder}.zip"
    assert described.train_list == original.train_list and described.meta == original.meta


def test_cifar_is_torchvisions_own(monkeypatch):
    datasets = import_torchvision().datasets
    assert cifar.cifar_class("cifar100") is datasets.CIFAR100
    assert cifar.cifar_class("cifar10") is datasets.CIFAR10


def test_download_makes_a_source_ready_without_loading_it(fake, monkeypatch):
    fake = fake("cifair10")
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "load", None)  # a call would fail
        download("cifair10", fake.folder, progress=False)
    fake.server.status = 503
    assert len(fake.load()) == 20


@pytest.mark.parametrize("name", ["shapes100", "shapes10"])
def test_the_embedded_data_sets_need_no_download(name, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar.urllib.request, "urlopen", None)
    download(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_name_is_not_downloaded(tmp_path):
    with pytest.raises(ValueError) as error:
        download("cifair-100", tmp_path)
    message_of(error, "cifair100")


def test_an_archive_put_there_by_hand_is_used_without_a_network(fake):
    fake = fake("cifair100")
    fake.folder.mkdir()
    fake.archive.write_bytes(fake.server.content)
    fake.server.status = 503
    assert len(fake.load()) == 4 and fake.server.requests == []


def test_a_download_shows_progress_in_bytes_unless_told_not_to(fake, capsys):
    fake = fake("cifair10")
    fake.load(progress=True)
    shown = capsys.readouterr()
    assert "ciFAIR-10.zip: 100%" in shown.out and "B/s" in shown.out and shown.err == ""
    shutil.rmtree(fake.folder)
    fake.load()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("name", "quicker"), [("cifar100", "cifair100"), ("cifar10", "cifair10")])
def test_a_throttled_host_is_announced_before_the_download_with_the_quicker_choice(fake, name, quicker, capsys):
    fake = fake(name)
    fake.server.status = 503
    with pytest.raises(OSError):
        fake.load()
    announced = capsys.readouterr().out
    assert "100 kB/s since June 2026" in announced and quicker in announced
    assert "100 kB/s since June 2026" in load_images.__doc__
    fake.server.status = 200
    fake.load()
    capsys.readouterr()
    fake.load()
    assert capsys.readouterr().out == "", "nothing is announced when nothing is downloaded"


# --- when the transfer fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("resumes", [True, False], ids=["server resumes", "server starts again"])
def test_an_interrupted_download_leaves_no_final_name_and_the_next_call_completes_it(fake, resumes):
    fake = fake("cifair100")
    fake.server.resumes, fake.server.cut_after = resumes, 5000
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.filename, f"{len(fake.server.content) - 5000} bytes before the end", "try again")
    fake.assert_nothing_in_place()
    assert fake.partial.read_bytes() == fake.server.content[:5000]
    fake.server.cut_after = None
    assert torch.equal(fake.load().images, fake.pixels("train"))
    assert fake.server.requests[1][1] == 4999, "the second request must ask for the missing bytes only"
    assert not fake.partial.exists()


def test_a_download_goes_on_where_it_stopped_through_a_redirect(fake):
    fake = fake("cifair100")
    fake.folder.mkdir()
    fake.partial.write_bytes(fake.server.content[:5000])
    fake.server.redirects = True
    assert len(fake.load()) == 4
    assert fake.server.requests == [(f"/{fake.filename}", 4999), (f"/elsewhere/{fake.filename}", 4999)]


def test_a_transfer_that_is_stopped_by_the_user_leaves_no_final_name(fake, monkeypatch):
    fake = fake("cifair100")

    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cifar, "progress_bar", stop)
        with pytest.raises(KeyboardInterrupt):
            fake.load()
    fake.assert_nothing_in_place()
    assert len(fake.load()) == 4


def test_a_complete_part_that_was_never_moved_into_place_is_taken_over(fake):
    fake = fake("cifair100")
    fake.folder.mkdir()
    fake.partial.write_bytes(fake.server.content)
    assert len(fake.load()) == 4
    assert fake.server.requests == [(f"/{fake.filename}", len(fake.server.content) - 1)]


def test_a_stalled_connection_times_out(fake, monkeypatch):
    fake = fake("cifair100")
    monkeypatch.setattr(cifar, "TIMEOUT", 0.2)
    fake.server.cut_after, fake.server.stalls = 5000, True
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, "timed out", fake.filename)
    fake.assert_nothing_in_place()


def test_without_a_network_one_sentence_names_file_url_folder_and_the_offline_choice(fake, monkeypatch):
    fake = fake("cifair100")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setattr(cifar, "CIFAIR_URL", url)
        with pytest.raises(OSError) as error:
            fake.load()
    message_of(error, "ciFAIR-100.zip", f"{url}/ciFAIR-100.zip", fake.folder, "by hand", "shapes100")
    assert fake.contents() == []


@pytest.mark.parametrize("status", [404, 503])
def test_an_http_error_gives_the_same_sentence_with_its_reason(fake, status):
    fake = fake("cifar10")
    fake.server.status = status
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, status, fake.filename, fake.server.url, fake.folder, "shapes100")
    fake.assert_nothing_in_place()


# --- when the content is wrong -------------------------------------------------------------------------------------


def test_a_page_instead_of_the_archive_is_refused_with_both_sums_removed_and_never_unpacked(fake, monkeypatch):
    fake = fake("cifair100")
    right, page = fake.server.content, b"<html>please log in</html>"
    fake.server.content = page
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "unpack_archive", None)
        with pytest.raises(OSError) as error:
            fake.load()
    message_of(error, fake.filename, md5(page), md5(right), "removed")
    assert fake.contents() == []
    fake.server.content = right
    assert len(fake.load()) == 4


def test_a_wrong_archive_put_there_by_hand_is_refused_but_left_to_its_owner(fake):
    fake = fake("cifair100")
    fake.folder.mkdir()
    fake.archive.write_bytes(b"another file")
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.archive, md5(b"another file"), md5(fake.server.content), "delete it")
    assert fake.archive.read_bytes() == b"another file" and fake.server.requests == []


class Trap:
    """Makes a folder when its pickle is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_pickle_in_the_archive_with_the_wrong_md5_is_refused_and_not_opened(fake, tmp_path, file):
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    fake = fake("cifair100", **{file: trap})
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.archive, "cifair100")
    assert not (tmp_path / "sprung").exists()
    assert fake.contents() == [fake.filename], "nothing of the archive may be left behind"
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists(), "the trap of this test must work"


@pytest.mark.parametrize("file", ["train", "test", "meta"])
def test_a_pickle_that_was_exchanged_after_unpacking_is_replaced_and_not_opened(fake, tmp_path, file):
    fake = fake("cifair100")
    fake.load()
    (fake.folder / fake.base / file).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert torch.equal(fake.load().images, fake.pixels("train"))
    assert not (tmp_path / "sprung").exists()
    assert (fake.folder / fake.base / file).read_bytes() == fake.files[file]
    assert fake.contents() == sorted([fake.filename, fake.base])


def test_torchvision_itself_refuses_a_pickle_with_the_wrong_md5(fake, tmp_path, monkeypatch):
    fake = fake("cifair100")
    fake.load()
    for file in ("train", "test", "meta"):
        (fake.folder / fake.base / file).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        monkeypatch.setattr(
            cifar, "prepare_cifar", lambda *arguments, **keywords: None
        )  # our own check is out of the way
        with pytest.raises(RuntimeError, match="corrupted"):
            fake.load()
        (fake.folder / fake.base / file).write_bytes(fake.files[file])
    assert not (tmp_path / "sprung").exists()


def test_unpacking_that_is_interrupted_leaves_no_final_name_and_the_next_call_needs_no_download(fake, monkeypatch):
    fake = fake("cifair100")

    def stop_halfway(archive, folder):
        os.makedirs(os.path.join(folder, fake.base))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "unpack_archive", stop_halfway)
        with pytest.raises(KeyboardInterrupt):
            fake.load()
    assert fake.contents() == [fake.filename]
    assert len(fake.load()) == 4 and len(fake.server.requests) == 1


def test_a_tar_file_cannot_write_outside_its_folder(fake, tmp_path, monkeypatch):
    if not hasattr(tarfile, "data_filter"):
        pytest.skip("this Python's tarfile has no filters (3.11.3 or older)")
    fake = fake("cifar100", **{"../../../escaped": b"!"})
    with pytest.raises(tarfile.OutsideDestinationError):
        fake.load()
    assert not list(tmp_path.rglob("escaped"))


def test_two_downloads_at_once_both_succeed(fake):
    fake = fake("cifair100")
    results = []
    threads = [threading.Thread(target=lambda: results.append(len(fake.load()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4, 4] and len(fake.server.requests) == 1, "the second waits for the first and uses its files"
