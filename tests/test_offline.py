"""The tests have no network, and so neither have the notebooks: nbval's kernels inherit the environment of pytest.

``make test`` runs every notebook with its own parameters in the pytest call that these tests belong to.
"""

import socket
import subprocess
import sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from test_notebooks import nbval_results

FAR = "192.0.2.1"  # an address for documentation (RFC 5737): nobody has it
LEAVE = {
    "a connection": f"socket.create_connection(('{FAR}', 80), timeout=5)",
    "a connection that returns its error": f"socket.socket().connect_ex(('{FAR}', 80))",
    "a datagram": f"socket.socket(type=socket.SOCK_DGRAM).sendto(b'hello', ('{FAR}', 53))",
    "a look-up": "socket.getaddrinfo('pypi.org', 443)",
    "an older look-up": "socket.gethostbyname('pypi.org')",
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


def test_nor_from_a_notebook_that_nbval_runs(tmp_path):
    source = (
        f"import socket\ntry:\n    {LEAVE['a look-up']}\nexcept OSError as error:\n    print('{SAYS}' in str(error))"
    )
    cell = new_code_cell(source, execution_count=1, outputs=[new_output("stream", text="True\n")])
    nbformat.write(new_notebook(cells=[cell]), tmp_path / "offline.ipynb")
    assert nbval_results(tmp_path / "offline.ipynb") == {0: True}


def test_sockets_within_the_machine_go_on_working(tmp_path, monkeypatch):
    pairs = [(socket.AF_INET, ("127.0.0.1", 0))]
    if hasattr(socket, "AF_UNIX"):
        monkeypatch.chdir(tmp_path)  # the path of a Unix socket has to be short
        pairs.append((socket.AF_UNIX, "socket"))
    for family, address in pairs:
        with socket.socket(family) as server, socket.socket(family) as client:
            server.bind(address)
            server.listen()
            client.connect(server.getsockname())
    for host in ("localhost", "127.0.0.1", None):
        assert socket.getaddrinfo(host, 80)
