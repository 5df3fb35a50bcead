"""Any OpenAI-compatible ``/chat/completions`` endpoint, over one lean HTTP client.

This engine is the one owner of retries (``retry.py``) and of how many requests are in
flight (``concurrency.py``); nothing above it repeats a request. The path of a row that goes
well has no lock, no timer but aiohttp's own, and one ``orjson`` call in each direction,
because at 2,000 rows a second everything else shows.
"""

from __future__ import annotations

__all__ = ["ENGINE_PARAMETERS", "OpenAIEngine", "check_parameters", "check_sampling"]

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import aiohttp
import orjson

from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError, PipelineError, RowError
from spider_worker.engines import wire
from spider_worker.engines.base import Completion, EngineInfo, EngineStats, SamplingParams
from spider_worker.engines.concurrency import AdaptiveLimit
from spider_worker.engines.network import guarded_connector, proxy_for
from spider_worker.engines.options import check_names, misspelt, refuse
from spider_worker.engines.retry import Failure, FailureKind, RetryPolicy

DEFAULT_IN_FLIGHT: Final = 512

ENGINE_PARAMETERS: Final = {
    "timeout": "seconds for one request (600)",
    "max_retries": "repetitions of a request after errors (5)",
    "patience": "seconds of nothing but 429 after which the job fails (600)",
    "headers": "extra HTTP headers",
    "extra_body": "fields added to every request's body",
}
"""What ``model.parameters`` may hold for this engine, and what each means."""

_REFUSED: Final = {
    "n": "use generation.duplications, which gives each sample an id of its own",
    "stream": "a batch job has nobody to stream to",
    "stream_options": "a batch job has nobody to stream to",
    "messages": "messages come from the source and the pre-processor",
    "model": "use model.name",
    "tools": "tools are given to submit_job, not in generation.parameters",
}
_SAMPLING: Final = frozenset(
    {
        "chat_template_kwargs", "extra_body", "frequency_penalty", "guided_choice",
        "guided_grammar", "guided_json", "guided_regex", "length_penalty", "logit_bias", "logprobs",
        "max_completion_tokens", "max_tokens", "min_p", "min_tokens", "parallel_tool_calls",
        "presence_penalty", "prompt_logprobs", "reasoning", "reasoning_effort",
        "repetition_penalty", "response_format", "seed", "service_tier", "stop",
        "stop_token_ids", "temperature", "thinking", "tool_choice", "top_a", "top_k",
        "top_logprobs", "top_p", "user", "verbosity",
    }
)  # fmt: skip
"""Names that endpoints are known to take, to tell a slip of the pen from one of their own."""

