"""What the service keeps of an adapter: states to go on from, weights to start from, archives."""

from __future__ import annotations

__all__ = ["Checkpoints"]

import asyncio
import logging
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.tinker_service.errors import Gone, Refusal
from spider_worker.tinker_service.service import TinkerService
from spider_worker.trainers.tinker.archive import ADAPTER_FILES, convert_adapter, unpack

FORMAT: Final = 1
_PATH: Final = "tinker://"

log = logging.getLogger(__name__)


class Checkpoints:
    """Of the adapter behind ``client``, the SDK's TrainingClient, which is of rank ``rank`` on
    ``base_model``. ``renew`` gives the client of an adapter that nothing has been asked of, in this
    one's place: services load into no other. The last two states are kept and those before deleted,
    where the service deletes at all: the last may not have been committed yet."""

    def __init__(
        self,
        service: TinkerService,
        client: Any,
        base_model: str,
        rank: int,
        renew: Callable[[], Awaitable[Any]],
    ) -> None:
        self._service, self._client = service, client
        self._base_model, self._rank = base_model, rank
        self._renew = renew
        self._states: list[str] = []

    async def save(self, step: int) -> dict[str, Any]:
        """Weights and moments; returns the state as JSON."""
        saved = await self._service.call(
            "saving a state", self._client, "save_state", _label("state", step)
        )
        self._states.append(str(saved.path))
        await self._forget()
        return {**self._identity(), "path": str(saved.path), "step": step}

    async def restore(self, state: Mapping[str, Any]) -> int:
        """The reverse; returns the step. Raises FatalJobError for a state of another trainer, base
        model or rank, Gone for one that the service has not."""
        self._check(state)
        path = str(state["path"])
        await self._load(path, "load_state_with_optimizer")
        self._states = [path]
        return int(state["step"])

    async def start_from(self, checkpoint: str) -> None:
        """Load the weights at ``checkpoint``. Raises FatalJobError for those of another base model
        or rank, NotSupported for what is no path at the service."""
        if not checkpoint.startswith(_PATH):
            raise NotSupported(
                f"student_checkpoint_path: {self._service.name} starts from its own checkpoints"
                f" alone, tinker://RUN/weights/NAME, and not from {checkpoint!r}. Train with"
                " provider local to start from a PEFT folder or a repository on the Hub"
            )
        await self._check_weights(checkpoint)
        await self._load(checkpoint, "load_state")

    async def export(self, folder: Path, step: int) -> None:
        """Write the adapter in PEFT's format to the empty ``folder``."""
        name = _label("adapter", step)
        if hasattr(await self._rest(), "get_checkpoint_archive_url"):
            await self._export_archive(folder, name)
        else:
            await self._export_files(folder, name)
        await asyncio.to_thread(
            convert_adapter, folder, base_model=self._base_model, rank=self._rank
        )

    async def _export_archive(self, folder: Path, name: str) -> None:
        saved = await self._service.call(
            "saving the adapter", self._client, "save_weights_for_sampler", name
        )
        path = str(saved.path)
        with tempfile.TemporaryDirectory(prefix="spider-tinker-") as scratch:
            archive = Path(scratch) / "archive"
            await self._service.download(await self._archive_url(path), archive)
            await asyncio.to_thread(unpack, archive, folder)
        await self._delete(path)  # they are here now

    async def _export_files(self, folder: Path, name: str) -> None:
        """The way of later versions of the SDK, which have no archives."""
        saved = await self._service.call(
            "saving the adapter", self._client, "save_weights_external", name
        )
        path = str(saved.path)
        what = "asking for the adapter's files"
        found = await self._ask(what, "get_external_weights_urls", path)
        urls = {name.rpartition("/")[2]: url for name, url in found.urls.items()}
        missing = sorted(set(ADAPTER_FILES) - urls.keys())
        if missing:
            raise FatalJobError(
                f"the checkpoint {path} of {self._service.name} has no {', '.join(missing)}"
                f" but {', '.join(sorted(urls)) or 'no file'}"
            )
        for file in ADAPTER_FILES:
            await self._service.download(urls[file], folder / file)
        await self._delete(path)

    def _identity(self) -> dict[str, Any]:
        return {
            "trainer": "tinker",
            "format": FORMAT,
            "base_model": self._base_model,
            "lora_rank": self._rank,
        }

    def _check(self, state: Mapping[str, Any]) -> None:
        own = self._identity()
        if any(state.get(key) != own[key] for key in ("trainer", "format")):
            raise FatalJobError(
                f"The state is of the trainer {state.get('trainer')!r} in format"
                f" {state.get('format')!r}; this one is 'tinker' in format {FORMAT}."
            )
        for key, noun in (("base_model", "base model"), ("lora_rank", "LoRA rank")):
            if state.get(key) != own[key]:
                raise FatalJobError(
                    f"The state is of {noun} {state.get(key)!r}, and this job trains {noun}"
                    f" {own[key]!r}. Resume with the config that the run began with."
                )

    async def _check_weights(self, checkpoint: str) -> None:
        try:
            info = await self._ask(
                f"looking up {checkpoint}", "get_weights_info_by_tinker_path", checkpoint
            )
        except Refusal as error:
            raise FatalJobError(
                f"student_checkpoint_path: {self._service.name} has no training weights at"
                f" {checkpoint!r}: {error.detail}"
            ) from error
        if info.base_model != self._base_model:
            raise FatalJobError(
                f"The checkpoint {checkpoint!r} is an adapter of the base model"
                f" {info.base_model!r}, and this job trains {self._base_model!r}."
            )
        if not info.is_lora or info.lora_rank != self._rank:
            raise FatalJobError(
                f"The checkpoint {checkpoint!r} has LoRA rank {info.lora_rank}, and this job asks"
                f" for {self._rank}. Set lora_rank to {info.lora_rank}, or start from another."
            )

    async def _load(self, path: str, method: str) -> None:
        """Twice, if need be: the SDK sends a request again whose answer was lost, and by then the
        adapter is none that nothing was asked of. Raises Gone, FatalJobError."""
        for last in (False, True):
            self._client = await self._renew()
            try:
                await self._service.call(f"loading {path}", self._client, method, path)
                return
            except Gone:
                raise  # another session may find it
            except Refusal as error:
                if last or error.status != 400:
                    raise FatalJobError(
                        f"{self._service.name} does not load {path!r}: {error.detail}"
                    ) from error
                log.info("loading %s once more: %s", path, error.detail)

    async def _archive_url(self, path: str) -> str:
        """Where the archive of sampler weights is. Servers differ in whether their kind is part
        of a checkpoint's name; to some the longer name is one that can only be deleted."""
        run, _, name = path.removeprefix(_PATH).partition("/")
        name = name.rpartition("/")[2]
        what, method = "asking for the adapter's archive", "get_checkpoint_archive_url"
        try:
            found = await self._ask(what, method, run, f"sampler_weights/{name}")
        except Refusal as error:
            if error.status not in (404, 405):
                raise
            found = await self._ask(what, method, run, name)
        return str(found.url)

    async def _forget(self) -> None:
        while len(self._states) > 2:
            await self._delete(self._states.pop(0))

    async def _delete(self, path: str) -> None:
        try:
            await self._ask(f"deleting {path}", "delete_checkpoint_from_tinker_path", path)
        except Exception as error:  # noqa: BLE001 - a run is worth more than a tidy service
            # Some know no such path, or no deleting, and the SDK has its own checks of both.
            log.info("%s stays with the service: %s", path, error)

    async def _rest(self) -> Any:
        """The SDK's RestClient. Later versions connect here, and wait for it."""
        return await asyncio.to_thread(self._service.client.create_rest_client)

    async def _ask(self, what: str, method: str, *args: Any) -> Any:
        return await self._service.call(what, await self._rest(), method, *args)


def _label(kind: str, step: int) -> str:
    """A name at the service, new each time: another attempt may have used the step's."""
    return f"spider-{kind}-{step:06d}-{uuid.uuid4().hex[:8]}"
