"""Each of the SDK's errors is the Spider error that says what to do."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import tinker

from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    PipelineError,
    RowError,
    SpiderError,
)
from spider_worker.tinker_service.errors import Gone, Refusal, mapped

REQUEST = httpx.Request("POST", "http://service/api/v1/asample")


def status(code: int, detail: Any = "the reason") -> Exception:
    body = {"detail": detail}
    response = httpx.Response(code, json=body, request=REQUEST)
    return tinker.APIStatusError(f"Error code: {code}", response=response, body=body)


def convert(error: BaseException) -> SpiderError:
    return mapped(error, tinker, what="sampling", where="the service")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (status(400), Refusal, "refuses the request"),
        (status(422, [{"loc": ["body", "rank"], "msg": "too high"}]), Refusal, "rank: too high"),
        (status(401), AuthError, "TINKER_API_KEY"),
        (status(403), AuthError, "refuses the key"),
        (status(402), FatalJobError, "payment"),
        (status(404), Gone, "does not know"),
        (status(400, "Model m not loaded"), Gone, "does not know"),
        (status(400, "Session 7 has expired"), Gone, "does not know"),
        (status(400, "the model takes no rank 64"), Refusal, "refuses the request"),
        (status(410), EngineUnavailable, "410"),
        (status(429), EngineUnavailable, "429"),
        (status(503), EngineUnavailable, "503"),
        (tinker.APIConnectionError(request=REQUEST), EngineUnavailable, "cannot be reached"),
        (tinker.APITimeoutError(request=REQUEST), EngineUnavailable, "cannot be reached"),
        (tinker.TinkerError("The api_key must start with"), AuthError, "api_key"),
        (KeyError("surprise"), PipelineError, "KeyError"),
    ],
)
def test_the_most_specific_error(error: Exception, kind: type[SpiderError], said: str) -> None:
    found = convert(error)
    assert type(found) is kind
    assert said in found.message
    assert "sampling" in found.message or kind is AuthError


def test_a_late_failure_is_found_in_its_cause() -> None:
    wrapped = ValueError("Error retrieving result")
    wrapped.__cause__ = status(400, "LoRA rank 64 must be between 1 and 16")
    found = convert(wrapped)
    assert isinstance(found, Refusal)
    assert found.status == 400
    assert found.detail == "LoRA rank 64 must be between 1 and 16"


@pytest.mark.parametrize(("category", "kind"), [("User", Refusal), ("Server", EngineUnavailable)])
def test_a_failed_request_is_somebodys_fault(category: str, kind: type[SpiderError]) -> None:
    error = tinker.RequestFailedError(
        "it went wrong",
        request_id="1",
        category=tinker.types.RequestErrorCategory[category],
    )
    assert type(convert(error)) is kind


def test_a_model_that_was_lost_while_a_request_waited_is_gone() -> None:
    error = tinker.RequestFailedError(
        "Model model_3 not found",
        request_id="1",
        category=tinker.types.RequestErrorCategory.User,
    )
    found = convert(error)
    assert isinstance(found, EngineUnavailable)  # another session may go on
    assert isinstance(found, Refusal)
    assert found.status == 404


def test_a_request_that_the_sdk_will_not_send_is_a_refusal() -> None:
    with pytest.raises(Exception, match="validation error") as caught:
        tinker.types.AdamParams(learning_rate="fast")
    found = convert(caught.value)
    assert isinstance(found, Refusal)
    assert found.status == 422


def test_what_is_ours_stays_as_it_is() -> None:
    error = RowError("a row", stage="generation")
    assert convert(error) is error
