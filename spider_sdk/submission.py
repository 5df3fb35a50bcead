"""What a submission consists of: the job's document without secrets, and its secrets beside it."""

from __future__ import annotations

__all__ = ["Env", "Processor", "Processors", "Submittable", "needed_for"]

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spider_sdk.bundle import Bundle, bundle_function, bundle_reference
from spider_sdk.config import (
    AppConfig,
    check_env_names,
    check_submittable,
    lift_secrets,
    parse_job,
)
from spider_sdk.errors import ConfigError, Problem, UsageError

Env = Sequence[str] | Mapping[str, str]
"""Names of variables to take from ``os.environ``, or names with values."""
Processor = Callable[..., Any] | str
"""A function, or ``"file.py:function"``."""


@dataclasses.dataclass(frozen=True)
class Processors:
    """The functions that go with a job, as text; None leaves what the config has."""

    pre: Bundle | None = None
    post: Bundle | None = None
    evaluator: Bundle | None = None

    @classmethod
    def bundle(
        cls,
        pre: Processor | None,
        post: Processor | None,
        pre_kwargs: Mapping[str, Any] | None = None,
        post_kwargs: Mapping[str, Any] | None = None,
        evaluator: Processor | None = None,
        evaluator_kwargs: Mapping[str, Any] | None = None,
    ) -> Processors:
        """Raises UsageError for a function that cannot travel."""
        return cls(
            _bundle("pre_processor", pre, pre_kwargs),
            _bundle("post_processor", post, post_kwargs),
            _bundle("evaluator", evaluator, evaluator_kwargs),
        )

    def items(self) -> tuple[tuple[str, Bundle | None], ...]:
        """By their keys in a job."""
        return (
            ("pre_processor", self.pre),
            ("post_processor", self.post),
            ("evaluator", self.evaluator),
        )


def _bundle(
    which: str, function: Processor | None, kwargs: Mapping[str, Any] | None
) -> Bundle | None:
    if function is None:
        if kwargs is not None:
            raise UsageError(f"{which}_kwargs were given without a {which}")
        return None
    if isinstance(function, str):
        return bundle_reference(function, kwargs)
    return bundle_function(function, kwargs)


@dataclasses.dataclass(frozen=True)
class Submittable:
    """``job`` for the wire (local paths still in it) and ``env``, its secrets by name."""

    job: dict[str, Any]
    env: dict[str, str]

    @property
    def forwarded(self) -> tuple[str, ...]:
        """Names of what is forwarded, sorted."""
        return tuple(sorted(self.env))

    @classmethod
    def build(
        cls,
        config: AppConfig,
        overrides: Mapping[str, Any] | None = None,
        processors: Processors = Processors(),
        env: Env = (),
    ) -> Submittable:
        """Check that the job can be submitted, and part it from its secrets.

        Raises ConfigError for a job that is not valid or not supported by this version, and
        for variables that it needs, or that ``env`` names, and that are not set.
        """
        if overrides:
            config = config.with_overrides(overrides if config.swe else {"job": overrides})
        document = _document(config, processors)
        check_submittable(parse_job(document))
        named = _named(env)
        job, lifted, _ = lift_secrets(document, {**os.environ, **named}, config.interpolated)
        return cls(job, _checked({**named, **lifted}))


def needed_for(
    document: Mapping[str, Any], config: AppConfig | None = None, env: Env = ()
) -> dict[str, str]:
    """The secrets that a job on the server needs again, for a retry.

    They come from the environment, from ``env``, and from ``config`` where that holds the keys
    that were lifted out of the job at first. Raises ConfigError naming those that are missing.
    """
    named = _named(env)
    known = {**os.environ, **named}
    if config is not None and (config.job or config.swe):
        known |= lift_secrets(config.document, known, config.interpolated)[1]
    _, lifted, _ = lift_secrets(document, known)
    return _checked({**named, **lifted})


def _document(config: AppConfig, processors: Processors) -> dict[str, Any]:
    document = dict(config.document)
    for name, bundle in processors.items():
        if bundle is not None:
            if config.swe is not None:
                raise UsageError(f"a SWE job has no {name}")
            document[name] = dict(bundle)
    return document


def _named(env: Env) -> dict[str, str]:
    if isinstance(env, Mapping):
        return {str(name): str(value) for name, value in env.items()}
    check_env_names(env)  # before a key in the wrong place is repeated in a message
    missing = [name for name in env if not os.environ.get(name)]
    if missing:
        said = "is to be forwarded and is not set; export it"
        raise ConfigError([Problem(f"env.{name}", f"{name} {said}") for name in missing])
    return {name: os.environ[name] for name in env}


def _checked(env: dict[str, str]) -> dict[str, str]:
    check_env_names(env)
    return env
