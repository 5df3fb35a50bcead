"""One endpoint of a model server: requests over a lean HTTP client, and what becomes of failures.

The one owner of retries (``retry.py``) and of how many requests are in flight
(``concurrency.py``); nothing above it repeats a request. The path of a request that goes well has
no lock and no timer but aiohttp's own, because at 2,000 rows a second everything else shows.
"""

from __future__ import annotations

__all__ = ["PARAMETERS", "Endpoint", "EndpointOptions", "check_parameters"]

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import aiohttp

from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError, PipelineError, RowError
from spider_worker.engines import wire
from spider_worker.engines.base import EngineStats
from spider_worker.engines.concurrency import AdaptiveLimit
from spider_worker.engines.network import guarded_connector, proxy_for
from spider_worker.engines.options import refuse
from spider_worker.engines.retry import Failure, FailureKind, RetryPolicy

T = TypeVar("T")

PARAMETERS: Final = {
    "timeout": "seconds for one request (600)",
    "max_retries": "repetitions of a request after errors (5)",
    "patience": "seconds of nothing but 429 after which the job fails (600)",
    "headers": "extra HTTP headers",
    "extra_body": "fields added to every request's body",
}
"""What ``parameters`` may hold for any engine over an endpoint, and what each means."""

_BUSY: Final = frozenset({503, 529})  # 529: "overloaded", at some providers
_TRANSIENT: Final = frozenset({408, 409, 425})  # and 5xx


def check_parameters(parameters: Mapping[str, Any], *, where: str) -> None:
    """Raises NotSupported for one of ``PARAMETERS`` that is malformed. ``where`` is their dotted
    path in the job."""
    for name in ("timeout", "max_retries", "patience"):
        value = parameters.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            refuse(f"{where}.{name}: expected a number, not {value!r}")
    for name in ("headers", "extra_body"):
        if not isinstance(parameters.get(name, {}), Mapping):
            refuse(f"{where}.{name}: expected a mapping, not {parameters[name]!r}")


@dataclasses.dataclass(frozen=True)
class EndpointOptions:
    """``where`` is the part of the job that names the endpoint (``model``, ``teacher``), for
    messages. ``lasting`` makes the error of a request whose repetitions are spent, from a code
    (``http_500``) and a text. ``max_in_flight`` bounds the requests in flight; ``allow_private``
    lets connections go to private addresses."""

    where: str
    lasting: Callable[[str, str], PipelineError]
    max_in_flight: int
    allow_private: bool


