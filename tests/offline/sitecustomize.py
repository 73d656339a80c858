"""No network for this Python: what would leave the machine fails at once, as it does on a machine without one.

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


def _guard_sending(name: str) -> None:
    """Replace a method of sockets whose last argument is the address."""
    method = getattr(socket.socket, name)

    def guarded(self, *arguments):
        if self.family in INTERNET and not is_here(arguments[-1][0]):
            raise OSError(errno.ENETUNREACH, SENTENCE.format(arguments[-1][0]))
        return method(self, *arguments)

    setattr(socket.socket, name, guarded)


def _guard_look_up(name: str) -> None:
    """Replace a function whose first argument is the host."""
    function = getattr(socket, name)

    def guarded(host, *arguments, **options):
        if not is_here(host):
            raise socket.gaierror(socket.EAI_NONAME, SENTENCE.format(host))
        return function(host, *arguments, **options)

    setattr(socket, name, guarded)


for name in ("connect", "connect_ex", "sendto"):
    _guard_sending(name)
for name in ("getaddrinfo", "gethostbyname", "gethostbyname_ex"):
    _guard_look_up(name)
