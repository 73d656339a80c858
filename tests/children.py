"""Functions run in processes of their own, which may be killed. They are forked from a server that has imported torch
once, so that one of them costs a tenth of a second and not three."""

import multiprocessing
import os
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

PRELOADED = [
    "pytest",
    "vitlib.course.cli",
    "vitlib.course.own_images",
    "torch._dynamo",
]  # optimisers import the last one


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
