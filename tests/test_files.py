"""Writing files whole, and showing their names."""

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
