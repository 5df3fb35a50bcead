"""Which versions of the SDK are used, and how they are called."""

from __future__ import annotations

import asyncio
import concurrent.futures
import sys
import types
from typing import Any

import pytest
from typing_extensions import deprecated

from spider_sdk.errors import EngineUnavailable
from spider_worker.tinker_service.sdk import NEWEST, OLDEST, call_sdk, load_sdk, speaks_json


def pretend(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    module = types.ModuleType("tinker")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tinker", module)


def test_the_range_is_what_was_tried() -> None:
    assert (OLDEST, NEWEST) == ((0, 9), (0, 25))


@pytest.mark.parametrize("version", ["0.9.0", "0.9.3", "0.16.1", "0.25.7"])
def test_versions_in_the_range_are_taken_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    pretend(monkeypatch, version)
    assert load_sdk().__version__ == version
    assert caplog.text == ""


@pytest.mark.parametrize("version", ["0.26.0", "1.4"])
def test_a_newer_one_is_warned_of_once_and_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, version: str
) -> None:
    pretend(monkeypatch, version)
    for _ in range(2):
        load_sdk()
    assert caplog.text.count(f"tinker {version} is newer") == 1
    assert "0.9 to 0.25" in caplog.text


@pytest.mark.parametrize(("version", "said"), [("0.8.4", "older"), ("unknown", "no version")])
def test_an_older_one_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, said: str) -> None:
    pretend(monkeypatch, version)
    with pytest.raises(EngineUnavailable, match=said):
        load_sdk()


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tinker", None)
    with pytest.raises(EngineUnavailable, match=r"spider-distill\[onpolicy\]"):
        load_sdk()


def test_training_came_as_json_up_to_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, expected in (("0.9.0", True), ("0.24.9", True), ("0.25.0", False)):
        pretend(monkeypatch, version)
        assert speaks_json(load_sdk()) is expected


class Owner:
    """Methods as the versions of the SDK have them."""

    def blocking(self) -> str:
        raise AssertionError("it would block the loop")

    async def blocking_async(self) -> Any:
        future: concurrent.futures.Future[str] = concurrent.futures.Future()
        future.set_result("twin")
        return future

    def future(self, value: str) -> concurrent.futures.Future[str]:
        found: concurrent.futures.Future[str] = concurrent.futures.Future()
        found.set_result(value)
        return found

    @deprecated("use future")
    async def future_async(self, value: str) -> str:
        raise AssertionError(value)

    def plain(self) -> str:
        return "at once"


@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [("blocking", (), "twin"), ("future", ("own",), "own"), ("plain", (), "at once")],
)
def test_each_way_of_a_method_is_waited_for(name: str, arguments: Any, wanted: str) -> None:
    assert asyncio.run(call_sdk(Owner(), name, *arguments)) == wanted
