"""The one seam to the network: requests, their retries, and their errors as Spider's own.

This module owns every retry of a single request (``live`` owns reconnecting a stream, and asks
for its requests without retries). What is repeated, and when:

- an answer 429 or 503 says that nothing was accepted, so any request is repeated, after the
  server's ``Retry-After`` where it gives one;
- a connection that breaks or times out may have lost the answer alone, so only a request that
  is safe to repeat is: reads, and a submission, which carries an ``Idempotency-Key``;
- a first connection that is refused is not repeated: most likely no server runs there, and a
  person waits for the answer.
"""

from __future__ import annotations

__all__ = ["RetryPolicy", "Transport", "job_path", "map_error"]

import contextlib
import dataclasses
import os
import random
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import IO, Any

import httpx2

from spider_sdk.errors import (
    ApiError,
    ConfigError,
    Conflict,
    NotFound,
    Problem,
    ServerBusy,
    ServerUnreachable,
    SpiderError,
    Unauthorized,
    UsageError,
)
from spider_sdk.settings import user_config_path

_JITTER = random.SystemRandom()

_STATUS: dict[int, type[ApiError]] = {
    401: Unauthorized,
    403: Unauthorized,
    404: NotFound,
    409: Conflict,
    422: Conflict,
    429: ServerBusy,
    503: ServerBusy,
}

_ERRORS: dict[type[Exception], tuple[type[SpiderError], str]] = {
    httpx2.ConnectError: (
        ServerUnreachable,
        "cannot connect to {url}: {error}; is a server up there (`spider up` starts one here), "
        "and is base_url right?",
    ),
    httpx2.ConnectTimeout: (ServerUnreachable, "{url} did not accept a connection in time"),
    httpx2.ReadTimeout: (
        ServerUnreachable,
        "{url} sent nothing for longer than server.request_timeout",
    ),
    httpx2.WriteTimeout: (ServerUnreachable, "{url} took no data for server.request_timeout"),
    httpx2.PoolTimeout: (ServerUnreachable, "all connections to {url} stayed in use"),
    httpx2.TimeoutException: (ServerUnreachable, "{url} did not answer in time"),
    httpx2.ReadError: (ServerUnreachable, "the connection to {url} broke: {error}"),
    httpx2.WriteError: (ServerUnreachable, "the connection to {url} broke: {error}"),
    httpx2.CloseError: (ServerUnreachable, "the connection to {url} broke: {error}"),
    httpx2.NetworkError: (ServerUnreachable, "the connection to {url} broke: {error}"),
    httpx2.RemoteProtocolError: (
        ServerUnreachable,
        "the connection to {url} was cut, or it speaks no HTTP: {error}",
    ),
    httpx2.ProxyError: (ServerUnreachable, "the proxy in front of {url} refused: {error}"),
    httpx2.LocalProtocolError: (UsageError, "the request to {url} is not valid HTTP: {error}"),
    httpx2.ProtocolError: (ServerUnreachable, "{url} broke the HTTP protocol: {error}"),
    httpx2.UnsupportedProtocol: (UsageError, "{url} is no http:// or https:// address"),
    httpx2.InvalidURL: (UsageError, "{url} is no valid address: {error}"),
    httpx2.SSEError: (ApiError, "{url} sent a broken event stream: {error}"),
    httpx2.TransportError: (ServerUnreachable, "{url} cannot be reached: {error}"),
    httpx2.DecodingError: (ApiError, "the answer of {url} cannot be decoded: {error}"),
    httpx2.TooManyRedirects: (ApiError, "{url} redirects in circles"),
    httpx2.RequestError: (ServerUnreachable, "the request to {url} failed: {error}"),
    httpx2.HTTPStatusError: (ApiError, "{url}: {error}"),
    httpx2.HTTPError: (ApiError, "{url}: {error}"),
    httpx2.CookieConflict: (ApiError, "{url} set conflicting cookies: {error}"),
    httpx2.StreamConsumed: (UsageError, "this answer of {url} was read already"),
    httpx2.StreamClosed: (UsageError, "this answer of {url} was closed before it was read"),
    httpx2.ResponseNotRead: (UsageError, "this answer of {url} was not read yet"),
    httpx2.RequestNotRead: (UsageError, "this request to {url} was not read yet"),
    httpx2.StreamError: (UsageError, "this answer of {url} cannot be read: {error}"),
}


