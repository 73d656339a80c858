"""Downloads: checked before anything is opened, whole or not there, and clear about what went wrong.

The archives are tiny fakes in CIFAR's format, served on this machine.
"""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import children
import numpy as np
import pytest
import torch

from vitlib.data import cifar
from vitlib.data.images import download, load_images
from vitlib.utils import import_torchvision

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
        self.type = "application/octet-stream"
        self.endless = False  # goes on after the content, and does not say how long
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
        if start >= max(len(self.content), 1):
            return request.send_error(416)
        body = self.content[start:]
        request.send_response(206 if self.resumes else 200)
        request.send_header("Content-Type", self.type)
        if not self.endless:
            request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        while self.endless:
            try:
                request.wfile.write(bytes(2**16))
            except OSError:  # the other side has had enough
                return None
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

        def serve(self, content):
            """Another archive, which counts as the right one: md5 sums keep such from being opened at all."""
            server.content = content
            if self.name.startswith("cifair"):
                monkeypatch.setitem(cifar.CIFAIR_MD5, self.name, (md5(content), cifar.CIFAIR_MD5[self.name][1]))
            else:
                monkeypatch.setattr(getattr(import_torchvision().datasets, self.name.upper()), "tgz_md5", md5(content))

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
    tested = fake.load("test")
    assert torch.equal(tested.images, fake.pixels(test))
    assert (None if tested.kept is None else tested.kept.tolist()) == (None if "fair" in name else [True] * 4)
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
        patch.setattr(cifar, "_unpack", None)
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


@pytest.mark.parametrize("name", NAMES)
def test_a_pickle_that_is_exchanged_after_the_check_is_not_opened_either(fake, tmp_path, monkeypatch, name):
    fake = fake(name)
    fake.load()
    monkeypatch.setattr(cifar, "prepare_cifar", lambda *arguments: None)  # it has found everything in order
    for file in fake.files:
        (fake.folder / fake.base / file).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        with pytest.raises(OSError) as error:
            fake.load("train" if file != "test" and file != "test_batch" else "test")
        message_of(error, fake.folder / fake.base / file, "has changed")
        (fake.folder / fake.base / file).write_bytes(fake.files[file])
    assert not (tmp_path / "sprung").exists()
    fake.load()


def test_unpacking_that_is_interrupted_leaves_no_final_name_and_the_next_call_needs_no_download(fake, monkeypatch):
    fake = fake("cifair100")

    def stop_halfway(source, target):
        target.write(source.read(1000))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", stop_halfway)
        with pytest.raises(KeyboardInterrupt):
            fake.load()
    assert fake.contents() == [fake.filename]
    assert len(fake.load()) == 4 and len(fake.server.requests) == 1


