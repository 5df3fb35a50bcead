"""Addresses of git repositories in rows of local tasks: what is one, and which ones are taken.

Client and worker ask here, so that what the one lets pass the other opens. Where an address leads
to, the worker judges when it connects.
"""

from __future__ import annotations

__all__ = ["is_remote", "remote_problem", "remote_server"]

import re
from typing import Final
from urllib.parse import urlsplit

_PORTS: Final = {"https": 443, "http": 80, "ssh": 22}
_URL: Final = re.compile(r"[a-z][a-z0-9+.-]*:(//|:)", re.ASCII | re.IGNORECASE)
#: ``user@host:path``, which means ssh.
_SHORT: Final = re.compile(r"[\w.-]+@(?P<host>[\w][\w.-]*):(?!//)\S+", re.ASCII)
_HOST: Final = re.compile(r"[\w][\w.-]*|[0-9a-f:.]*:[0-9a-f:.]*", re.ASCII | re.IGNORECASE)


def is_remote(source: str) -> bool:
    """Whether a ``repo_source`` is an address, and no path and no reference to an input."""
    return _URL.match(source) is not None or _SHORT.fullmatch(source) is not None


def remote_problem(address: str) -> str | None:
    """Why no repository is fetched from this address, None where one may be."""
    try:
        scheme, host, _ = remote_server(address)
    except ValueError:
        return f"{address!r} is no address of a repository"
    if scheme not in _PORTS:
        return (
            f"{address!r}: repositories are fetched by https, http or ssh; give a folder or a "
            "bundle by its path, and it is uploaded"
        )
    if _HOST.fullmatch(host) is None:
        return f"{address!r} names no host"
    parts = None if _SHORT.fullmatch(address) else urlsplit(address)
    if parts is not None and (parts.password is not None or (parts.username and scheme != "ssh")):
        return (
            f"an address with a user or password in it is kept with the job: {host}; leave it out"
        )
    return None


def remote_server(address: str) -> tuple[str, str, int]:
    """(scheme, host, port) of an address; the port is 0 where its scheme is none that is taken.
    Raises ValueError where there is none."""
    short = _SHORT.fullmatch(address)
    if short is not None:
        return "ssh", short["host"], _PORTS["ssh"]
    parts = urlsplit(address)
    scheme = parts.scheme.lower()
    return scheme, parts.hostname or "", parts.port or _PORTS.get(scheme, 0)
