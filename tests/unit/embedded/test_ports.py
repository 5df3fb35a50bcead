from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator

import pytest

from spider_api.embedded.ports import free_port, is_free, port_or_any, require_free
from spider_sdk.errors import UsageError


@pytest.fixture
def busy() -> Iterator[socket.socket]:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    with listener:
        yield listener


def test_a_busy_port_is_refused_with_who_and_what_to_do(busy: socket.socket) -> None:
    port = busy.getsockname()[1]
    with pytest.raises(UsageError, match=rf"port {port} .*--port") as caught:
        require_free(port)
    if sys.platform.startswith("linux"):
        assert f"by process {os.getpid()} (" in str(caught.value)


def test_a_fallback_is_any_port(busy: socket.socket) -> None:
    assert port_or_any(busy.getsockname()[1]) == 0


def test_a_free_port_is_taken_as_asked() -> None:
    port = free_port()
    assert is_free(port)
    require_free(port)
    assert port_or_any(port) == port
