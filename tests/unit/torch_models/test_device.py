"""Where torch runs a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from spider_sdk.errors import EngineUnavailable, NotSupported
from spider_worker.torch_models.device import check_device, choose_device, devices_for


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    count = int(request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    return count


@pytest.mark.parametrize(
    ("gpus", "asked", "chosen"),
    [
        (0, None, "cpu"),
        (2, None, "cuda"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda", "cuda"),
        (2, "cuda:1", "cuda:1"),
    ],
    indirect=["gpus"],
)
@pytest.mark.usefixtures("gpus")
def test_a_gpu_is_used_where_there_is_one(asked: str | None, chosen: str) -> None:
    parameters: dict[str, Any] = {} if asked is None else {"device": asked}
    check_device(parameters, where="here")
    assert choose_device(parameters, where="here") == chosen


@pytest.mark.parametrize(
    ("gpus", "asked"), [(0, "cuda"), (1, "cuda:1"), (2, "cuda:2")], indirect=["gpus"]
)
@pytest.mark.usefixtures("gpus")
def test_a_gpu_that_is_not_there_is_refused(asked: str) -> None:
    with pytest.raises(EngineUnavailable, match=rf"here\.device is '{asked}'.*no such GPU"):
        choose_device({"device": asked}, where="here")


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CUDA", ""])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(NotSupported, match=r"here\.device: expected auto, cpu, cuda or cuda:N"):
        check_device({"device": device}, where="here")


def test_a_runner_needs_every_gpu_up_to_the_one_that_is_named() -> None:
    needed = {name: devices_for({"device": name}) for name in ("cpu", "auto", "cuda", "cuda:2")}
    assert needed == {"cpu": 0, "auto": 1, "cuda": 1, "cuda:2": 3}
    assert devices_for({}) == 1
