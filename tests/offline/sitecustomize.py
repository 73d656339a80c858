"""No network for this Python: connections and look-ups that leave the machine fail at once, as they do without one.

Python imports a module of this name when it starts. ``conftest.py`` puts this folder on PYTHONPATH, so the notebooks
that nbval runs and every process that a test starts are offline; loopback and Unix sockets go on working. It is no wall
against hostile code, nor against libraries that open sockets without Python's socket module.
"""

import errno
import socket

INTERNET = (socket.AF_INET, socket.AF_INET6)
SENTENCE = "the tests have no network: {!r} is not on this machine (tests/offline/sitecustomize.py)"


def is_here(host: str | bytes | None) -> bool:
    """Whether a name or number stands for this machine; None and "" do, in Python's own functions."""
    host = host.decode() if isinstance(host, bytes) else host
    loopback = (host or "").startswith("127.") and host.replace(".", "").isdigit()
    return loopback or host in (None, "", "localhost", "::1", "0.0.0.0", "::", socket.gethostname())


connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo


def connect_here(self, address):
    if self.family in INTERNET and not is_here(address[0]):
        raise OSError(errno.ENETUNREACH, SENTENCE.format(address[0]))
    return connect(self, address)


def look_up_here(host, *arguments, **options):
    if not is_here(host):
        raise socket.gaierror(socket.EAI_NONAME, SENTENCE.format(host))
    return getaddrinfo(host, *arguments, **options)


socket.socket.connect, socket.getaddrinfo = connect_here, look_up_here
