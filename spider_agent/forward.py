"""A port of this process's loopback that leads to a Unix socket: the way to the worker's proxy
from where there is no network."""

from __future__ import annotations

__all__ = ["forward"]

import contextlib
import socket
import threading


def forward(path: str) -> int:
    """Listen on a free port and pass each connection on to the socket at ``path``, on threads
    that end with the process. Returns the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, path), daemon=True).start()
    port: int = listener.getsockname()[1]
    return port


def _accept(listener: socket.socket, path: str) -> None:
    while True:
        here, _ = listener.accept()
        there = socket.socket(socket.AF_UNIX)
        try:
            there.connect(path)
        except OSError:
            here.close()  # the client is told by its broken connection, and tries again
            there.close()
            continue
        for one, other in ((here, there), (there, here)):
            threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
