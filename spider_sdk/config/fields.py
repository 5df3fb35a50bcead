"""marshmallow fields that take exactly one type and say which one they wanted.

A message begins with "expected"; whoever reports it adds the value that was found. None never
arrives here: an empty value counts as not given (``Section`` drops it).
"""

from __future__ import annotations

__all__ = [
    "Choice",
    "Fraction",
    "Items",
    "JsonMapping",
    "Matching",
    "Nested",
    "Number",
    "PlainList",
    "Scalar",
    "Section",
    "Switch",
    "Text",
    "TextMapping",
    "Url",
    "VariableName",
    "Whole",
    "nearest",
]

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar
from urllib.parse import urlsplit

import marshmallow
from marshmallow import ValidationError, fields
from marshmallow.types import ErrorMessages

from spider_sdk.config.names import env_name_problem


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that ``word`` was probably meant to be."""
    close = difflib.get_close_matches(word.lower(), sorted(known), n=1, cutoff=0.6)
    return close[0] if close else None


_MESSAGES: ErrorMessages = {"required": "required, and not given"}
_SECTION_MESSAGES: ErrorMessages = {**_MESSAGES, "type": "expected a mapping"}
_LIST_MESSAGES: ErrorMessages = {**_MESSAGES, "invalid": "expected a list"}


class Scalar(fields.Field[Any]):
    """A field whose value passes ``check``, which returns it or raises ValueError."""

    default_error_messages = _MESSAGES

    def check(self, value: Any) -> Any:
        raise NotImplementedError

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> Any:
        try:
            return self.check(value)
        except ValueError as error:
            raise ValidationError(str(error)) from error


class Text(Scalar):
    """Text, not empty unless ``empty`` allows it."""

    def __init__(self, *, empty: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.empty = empty

    def check(self, value: Any) -> str:
        if isinstance(value, bool | int | float):
            raise ValueError("expected text (put it between quotation marks)")
        if not isinstance(value, str):
            raise ValueError("expected text")
        if not value.strip() and not self.empty:
            raise ValueError("expected text that is not blank")
        return value


class Matching(Text):
    """Text of a certain form: ``expected`` says which."""

    def __init__(self, pattern: str, expected: str, **options: Any) -> None:
        super().__init__(**options)
        self.pattern = re.compile(pattern, re.ASCII)
        self._expected = expected

    def check(self, value: Any) -> str:
        text = super().check(value)
        if self.pattern.fullmatch(text) is None:
            raise ValueError(f"expected {self._expected}")
        return text


class Url(Text):
    """An http or https address without a user or password in it."""

    def check(self, value: Any) -> str:
        text = super().check(value)
        expected = "expected an address such as http://127.0.0.1:8000/v1"
        try:
            parts = urlsplit(text)
            parts.port  # noqa: B018 - raises where it is no number
        except ValueError:
            raise ValueError(expected) from None
        if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", text):
            raise ValueError(expected)
        if parts.username is not None or parts.password is not None:
            raise ValueError("expected an address with no user or password in it (use api_key)")
        return text


class VariableName(Text):
    """The name of an environment variable that a job may use."""

    def check(self, value: Any) -> str:
        text = super().check(value)
        if (said := env_name_problem(text)) is not None:
            raise ValueError(said)
        return text


class Choice(Text):
    """One of a few words."""

    def __init__(self, choices: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.choices = tuple(choices)

    def check(self, value: Any) -> str:
        if isinstance(value, str) and value in self.choices:
            return value
        expected = f"expected {_alternatives(self.choices)}"
        meant = nearest(value, self.choices) if isinstance(value, str) else None
        raise ValueError(f"{expected} (did you mean {meant}?)" if meant else expected)


class Switch(Scalar):
    """true or false."""

    def check(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return value


class Number(Scalar):
    """A number within bounds; ``above`` and ``below`` are exclusive, the
    others are not."""

    kind: ClassVar[str] = "a number"

    def __init__(
        self,
        *,
        above: float | None = None,
        least: float | None = None,
        most: float | None = None,
        below: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        named = {
            "exclusiveMinimum": above,
            "minimum": least,
            "maximum": most,
            "exclusiveMaximum": below,
        }
        #: the bounds by JSON Schema's names
        self.limits = {name: bound for name, bound in named.items() if bound is not None}
        bounds: list[tuple[str, Callable[[float], bool]]] = []
        if above is not None:
            bounds.append((f"greater than {above:g}", lambda value: value > above))
        if least is not None:
            bounds.append((f"at least {least:g}", lambda value: value >= least))
        if most is not None:
            bounds.append((f"at most {most:g}", lambda value: value <= most))
        if below is not None:
            bounds.append((f"less than {below:g}", lambda value: value < below))
        self._bounds = bounds

    def convert(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        return float(value)

    def check(self, value: Any) -> float:
        wording = f"expected {self.kind}"
        if self._bounds:
            wording += " " + " and ".join(said for said, _ in self._bounds)
        try:
            number = self.convert(value)
        except ValueError:
            raise ValueError(wording) from None
        if not all(holds(number) for _, holds in self._bounds):
            raise ValueError(wording)
        return number


class Whole(Number):
    """A whole number; ``1e3`` is one."""

    kind = "a whole number"

    def convert(self, value: Any) -> int:
        if super().convert(value) % 1:  # 2**63 + 1 is whole, though no float says so exactly
            raise ValueError
        return int(value)


class Fraction(Number):
    """From 0 to 1."""

    def __init__(self, **options: Any) -> None:
        super().__init__(least=0, most=1, **options)


class JsonMapping(Scalar):
    """A mapping whose keys belong to somebody else (an engine, a user)."""

    def check(self, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError("expected a mapping")
        return value


class TextMapping(fields.Field[dict[str, str]]):
    """A mapping of names to text. ``names`` checks a name: None, or what is wrong with it."""

    def __init__(self, names: Callable[[str], str | None] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._names = names

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> dict[str, str]:
        if not isinstance(value, dict):
            raise ValidationError("expected a mapping of names to text")
        errors: dict[str, list[str]] = {}
        for name, text in value.items():
            if self._names is not None and (said := self._names(name)) is not None:
                errors[name] = [said]
            elif not isinstance(text, str):
                errors[name] = ["expected text (put it between quotation marks)"]
        if errors:
            raise ValidationError(errors)
        return dict(value)


class PlainList(fields.List[Any]):
    """A list of one kind of value, given to dataclasses as a tuple."""

    default_error_messages = _LIST_MESSAGES

    def _deserialize(self, value: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(value, list):
            raise self.make_error("invalid")
        return tuple(super()._deserialize(value, *args, **options))


class Section(marshmallow.Schema):
    """A section of the document, checked and built into the dataclass ``builds``.

    An empty value is dropped, so that the dataclass's default holds. An unknown key is an error
    that names the nearest known one; ``elsewhere`` may say where the key belongs instead.
    """

    builds: ClassVar[Callable[..., Any]]
    elsewhere: ClassVar[Mapping[str, str]] = {}
    may_be_empty: ClassVar[frozenset[str]] = frozenset()  #: keys that may stand here without value

    class Meta:
        unknown = marshmallow.EXCLUDE

    error_messages = {"type": "expected a mapping"}  # noqa: RUF012 - marshmallow's own annotation

    @marshmallow.pre_load
    def _drop_empty(self, data: Any, **_: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}

    @marshmallow.validates_schema(pass_original=True, skip_on_field_errors=False)
    def _no_unknown_keys(self, _data: Any, original: Any, **_: Any) -> None:
        if not isinstance(original, dict):
            return
        errors = {
            key: [self._unknown(key)]
            for key, value in original.items()
            if key not in self.fields and not (value is None and key in self.may_be_empty)
        }
        if errors:
            raise ValidationError(errors)

    def _unknown(self, key: str) -> str:
        if key in self.elsewhere:
            return f"unknown key; {self.elsewhere[key]}"
        meant = nearest(key, self.fields)
        if meant:
            return f"unknown key; did you mean {meant}?"
        return f"unknown key; known here: {', '.join(self.fields)}"

    @marshmallow.post_load
    def _build(self, data: dict[str, Any], **_: Any) -> Any:
        return type(self).builds(**data)


class Nested(fields.Nested):
    """A section within a section."""

    default_error_messages = _SECTION_MESSAGES


class Items(fields.Field[tuple[Any, ...]]):
    """A list of sections, given to dataclasses as a tuple."""

    def __init__(self, section: type[Section], **options: Any) -> None:
        super().__init__(**options)
        self.section = section

    def _deserialize(self, value: Any, *_: Any, **__: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValidationError("expected a list")
        schema = self.section()
        built: list[Any] = []
        errors: dict[str | int, Any] = {}
        for number, item in enumerate(value):
            try:
                built.append(schema.load(item))
            except ValidationError as error:
                errors[number] = error.messages
        if errors:
            raise ValidationError(errors)
        return tuple(built)


def _alternatives(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