class Endpoint:
    """Requests to the server at ``base_url`` for the model ``model``. ``parameters`` are checked
    ones."""

    def __init__(
        self,
        base_url: str,
        *,
        model: str,
        api_key: str | None,
        parameters: Mapping[str, Any],
        options: EndpointOptions,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._model = model
        self._options = options
        self._headers = {"Content-Type": "application/json", "User-Agent": "spider"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._headers |= {str(k): str(v) for k, v in parameters.get("headers", {}).items()}
        self._timeout = float(parameters.get("timeout", 600.0))
        self._policy = RetryPolicy(
            max_retries=int(parameters.get("max_retries", 5)),
            patience=float(parameters.get("patience", 600.0)),
        )
        self._limit = AdaptiveLimit(options.max_in_flight)
        self._session: aiohttp.ClientSession | None = None
        self._send: dict[str, Any] = {}
        self._fatal: FatalJobError | None = None
        self._last_success: float | None = None
        self._throttled = 0
        self._retries = 0
        self._waiting = 0

    def stats(self) -> EngineStats:
        return EngineStats(
            in_flight=self._limit.in_flight,
            limit=self._limit.limit,
            throttled=self._throttled,
            retries=self._retries,
            waiting=self._waiting,
        )

    async def open(self) -> None:
        """Open the client. Nothing is sent."""
        proxy = proxy_for(self.base_url)
        self._session = aiohttp.ClientSession(
            connector=guarded_connector(
                allow_private=self._options.allow_private,
                proxied=bool(proxy),
                where=f"{self._options.where}.base_url",
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout or None, sock_connect=30),
        )
        # A redirect would carry rows and the key to an address that nobody checked.
        self._send = {"allow_redirects": False}
        if proxy:
            self._send["proxy"] = proxy

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def request(self, path: str, body: bytes | None, read: Callable[[bytes], T]) -> T:
        """What ``read`` makes of the answer to a POST of ``body`` to ``path`` (None: to a GET),
        after as many tries as it takes. ``read`` raises EndpointError for an answer that is none.

        Raises AuthError, FatalJobError where no request can succeed; EngineUnavailable where
        nothing listens; RowError for a request that is refused; what ``options.lasting`` makes.
        """
        began = time.monotonic()
        counts = dict.fromkeys(FailureKind, 0)
        repeated = False
        while True:
            result = await self._once(path, body, read, first=repeated)
            if not isinstance(result, Failure):
                return result
            counts[result.kind] += 1
            self._give_up(result, counts, began)
            self._retries += 1
            repeated = True
            self._waiting += 1
            try:
                await asyncio.sleep(self._policy.delay(result, counts[result.kind]))
            finally:
                self._waiting -= 1

    async def _once(
        self, path: str, body: bytes | None, read: Callable[[bytes], T], *, first: bool
    ) -> T | Failure:
        """One try. Raises what no repetition can mend."""
        limit = self._limit
        epoch = await limit.acquire(first=first)
        try:
            if self._fatal is not None:
                raise type(self._fatal)(self._fatal.message)
            began = time.monotonic()
            result = await self._try(path, body, read)
            if not isinstance(result, Failure):
                now = time.monotonic()
                self._last_success = now
                limit.succeeded(epoch, now - began)
            elif result.overload:
                limit.throttled(epoch, result.retry_after)
            else:
                limit.failed(epoch)
            return result
        except FatalJobError as error:
            self._fatal = error  # what waits for a place need not be refused one by one
            raise
        finally:
            limit.release()

    async def _try(self, path: str, body: bytes | None, read: Callable[[bytes], T]) -> T | Failure:
        if self._session is None:
            raise PipelineError("The openai engine was used before start() or after close().")
        url = self.base_url + path
        method = "GET" if body is None else "POST"
        try:
            async with self._session.request(method, url, data=body, **self._send) as response:
                answer = await response.read()
        except TimeoutError:
            return Failure(
                FailureKind.ERROR, "timeout", f"no answer within {self._timeout:g} s", overload=True
            )
        except aiohttp.ClientConnectorError as error:
            kind = FailureKind.ERROR if self._last_success is None else FailureKind.OUTAGE
            return Failure(kind, "unreachable", str(error))
        except aiohttp.InvalidURL as error:
            raise FatalJobError(f"{self._options.where}.base_url is no URL: {url}") from error
        except (aiohttp.ClientError, OSError) as error:
            return Failure(FailureKind.ERROR, "connection", f"{type(error).__name__}: {error}")
        if response.status != 200:
            return self._refused(path, response.status, answer, response.headers.get("Retry-After"))
        try:
            return read(answer)
        except wire.EndpointError as error:
            if error.status:
                return self._refused(path, error.status, answer, None)
            return Failure(FailureKind.ERROR, "malformed", str(error))

    def _refused(self, path: str, status: int, body: bytes, retry_after: str | None) -> Failure:
        """What an answer other than 200 means. Raises what no repetition can mend."""
        where = self._options.where
        said = wire.error_message(body)
        code = f"http_{status}"
        text = f"{self.base_url}{path} answered {status}: {said}"
        if status == 429 and not wire.is_quota(body):
            self._throttled += 1
            wait = wire.retry_after_seconds(retry_after)
            return Failure(FailureKind.THROTTLED, code, text, wait, overload=True)
        if status >= 500 or status in _TRANSIENT:
            wait = wire.retry_after_seconds(retry_after) if status in _BUSY else None
            return Failure(FailureKind.ERROR, code, text, wait, overload=status in _BUSY)
        if status in (401, 403) and b"flagged_input" not in body:  # moderation refuses one row
            raise AuthError(f"{text}. Check the key ({where}.api_key_env) and what it may use.")
        if status in (402, 429):
            raise FatalJobError(f"{text}. The account has no credit left.")
        if status == 404 and self._last_success is None:
            raise FatalJobError(
                f"{text}. Either the endpoint does not know the model {self._model!r}, or "
                f"{where}.base_url is not the address under which {path} lies "
                "(it mostly ends in /v1)."
            )
        if 300 <= status < 400:
            raise FatalJobError(f"{text}. Redirects are not followed: correct {where}.base_url.")
        raise RowError(text, stage="generation", kind=code)

    def _give_up(self, failure: Failure, counts: Mapping[FailureKind, int], began: float) -> None:
        """Raises if this failure's budget is spent."""
        if failure.kind is FailureKind.ERROR:
            if counts[failure.kind] <= self._policy.max_retries:
                return
            text = f"{failure.message} ({counts[failure.kind]} tries)"
            if failure.code == "unreachable":
                raise EngineUnavailable(f"Nothing answers at {self.base_url}: {text}")
            raise self._options.lasting(failure.code, text)
        waited = time.monotonic() - max(began, self._last_success or began)
        if waited > self._policy.patience:
            kind = EngineUnavailable if failure.kind is FailureKind.OUTAGE else FatalJobError
            raise kind(
                f"No request has succeeded for {waited:.0f} s; the last answer: "
                f"{failure.message}. What is finished is kept; retry the job later."
            )
