"""The tests have no network, and so neither have the notebooks: nbval's kernels inherit the environment of pytest.

``make test`` runs every notebook with its own parameters in the pytest call that these tests belong to.
"""

import socket
import subprocess
import sys

import pytest

FAR = "192.0.2.1"  # an address for documentation (RFC 5737): nobody has it
SAYS = "the tests have no network"


def test_no_connection_leaves_this_machine():
    with socket.socket() as unconnected, pytest.raises(OSError, match=SAYS):
        unconnected.connect((FAR, 80))


def test_nor_does_a_look_up_from_a_process_that_a_test_starts():
    program = "import urllib.request\nurllib.request.urlopen('https://download.pytorch.org')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1 and SAYS in done.stderr