def job_path(job_id: str, *rest: str) -> str:
    """The URL path of a job, or of something of its; no name can climb out of it."""
    parts = [urllib.parse.quote(part, safe="") for part in (job_id, *rest)]
    if any(part in ("", ".", "..") for part in parts):
        raise UsageError(f"{'/'.join((job_id, *rest))!r} names no job")
    return "/".join(("/v1/jobs", *parts))


def map_error(error: Exception, url: str) -> SpiderError:
    """Spider's error for one of httpx2's, by the nearest class. Raises TypeError for others."""
    for cls in type(error).__mro__:
        if cls in _ERRORS:
            kind, text = _ERRORS[cls]
            return kind(text.format(url=url, error=_reason(error)))
    raise TypeError(f"{type(error).__name__} is no error of httpx2")


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    if "CERTIFICATE_VERIFY_FAILED" in text:
        text += " (for a certificate of your own, set SSL_CERT_FILE or server.verify_tls: false)"
    return text


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
    """``attempts`` in all; waits ``base``, twice that, … up to ``cap`` seconds (jittered)
    between them, or what ``Retry-After`` says, up to ``longest``."""

    attempts: int = 5
    base: float = 0.5
    cap: float = 8.0
    longest: float = 60.0

    def delay(self, attempt: int, asked: float | None = None) -> float:
        """Seconds to wait after the ``attempt``-th try (from 0)."""
        if asked is not None:
            return min(max(asked, 0.0), self.longest)
        return min(self.cap, self.base * 2.0**attempt) * _JITTER.uniform(0.5, 1.0)


class Transport:
    """A connection pool to one API, with its address, key and headers.

    ``timeout`` is seconds without a sign of life, for a request. ``transport`` replaces the
    network (``httpx2.WSGITransport(app)`` in tests).
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str | None = None,
        timeout: float = 120.0,
        verify_tls: bool = True,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
        retries: RetryPolicy | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = _checked_url(base_url)
        self.retries = retries or RetryPolicy()
        self._sleep = sleep
        self._timeout = timeout
        sent = {"Accept": "application/json", "User-Agent": "spider-sdk", **(headers or {})}
        if api_key:
            sent["Authorization"] = f"Bearer {api_key.strip()}"
        for name, value in sent.items():
            if not (value.isascii() and value.isprintable()):
                what = "api_key" if name == "Authorization" else f"server.headers.{name}"
                raise UsageError(f"{what} holds characters that no HTTP header can carry")
        try:
            self._http = httpx2.Client(
                base_url=self.base_url,
                headers=sent,
                timeout=timeout,
                verify=verify_tls,
                transport=transport,
            )
        except httpx2.InvalidURL as error:
            raise map_error(error, self.base_url) from error

    def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str | int] | None = None,
        json: Any = None,
        body: Callable[[], IO[bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
        safe: bool | None = None,
        retry: bool = True,
        timeout: float | None = None,
    ) -> httpx2.Response:
        """One request, its answer read. Raises ServerUnreachable, ApiError or ConfigError.

        ``body`` opens the content anew for each attempt. ``safe`` says whether a request whose
        answer was lost may be repeated (default: GET and HEAD); ``retry`` False tries once;
        ``timeout`` shortens the client's.
        """
        patience = self._timeout if timeout is None else min(self._timeout, timeout)
        safe = method in ("GET", "HEAD") if safe is None else safe
        attempt = 0
        while True:
            last = not retry or attempt + 1 >= self.retries.attempts
            try:
                response = self._send(method, path, params, json, body, headers, patience)
            except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.CookieConflict) as error:
                refused = isinstance(error, httpx2.ConnectError) and attempt == 0
                mapped = map_error(error, self.base_url)
                if last or refused or not safe or not isinstance(mapped, ServerUnreachable):
                    raise mapped from error
                self._sleep(self.retries.delay(attempt))
            else:
                if response.status_code not in (429, 503) or last:
                    raise_for_problem(response, self.base_url)
                    return response
                self._sleep(self.retries.delay(attempt, retry_after(response)))
            attempt += 1

    def json(self, method: str, path: str, **options: Any) -> Any:
        """``request``, with the answer's JSON."""
        response = self.request(method, path, **options)
        try:
            return response.json()
        except ValueError as error:
            raise ApiError(
                f"{self.base_url} answered {method} {path} with something other than JSON; "
                "is a Spider API there?",
                status=response.status_code,
            ) from error

    @contextlib.contextmanager
    def stream(
        self,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout: float | None = None,
    ) -> Iterator[httpx2.Response]:
        """A GET whose body is read as it comes. Never retried here. ``read_timeout`` in
        seconds, in place of the client's."""
        patience = self._timeout if read_timeout is None else read_timeout
        timeout = httpx2.Timeout(self._timeout, read=patience)
        try:
            with self._http.stream(
                "GET", path, params=params, headers=headers, timeout=timeout
            ) as response:
                if response.status_code >= 300:
                    response.read()
                    raise_for_problem(response, self.base_url)
                yield response
        except (httpx2.HTTPError, httpx2.StreamError) as error:
            raise map_error(error, self.base_url) from error

    def pause(self, attempt: int) -> None:
        """Wait as between two tries; for those who own the retry of a stream."""
        self._sleep(self.retries.delay(attempt))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _send(
        self,
        method: str,
        path: str,
        params: Mapping[str, str | int] | None,
        json: Any,
        body: Callable[[], IO[bytes]] | None,
        headers: Mapping[str, str] | None,
        timeout: float,
    ) -> httpx2.Response:
        with contextlib.ExitStack() as stack:
            content = stack.enter_context(body()) if body is not None else None
            return self._http.request(
                method,
                path,
                params=params,
                json=json,
                content=content,
                headers=headers,
                timeout=timeout,
            )


