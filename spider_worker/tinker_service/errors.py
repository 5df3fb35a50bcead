"""What the SDK raises, as Spider's errors."""

from __future__ import annotations

__all__ = ["Gone", "Refusal", "ResultLost", "mapped"]

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    PipelineError,
    SpiderError,
)


class Refusal(FatalJobError):
    """The service will not do what it was asked for.

    ``status`` is the HTTP status, 400 where the service took the request and refused it later;
    ``detail`` its own words.
    """

    def __init__(self, message: str, *, status: int, detail: str) -> None:
        super().__init__(message)
        self.status = status
        self.detail = detail


class Gone(Refusal, EngineUnavailable):
    """What was asked for is not there (any more): a server that was started again, or a session
    that has ended. The same request is refused for ever, and a new session can go on from a saved
    state; to whoever asks for something that may never have been there, it is a Refusal."""


class ResultLost(EngineUnavailable):
    """The service did what it was asked for and cannot say what came of it."""


#: What servers say of what they have lost, in an answer that is no 404.
_GONE: Final = re.compile(
    r"not loaded|(session|model|adapter|sampler)\b.{0,200}"
    r"\b(not found|not exist|expired|has ended)",
    re.IGNORECASE | re.DOTALL,
)


def mapped(error: BaseException, sdk: Any, *, what: str, where: str) -> SpiderError:
    """The Spider error for what the SDK raised. ``what`` was being done (``sampling``), ``where``
    is the service.

    The SDK wraps the error of a request that failed late, so the chain of causes is searched.
    """
    if isinstance(error, SpiderError):
        return error
    for cause in _causes(error):
        if isinstance(cause, sdk.APIStatusError):
            return _status(cause, what, where)
        if isinstance(cause, sdk.APIConnectionError):
            return EngineUnavailable(
                f"{where} cannot be reached ({what}): {cause.message or type(cause).__name__}."
                " Check base_url, and that the server runs"
            )
        if isinstance(cause, sdk.RequestFailedError):
            return _failed(cause, what, where)
        if isinstance(cause, sdk.APIResponseValidationError):
            return EngineUnavailable(
                f"{where} answers in a form that tinker {sdk.__version__} does not read ({what}):"
                f" {cause.message}. Install a version of the SDK that the server speaks with"
            )
        if isinstance(cause, sdk.TinkerError) and "api_key" in str(cause):
            return AuthError(f"{where}: {cause}")
    if type(error).__name__ == "ValidationError":  # pydantic's, of a request that was not sent
        return Refusal(
            f"tinker {sdk.__version__} does not send this request ({what}): {error}",
            status=422,
            detail=str(error),
        )
    return PipelineError(
        f"tinker {sdk.__version__} failed ({what}, {where}): {type(error).__name__}: {error}"
    )


def _status(error: Any, what: str, where: str) -> SpiderError:
    status, detail = int(error.status_code), _detail(error)
    if status in (401, 403):
        return AuthError(
            f"{where} refuses the key ({what}, {status}: {detail}). Set TINKER_API_KEY, or what"
            " api_key_env names, where the job is submitted"
        )
    if status == 402:
        return FatalJobError(f"{where} asks for payment ({what}): {detail}")
    if status == 410 or status == 429 or status >= 500:
        return EngineUnavailable(f"{where} failed ({what}, {status}): {detail}")
    if status == 404 or (status == 400 and _GONE.search(detail)):
        return _gone(detail, what, where)
    return Refusal(
        f"{where} refuses the request ({what}, {status}): {detail}", status=status, detail=detail
    )


def _failed(error: Any, what: str, where: str) -> SpiderError:
    category = str(getattr(error.category, "value", error.category)).lower()
    if category == "user":
        said = str(error.message)
        if _GONE.search(said):
            return _gone(said, what, where)
        return Refusal(f"{where} refuses the request ({what}): {said}", status=400, detail=said)
    return EngineUnavailable(f"{where} failed ({what}): {error.message}")


def _gone(detail: str, what: str, where: str) -> Gone:
    return Gone(
        f"{where} does not know what it was asked for ({what}): {detail}. A server that was"
        " started again has lost what it held; a session of five silent minutes has ended",
        status=404,
        detail=detail,
    )


def _detail(error: Any) -> str:
    body = error.body
    said = body.get("detail", body) if isinstance(body, Mapping) else body
    if isinstance(said, list):  # FastAPI's list of what is wrong with a request
        said = "; ".join(
            f"{'.'.join(map(str, one.get('loc', ())))}: {one.get('msg', '')}"
            for one in said
            if isinstance(one, Mapping)
        )
    return str(said or error.message)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
