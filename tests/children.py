"""Commands and functions in processes of their own, which may be interrupted or killed.

Functions are forked from a server that has imported torch once, so that one costs a tenth of a second and not three.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

# optimisers import the last one
PRELOADED = ["pytest", "vitlib.course.cli", "vitlib.course.own_images", "torch._dynamo"]


def start_command(*arguments: object, **options: object) -> subprocess.Popen:
    """Start ``python -m vitlib`` so that Ctrl-C reaches it; what runs in the background of a shell ignores it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **options}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([sys.executable, "-m", "vitlib", *map(str, arguments)], start_new_session=True, **pipes)
    finally:
        signal.signal(signal.SIGINT, before)


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, "it has ended, or takes too long"
        time.sleep(0.05)


def start(target, *arguments, log: Path, **environment: str) -> BaseProcess:
    """Start ``target(*arguments)``, a function of a test module; what it prints goes to the file ``log``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run, args=(target, arguments, str(log), environment))
    process.start()
    return process


def run(target, *arguments, log: Path, **environment: str) -> int:
    """The exit code of ``target(*arguments)`` in a process of its own; -9 if it was killed."""
    process = start(target, *arguments, log=log, **environment)
    process.join(300)
    return process.exitcode


def _run(target, arguments, log, environment) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    target(*arguments)
