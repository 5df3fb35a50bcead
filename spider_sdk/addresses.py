"""Which network addresses a job may lead to. The API asks when a job is submitted, a worker when
it connects: one judgement, so that neither is the weaker lock."""

from __future__ import annotations

__all__ = ["address_problem"]

import ipaddress
from typing import Final

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

#: What no job may ever reach: link-local networks and the clouds' metadata services.
_FORBIDDEN: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",
        "100.100.100.200/32",
        "192.0.0.192/32",
        "168.63.129.16/32",
    )
)
_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")


def address_problem(text: str, *, allow_private: bool) -> str | None:
    """Why a job may not reach this IP address (a zone may follow after ``%``), or None.

    The words go on from "… leads to". Raises ValueError for what is no IP address.
    """
    address = _unwrapped(ipaddress.ip_address(text.partition("%")[0]))
    if any(address in network for network in _FORBIDDEN) or address.is_multicast:
        return f"{address}, a link-local or metadata address, which no job may reach"
    if not address.is_global and not allow_private:
        return (
            f"{address}, a private address, which this server does not allow "
            "(its operator can, with SPIDER_ALLOW_PRIVATE_URLS=true)"
        )
    return None


def _unwrapped(address: Address) -> Address:
    """The IPv4 address inside an IPv6 one, where that is what would be reached."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address.teredo is not None:
            return address.teredo[1]
        if address in _NAT64 or 1 < int(address) < 2**32:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address
