"""Any OpenAI-compatible ``/chat/completions`` endpoint (``endpoint.py`` has the HTTP)."""

from __future__ import annotations

__all__ = ["ENGINE_PARAMETERS", "OpenAIEngine", "check_parameters", "check_sampling"]

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from spider_sdk.errors import PipelineError, RowError
from spider_worker.engines import endpoint, wire
from spider_worker.engines.base import Completion, EngineInfo, EngineStats, SamplingParams
from spider_worker.engines.endpoint import Endpoint, EndpointOptions
from spider_worker.engines.options import check_names, misspelt, refuse

DEFAULT_IN_FLIGHT: Final = 512

ENGINE_PARAMETERS: Final = endpoint.PARAMETERS
"""What ``model.parameters`` may hold for this engine, and what each means."""

_REFUSED: Final = {
    "n": "use generation.duplications, which gives each sample an id of its own",
    "stream": "a batch job has nobody to stream to",
    "stream_options": "a batch job has nobody to stream to",
    "messages": "messages come from the source and the pre-processor",
    "model": "use model.name",
    "tools": "tools are not built yet in this version",
    **dict.fromkeys(
        ("logprobs", "top_logprobs", "prompt_logprobs"), "log-probabilities are kept in no record"
    ),
}
_SAMPLING: Final = frozenset(
    {
        "chat_template_kwargs", "extra_body", "frequency_penalty", "guided_choice",
        "guided_grammar", "guided_json", "guided_regex", "length_penalty", "logit_bias",
        "max_completion_tokens", "max_tokens", "min_p", "min_tokens", "parallel_tool_calls",
        "presence_penalty", "reasoning", "reasoning_effort",
        "repetition_penalty", "response_format", "seed", "service_tier", "stop",
        "stop_token_ids", "temperature", "thinking", "tool_choice", "top_a", "top_k",
        "top_p", "user", "verbosity",
    }
)  # fmt: skip
"""Names that endpoints are known to take, to tell a slip of the pen from one of their own."""

_PATH: Final = "/chat/completions"


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raises NotSupported for an engine argument that is unknown or malformed."""
    check_names(parameters, ENGINE_PARAMETERS, where="model.parameters", engine="openai")
    endpoint.check_parameters(parameters, where="model.parameters")
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
        self._endpoint = Endpoint(
            base_url.rstrip("/").removesuffix(_PATH),
            model=model,
            api_key=api_key,
            parameters=parameters,
            options=EndpointOptions(
                where="model",
                lasting=_row_error,
                max_in_flight=max_in_flight,
                allow_private=allow_private,
            ),
        )
        self._fixed = {"model": model, **parameters.get("extra_body", {})}
        # Rows that wait for their retry hold no place in the limit: a few more than the
        # limit keep it full.
        self._info = EngineInfo(name="openai", capacity=max_in_flight + max_in_flight // 2 + 1)

    @property
    def info(self) -> EngineInfo:
        return self._info

    def stats(self) -> EngineStats:
        return self._endpoint.stats()

    async def start(self) -> None:
        """Open the client. Nothing is sent: the first row shows whether the key is good."""
        await self._endpoint.open()

    async def close(self) -> None:
        await self._endpoint.close()

    async def complete(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        params: SamplingParams,
    ) -> Completion:
        body = self._body(messages, tools, params)
        return await self._endpoint.request(_PATH, body, wire.read_completion)

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


def _row_error(kind: str, message: str) -> PipelineError:
    return RowError(message, stage="generation", kind=kind)
