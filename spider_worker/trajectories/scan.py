"""Taking secrets out of whatever is about to leave.

An agent can print its environment, and a repository under work can hold keys. What is known to be
secret (the job's own values) and what looks like a key is replaced by ``[REDACTED:<kind>]`` in
every text; what was found is reported by instance and kind, never by value.

This is a net with holes. A known value is found as it is, escaped in JSON or a URL, and in
unwrapped base64; not reversed, encrypted or cut in two. Known values shorter than ``SHORTEST``
are placeholders such as ``EMPTY`` and would tear up ordinary words: they are left alone.
"""

from __future__ import annotations

__all__ = ["KNOWN", "SHORTEST", "Scanner"]

import base64
import collections
import dataclasses
import functools
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

SHORTEST: Final = 8  #: characters
KNOWN: Final = "job-secret"  #: the kind of the job's own values


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A kind of key. ``needles``: one of them is in every text that can match, which is a hundred
    times cheaper to ask for than the pattern. A pattern's group ``key``, or all of it, is hidden.
    """

    kind: str
    needles: tuple[str, ...]
    pattern: re.Pattern[str]


#: Between two lines of a key: line ends as they are or as JSON escapes them, quotes, and the line
#: numbers of a file viewer.
_GAP: Final = r"(?:\s|\\+[nrt]|[\"'])*(?:\d{1,6}(?:\t|\\+t))?"
_PRIVATE: Final = r"[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"

#: A digit is asked for where words with hyphens or underscores would match otherwise. It is looked
#: for so far and no further, or a hostile text would take the square of its length in time.
_SHAPES: Final = (
    _Shape(
        "private-key",
        ("PRIVATE KEY",),
        re.compile(
            rf"-----BEGIN {_PRIVATE}"
            rf"(?:(?:[\w+/=\s\\:,.()\"']|-(?!----)){{40,20000}}?-----END {_PRIVATE}"
            # Cut off by whoever shortened the output.
            rf"|{_GAP}[A-Za-z0-9+/=]{{40,}}(?:{_GAP}[A-Za-z0-9+/=]{{16,}})*)"
        ),
    ),
    _Shape(
        "github-token",
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,})"),
    ),
    _Shape("gitlab-token", ("glpat-",), re.compile(r"(?<![A-Za-z0-9])glpat-[\w-]{20,}")),
    _Shape("huggingface-token", ("hf_",), re.compile(r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{20,}")),
    _Shape(
        "api-key",
        ("sk-",),
        re.compile(r"(?<![A-Za-z0-9_-])sk-(?=[\w-]{0,200}\d)[\w-]{20,}"),
    ),
    _Shape(
        "stripe-key",
        ("k_live_", "k_test_"),
        re.compile(r"(?<![A-Za-z0-9])[rs]k_(?:live|test)_[A-Za-z0-9]{16,}"),
    ),
    _Shape(
        "aws-key",
        ("AKIA", "ASIA"),
        re.compile(r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ),
    _Shape("google-key", ("AIza",), re.compile(r"(?<![A-Za-z0-9])AIza[\w-]{35}")),
    _Shape(
        "slack-token",
        ("xox", "xapp-"),
        re.compile(r"(?<![A-Za-z0-9])(?:xox[abeoprs]|xapp)-(?=[\w-]{0,200}\d)[A-Za-z0-9-]{10,}"),
    ),
    _Shape("npm-token", ("npm_",), re.compile(r"(?<![A-Za-z0-9])npm_[A-Za-z0-9]{36}")),
    _Shape("pypi-token", ("pypi-AgE",), re.compile(r"(?<![A-Za-z0-9])pypi-AgE[\w-]{50,}")),
    _Shape(
        "jwt",
        ("eyJ",),
        re.compile(r"(?<![\w-])eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}"),
    ),
    _Shape(
        "authorization",
        ("uthorization", "UTHORIZATION"),
        re.compile(
            r"authorization[\\\"']*\s*[:=]\s*[\\\"']*(?:bearer|basic|token)\s+"
            r"(?P<key>(?=[A-Za-z._~+/=-]{0,400}\d)[\w.~+/=-]{16,})",
            re.IGNORECASE,
        ),
    ),
)


class Scanner:
    """Redacts texts and remembers what it found. ``secrets`` are known values; empty and short
    ones are left out."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = {form for value in secrets if len(value) >= SHORTEST for form in _forms(value)}
        # Longest first, so that no shorter one leaves the rest of a longer one behind.
        ordered = sorted(known, key=lambda form: (-len(form), form))
        self._known = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self._needles = ordered
        #: For each instance, how often each kind was found in what is its.
        self.found: dict[str, collections.Counter[str]] = {}

    @property
    def counts(self) -> dict[str, int]:
        """How often each kind was found, over all instances."""
        total = sum(self.found.values(), collections.Counter[str]())
        return dict(sorted(total.items()))

    def redact(self, value: Any, instance_id: str = "") -> Any:
        """A copy of some JSON without secrets, in the keys of objects as well as in values."""
        found = collections.Counter[str]()
        clean = self._redact(value, found)
        if found:
            self.found.setdefault(instance_id, collections.Counter()).update(found)
        return clean

    def _redact(self, value: Any, found: collections.Counter[str]) -> Any:
        if isinstance(value, str):
            return self._text(value, found)
        if isinstance(value, Mapping):
            return {
                self._redact(name, found): self._redact(item, found) for name, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._redact(item, found) for item in value]
        return value

    def _text(self, text: str, found: collections.Counter[str]) -> str:
        if len(text) < SHORTEST:
            return text
        if self._known is not None and any(needle in text for needle in self._needles):
            text, times = self._known.subn(_mark(KNOWN), text)
            found[KNOWN] += times
        for shape in _SHAPES:
            if any(needle in text for needle in shape.needles):
                text, times = shape.pattern.subn(functools.partial(_hidden, shape), text)
                if times:
                    found[shape.kind] += times
        return text


def _mark(kind: str) -> str:
    return f"[REDACTED:{kind}]"


def _hidden(shape: _Shape, match: re.Match[str]) -> str:
    group = "key" if "key" in shape.pattern.groupindex else 0
    start, end = (place - match.start() for place in match.span(group))
    return match[0][:start] + _mark(shape.kind) + match[0][end:]


def _forms(value: str) -> Iterator[str]:
    """A value as it may stand in a text."""
    yield value
    yield json.dumps(value)[1:-1]
    yield json.dumps(value, ensure_ascii=False)[1:-1]
    yield urllib.parse.quote(value, safe="")
    raw = value.encode("utf-8", "surrogatepass")
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        for offset in range(3):
            # Where a value begins within base64 depends on what stands before it; the characters
            # at both ends also hold bits of its neighbours.
            text = encode(bytes(offset) + raw).decode()
            first = -(-offset * 8 // 6)
            last = (offset + len(raw)) * 8 // 6
            yield text[first:last]
