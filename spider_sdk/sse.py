"""Server-sent events, read from the bytes of a response.

Not httpx2's own reader, because that one swallows comments: here a comment is reported, since
the server's heartbeats are what lets a follower look at its deadline while a job is silent.
"""

from __future__ import annotations

__all__ = ["Message", "read_messages"]

import codecs
import dataclasses
from collections.abc import Iterable, Iterator

from spider_sdk.errors import ApiError

MAX_MESSAGE_CHARS = 16 * 2**20
"""A message longer than this is no event of ours: stop before memory runs out."""


@dataclasses.dataclass(frozen=True)
class Message:
    """One message. ``event`` is ``message`` where the stream named none."""

    event: str
    data: str
    id: str | None


def read_messages(chunks: Iterable[bytes]) -> Iterator[Message | None]:
    """The messages of a stream; None for a comment (a heartbeat).

    A message that the stream's end cuts off is dropped, as the standard asks for. Raises
    ApiError for a message over ``MAX_MESSAGE_CHARS``.
    """
    event, data, size, identity = "", list[str](), 0, None
    for line in _lines(chunks):
        if line.startswith(":"):
            yield None
            continue
        if not line:
            if data:
                yield Message(event or "message", "\n".join(data), identity)
            event, data, size = "", [], 0
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
            size += len(value)
            if size > MAX_MESSAGE_CHARS:
                raise ApiError(f"the event stream's message is over {MAX_MESSAGE_CHARS} characters")
        elif name == "event":
            event = value
        elif name == "id" and "\0" not in value:
            identity = value


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    for chunk in chunks:
        text = rest + decoder.decode(chunk)
        if len(text) > MAX_MESSAGE_CHARS:
            raise ApiError(f"the event stream sent a line over {MAX_MESSAGE_CHARS} characters")
        # A carriage return at the very end may be half of a CR LF: leave it for the next chunk.
        keep = text.endswith("\r")
        text = text.removesuffix("\r").replace("\r\n", "\n").replace("\r", "\n")
        *lines, rest = text.split("\n")
        if keep:
            rest += "\r"
        yield from lines