def test_two_downloads_at_once_both_succeed(fake):
    fake = fake("cifair100")
    results = []
    threads = [threading.Thread(target=lambda: results.append(len(fake.load()))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [4, 4] and len(fake.server.requests) == 1, "the second waits for the first and uses its files"


# --- damaged archives ----------------------------------------------------------------------------------------------


def flipped(content, position):
    """One bit changed, at a place between 0, the start, and 1, the end."""
    place = int(position * (len(content) - 1))
    return content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :]


DAMAGES = {
    "empty": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "last byte lost": lambda content: content[:-1],
    "first byte lost": lambda content: content[1:],
    "something added": lambda content: content + b"!",
    "bit flipped at the start": lambda content: flipped(content, 0),
    "bit flipped inside": lambda content: flipped(content, 0.5),
    "bit flipped at the end": lambda content: flipped(content, 1),
    "a page": lambda content: b"<!DOCTYPE html><html><body>please log in</body></html>",
    "zeros": lambda content: bytes(len(content)),
}


@pytest.mark.parametrize("name", ["cifair100", "cifar10"], ids=["zip", "tar.gz"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_archive_is_never_unpacked_and_the_next_call_gets_it_whole(fake, monkeypatch, name, damage):
    fake = fake(name)
    right = fake.server.content
    fake.server.content = damage(right)
    with monkeypatch.context() as patch:
        patch.setattr(cifar, "_unpack", None)
        with pytest.raises(OSError) as error:
            fake.load()
    message_of(error, fake.filename)
    assert fake.contents() == []
    fake.server.content = right
    fake.load()


@pytest.mark.parametrize("name", ["cifair100", "cifar10"], ids=["zip", "tar.gz"])
def test_what_is_wrong_in_an_archive_with_the_right_md5_gives_one_sentence_or_the_right_images(fake, name):
    """A check that the md5 makes superfluous; so that nothing depends on the md5 alone."""
    fake = fake(name)
    right = fake.server.content
    train = fake.pixels(*list(fake.files)[:-2])
    others = [damage(right) for damage in DAMAGES.values()] + [flipped(right, place / 60) for place in range(61)]
    refused = 0
    for content in others:
        fake.serve(content)
        try:
            images = fake.load().images
        except OSError as error:
            refused += 1
            assert str(error).endswith(".") and "\n" not in str(error)
            assert not (fake.folder / fake.base).exists()
            assert set(fake.contents()) <= {fake.filename}
        else:
            assert torch.equal(images, train)
        shutil.rmtree(fake.folder)
    assert len(others) / 2 < refused < len(others)


def test_a_damaged_part_is_found_out_at_the_end_and_downloaded_anew(fake):
    fake = fake("cifair100")
    fake.folder.mkdir()
    fake.partial.write_bytes(flipped(fake.server.content[:5000], 0.5))
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, "removed")
    assert fake.contents() == []
    assert len(fake.load()) == 4 and [start for _, start in fake.server.requests] == [4999, 0]


def test_a_part_that_is_longer_than_the_file_does_not_stand_in_the_way(fake):
    fake = fake("cifair100")
    fake.folder.mkdir()
    fake.partial.write_bytes(fake.server.content + b"and more")
    assert len(fake.load()) == 4 and fake.server.requests[-1] == (f"/{fake.filename}", 0)


@pytest.mark.parametrize("resumes", [True, False])
def test_a_login_page_does_not_replace_what_has_been_downloaded_before(fake, resumes):
    fake = fake("cifair100")
    right, part = fake.server.content, fake.server.content[:5000]
    fake.folder.mkdir()
    fake.partial.write_bytes(part)
    fake.server.content, fake.server.resumes = b"<html>please log in</html>" * 1000, resumes
    fake.server.type = "text/html; charset=utf-8"
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.filename, "login page", "try again")
    assert fake.partial.read_bytes() == part
    fake.server.content, fake.server.type = right, "application/zip"
    assert len(fake.load()) == 4


# --- hostile archives: the md5 sum keeps them from being opened, so here it is that of the hostile one ----------------


def own_members(fake):
    return [(f"{fake.base}/{file}", content) for file, content in fake.files.items()]


def pack_members(fake, members):
    """An archive of the fake's kind: (name, content) for a file, (name, path) for a symbolic link."""
    buffer = io.BytesIO()
    zipped = fake.filename.endswith(".zip")
    with zipfile.ZipFile(buffer, "w") if zipped else tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members:
            link = isinstance(content, str)
            if zipped:
                entry = zipfile.ZipInfo(name)
                entry.external_attr = (0o120777 if link else 0o100644) << 16
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
            elif link:
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                archive.addfile(entry)
            else:
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


KINDS = pytest.mark.parametrize("name", ["cifair100", "cifar100"], ids=["zip", "tar.gz"])


@KINDS
def test_members_that_climb_out_and_further_ones_are_not_written(fake, tmp_path, name):
    fake = fake(name)
    climbing = ["../escaped", "../../../escaped", str(tmp_path / "escaped"), f"{fake.base}/../../../escaped"]
    climbing += [f"{fake.base}/sub/escaped", f"{fake.base}/train/escaped", "..\\escaped", "C:\\escaped", "escaped"]
    fake.serve(pack_members(fake, own_members(fake) + [(member, b"!") for member in climbing]))
    assert torch.equal(fake.load().images, fake.pixels("train"))
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]
    assert fake.contents() == sorted([fake.filename, fake.base])
    assert sorted(path.name for path in (fake.folder / fake.base).iterdir()) == ["meta", "test", "train"]


@KINDS
def test_nothing_is_written_through_a_link_to_a_folder_outside(fake, tmp_path, name):
    fake = fake(name)
    (outside := tmp_path / "outside").mkdir()
    fake.serve(pack_members(fake, [(fake.base, str(outside)), *own_members(fake)]))
    assert torch.equal(fake.load().images, fake.pixels("train"))
    assert not list(outside.iterdir()) and not (fake.folder / fake.base).is_symlink()


@KINDS
def test_a_link_in_place_of_a_file_is_not_made_or_followed(fake, tmp_path, name):
    fake = fake(name)
    (outside := tmp_path / "outside").write_bytes(fake.files["train"])
    fake.serve(pack_members(fake, [(f"{fake.base}/train", str(outside)), *own_members(fake)[1:]]))
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.archive, "does not hold the files", "delete it")
    assert fake.contents() == [fake.filename]


