"""The addresses that an engine connects to, judged at the socket."""

from __future__ import annotations

import asyncio
import socket

import aiohttp
import pytest

from spider_sdk.errors import FatalJobError
from spider_worker.engines.network import check_address, guarded_connector

#: As they may come out of a name's resolution, whatever the API was told before.
METADATA = [
    "169.254.169.254",
    "168.63.129.16",
    "192.0.0.192",
    "100.100.100.200",
    "fe80::1%eth0",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "::169.254.169.254",
    "224.0.0.1",
]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("address", METADATA)
def test_metadata_addresses_are_never_connected_to(address: str, private: bool) -> None:
    with pytest.raises(FatalJobError, match=r"model\.base_url"):
        check_address(address, allow_private=private)


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "::1", "::ffff:192.168.0.1"])
def test_private_addresses_are_the_operators_choice(address: str) -> None:
    check_address(address, allow_private=True)
    with pytest.raises(FatalJobError, match="SPIDER_ALLOW_PRIVATE_URLS"):
        check_address(address, allow_private=False)


def test_public_addresses_are_open() -> None:
    check_address("93.184.216.34", allow_private=False)
    check_address("2606:2800:220:1:248:1893:25c8:1946", allow_private=False)


def test_the_connector_asks_before_it_makes_a_socket() -> None:
    """A listener is there, and nobody comes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        port = listener.getsockname()[1]

        async def connect() -> None:
            connector = guarded_connector(allow_private=False, proxied=False)
            async with aiohttp.ClientSession(connector=connector) as session:
                await session.get(f"http://127.0.0.1:{port}/")

        with pytest.raises(FatalJobError, match="private address"):
            asyncio.run(connect())
        with pytest.raises(BlockingIOError):
            listener.accept()
