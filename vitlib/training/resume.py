"""The file from which an interrupted training resumes exactly."""

import json
import os
import time
from pathlib import Path

import torch

from vitlib.utils import atomic_write, first_line

# settings that are fingerprints; to show the two hashes would help nobody
_CHANGED = {
    "images": "that cannot go on, because the training images have changed since",
    "start": "that cannot go on, because it started from other weights",
}


class OtherTraining(ValueError):
    """A resume file belongs to a training with other settings: ``OtherTraining(path, difference)``."""

    def __str__(self) -> str:
        path, difference = self.args
        way_out = "give the same settings, another run_dir, or delete the resume files"
        return f"{path} belongs to a training {difference}; {way_out}."


class ResumeFile:
    """The state of an unfinished training on disk.

    The file before the last one is kept too, as ``<name>-previous.pt``, in case the last is damaged. Files are read
    with ``weights_only=True``, which runs no code from them.

    Args:
        settings: everything that the numbers of the training depend on, in types of JSON. ``images`` and ``start`` are
            fingerprints of data. A file with other settings is refused; the error names the first that differs, so
            causes must stand before what they change.
        minutes: time between two files within an epoch.
    """

    FORMAT = "vitlib resume 2"

    def __init__(self, path: str | Path, settings: dict, minutes: float = 5.0):
        self.path = Path(path)
        self.previous = self.path.with_name(f"{self.path.stem}-previous{self.path.suffix}")
        self.settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        self.minutes = minutes
        self.written = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last file is older than ``minutes``."""
        return time.monotonic() - self.written >= 60 * self.minutes

    def save(self, state: dict) -> None:
        """Write ``state``, made of tensors, numbers, texts, lists and dicts."""
        with atomic_write(self.path) as temporary:
            try:
                torch.save({"format": self.FORMAT, "settings": json.dumps(self.settings), "state": state}, temporary)
            except RuntimeError as error:
                raise OSError(f"{self.path} cannot be written ({first_line(error):.100}); is the disk full?") from error
            if self.path.exists():
                os.replace(self.path, self.previous)
        self.written = time.monotonic()

    def load(self) -> dict | None:
        """Return the last state, on the CPU, or None if there is no file.

        Raises:
            ValueError: if the file is damaged or foreign, or belongs to a training with other settings.
        """
        for unfinished in self.path.parent.glob(f".{self.path.name}.*.part"):  # of a process that was killed
            unfinished.unlink(missing_ok=True)
        path = self.path if self.path.exists() else self.previous  # after a kill between the two moves of save
        if not path.exists():
            return None
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            if content["format"] != self.FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            settings, state = json.loads(content["settings"]), content["state"]
        except Exception as error:  # damaged files fail in many ways: zip, pickle, key, type
            has_previous = path == self.path and self.previous.exists()
            way_out = f"go on from {self.previous.name}" if has_previous else "begin again"
            raise ValueError(
                f"{path} is not a whole resume file of vitlib ({first_line(error):.100}); delete it to {way_out}."
            ) from error
        theirs, ours = _flat(settings), _flat(self.settings)
        for name in ours | theirs:
            if theirs.get(name) != ours.get(name):
                difference = f"with {name}={theirs.get(name)!r}, this one has {name}={ours.get(name)!r}"
                raise OtherTraining(path, _CHANGED.get(name, difference))
        return state


def _flat(settings: dict, prefix: str = "") -> dict:
    """Name nested settings with dots, such as ``recipe.clip``."""
    flat = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
