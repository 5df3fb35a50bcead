"""Split expressions for streaming: ``train[10:20]+test[:5]``.

Without streaming, the ``datasets`` library reads the whole notation itself.
"""

from __future__ import annotations

__all__ = ["SplitPart", "parse_streaming_split"]

import dataclasses
import re

from spider_sdk.errors import FatalJobError, NotSupported

_PART = re.compile(r"(?P<name>[^\[\]+()]+?)\s*(?:\[(?P<start>[^:\]]*):(?P<stop>[^:\]]*)\])?")


@dataclasses.dataclass(frozen=True)
class SplitPart:
    """Rows ``start`` to ``stop`` (exclusive; None: the end) of the split ``name``."""

    name: str
    start: int = 0
    stop: int | None = None


def parse_streaming_split(expression: str) -> tuple[SplitPart, ...]:
    """The parts of an expression, in order.

    Raises NotSupported for what needs the number of rows, which a stream does not know:
    percentages and positions counted from the end. Raises FatalJobError for an empty slice.
    """
    return tuple(_parse_part(part.strip(), expression) for part in expression.split("+"))


def _parse_part(text: str, expression: str) -> SplitPart:
    match = _PART.fullmatch(text)
    if match is None:
        raise NotSupported(
            f"source.split: {expression!r} is not understood with source.streaming; "
            "expected NAME or NAME[START:STOP], joined by +"
        )
    start = _position(match["start"], expression) or 0
    stop = _position(match["stop"], expression)
    if stop is not None and stop <= start:
        raise FatalJobError(f"source.split: {text} holds no rows")
    return SplitPart(match["name"], start, stop)


def _position(text: str | None, expression: str) -> int | None:
    text = (text or "").strip().replace("_", "")
    if not text:
        return None
    if text.isdecimal():
        return int(text)
    if "%" in text:
        raise NotSupported(
            f"source.split: {expression!r} slices by percentage, for which the number of rows "
            "must be known; with source.streaming give row numbers (train[0:1000]), or turn "
            "streaming off"
        )
    if text.startswith("-"):
        raise NotSupported(
            f"source.split: {expression!r} counts from the end, which a stream does not know; "
            "give row numbers from the start, or turn source.streaming off"
        )
    raise NotSupported(f"source.split: {text!r} in {expression!r} is no row number")