_BUSY: Final = frozenset({503, 529})  # 529: "overloaded", at some providers
_TRANSIENT: Final = frozenset({408, 409, 425})  # and 5xx


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raises NotSupported for an engine argument that is unknown or malformed."""
    check_names(parameters, ENGINE_PARAMETERS, where="model.parameters", engine="openai")
    for name in ("timeout", "max_retries", "patience"):
        value = parameters.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            refuse(f"model.parameters.{name}: expected a number, not {value!r}")
    for name in ("headers", "extra_body"):
        if not isinstance(parameters.get(name, {}), Mapping):
            refuse(f"model.parameters.{name}: expected a mapping, not {parameters[name]!r}")
    check_sampling(parameters.get("extra_body", {}), where="model.parameters.extra_body")


def check_sampling(params: SamplingParams, *, where: str = "generation.parameters") -> None:
    """Raises NotSupported for what cannot work through this engine; other names pass on to the
    endpoint, which knows best what it takes."""
    for name, reason in _REFUSED.items():
        if name in params:
            refuse(f"{where}.{name} cannot be set: {reason}")
    if where != "generation.parameters":
        return  # extra_body is what one writes to send a name as it stands
    for name in params:
        if meant := misspelt(name, _SAMPLING):
            refuse(
                f"{where}.{name}: did you mean {meant!r}? If the endpoint has an option of this "
                "name, give it in model.parameters.extra_body"
            )


class OpenAIEngine:
    """See the module. ``parameters`` are ``model.parameters``; ``max_in_flight`` bounds the
    requests in flight; ``allow_private`` lets connections go to private addresses."""

    def __init__(
        self,
        model: str,
        *,
        base_url: str,
        api_key: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        max_in_flight: int = DEFAULT_IN_FLIGHT,
        allow_private: bool = True,
    ) -> None:
        parameters = parameters or {}
        check_parameters(parameters)
        self._url = base_url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._headers = {"Content-Type": "application/json", "User-Agent": "spider"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._headers |= {str(k): str(v) for k, v in parameters.get("headers", {}).items()}
        self._fixed = {"model": model, **parameters.get("extra_body", {})}
        self._model = model
        self._timeout = float(parameters.get("timeout", 600.0))
        self._policy = RetryPolicy(
            max_retries=int(parameters.get("max_retries", 5)),
            patience=float(parameters.get("patience", 600.0)),
        )
        self._allow_private = allow_private
        self._limit = AdaptiveLimit(max_in_flight)
        # Rows that wait for their retry hold no place in the limit: a few more than the
        # limit keep it full.
        self._info = EngineInfo(name="openai", capacity=max_in_flight + max_in_flight // 2 + 1)
        self._session: aiohttp.ClientSession | None = None
        self._post: dict[str, Any] = {}
        self._fatal: FatalJobError | None = None
        self._last_success: float | None = None
        self._throttled = 0
        self._retries = 0
        self._waiting = 0

    @property
    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        return EngineStats(
            in_flight=self._limit.in_flight,
            limit=self._limit.limit,
            throttled=self._throttled,
            retries=self._retries,
            waiting=self._waiting,
        )

    async def start(self) -> None:
        """Open the client. Nothing is sent: the first row shows whether the key is good."""
        proxy = proxy_for(self._url)
        self._session = aiohttp.ClientSession(
            connector=guarded_connector(allow_private=self._allow_private, proxied=bool(proxy)),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=self._timeout or None, sock_connect=30),
        )
        # A redirect would carry rows and the key to an address that nobody checked.
        self._post = {"allow_redirects": False}
        if proxy:
            self._post["proxy"] = proxy

    async def close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        params: SamplingParams,
    ) -> Completion:
        body = self._body(messages, tools, params)
        began = time.monotonic()
        counts = dict.fromkeys(FailureKind, 0)
        repeated = False
        while True:
            result = await self._once(body, first=repeated)
            if isinstance(result, Completion):
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

    def _body(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        params: SamplingParams,
    ) -> bytes:
        body = {**self._fixed, **params, "messages": messages}
        if "extra_body" in body:  # the openai package's spelling of "and also send this"
            body |= body.pop("extra_body")
        if tools:
            body["tools"] = tools
        try:
            return orjson.dumps(body)
        except TypeError as error:
            raise _row_error("not_json", f"the request is not JSON: {error}") from error

    async def _once(self, body: bytes, *, first: bool) -> Completion | Failure:
        """One try. Raises what no repetition can mend."""
        limit = self._limit
        epoch = await limit.acquire(first=first)
        try:
            if self._fatal is not None:
                raise type(self._fatal)(self._fatal.message)
            began = time.monotonic()
            result = await self._send(body)
            if isinstance(result, Completion):
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

    async def _send(self, body: bytes) -> Completion | Failure:
        if self._session is None:
            raise PipelineError("The openai engine was used before start() or after close().")
        try:
            async with self._session.post(self._url, data=body, **self._post) as response:
                answer = await response.read()
        except TimeoutError:
            return Failure(
                FailureKind.ERROR, "timeout", f"no answer within {self._timeout:g} s", overload=True
            )
        except aiohttp.ClientConnectorError as error:
            kind = FailureKind.ERROR if self._last_success is None else FailureKind.OUTAGE
            return Failure(kind, "unreachable", str(error))
        except aiohttp.InvalidURL as error:
            raise FatalJobError(f"model.base_url is no URL: {self._url}") from error
        except (aiohttp.ClientError, OSError) as error:
            return Failure(FailureKind.ERROR, "connection", f"{type(error).__name__}: {error}")
        if response.status != 200:
            return self._refused(response.status, answer, response.headers.get("Retry-After"))
        try:
            return wire.read_completion(answer)
        except wire.EndpointError as error:
            if error.status:
                return self._refused(error.status, answer, None)
            return Failure(FailureKind.ERROR, "malformed", str(error))

    def _refused(self, status: int, body: bytes, retry_after: str | None) -> Failure:
        """What an answer other than 200 means. Raises what no repetition can mend."""
        said = wire.error_message(body)
        code = f"http_{status}"
        text = f"{self._url} answered {status}: {said}"
        if status == 429 and not wire.is_quota(body):
            self._throttled += 1
            wait = wire.retry_after_seconds(retry_after)
            return Failure(FailureKind.THROTTLED, code, text, wait, overload=True)
        if status >= 500 or status in _TRANSIENT:
            wait = wire.retry_after_seconds(retry_after) if status in _BUSY else None
            return Failure(FailureKind.ERROR, code, text, wait, overload=status in _BUSY)
        if status in (401, 403) and b"flagged_input" not in body:  # moderation refuses one row
            raise AuthError(f"{text}. Check the key (model.api_key_env) and what it may use.")
        if status in (402, 429):
            raise FatalJobError(f"{text}. The account has no credit left.")
        if status == 404 and self._last_success is None:
            raise FatalJobError(
                f"{text}. Either the endpoint does not know the model {self._model!r}, or "
                "model.base_url is not the address under which /chat/completions lies "
                "(it mostly ends in /v1)."
            )
        if 300 <= status < 400:
            raise FatalJobError(f"{text}. Redirects are not followed: correct model.base_url.")
        raise _row_error(code, text)

    def _give_up(self, failure: Failure, counts: Mapping[FailureKind, int], began: float) -> None:
        """Raises if this failure's budget is spent."""
        if failure.kind is FailureKind.ERROR:
            if counts[failure.kind] <= self._policy.max_retries:
                return
            text = f"{failure.message} ({counts[failure.kind]} tries)"
            if failure.code == "unreachable":
                raise EngineUnavailable(f"Nothing answers at {self._url}: {text}")
            raise _row_error(failure.code, text)
        waited = time.monotonic() - max(began, self._last_success or began)
        if waited > self._policy.patience:
            raise FatalJobError(
                f"No request has succeeded for {waited:.0f} s; the last answer: "
                f"{failure.message}. Finished rows are kept; retry the job later."
            )


def _row_error(kind: str, message: str) -> RowError:
    return RowError(message, stage="generation", kind=kind)
