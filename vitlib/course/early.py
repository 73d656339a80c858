"""Workers of a sweep that are there when they are needed: what they import is imported while the command line does the
same for itself. Imports nothing that takes time.
"""

import multiprocessing
import sys
from multiprocessing import forkserver

IMPORTED = ["distributed.nanny", "vitlib.course.worker"]
_started = False


def prepare_workers() -> None:
    """Start the process from which workers of this machine are forked; one by one they would take seconds to start.

    For a program that does not change its environment variables afterwards: the workers get those of this moment.
    """
    global _started
    if sys.platform == "linux":  # elsewhere processes that are forked may not use the system's libraries
        multiprocessing.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()
        _started = True


def start_method() -> str:
    """How worker processes are to be started."""
    return "forkserver" if _started else "spawn"
