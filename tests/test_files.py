"""Writing files whole, and showing their names."""

import os
import threading

import pytest

from vitlib.utils import atomic_write, printable


def test_a_file_is_there_when_the_block_has_ended_and_not_before(tmp_path):
    path = tmp_path / "new folder" / "figures ü.json"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "half" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
def test_a_block_that_fails_leaves_the_file_of_before_and_nothing_else(tmp_path, error):
    path = tmp_path / "history.json"
    path.write_text("finished work")
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise error
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


def test_threads_that_write_the_same_file_at_once_do_not_write_into_each_others(tmp_path):
    path, names, failed, meeting = tmp_path / "cache", [], [], threading.Barrier(4)

    def write(number):
        try:
            with atomic_write(path) as temporary:
                names.append(temporary)
                temporary.write_text(str(number) * 1000)
                meeting.wait(timeout=60)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(set(names)) == 4
    assert path.read_text() in [str(number) * 1000 for number in range(4)] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("große Katze 猫.png", "große Katze 猫.png"),
        ("line\nbreak", "line\\nbreak"),
        ("\x1b[2Jclear", "\\x1b[2Jclear"),
        ("caf\udce9.png", "caf\ufffd.png"),
    ],
)
def test_a_name_is_shown_without_what_breaks_lines_or_commands_terminals(name, seen):
    assert printable(name) == seen
