"""The process that runs a user's function: rows in, outcomes out, one JSON line each.

This file is not imported by the worker. Its text is handed to an interpreter
(``python -I -c``), which may be another version in another environment and sees none of
our packages: the standard library is all it may use.

The channel is the socket on file descriptor 0. The first line is the setup
(``spider_worker.sandbox.channel`` writes it) and is answered by ``["ready"]`` or
``["failed", message, traceback]``. Then come chunks: a line with a number, that many lines
with a row each. Every row is answered, in order, by ``[0, value]`` or by
``[1, kind, message, traceback]``. Before a row is touched, its number is written to shared
memory, so that the worker knows which row was running when this process hung or died.
"""

from __future__ import annotations

__all__ = ["main"]

import asyncio
import ctypes
import inspect
import json
import linecache
import math
import mmap
import os
import re
import resource
import signal
import struct
import sys
import time
import traceback
import types
from collections.abc import Callable
from typing import Any

OWN_FRAMES = "<spider sandbox>"  # what this text is compiled as: its frames are not the user's
MODULE = "spider_user_code"
FLUSH_AFTER = 0.005  # seconds that an outcome may wait for company
MAX_OUTCOME = 32 << 20  # bytes of one encoded value
MAX_MESSAGE = 4_000  # characters
MAX_TRACE = 16_000
PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
LONG_NUMBER = re.compile(r"\d{19}")


class NotJson(Exception):
    """The function returned something that is no JSON."""


def main(setup_fd: int = 0) -> None:
    channel, counter_fd = os.dup(setup_fd), int(sys.argv[1])
    counter = mmap.mmap(counter_fd, 8)
    os.close(counter_fd)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # print() belongs to the log: on the channel it would corrupt the protocol
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    lines = os.fdopen(channel, "rb", buffering=1 << 16, closefd=False)
    setup = json.loads(lines.readline())
    try:
        confine(setup)
        os.environ.clear()  # the interpreter's start puts LC_CTYPE there, bwrap PWD
        os.environ.update(setup["env"])
        function = define(setup)
    except BaseException as error:  # noqa: BLE001 - the boundary: told to the worker, which raises it
        send(channel, encode(["failed", describe_error(error), user_trace(error)]))
        return
    send(channel, b'["ready"]\n')
    serve(Row(function, setup["kwargs"]), lines, channel, counter, setup["row_timeout"])


def confine(setup: dict[str, Any]) -> None:
    """Give up what can be given up from inside, before any of the user's text runs."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "PR_SET_NO_NEW_PRIVS was refused")
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if setup["parent"] is not None and os.getppid() != setup["parent"]:
            os._exit(1)  # the worker died before the line above: no signal will come
    for name, value in setup["limits"].items():
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (limit, limit))


def define(setup: dict[str, Any]) -> Callable[..., Any]:
    """Run the user's text as a module and take the function out of it."""
    source, filename = setup["source"], f"<{setup['stage']}>"
    # The traceback module finds the text of <...> files in this cache alone.
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    module = types.ModuleType(MODULE)
    module.__file__ = filename
    sys.modules[MODULE] = module  # dataclasses and pickle look a class's module up there
    exec(compile(source, filename, "exec", dont_inherit=True), module.__dict__)  # noqa: S102
    function = module.__dict__.get(setup["name"])
    if not callable(function):
        found = "nothing" if function is None else f"a {type(function).__name__}"
        raise NameError(f"the source defines {found} under the name {setup['name']!r}")
    return function  # type: ignore[no-any-return]


def serve(row: Row, lines: Any, channel: int, counter: mmap.mmap, row_timeout: float) -> None:
    """Answer chunks until the worker closes the channel."""
    started = 0
    while header := lines.readline():
        count = int(header)
        allow_cpu(count * row_timeout)
        outcomes: list[bytes] = []
        flushed = time.monotonic()
        for _ in range(count):
            line = lines.readline()
            started += 1
            struct.pack_into("<Q", counter, 0, started)
            outcomes.append(row.run(line))
            now = time.monotonic()
            if now - flushed > FLUSH_AFTER:
                send(channel, b"".join(outcomes))
                outcomes.clear()
                flushed = now
        send(channel, b"".join(outcomes))


def allow_cpu(seconds: float) -> None:
    """Move the soft limit on CPU time on to what the coming rows may use.

    A fixed limit would end a long job; none would let threads and children that a row
    leaves behind burn on for as long as the job lives.
    """
    times = os.times()
    allowance = seconds * (os.cpu_count() or 1) + 10
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(times.user + times.system + allowance) + 1
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


