"""The secrets that this process knows, for ``scan`` to look for where a run is published by hand.

A job's own secrets come with it; whoever pushes a file later has them in variables at best. Which
of those are secrets is told by their names, since the ones that a config named are not all that an
agent, or a repository's tests, can have printed.
"""

from __future__ import annotations

__all__ = ["known_secrets"]

from collections.abc import Iterable, Mapping
from typing import Any, Final

from spider_sdk.config.names import maybe_secret_key
from spider_worker.trajectories.scan import SHORTEST

#: Characters from which on a value of letters alone is no word such as ``disabled``.
_LONG: Final = 16


def known_secrets(
    environ: Mapping[str, str], metadata: Mapping[str, Any] | None, names: Iterable[str] = ()
) -> list[str]:
    """The values of ``environ`` under ``names``, under the name that a run's ``metadata`` has for
    its key, and under every name that sounds like a secret's. Of the last, those are left out that
    are short or a word: taking them out would tear up ordinary text."""
    llm = (metadata or {}).get("llm_config")
    named = {*names, llm.get("api_key_env") if isinstance(llm, Mapping) else None}
    return sorted(
        {
            value
            for name, value in environ.items()
            if value and (name in named or (maybe_secret_key(name) and _telling(value)))
        }
    )


def _telling(value: str) -> bool:
    return len(value) >= (_LONG if value.isalpha() else SHORTEST)
