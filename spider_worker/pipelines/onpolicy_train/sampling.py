"""How the student samples, from ``generation.parameters``."""

from __future__ import annotations

__all__ = ["bias_of", "sample_params"]

from collections.abc import Callable, Mapping
from typing import Any, Final

from spider_sdk.config.model import JobConfig, OnPolicyOptions
from spider_sdk.errors import FatalJobError
from spider_worker.tokens import SampleParams

#: What a sampled reverse KL needs: anything else samples from another distribution than the
#: policy's own, and the estimate is biased. Each with the values that ask for nothing.
_UNBIASED: Final[Mapping[str, tuple[float, ...]]] = {
    "temperature": (1.0,),
    "top_p": (1.0,),
    "top_k": (0, -1),
}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


#: What a parameter may be, and how that is said.
_KNOWN: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "chat_template_kwargs": (lambda value: isinstance(value, Mapping), "a mapping"),
    "max_tokens": (lambda value: _whole(value, 1), "a whole number from 1"),
    "seed": (_whole, "a whole number from 0"),
    "stop_token_ids": (
        lambda value: isinstance(value, list | tuple) and all(map(_whole, value)),
        "a list of token ids",
    ),
    "temperature": (lambda value: _number(value) and value >= 0, "a number from 0"),
    "top_k": (lambda value: _whole(value, -1), "a whole number, 0 or -1 for all tokens"),
    "top_p": (lambda value: _number(value) and 0 < value <= 1, "a number above 0, at most 1"),
}


def sample_params(job: JobConfig, options: OnPolicyOptions) -> SampleParams:
    """Raises FatalJobError for a parameter that sampling has not, or whose value means nothing."""
    parameters = {k: v for k, v in job.generation.parameters.items() if v is not None}
    unknown = sorted(set(parameters) - set(_KNOWN))
    if unknown:
        raise FatalJobError(
            f"generation.parameters: {', '.join(unknown)} is not known to on-policy training, which"
            f" takes {', '.join(_KNOWN)}"
        )
    for name, value in parameters.items():
        holds, expected = _KNOWN[name]
        if not holds(value):
            raise FatalJobError(f"generation.parameters.{name}: expected {expected}, not {value!r}")
    length = parameters.get("max_tokens", options.max_tokens)
    if length != options.max_tokens:
        raise FatalJobError(
            f"generation.parameters.max_tokens ({length}) and on_policy_options.max_tokens"
            f" ({options.max_tokens}) differ; keep the second"
        )
    return SampleParams(
        max_tokens=options.max_tokens,
        stop=tuple(parameters.get("stop_token_ids", ())),
        temperature=float(parameters.get("temperature", 1.0)),
        top_p=float(parameters.get("top_p", 1.0)),
        top_k=max(parameters.get("top_k", 0), 0),
    )


def bias_of(job: JobConfig) -> dict[str, Any]:
    """The parameters under which the student is not sampled from its own distribution."""
    return {
        name: value
        for name, value in job.generation.parameters.items()
        if name in _UNBIASED and value is not None and value not in _UNBIASED[name]
    }
