"""From documents to dataclasses, with every problem told at once."""

from __future__ import annotations

__all__ = ["job_document", "load_root", "parse_job", "read_file"]

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path as FilePath
from typing import Any, Final

from marshmallow import ValidationError

from spider_sdk.config.fields import Section
from spider_sdk.config.model import Job, JobConfig, SweConfig
from spider_sdk.config.names import is_secret_key
from spider_sdk.config.plain import as_json
from spider_sdk.config.positions import Document, Path, dotted, read_yaml
from spider_sdk.config.rules import Complaint, job_rules, swe_rules
from spider_sdk.config.schema import JobSchema, Root, RootSchema
from spider_sdk.config.swe_schema import SweRootSchema, SweSchema
from spider_sdk.errors import ConfigError, Problem

_MAX_BYTES: Final = 1 << 20  # a job file is written by hand; data belongs into source.dataset
_MISSING: Final = object()


def read_file(path: FilePath) -> Document:
    """The YAML file at ``path``. Raises ConfigError where it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise _unreadable(path, f"larger than {_MAX_BYTES >> 20} MiB, which is no job file")
        return read_yaml(content.decode("utf-8-sig"), str(path))
    except FileNotFoundError:
        raise _unreadable(path, "there is no such file") from None
    except UnicodeDecodeError as error:
        raise _unreadable(path, f"not UTF-8 text (byte {error.start})") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"cannot be read: {error}") from error


def _unreadable(path: FilePath, message: str) -> ConfigError:
    return ConfigError([Problem("(file)", message, None, str(path))])


def load_root(document: Document) -> Root:
    """A whole file. Raises ConfigError with every problem of the document, by line."""
    root = document.data if document.data is not None else {}
    problems = list(document.problems)
    if not isinstance(root, dict):
        message = f"expected a mapping with server and job, not {_shown((), root)}"
        raise ConfigError([*problems, document.problem((), message)])
    swe = _is_swe(root)
    schema: Section = SweRootSchema() if swe else RootSchema()
    rules: Iterable[Complaint]
    if swe:
        rules = swe_rules(root)
    else:
        rules = ((("job", *path), said) for path, said in job_rules(root.get("job")))
    built = _build(schema, root, document, (), rules, problems)
    assert isinstance(built, Root)
    return built


def _is_swe(root: Mapping[str, Any]) -> bool:
    return "job" not in root and not set(SweSchema().fields).isdisjoint(root)


def parse_job(document: Any) -> Job:
    """The job of a wire document (plain JSON; nothing is interpolated). ``{"swe": {…}}`` is a
    SWE job.

    Raises ConfigError. Its problems carry paths as in the file: from ``job``, or of a SWE job,
    whose keys stand at the root there, those keys alone.
    """
    if isinstance(document, Mapping) and "swe" in document:
        return _parse_swe(document)
    problems: list[Problem] = []
    data = as_json(document, problems, ("job",))
    built = _build(JobSchema(), data, Document(None), ("job",), job_rules(data), problems)
    assert isinstance(built, JobConfig)
    return built


def _parse_swe(document: Mapping[str, Any]) -> SweConfig:
    beside = [key for key in document if key != "swe"]
    if beside:
        said = 'a SWE job is {"swe": {…}} and nothing beside it'
        raise ConfigError([Problem(f"job.{key}", said) for key in beside])
    problems: list[Problem] = []
    data = as_json(document["swe"], problems)
    built = _build(SweSchema(), data, Document(None), (), swe_rules(data), problems)
    assert isinstance(built, SweConfig)
    return built


def job_document(job: Job) -> dict[str, Any]:
    """The wire document of ``job``, without what is None or empty: ``parse_job`` gives an equal
    job back."""
    document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(job)))
    pruned = _pruned(document, job)
    assert isinstance(pruned, dict)
    return {"swe": pruned} if isinstance(job, SweConfig) else pruned


def _pruned(value: Any, typed: Any) -> Any:
    """Leave out the fields of dataclasses that say nothing; users' own mappings stay whole."""
    if isinstance(value, dict) and dataclasses.is_dataclass(typed):
        return {
            key: _pruned(item, getattr(typed, key))
            for key, item in value.items()
            if item is not None and item != {} and item != []
        }
    if isinstance(value, list) and isinstance(typed, tuple):
        return [_pruned(item, one) for item, one in zip(value, typed, strict=True)]
    return value


def _build(
    schema: Section,
    data: Any,
    document: Document,
    prefix: Path,
    rules: Iterable[Complaint],
    problems: list[Problem],
) -> Any:
    """Load ``data``, which stands at ``prefix`` of the document."""
    complaints: list[Complaint] = []
    built = None
    try:
        built = schema.load(data)
    except ValidationError as error:
        complaints += _flat(error.messages, (), data)
    said_already = {path for path, _ in complaints}
    complaints += [(path, said) for path, said in rules if path not in said_already]
    told = {problem.path for problem in problems}
    for path, said in complaints:
        whole = (*prefix, *path)
        # A value that could not be read stands as None: what is missing then was told already.
        if dotted(whole) not in told or _at(data, path) is not None:
            problems.append(document.problem(whole, said))
    if problems:
        raise ConfigError(sorted(problems, key=lambda one: (one.line is None, one.line or 0)))
    return built


def _flat(messages: Any, path: Path, data: Any) -> Iterator[Complaint]:
    """marshmallow's nested messages as paths, each with the value that was found there."""
    if isinstance(messages, dict):
        for key, inner in messages.items():
            here = path if key == "_schema" else (*path, key)
            yield from _flat(inner, here, data if key == "_schema" else _item(data, key))
        return
    for message in [messages] if isinstance(messages, str) else messages:
        found = message.startswith("expected") and data is not _MISSING
        yield path, f"{message}, not {_shown(path, data)}" if found else message


def _at(data: Any, path: Path) -> Any:
    for key in path:
        data = _item(data, key)
    return None if data is _MISSING else data


def _item(data: Any, key: Any) -> Any:
    try:
        return data[key]
    except (KeyError, IndexError, TypeError):
        return _MISSING


def _shown(path: Path, value: Any) -> str:
    """A value for a message: short, and never a secret."""
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    last = str(path[-1]) if path else ""
    if is_secret_key(last) or last.endswith(("api_key_env", "url")):
        return "this"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:56]} …"
