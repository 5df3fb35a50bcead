"""The ``tinker`` SDK: which versions are known to work, and one way to call all of them."""

from __future__ import annotations

__all__ = ["NEWEST", "OLDEST", "call_sdk", "load_sdk", "speaks_json"]

import asyncio
import concurrent.futures
import inspect
import logging
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable

OLDEST: Final = (0, 9)
NEWEST: Final = (0, 25)
"""The first and the last minor version that were run against a real server. An older one lacks
calls that are made here; a newer one is warned of and used, since the hosted service asks for
recent ones."""

log = logging.getLogger(__name__)

_warned: set[str] = set()


def load_sdk() -> Any:
    """The SDK's module. Raises EngineUnavailable where it is missing or too old."""
    try:
        import tinker
    except ImportError as error:
        raise EngineUnavailable(
            f"provider tinker needs the tinker package on this worker ({error}): install"
            " spider-distill[onpolicy]"
        ) from error
    text = str(tinker.__version__)
    release = _release(text)
    if release < OLDEST:
        raise EngineUnavailable(
            f"tinker {text} is older than this version of Spider can use; install tinker"
            f" {_dotted(OLDEST)} or newer on this worker"
        )
    if release > NEWEST and text not in _warned:
        _warned.add(text)
        log.warning(
            "tinker %s is newer than the versions that were tried with this version of Spider"
            " (%s to %s); going on with it",
            text,
            _dotted(OLDEST),
            _dotted(NEWEST),
        )
    return tinker


async def call_sdk(owner: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """The result of ``owner.name(…)``, waited for on this event loop.

    In versions up to 0.25 the twin ``…_async`` of a method is the one for an event loop; later ones
    mark it as deprecated where the method itself gives a future at once.
    """
    method = getattr(owner, name)
    twin = getattr(owner, f"{name}_async", None)
    if twin is not None and hasattr(twin, "__deprecated__") <= hasattr(method, "__deprecated__"):
        method = twin
    found = method(*args, **kwargs)
    while True:
        if isinstance(found, concurrent.futures.Future):
            found = asyncio.wrap_future(found)
        elif not inspect.isawaitable(found):
            return found
        found = await found


def speaks_json(sdk: Any) -> bool:
    """Whether results of training come as JSON, to this version; it takes an HTTP client, too."""
    return _release(str(sdk.__version__)) < (0, 25)


def _release(text: str) -> tuple[int, ...]:
    from packaging.version import InvalidVersion, Version

    try:
        return Version(text).release[:2]
    except InvalidVersion as error:
        raise EngineUnavailable(f"the tinker package has no version: {error}") from error


def _dotted(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
