"""Writing files whole, and showing their names."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vitlib.utils import atomic_write


def test_a_file_is_there_when_the_block_has_ended_and_not_before(tmp_path):
    path = tmp_path / "new folder" / "figures ü.json"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


def test_a_block_that_fails_leaves_the_file_of_before_and_nothing_else(tmp_path):
    path = tmp_path / "history.json"
    path.write_text("finished work")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "finished work" and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_others_may_read_what_a_library_has_hidden_from_them(tmp_path):
    path = tmp_path / "model.safetensors"
    before = os.umask(0o027)
    try:
        with atomic_write(path) as temporary:
            temporary.touch(mode=0o600)  # as safetensors does
        assert path.stat().st_mode & 0o777 == 0o640
        assert os.umask(0o027) == 0o027, "the process's own mask is as it was"
    finally:
        os.umask(before)


def test_threads_that_write_the_same_file_do_not_write_into_each_others(tmp_path):
    meeting = threading.Barrier(2)

    def write(text):
        with atomic_write(tmp_path / "cache") as temporary:
            temporary.write_text(text)
            meeting.wait(timeout=60)
        return temporary

    with ThreadPoolExecutor() as pool:
        assert len(set(pool.map(write, "ab"))) == 2
    assert [path.read_text() in "ab" for path in tmp_path.iterdir()] == [True]
