"""Free ports, and who holds a busy one."""

from __future__ import annotations

__all__ = ["free_port", "is_free", "port_or_any", "require_free", "who_listens"]

import contextlib
import socket
from pathlib import Path

from spider_sdk.errors import UsageError

LISTEN = "0A"  #: the state of a listening socket in /proc/net/tcp


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listened on a moment ago; whoever binds it can still lose a race."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port


def is_free(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        # As gunicorn binds: a port whose last connections are in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def port_or_any(port: int, host: str = "127.0.0.1") -> int:
    """``port`` where it is free, else 0."""
    return port if is_free(port, host) else 0


def require_free(port: int, host: str = "127.0.0.1") -> None:
    """Raises UsageError that says who listens on the port and what to do."""
    if not is_free(port, host):
        holder = who_listens(port)
        raise UsageError(
            f"port {port} on {host} is taken"
            + (f" by {holder}" if holder else "")
            + ": stop that process, or choose another port with --port (0: any free one)"
        )


def who_listens(port: int) -> str | None:
    """``process 4711 (python -m http.server)``; None where the system does not tell."""
    inodes = _listening_inodes(port)
    if not inodes:
        return None
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and _holds_socket(process, inodes):
            return f"process {process.name} ({_command_line(process)})"
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):  # no such table: not Linux, or no IPv6
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and int(fields[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(fields[9])
    return inodes


def _holds_socket(process: Path, inodes: set[str]) -> bool:
    with contextlib.suppress(OSError):  # another user's process, or one that just ended
        for descriptor in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(descriptor.readlink())
                if target.removeprefix("socket:[").removesuffix("]") in inodes:
                    return True
    return False


def _command_line(process: Path) -> str:
    try:
        words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "ended"
    text = " ".join(word for word in words if word)
    return text if len(text) <= 80 else text[:79] + "…"
