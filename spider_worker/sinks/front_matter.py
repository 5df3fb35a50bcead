"""The front matter of a card, and sections of its text: edited, and kept where not ours."""

from __future__ import annotations

__all__ = ["dump", "edit", "section_of", "split", "with_names", "with_section"]

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import yaml

from spider_sdk.errors import FatalJobError

_FRONT: Final = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.M)
_TOP_LEVEL: Final = re.compile(r"""^([\w-]+|"[^"\n]+"|'[^'\n]+')[ \t]*:(?=\s)""", re.M)


def split(text: str, repo_type: str) -> tuple[str, str]:
    """The front matter's YAML ("" for none) and what follows it. Raises FatalJobError for one that
    cannot be read; ``repo_type`` says in its words where the card is."""
    found = _FRONT.match(text)
    if found is None:
        return "", text
    try:
        front = yaml.safe_load(found[1])
        why = "it is not a mapping"
    except yaml.YAMLError as error:
        front, why = error, str(error)
    if not isinstance(front, dict | None):
        raise FatalJobError(
            f"The README.md of the output {repo_type} has a front matter that cannot be read, so "
            f"it cannot be kept: {why}. Repair it on the Hub, then submit or retry the job"
        )
    return found[1], text[found.end() :]


def edit(front: str, ours: Mapping[str, Any]) -> str:
    """``front`` with the top-level keys of ``ours`` set, or removed where None.

    The text of all other keys is kept letter for letter: PyYAML would read ``no`` (Norwegian)
    as False, which the Hub does not, and it would drop comments.
    """
    text = {key: dump({key: value}) for key, value in ours.items() if value is not None}
    starts = [*_TOP_LEVEL.finditer(front)]
    parts = [front[: starts[0].start()] if starts else front]
    for start, following in itertools.zip_longest(starts, starts[1:]):
        key = start[1].strip("'\"")
        block = front[start.start() : following.start() if following else None]
        parts.append(text.pop(key, "") if key in ours else block)
    edited = "".join(parts)
    if edited and not edited.endswith("\n"):
        edited += "\n"
    edited += "".join(text.values())
    wanted = {**(yaml.safe_load(front) or {}), **ours}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    try:
        same = yaml.safe_load(edited) == wanted
    except yaml.YAMLError:
        same = False
    # Written in a way that cannot be cut at its keys ({a: b, …}): say the same in another.
    return edited if same else dump(wanted)


def dump(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True, width=100)


def with_names(text: str, key: str, names: Iterable[str]) -> list[str]:
    """A list of strings with ``names`` added; read as text alone, for ``no`` is one too."""
    front = yaml.load(text, Loader=yaml.BaseLoader) or {}  # noqa: S506 (builds only strings)
    present = front.get(key) or []
    present = [present] if isinstance(present, str) else list(present)
    return present + [name for name in names if name not in present]


def with_section(body: str, name: str, section: str) -> str:
    """``body`` with our section of that name replaced, or appended where it has none."""
    begin, end = _marks(name)
    block = f"{begin}\n{section}{end}"
    start, stop = body.find(begin), body.find(end)
    if 0 <= start < stop:
        return body[:start] + block + body[stop + len(end) :]
    return f"{body.rstrip()}\n\n{block}\n"


def section_of(body: str, name: str) -> str:
    """What ``with_section`` put into ``body``."""
    begin, end = _marks(name)
    return body.partition(f"{begin}\n")[2].partition(end)[0]


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- spider:begin {name} -->", f"<!-- spider:end {name} -->"
