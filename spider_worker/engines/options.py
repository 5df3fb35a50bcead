"""Refusing options by name, with the nearest known one."""

from __future__ import annotations

__all__ = ["check_names", "misspelt", "refuse"]

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn

from spider_sdk.errors import NotSupported


def refuse(message: str) -> NoReturn:
    raise NotSupported(message)


def misspelt(name: str, known: Collection[str]) -> str | None:
    """The known name that ``name`` is very likely meant to be; None where it is known or is
    probably a name of its own, as ``min_tokens`` is beside ``max_tokens``."""
    if name in known:
        return None
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.85)), None)


def check_names(
    options: Mapping[str, Any],
    known: Iterable[str],
    *,
    where: str,
    engine: str,
) -> None:
    """Raises NotSupported that names every option of ``options`` not in ``known``.

    ``where`` is the dotted path of ``options`` in the job.
    """
    names = sorted(known)
    problems = []
    for name in options:
        if name in names:
            continue
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        problems.append(f"{where}.{name}: the {engine} engine has no such option{hint}")
    if problems:
        shown = f". It knows: {', '.join(names)}" if len(names) <= 24 else ""
        raise NotSupported("; ".join(problems) + shown + ".")
