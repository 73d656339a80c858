"""Where files live, and writing them so that an interruption never leaves half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def data_folder(data_dir: str | os.PathLike | None = None) -> Path:
    """Where downloads and caches live: ``data_dir``, else the environment's VITLIB_DATA, else ~/.cache/vitlib."""
    return Path(data_dir or os.environ.get("VITLIB_DATA") or "~/.cache/vitlib").expanduser().absolute()


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to, and moves it into place when the block ends well.

    If the block fails, the temporary file is removed and whatever stood at ``path`` before is still there.

    >>> with written_whole("history.json") as temporary:
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.umask(mask := os.umask(0))  # safetensors hides its files from other users; a shared class folder needs them
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