@KINDS
@pytest.mark.parametrize("place", ["beside the files", "as one of the files"])
def test_an_archive_that_unpacks_to_too_much_is_refused_before_it_is_written(fake, monkeypatch, name, place):
    fake = fake(name)
    monkeypatch.setattr(cifar, "MOST_BYTES", 200_000)
    bomb = [("first" if place == "beside the files" else f"{fake.base}/train", bytes(10_000_000))]
    fake.serve(pack_members(fake, bomb + own_members(fake)[1:]))
    assert len(fake.server.content) < 100_000
    written = []
    monkeypatch.setattr(shutil, "copyfileobj", lambda *files: written.append(files))
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.archive, "more than 1000 files or 200000 bytes", "delete it")
    assert not written and fake.contents() == [fake.filename]


@KINDS
def test_an_archive_of_too_many_files_is_refused(fake, name):
    fake = fake(name)
    fake.serve(pack_members(fake, own_members(fake) + [(f"{number}", b"") for number in range(cifar.MOST_MEMBERS)]))
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.archive, f"more than {cifar.MOST_MEMBERS} files")
    assert fake.contents() == [fake.filename]


def test_of_a_member_that_is_longer_than_it_says_no_more_is_written(fake, monkeypatch):
    fake = fake("cifair100")
    size = len(fake.files["train"])
    fake.files["train"] += bytes(10_000_000)
    content = pack_members(fake, own_members(fake))
    told = (size + 10_000_000).to_bytes(4, "little")
    assert content.count(told) == 2
    fake.serve(content.replace(told, size.to_bytes(4, "little")))
    copy, sizes = shutil.copyfileobj, []

    def measured(source, target):
        try:
            copy(source, target)
        finally:
            sizes.append(target.tell())

    monkeypatch.setattr(shutil, "copyfileobj", measured)
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.archive)
    assert 0 <= max(sizes) <= size and fake.contents() == [fake.filename]


def test_a_download_without_end_is_given_up_and_its_bytes_with_it(fake, monkeypatch):
    fake = fake("cifair100")
    monkeypatch.setattr(cifar, "MOST_BYTES", 200_000)
    fake.server.endless = True
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.filename, "more than 200000 bytes")
    assert fake.partial.stat().st_size == 0
    fake.server.endless = False
    assert len(fake.load()) == 4


# --- no room, no permission ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def room(size):
    """No file may grow beyond ``size`` bytes, whoever writes it: as on a full disk, but for the name of the error."""
    resource = pytest.importorskip("resource", reason="Windows has no limits on the size of files")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_download_that_fills_the_disk_goes_on_when_there_is_room(fake):
    fake = fake("cifair100")
    with room(8000), pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.filename, os.strerror(errno.EFBIG), "try again")
    assert fake.contents() == [fake.partial.name]
    kept = fake.partial.read_bytes()
    assert 0 < len(kept) <= 8000 and fake.server.content.startswith(kept)
    assert len(fake.load()) == 4 and fake.server.requests[-1][1] == len(kept) - 1


@pytest.mark.parametrize("name", ["cifair100", "cifar10"])
def test_unpacking_that_fills_the_disk_leaves_the_archive_and_what_was_there(fake, name):
    fake = fake(name)
    fake.load()
    (damaged := fake.folder / fake.base / list(fake.files)[0]).write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in fake.folder.rglob("*") if path.is_file()}
    with room(8000), pytest.raises(OSError) as error:
        fake.load()
    message_of(error, name, fake.folder, os.strerror(errno.EFBIG), "VITLIB_DATA")
    assert {path: path.read_bytes() for path in fake.folder.rglob("*") if path.is_file()} == before
    fake.load()
    assert damaged.read_bytes() != b"damaged" and len(fake.server.requests) == 1


def refuse(*arguments, **options):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a folder")


def test_data_that_is_ready_is_loaded_from_a_folder_that_cannot_be_written(fake, monkeypatch):
    """root may write anywhere, so whatever would write is made to fail."""
    fake = fake("cifair100")
    fake.load()
    for place, name in [(cifar, "FileLock"), (type(fake.folder), "mkdir"), (os, "replace"), (os, "mkdir")]:
        monkeypatch.setattr(place, name, refuse)
    assert len(fake.load()) == len(fake.load("test")) == 4
    download("cifair100", fake.folder)


