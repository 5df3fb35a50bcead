"""What is said of an interpreter that is not the agents'."""

from __future__ import annotations

import asyncio
import sys

import pytest

from spider_sdk.errors import EngineUnavailable
from spider_worker.agents.interpreter import ask_model


def test_an_environment_without_the_sdk_is_no_traceback() -> None:
    """As while ``make agent`` is still at work."""
    with pytest.raises(EngineUnavailable) as caught:
        asyncio.run(ask_model(sys.base_prefix + "/bin/python3", "openai/m"))
    assert "is not complete" in caught.value.message
    assert "make agent" in caught.value.message
    assert "Traceback" not in caught.value.message