def raise_for_problem(response: httpx2.Response, url: str) -> None:
    """Raise the error that an answer stands for; nothing for a success.

    A 422 that lists fields becomes a ConfigError: it says of the job what a local check
    would have said.
    """
    status = response.status_code
    if status < 300:
        return
    if status < 400:
        raise ApiError(
            f"{url} redirects to {response.headers.get('location', 'nowhere')}; set base_url to "
            "the address that answers itself",
            status=status,
        )
    problem = _problem(response)
    fields = problem.get("errors")
    if status == 422 and isinstance(fields, list) and fields:
        raise ConfigError([_field(field) for field in fields])
    text = problem.get("detail") or problem.get("message") or problem.get("title")
    said = f": {response.text[:200]}" if response.text else ""  # none to a HEAD
    message = str(text) if text else f"{url} answered {status}{said}"
    if status == 401:
        message += "; set SPIDER_API_KEY, or server.api_key in the config"
        if os.environ.get("SPIDER_CONFIG") and not user_config_path().is_file():
            message += f" (there is no file {user_config_path()}, which SPIDER_CONFIG names)"
    kind = _STATUS.get(status, ApiError)
    raise kind(message, status=status, problem=problem)


def retry_after(response: httpx2.Response) -> float | None:
    """Seconds that the answer asks to wait, None where it names none (or names a date, which
    would need the two clocks to agree)."""
    try:
        return float(response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _problem(response: httpx2.Response) -> dict[str, Any]:
    try:
        document = response.json()
    except ValueError:
        return {}
    return document if isinstance(document, dict) else {}


def _field(field: Any) -> Problem:
    if not isinstance(field, dict):
        return Problem(path="job", message=str(field))
    line = field.get("line")
    return Problem(
        path=str(field.get("path") or "job"),
        message=str(field.get("message") or "not valid"),
        line=line if isinstance(line, int) else None,
    )


def _checked_url(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    if not mark or scheme.lower() not in ("http", "https") or not rest.strip("/"):
        raise UsageError(
            f"base_url must begin with http:// or https:// and name a host, not {url!r}"
        )
    return url.rstrip("/")
