"""Keeps students' kernels to themselves: what they inherit, and which files, addresses and processes they reach.

As a program this module is the door through which the grader's kernels start: it gives up rights, which neither the
kernel nor anything that it starts gets back, and then becomes the kernel. The system has to help: Linux does, without
root, by Landlock (docs.kernel.org/userspace-api/landlock.html). Elsewhere only the environment is another.
"""

import ctypes
import glob
import json
import os
import re
import site
import struct
import sys
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path

PASSED = re.compile(
    r"PATH|LANG|LANGUAGE|LC_\w+|TZ|USER|LOGNAME|USERNAME|VIRTUAL_ENV|CONDA_PREFIX|PYTHON(PATH|HOME|HASHSEED|UTF8)|"
    r"(LD|DYLD|DYLD_FALLBACK)_LIBRARY_PATH|(OMP|MKL|OPENBLAS)_NUM_THREADS|GOMP_SPINCOUNT|KMP_BLOCKTIME|"
    r"CUDA_(HOME|VISIBLE_DEVICES)|NVIDIA_\w+|"
    r"SYSTEM(ROOT|DRIVE)|WINDIR|COMSPEC|PATHEXT|NUMBER_OF_PROCESSORS|PROCESSOR_\w+",  # Windows needs these
    re.IGNORECASE,
)
SYSTEM = (
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/nix/store", "/gnu/store", "/proc", "/sys",
    "/run/opengl-driver", "/var/cache/fontconfig",
)  # fmt: skip
DEVICES = ("null", "zero", "full", "random", "urandom", "nvidia*", "dri", "kfd")  # in /dev; no terminals, no /dev/shm
LARGEST_FILE = 2 * 2**30  # bytes; a loop that writes all night would otherwise fill the disk
PACKAGE = Path(find_spec("vitlib").origin).parent

# What Landlock keeps away, and from which version of it on.
KEPT = {
    "writing outside a copy of their folder": 1,
    "reading files other than the copy's, Python's, the system's and the course's images": 1,
    "looking into other processes": 1,
    "emptying other files": 3,
    "TCP connections": 4,
    "signals to other processes": 6,
}
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all processors
NO_NEW_PRIVILEGES, CHILD_SUBREAPER = 38, 36  # options of prctl
CAPABILITIES = 0x20080522  # version of the layout that capset gets
WRITE_FILE, READ_FILE, READ_DIR, TRUNCATE = (1 << bit for bit in (1, 2, 3, 14))
OF_FILES = WRITE_FILE | READ_FILE | TRUNCATE
CONNECT_TCP = 1 << 1
ABSTRACT_SOCKETS_AND_SIGNALS = 0b11


def own_environment(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What of ``environ`` is no secret, and a home and temporary files of one's own below ``folder``."""
    home, temporary = str(folder / "home"), str(folder / "tmp")
    return {
        **{name: value for name, value in environ.items() if PASSED.fullmatch(name)},
        **dict.fromkeys(("HOME", "USERPROFILE", "APPDATA", "LOCALAPPDATA"), home),
        **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), temporary),
        "PYTHONUSERBASE": site.getuserbase(),  # packages of `pip install --user` are in the real home
        # one notebook must not leave the next one a file that every kernel reads at its start
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
    }


def readable() -> list[str]:
    """Files and folders that every kernel has to read: this Python with its packages, vitlib, the system's."""
    here = PACKAGE.parent
    # the folder where the grader was started may hold the students' work, a checkout of vitlib holds the solutions
    closed = {Path.cwd(), *([here, *here.parents] if (here / "notebooks").is_dir() else ())}
    lists = (os.environ.get(name, "").split(os.pathsep) for name in ("PYTHONPATH", "LD_LIBRARY_PATH"))
    packages = {path for paths in (sys.path, *lists) for path in paths if path and Path(path).absolute() not in closed}
    return sorted({*SYSTEM, sys.prefix, sys.base_prefix, str(PACKAGE), *map(str, here.glob("vitlib*-info")), *packages})


def landlock_version() -> int:
    """Of the running system; 0 where it has none."""
    return max(0, _call(CREATE_RULESET, None, 0, 1)) if sys.platform == "linux" else 0


def in_words(version: int) -> str:
    """What a version of Landlock keeps students' notebooks from, and what it does not."""
    kept = [what for what, since in KEPT.items() if since <= version]
    left = [what for what, since in KEPT.items() if since > version]
    has = f"has Landlock {version}" if version else "has no Landlock"
    blocks = [
        ("Notebooks are kept from", kept),
        (f"Notebooks are NOT kept from (this system {has}; Linux 6.12 does it all)", left),
    ]
    return "\n".join("\n  ".join([f"{title}:", *items]) for title, items in blocks if items)


def adopt_orphans() -> None:
    """On Linux: whatever is started below this process stays below it, even what cuts itself loose."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(CHILD_SUBREAPER, 1, 0, 0, 0)


def drop_privileges() -> None:
    """On Linux: root becomes a user like others, who may no more than the owner of a file and looks into no process."""
    if sys.platform == "linux":
        header = struct.pack("=Ii", CAPABILITIES, 0)
        _checked(ctypes.CDLL(None, use_errno=True).capset(header, bytes(24)))


def restrict(version: int, writable: Iterable[str], readable: Iterable[str]) -> None:
    """Give up, for this process and all that it will start, whatever Landlock of that version can keep away.

    Args:
        writable: folders in which everything stays allowed.
        readable: files and folders that may be read. Names can be listed everywhere.

    Raises:
        OSError: if the system refuses.
    """
    # all rights to files but those to execute, which reading implies, and to control devices
    everything = sum(1 << bit for bit in range(1, 13 if version < 2 else 14 if version < 3 else 15))
    network = CONNECT_TCP if version >= 4 else 0
    handled = struct.pack("=QQQ", everything, network, ABSTRACT_SOCKETS_AND_SIGNALS if version >= 6 else 0)
    ruleset = _checked(_call(CREATE_RULESET, handled, len(handled), 0))
    _allow(ruleset, "/", READ_DIR)
    for path in readable:
        _allow(ruleset, path, READ_FILE | READ_DIR)
    for path in writable:
        _allow(ruleset, path, everything)
    for path in (path for name in DEVICES for path in glob.glob(f"/dev/{name}")):
        _allow(ruleset, path, everything & OF_FILES)
    _checked(ctypes.CDLL(None, use_errno=True).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
    _checked(_call(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    if not os.path.exists(path):
        return
    opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights if os.path.isdir(path) else rights & OF_FILES, opened)
    _checked(_call(ADD_RULE, ruleset, 1, rule, 0))
    os.close(opened)


def _call(number: int, *arguments) -> int:
    numbers = (ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments)
    return ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *numbers)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"the kernel's rights cannot be limited: {os.strerror(ctypes.get_errno())}")
    return result


def main(limits: str, *arguments: str) -> None:
    """Become a kernel. ``limits`` is a JSON file with the arguments of :func:`restrict`."""
    given = json.loads(Path(limits).read_text())
    lines = []
    if sys.platform == "linux":
        Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run out, this ends and not the grader
        drop_privileges()
    if os.name == "posix":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    if given["version"]:
        restrict(**given)
        # a terminal, which IPython's `!` would open, is a way to write on those of others
        lines = ["--IPKernelApp.exec_lines=get_ipython().system = get_ipython().system_raw"]
    from ipykernel import kernelapp

    sys.argv[:] = ["ipykernel_launcher", *arguments, *lines]
    kernelapp.launch_new_instance()


if __name__ == "__main__":
    main(*sys.argv[1:])
