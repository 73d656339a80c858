"""What a contained process may still do, by each version of Landlock that this system knows, and what it inherits."""

import os
import socket
import sys
from pathlib import Path

import children
import pytest

from vitlib.course import contain, execution

VERSIONS = range(1, contain.landlock_version() + 1)
TRIES = {
    "write": lambda top: (top / "outside" / "new").write_text("x"),
    "overwrite": lambda top: (top / "outside" / "file").open("r+").write("x"),
    "make a folder": lambda top: (top / "outside" / "folder").mkdir(),
    "remove": lambda top: (top / "outside" / "file").unlink(),
    "link": lambda top: (top / "outside" / "link").symlink_to("file"),
    "make a pipe": lambda top: os.mkfifo(top / "outside" / "pipe"),
    "take in": lambda top: os.rename(top / "outside" / "file", top / "inside" / "taken"),
    "read": lambda top: (top / "outside" / "file").read_text(),
    "empty": lambda top: os.truncate(top / "outside" / "file", 0),
    "connect": lambda top: socket.create_connection(("127.0.0.1", int((top / "readable" / "port").read_text()))),
    "signal": lambda top: os.kill(int((top / "readable" / "pid").read_text()), 0),
    "list": lambda top: os.listdir(top / "outside"),
    "read what it may": lambda top: (top / "readable" / "port").read_text(),
    "write what it may only read": lambda top: (top / "readable" / "port").write_text("1"),
    "write inside": lambda top: (top / "inside" / "new").write_text("x"),
    "move inside": lambda top: os.rename(top / "inside" / "new", top / "inside" / "moved"),
    "empty inside": lambda top: os.truncate(top / "inside" / "moved", 0),
    "write to a device": lambda top: Path("/dev/null").write_text("x"),
    "start a program": lambda top: os.waitpid(os.spawnv(os.P_NOWAIT, "/bin/true", ["true"]), 0),
}
ALWAYS = {
    "list", "read what it may", "write inside", "move inside", "empty inside", "write to a device", "start a program",
}  # fmt: skip
SINCE = {"empty": 3, "connect": 4, "signal": 6}


def try_all(top, version):
    contain.drop_privileges()
    contain.restrict(version, [str(top / "inside"), str(top / "log")], [str(top / "readable"), *contain.readable()])
    for name, act in TRIES.items():
        try:
            act(top)
        except OSError as error:
            print(f"{name}: {type(error).__name__}")


@pytest.mark.skipif(not VERSIONS, reason="this system has no Landlock")
@pytest.mark.parametrize("version", [1, 2, 3, 4, 6])
def test_each_version_refuses_what_it_can_and_nothing_else(tmp_path, version):
    if version not in VERSIONS:
        pytest.skip(f"this system has Landlock {max(VERSIONS)}")
    for name in ("inside", "outside", "readable"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "file").write_text("kept")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        (tmp_path / "readable" / "port").write_text(str(server.getsockname()[1]))
        (tmp_path / "readable" / "pid").write_text(str(os.getpid()))
        assert children.run(try_all, tmp_path, version, log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    refused = dict(line.split(": ") for line in (tmp_path / "log").read_text().splitlines())
    assert set(refused) == {name for name in TRIES if name not in ALWAYS and SINCE.get(name, 1) <= version}
    # the first version calls every move between folders one between disks
    assert set(refused.values()) <= {"PermissionError", *(["OSError"] if version == 1 else [])}
    assert (tmp_path / "outside" / "file").read_text() == ("kept" if version >= 3 else "")


@pytest.mark.parametrize("version", range(8))
def test_the_report_names_everything_once_and_says_what_is_missing(version):
    lines = contain.in_words(version).splitlines()
    assert sorted(line.strip() for line in lines if line.startswith("  ")) == sorted(contain.KEPT)
    titles = [line for line in lines if not line.startswith("  ")]
    assert [title.startswith("Notebooks are NOT kept from") for title in titles] == (
        [True] if version == 0 else [False, True] if version < 6 else [False]
    )
    for what, since in contain.KEPT.items():
        missing = any("NOT" in line for line in lines[: lines.index(f"  {what}")])
        assert missing == (version < since), what


SECRETS = (
    "API_TOKEN", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "HF_TOKEN", "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS",
    "HTTPS_PROXY", "PIP_INDEX_URL", "XDG_RUNTIME_DIR", "MY_PATH_TOKEN", "KAGGLE_KEY", "LD_PRELOAD", "PYTHONSTARTUP",
)  # fmt: skip


def test_only_harmless_variables_are_passed_and_home_and_temporary_files_are_ones_own(tmp_path):
    harmless = {"PATH": "/bin", "LANG": "C.UTF-8", "LC_ALL": "C", "OMP_NUM_THREADS": "2", "SystemRoot": "C:"}
    given = {**harmless, **dict.fromkeys(SECRETS, "secret"), "HOME": "/a/home", "TMPDIR": "/tmp"}
    passed = contain.own_environment(given, tmp_path)
    assert passed.items() >= harmless.items() and "secret" not in passed.values()
    assert {passed[name] for name in ("HOME", "USERPROFILE")} == {str(tmp_path / "home")}
    assert {passed[name] for name in ("TMPDIR", "TEMP", "TMP")} == {str(tmp_path / "tmp")}


def test_packages_are_readable_and_the_checkout_and_the_current_folder_are_not(tmp_path, monkeypatch):
    site, work, more = (tmp_path / name for name in ("site", "work", "more"))
    checkout = contain.PACKAGE.parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), str(checkout), str(site)])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(more), str(checkout), ""]))
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    readable = contain.readable()
    assert {str(site), str(more), str(contain.PACKAGE), sys.prefix, "/usr"} <= set(readable)
    assert not {"", ".", str(tmp_path), str(work), str(checkout), *map(str, checkout.parents)} & set(readable)
    assert not any(Path(path).name in ("notebooks", "solutions") for path in readable)
    # where vitlib is installed among other packages, these have to be readable too
    monkeypatch.setattr(contain, "PACKAGE", site / "vitlib")
    assert str(site) in contain.readable()


def test_what_a_parameter_names_by_its_whole_path_can_be_read_and_only_ones_own_folder_written(tmp_path, monkeypatch):
    monkeypatch.setenv("VITLIB_DATA", str(tmp_path / "data"))
    given = {"downstream": str(tmp_path / "images"), "weights": "cifar100-small", "run_dir": "../run", "seed": 1}
    rights = execution._rights(tmp_path / "own", given)
    assert {str(tmp_path / "images"), str(tmp_path / "data")} <= set(rights["readable"])
    assert not {"cifar100-small", "../run"} & set(rights["readable"])
    assert rights["writable"] == [str(tmp_path / "own")]