class Row:
    """The user's function with its keyword arguments, from one line to another."""

    def __init__(self, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
        self._function = function
        self._kwargs = kwargs
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, line: bytes) -> bytes:
        try:
            value = self._function(json.loads(line), **self._kwargs)
            if inspect.isawaitable(value):
                value = self._wait_for(value)
            text = dumps(value)
            encoded = text.encode()
            if len(encoded) > MAX_OUTCOME:
                raise NotJson(
                    f"the value returned is {len(encoded):,} bytes of JSON; "
                    f"the limit is {MAX_OUTCOME:,}"
                )
            return b"[0," + encoded + b"]\n"
        except NotJson as error:
            return encode([1, "not_json", str(error), None])
        except UnicodeEncodeError:
            return encode([1, "not_json", "the value returned holds text that is not UTF-8", None])
        except BaseException as error:  # noqa: BLE001 - the boundary: whatever a row raises is its outcome
            kind = type(error).__name__
            return encode([1, kind, error_text(error) or kind, user_trace(error)])

    def _wait_for(self, awaitable: Any) -> Any:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        failure, value = self._loop.run_until_complete(settle(awaitable))
        if failure is not None:
            raise failure
        return value


async def settle(awaitable: Any) -> tuple[BaseException | None, Any]:
    """Catch what an awaitable raises next to it, so that asyncio's frames are not in its
    traceback and SystemExit does not break the loop."""
    try:
        return None, await awaitable
    except BaseException as error:  # noqa: BLE001 - raised again by the caller
        return error, None


def dumps(value: Any) -> str:
    """JSON of a returned value. Raises NotJson with the type and the place."""
    try:
        text = _ENCODER.encode(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise NotJson(find_fault(value) or f"the value returned is no JSON: {error}") from None
    # Readers of JSON hold integers of 64 bits; only text with a long number can have a larger.
    if LONG_NUMBER.search(text) and (fault := find_fault(value)):
        raise NotJson(fault)
    return text


_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def find_fault(value: Any, path: str = "", depth: int = 0) -> str | None:
    """What in a value is no JSON, and where; None if nothing is."""
    where = f" at {path}" if path else ""
    if depth > 200:
        return f"the value returned is nested too deeply{where}"
    if value is None or isinstance(value, str | bool):
        return None
    if isinstance(value, int):
        if -(2**63) <= value < 2**64:
            return None
        return f"the value returned has an integer beyond 64 bits{where}"
    if isinstance(value, float):
        if math.isfinite(value):
            return None
        return f"the value returned has {value}{where}, which JSON has not; return None for it"
    if isinstance(value, dict):
        for key, item in value.items():
            if key is not None and not isinstance(key, str | int | float):
                return f"the value returned has a key of type {type_name(key)}{where}"
            if fault := find_fault(item, f"{path}[{key!r}]", depth + 1):
                return fault
        return None
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            if fault := find_fault(item, f"{path}[{index}]", depth + 1):
                return fault
        return None
    return f"the value returned has type {type_name(value)}{where}, which is no JSON"


def type_name(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def describe_error(error: BaseException) -> str:
    text = error_text(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_text(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as broken:  # noqa: BLE001 - a __str__ of the user's
        text = f"(its text cannot be had: {type(broken).__name__})"
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"


def user_trace(error: BaseException) -> str:
    """The traceback without the frames of this file; of a long one, the end."""
    try:
        report = traceback.TracebackException.from_exception(error)
        link: traceback.TracebackException | None
        todo, seen = [report], set()
        while todo:
            link = todo.pop()
            seen.add(id(link))
            kept = [frame for frame in link.stack if frame.filename != OWN_FRAMES]
            link.stack = traceback.StackSummary.from_list(kept)
            following = [
                link.__cause__,
                link.__context__,
                *(getattr(link, "exceptions", None) or []),
            ]
            todo += [one for one in following if one is not None and id(one) not in seen]
        text = "".join(report.format())
    except Exception as broken:  # noqa: BLE001 - formatting runs the user's __str__ and __repr__
        text = f"(no traceback: {type(broken).__name__} while it was written)"
    return text if len(text) <= MAX_TRACE else "…" + text[-MAX_TRACE:]


def encode(answer: list[Any]) -> bytes:
    """A line of ours: what is no UTF-8 in it becomes ``?``, so that encoding cannot fail."""
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def send(channel: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(channel, view) :]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # the worker is done with us: threads that the user left behind are too
