"""One session with a Tinker-compatible service."""

from __future__ import annotations

__all__ = ["HOSTED", "TinkerService"]

import asyncio
import difflib
import inspect
import logging
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from spider_sdk.addresses import address_problem
from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    PipelineError,
)
from spider_worker.tinker_service.errors import ResultLost, mapped
from spider_worker.tinker_service.pulse import Pulse
from spider_worker.tinker_service.sdk import call_sdk, load_sdk, speaks_json
from spider_worker.tinker_service.wire import Wire

HOSTED: Final = "https://tinker.thinkingmachines.dev/services/tinker-prod"
"""Thinking Machines' own."""

#: Sent where a server of one's own wants no key: the SDK sends none but such.
_NO_KEY: Final = "tml-none"
_KEY_STARTS: Final = ("tml-", "eyJ")
_CLOSING: Final = 10.0  # seconds

log = logging.getLogger(__name__)


class TinkerService:
    """``base_url`` None: what TINKER_BASE_URL names on this worker, else the hosted service.
    ``where`` is the part of the job that names the service (``model``, ``teacher``).
    ``allow_private`` lets it be at a private address. ``patience`` is how many seconds it may be
    silent. The SDK owns the retries of a request.
    """

    def __init__(
        self,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        where: str = "model",
        allow_private: bool = True,
        patience: float = 120.0,
    ) -> None:
        self.url = (base_url or os.environ.get("TINKER_BASE_URL") or HOSTED).rstrip("/")
        self._where, self._allow_private = where, allow_private
        self._key = self._checked_key(api_key)
        self.name = "Tinker" if self.url == HOSTED else f"the Tinker server at {self.url}"
        self._headers = {"X-API-Key": self._key}
        self._pulse = Pulse(self.url, self._headers, name=self.name, patience=patience)
        self._wire: Wire | None = None
        self._sdk: Any = None
        self._client: Any = None
        self._models: dict[str, int | None] = {}

    async def start(self) -> None:
        """Open a session. Raises EngineUnavailable, AuthError, FatalJobError for an address that
        jobs may not reach."""
        self._sdk = await asyncio.to_thread(load_sdk)  # it imports torch where that is installed
        await asyncio.to_thread(self._check_address)
        await self._pulse.check()
        if speaks_json(self._sdk):
            loop = asyncio.get_running_loop()
            self._wire = Wire(lambda said: loop.call_soon_threadsafe(self._stuck, said))
        try:
            # The constructor, or in later versions the first look at ``holder``, opens the
            # session, and waits for it.
            self._client = await asyncio.to_thread(self._open)
        except Exception as error:
            raise mapped(error, self._sdk, what="opening a session", where=self.name) from error
        found = await self.call("asking for its models", self.client, "get_server_capabilities")
        self._models = {
            str(model.model_name): getattr(model, "max_context_length", None)
            for model in found.supported_models
            if model.model_name
        }

    @property
    def sdk(self) -> Any:
        """The SDK's module."""
        return self._started()[0]

    @property
    def client(self) -> Any:
        """The SDK's ServiceClient."""
        return self._started()[1]

    def context_of(self, model: str) -> int | None:
        """The most tokens of a sequence, None where the service does not say. Raises
        FatalJobError for a model that it does not serve."""
        if model not in self._models:
            near = difflib.get_close_matches(model, self._models, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            known = ", ".join(sorted(self._models)) or "none"
            raise FatalJobError(
                f"{self._where}.name: {self.name} does not serve {model!r}{hint}. It serves:"
                f" {known}"
            )
        return self._models[model]

    async def call(self, what: str, owner: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result of ``owner.method(…)``, one of the SDK's objects; ``what`` is being done.

        Raises Refusal, AuthError, EngineUnavailable (also when the service falls silent), and
        PipelineError for what else the SDK raises.
        """
        sdk, _ = self._started()
        try:
            return await self._pulse.watch(call_sdk(owner, method, *args, **kwargs))
        except Exception as error:  # the boundary to the library
            raise mapped(error, sdk, what=what, where=self.name) from error

    async def answers(self) -> bool:
        """Whether the service is there, now."""
        return await self._pulse.answers()

    async def get_json(self, path: str) -> Any:
        """What a GET of ``path`` answers; None for no JSON or an error."""
        async with httpx.AsyncClient(timeout=30.0, headers=self._headers) as client:
            try:
                answer = await client.get(f"{self.url}{path}")
                return answer.json() if answer.status_code == 200 else None
            except (httpx.HTTPError, ValueError):
                return None

    async def post(self, path: str, body: Mapping[str, Any]) -> int:
        """POST what the SDK has no public call for; the status, 0 where there was no answer."""
        async with httpx.AsyncClient(timeout=30.0, headers=self._headers) as client:
            try:
                return (await client.post(f"{self.url}{path}", json=dict(body))).status_code
            except httpx.HTTPError:
                return 0

    async def download(self, url: str, target: Path) -> None:
        """Write what ``url``, which the service named, holds. Raises EngineUnavailable."""
        # The key goes to the service alone, and not to a store that it points to.
        own = urllib.parse.urlsplit(url)[:2] == urllib.parse.urlsplit(self.url)[:2]
        try:
            async with (
                httpx.AsyncClient(timeout=60.0, headers=self._headers if own else {}) as client,
                client.stream("GET", url) as answer,
            ):
                answer.raise_for_status()
                with target.open("wb") as file:
                    async for chunk in answer.aiter_bytes(1 << 20):
                        file.write(chunk)
        except httpx.HTTPError as error:
            raise EngineUnavailable(
                f"a checkpoint of {self.name} could not be downloaded: {type(error).__name__}:"
                f" {error}"
            ) from error

    async def close(self) -> None:
        client, self._client = self._client, None
        wire, self._wire = self._wire, None
        await self._pulse.close()
        try:
            async with asyncio.timeout(_CLOSING):
                if client is not None:
                    await _end(client)
                if wire is not None:
                    await wire.close()
        except Exception as error:  # noqa: BLE001 - the service may be gone, and the run is over
            log.info("the session with %s was left open: %r", self.name, error)

    def _stuck(self, said: str) -> None:
        self._pulse.give_up(
            ResultLost(f"{self.name} cannot say what came of a request ({said or 'no reason'})")
        )

    def _started(self) -> tuple[Any, Any]:
        if self._client is None:
            raise PipelineError("The Tinker service was used before start or after close.")
        return self._sdk, self._client

    def _checked_key(self, key: str | None) -> str:
        if not key:
            if self.url != HOSTED:
                return _NO_KEY
            raise AuthError(
                "Tinker needs a key: set TINKER_API_KEY, or what api_key_env names, where the job"
                " is submitted"
            )
        if not key.startswith(_KEY_STARTS):
            raise AuthError(f"{self._where}.api_key: a key for Tinker begins with tml-")
        return key

    def _open(self) -> Any:
        make = self._sdk.ServiceClient
        options: dict[str, Any] = {"base_url": self.url, "api_key": self._key}
        if self._wire is not None:
            options["http_client"] = self._wire.client
        if "default_headers_overrides" not in inspect.signature(make).parameters:
            # Or the SDK would send the key in this worker's own environment, which is not the
            # job's to spend.
            options["default_headers"] = self._headers
        client = make(**options)
        assert client.holder is not None
        return client

    def _check_address(self) -> None:
        """The SDK resolves the name again, so this is no lock against a name that changes."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise NotSupported(
                f"{self._where}.base_url: expected an http or https URL, not {self.url!r}"
            )
        if self.url == HOSTED or urllib.request.getproxies().get(parts.scheme):
            return
        try:
            found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise EngineUnavailable(
                f"{self.name} cannot be reached: {parts.hostname} cannot be resolved: {error}"
            ) from error
        for entry in found:
            said = address_problem(str(entry[4][0]), allow_private=self._allow_private)
            if said is not None:
                raise FatalJobError(f"{self._where}.base_url leads to {said}.")


async def _end(client: Any) -> None:
    """End the session of the SDK's ServiceClient and close its connections, which its versions
    up to 0.25 leave open."""
    if hasattr(client, "close"):
        await call_sdk(client, "close", "success")
        return
    holder = client.holder
    holder.close()  # ends the heartbeat, after which the service ends the session

    async def release() -> None:
        for pool in list(getattr(holder, "_client_pools", {}).values()):
            for one in list(getattr(pool, "_clients", ())):
                await one.close()

    await holder.run_coroutine_threadsafe(release())
