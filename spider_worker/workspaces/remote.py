"""How git reaches the remote address of an origin, and nothing else.

A row of a job names it, so it is judged as a model's address is: after the name was resolved, and
git is told what was found, so that a second look cannot find anything else. A redirect is not
followed. (For ssh the name is only looked at before: its host keys are what it trusts.)
"""

from __future__ import annotations

__all__ = ["remote_options"]

import ipaddress
import socket

from spider_sdk.addresses import address_problem
from spider_sdk.errors import WorkspaceError
from spider_sdk.remotes import remote_problem, remote_server


def remote_options(address: str, *, allow_private: bool) -> tuple[str, ...]:
    """Options of git for this address. Blocking: resolves the name.

    Raises WorkspaceError where the address may not be reached, or leads nowhere.
    """
    said = remote_problem(address)
    if said is not None:
        raise WorkspaceError(f"repo_source: {said}")
    scheme, host, port = remote_server(address)
    try:
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise WorkspaceError(f"repo_source: {address}: {host} is not found: {error}") from error
    found = list(dict.fromkeys(str(entry[4][0]) for entry in entries))
    for one in found:
        said = address_problem(one, allow_private=allow_private)
        if said is not None:
            raise WorkspaceError(f"repo_source: {address} leads to {said}")
    options = [
        "protocol.allow=never", "protocol.file.allow=never", f"protocol.{scheme}.allow=always",
        "http.followRedirects=false",
    ]  # fmt: skip
    if scheme != "ssh" and not _is_address(host):
        shown = ",".join(f"[{one}]" if ":" in one else one for one in found)
        options.append(f"http.curloptResolve={host}:{port}:{shown}")
    return tuple(part for option in options for part in ("-c", option))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
