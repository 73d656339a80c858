"""The tests have no network, and so neither have the notebooks: nbval's kernels inherit the environment of pytest.

``make test`` runs every notebook with its own parameters in the pytest call that these tests belong to.
"""

import subprocess
import sys

import pytest

FAR = "192.0.2.1"  # an address for documentation (RFC 5737): nobody has it
LEAVE = {
    "a connection": f"socket.create_connection(('{FAR}', 80), timeout=5)",
    "a look-up": "socket.getaddrinfo('pypi.org', 443)",
    "a download": "urllib.request.urlopen('https://download.pytorch.org')",
}
SAYS = "the tests have no network"


@pytest.mark.parametrize("line", LEAVE.values(), ids=LEAVE)
def test_nothing_leaves_this_machine(line):
    with pytest.raises(OSError, match=SAYS):
        exec(f"import socket, urllib.request\n{line}")


def test_nor_from_a_process_that_a_test_starts():
    program = f"import urllib.request\n{LEAVE['a download']}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and SAYS in done.stderr
