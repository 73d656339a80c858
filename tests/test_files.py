"""Writing files whole, and showing their names."""

import os

import pytest

from vitlib import utils
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


def test_windows_waits_for_a_program_that_has_the_file_open(tmp_path, monkeypatch, capsys):
    replace, tried = os.replace, []

    def refuse_thrice(*paths):
        tried.append(paths)
        if len(tried) <= 3:
            raise PermissionError("Access is denied")
        replace(*paths)

    monkeypatch.setattr(utils.os, "replace", refuse_thrice)
    monkeypatch.setattr(utils.time, "sleep", lambda seconds: None)
    with pytest.raises(PermissionError), atomic_write(tmp_path / "grades.csv") as temporary:
        temporary.write_text("Linux does not wait")
    monkeypatch.setattr(utils.sys, "platform", "win32")
    with atomic_write(tmp_path / "grades.csv") as temporary:
        temporary.write_text("all grades")
    assert (tmp_path / "grades.csv").read_text() == "all grades" and len(tried) == 4
    assert capsys.readouterr().out == f"{tmp_path / 'grades.csv'} is open in another program; close it there.\n"