@pytest.mark.parametrize("call", ["mkdir", "FileLock"])
def test_a_folder_that_cannot_be_written_is_said_to_be_that(fake, monkeypatch, call):
    fake = fake("cifair100")
    monkeypatch.setattr(cifar if call == "FileLock" else type(fake.folder), call, refuse)
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, "cifair100", fake.folder, os.strerror(errno.EACCES), "VITLIB_DATA")
    assert fake.server.requests == []


def test_a_file_in_place_of_the_data_folder_is_left_alone(fake):
    fake = fake("cifair100")
    fake.folder.write_text("mine")
    with pytest.raises(OSError) as error:
        fake.load()
    message_of(error, fake.folder, "VITLIB_DATA")
    assert fake.folder.read_text() == "mine"


# --- several processes ---------------------------------------------------------------------------------------------


def prepare_apart(folder, url, train_list, meta, sums, gate):
    """``download`` in a process of its own, which has to be told of the fake. Says when it sets to work, and then waits
    while there is a file ``gate``."""
    prepare = cifar._prepare

    def prepare_behind_the_gate(*arguments):
        print("sets to work", flush=True)
        wait_until(lambda: not gate.exists())
        prepare(*arguments)

    cifar._prepare = prepare_behind_the_gate
    original = import_torchvision().datasets.CIFAR100
    original.train_list, original.meta = train_list, meta
    cifar.CIFAIR_URL, cifar.CIFAIR_MD5["cifair100"] = url, sums
    download("cifair100", folder, progress=False)


@pytest.fixture
def start_apart(fake, tmp_path):
    fake = fake("cifair100")
    started = []

    def start():
        log = tmp_path / f"{len(started)}.log"
        described = cifar.cifar_class("cifair100")
        sums = cifar.CIFAIR_MD5["cifair100"]
        arguments = (fake.folder, fake.server.url, described.train_list, described.meta, sums, tmp_path / "gate")
        started.append(children.start(prepare_apart, *arguments, log=log, no_proxy="127.0.0.1"))
        return started[-1], log

    yield fake, start
    for process in started:
        process.kill()
        process.join()


def wait_until(true):
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end, "nothing has happened for two minutes"
        time.sleep(0.02)


def test_processes_that_prepare_the_same_data_at_once_do_it_once(start_apart, tmp_path):
    fake, start = start_apart
    gate = tmp_path / "gate"
    gate.touch()
    processes, logs = zip(*(start() for _ in range(3)), strict=True)

    def said() -> str:
        return "".join(log.read_text() for log in logs if log.exists())

    wait_until(lambda: said().count("Another process is preparing data") == 2)
    gate.unlink()
    for process in processes:
        process.join(120)
    assert said().count("sets to work") == 1
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert fake.server.requests == [(f"/{fake.filename}", 0)]
    assert fake.contents() == sorted([fake.filename, fake.base])
    assert torch.equal(fake.load().images, fake.pixels("train"))


def test_when_a_process_is_killed_in_the_middle_the_one_that_waits_goes_on_where_it_stopped(start_apart):
    fake, start = start_apart
    fake.server.cut_after, fake.server.stalls = 5000, True
    first, _ = start()
    wait_until(lambda: fake.partial.exists() and fake.server.requests)
    second, log = start()
    wait_until(lambda: "Another process is preparing data" in log.read_text() if log.exists() else False)
    fake.server.cut_after, fake.server.stalls = None, False
    first.kill()
    second.join(120)
    assert second.exitcode == 0, log.read_text()
    assert len(fake.server.requests) == 2
    assert fake.contents() == sorted([fake.filename, fake.base])
    assert torch.equal(fake.load().images, fake.pixels("train"))


@pytest.mark.parametrize("kind", ["folder", "link", "file"])
def test_what_a_killed_process_left_of_unpacking_is_neither_used_nor_kept(fake, tmp_path, kind):
    fake = fake("cifair100")
    fake.folder.mkdir()
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / fake.base).mkdir(parents=True)
    (elsewhere / fake.base / "train").write_bytes(b"half of it")
    for name in (".unpacking", ".damaged"):
        if kind == "folder":
            shutil.copytree(elsewhere, fake.folder / name)
        elif kind == "link":
            (fake.folder / name).symlink_to(elsewhere)
        else:
            (fake.folder / name).write_text("?")
    assert len(fake.load()) == 4
    assert fake.contents() == sorted([fake.filename, fake.base])
    assert (elsewhere / fake.base / "train").read_bytes() == b"half of it"
