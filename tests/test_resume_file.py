"""The file of an unfinished training; test_resume.py shows what whole trainings do with it."""

import pytest
import torch

from vitlib.training import resume
from vitlib.training.resume import ResumeFile


def test_the_last_state_comes_back_and_the_one_before_is_kept(tmp_path):
    file = ResumeFile(tmp_path / "folder" / "a-resume.pt", {"seed": 1, "sizes": (1, 2)})
    assert file.load() is None
    for number in range(3):
        file.save({"step": number, "weights": [torch.full((2,), number)], "notes": {"name": "x", "none": None}})
    again = ResumeFile(tmp_path / "folder" / "a-resume.pt", {"sizes": [1, 2], "seed": 1})
    state = again.load()
    assert state["step"] == 2 and torch.equal(state["weights"][0], torch.tensor([2, 2]))
    assert state["notes"] == {"name": "x", "none": None}
    assert {path.name for path in file.path.parent.iterdir()} == {"a-resume.pt", "a-resume-previous.pt"}
    file.path.unlink()
    assert again.load()["step"] == 1, "after a kill between the two moves"


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*arguments):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"a-resume.pt cannot be written \(.*unexpected pos\); is the disk full\?"):
        ResumeFile(tmp_path / "a-resume.pt", {}).save({})


def test_a_file_is_due_when_its_minutes_are_over(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(resume.time, "monotonic", lambda: now)
    file = ResumeFile(tmp_path / "a-resume.pt", {}, minutes=5)
    now += 299
    assert not file.is_due
    now += 1
    assert file.is_due
    file.save({})
    assert not file.is_due


@pytest.mark.parametrize(
    "theirs, ours, message",
    [
        ({"seed": 1}, {"seed": 2}, "belongs to a training with seed=1, this one has seed=2; give the same settings"),
        ({}, {"new": 2}, "belongs to a training with new=None, this one has new=2;"),
        ({"images": "0af", "batch": 8}, {"images": "1be", "batch": 4}, "because the training images have changed"),
        (
            {"config": {"image_size": 8, "num_classes": 2}, "images": "0af"},
            {"config": {"image_size": 16, "num_classes": 3}, "images": "1be"},
            "config.image_size=8, this one has config.image_size=16",
        ),
        ({"start": "0af"}, {"start": "1be"}, "because it started from other weights"),
    ],
)
def test_a_training_with_other_settings_is_refused(tmp_path, theirs, ours, message):
    ResumeFile(tmp_path / "a-resume.pt", theirs).save({})
    with pytest.raises(ValueError, match=message) as error:
        ResumeFile(tmp_path / "a-resume.pt", ours).load()
    assert "0af" not in str(error.value) and str(tmp_path / "a-resume.pt") in str(error.value)


def whole(**changes) -> dict:
    return {"format": ResumeFile.FORMAT, "settings": "{}", "state": {"step": 1}} | changes


DAMAGES = {
    "truncated": lambda path, trap: path.write_bytes(path.read_bytes()[:-100]),
    "a torch file that runs code": lambda path, trap: torch.save(whole(state=trap), path),
    "of another version": lambda path, trap: torch.save(whole(format="vitlib resume 99"), path),
    "of other contents": lambda path, trap: torch.save({"weights": torch.ones(2)}, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_refused_and_runs_no_code(tmp_path, damage, trap):
    file = ResumeFile(tmp_path / "a-resume.pt", {})
    file.save({"step": 0})
    DAMAGES[damage](file.path, trap)
    with pytest.raises(ValueError, match="a-resume.pt is not a whole resume file of vitlib .*delete it to begin again"):
        file.load()
    file.previous.write_bytes(b"")
    with pytest.raises(ValueError, match="delete it to go on from a-resume-previous.pt") as error:
        file.load()
    assert "\n" not in str(error.value)
