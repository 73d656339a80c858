"""Where files live, and writing them so that an interruption never leaves half of one."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def data_folder(data_dir: str | os.PathLike | None = None) -> Path:
    """Where downloads and caches live: ``data_dir``, else the environment's VITLIB_DATA, else ~/.cache/vitlib."""
    return Path(data_dir or os.environ.get("VITLIB_DATA") or "~/.cache/vitlib").expanduser().absolute()


def shown(path: str | os.PathLike) -> str:
    """A path as a message may show it. Names in a folder from elsewhere can hold line breaks and commands to a
    terminal, which are escaped, and bytes that are no text, which become question marks."""
    text = os.fsencode(path).decode(errors="replace")
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path`` to write to, and moves it into place when the block ends well.

    If the block fails, the temporary file is removed and whatever stood at ``path`` before is still there.

    >>> with written_whole("history.json") as temporary:
    ...     temporary.write_text("{}")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # of this process and thread, so that two which write the same file at once do not write into each other's
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        yield temporary
        os.umask(mask := os.umask(0))  # safetensors hides its files from other users; a shared class folder needs them
        temporary.chmod(0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
