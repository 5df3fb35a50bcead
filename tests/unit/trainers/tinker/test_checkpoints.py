"""What is asked of a service that keeps states and adapters, and what its refusals lead to."""

from __future__ import annotations

import asyncio
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from spider_sdk.errors import FatalJobError, PipelineError
from spider_worker.tinker_service.errors import Gone, Refusal
from spider_worker.trainers.tinker import checkpoints
from spider_worker.trainers.tinker.checkpoints import Checkpoints

STATE = {
    "trainer": "tinker",
    "format": checkpoints.FORMAT,
    "base_model": "m",
    "lora_rank": 4,
    "path": "tinker://r/weights/s",
    "step": 3,
}


class Service:
    """What TinkerService gives, with ``answer`` in the place of the network."""

    name = "the service"

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer
        self.asked: list[tuple[Any, str, tuple[Any, ...]]] = []
        self.client = SimpleNamespace(
            create_rest_client=lambda: SimpleNamespace(get_checkpoint_archive_url=None)
        )

    async def call(self, what: str, owner: Any, method: str, *args: Any) -> Any:
        self.asked.append((owner, method, args))
        return self._answer(method, len(self.asked))

    async def download(self, url: str, target: Path) -> None:
        with tarfile.open(target, "w") as tar:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                tar.addfile(tarfile.TarInfo(name), io.BytesIO())


def kept(service: Service) -> Checkpoints:
    made = iter(range(1, 100))

    async def renew() -> str:
        return f"adapter {next(made)}"

    given: Any = service
    return Checkpoints(given, "adapter 0", "m", 4, renew)


def restore(answer: Callable[..., Any]) -> tuple[Service, Callable[[], int]]:
    service = Service(answer)
    return service, lambda: asyncio.run(kept(service).restore(STATE))


def test_a_load_that_is_refused_is_tried_with_one_more_adapter() -> None:
    """The first may have been loaded into, and the answer lost."""

    def answer(_: str, number: int) -> None:
        if number == 1:
            raise Refusal("no", status=400, detail="the adapter has been used")

    service, go = restore(answer)
    assert go() == 3
    assert [owner for owner, _, _ in service.asked] == ["adapter 1", "adapter 2"]


def test_a_load_that_is_refused_again_fails_the_job() -> None:
    def answer(_: str, number: int) -> None:
        raise Refusal("no", status=400, detail=f"not this one, {number}")

    service, go = restore(answer)
    with pytest.raises(FatalJobError, match=r"does not load 'tinker://r/weights/s': .*one, 2"):
        go()
    assert len(service.asked) == 2


def test_a_state_that_is_not_there_is_left_to_the_next_attempt() -> None:
    def answer(*_: Any) -> None:
        raise Gone("not there", status=404, detail="not there")

    service, go = restore(answer)
    with pytest.raises(Gone):
        go()
    assert len(service.asked) == 1


@pytest.mark.parametrize("refusal", [None, PipelineError("no such path")])
def test_an_adapter_does_not_stay_with_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: PipelineError | None
) -> None:
    """Or not for want of trying."""
    path = "tinker://r/sampler_weights/a"

    def answer(method: str, _: int) -> Any:
        if method == "delete_checkpoint_from_tinker_path" and refusal is not None:
            raise refusal
        return SimpleNamespace(path=path, url="https://there")

    monkeypatch.setattr(checkpoints, "convert_adapter", lambda *_, **__: None)
    service = Service(answer)
    asyncio.run(kept(service).export(tmp_path, 3))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    _, method, given = service.asked[-1]
    assert (method, given) == ("delete_checkpoint_from_tinker_path", (path,))
