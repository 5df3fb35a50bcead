"""Which addresses an engine may connect to.

A job names its endpoint, so a worker could be made to speak to its own cloud's metadata
service or to a neighbour. The address is checked where the socket is made, after name
resolution: a name that resolves to something else on second look gains nothing.
"""

from __future__ import annotations

__all__ = ["check_address", "guarded_connector", "proxy_for"]

import socket
import urllib.parse
import urllib.request
from typing import Any

import aiohttp

from spider_sdk.addresses import address_problem
from spider_sdk.errors import FatalJobError


def check_address(address: str, *, allow_private: bool, where: str = "model.base_url") -> None:
    """Raises FatalJobError if a job may not connect to this IP address, which ``where`` in the
    job led to."""
    said = address_problem(address, allow_private=allow_private)
    if said is not None:
        raise FatalJobError(f"{where} leads to {said}.")


def guarded_connector(
    *, allow_private: bool, proxied: bool, where: str = "model.base_url"
) -> aiohttp.TCPConnector:
    """A connector without a limit of its own. Through a proxy of the operator's the proxy's
    own address may be private."""

    def open_socket(info: Any) -> socket.socket:
        family, kind, protocol, _, address = info
        check_address(str(address[0]), allow_private=allow_private or proxied, where=where)
        return socket.socket(family, kind, protocol)

    return aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, socket_factory=open_socket)


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for ``url``, looked up once instead of for each
    request."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)
