"""``AppConfig``: a whole config file, checked."""

from __future__ import annotations

__all__ = ["AppConfig"]

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from spider_sdk.config.loader import load_root, read_file
from spider_sdk.config.model import JobConfig, ServerConfig, SweConfig
from spider_sdk.config.plain import apply_overrides, as_json, interpolate
from spider_sdk.config.positions import Document
from spider_sdk.errors import ConfigError, Problem

_NOTHING: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class AppConfig:
    """Where the server is and what job to run: one of ``job`` and ``swe`` is None.

    ``document`` is the job as it goes over the wire (``{"swe": {…}}`` for a SWE job), with
    whatever secrets the file holds: ``lift_secrets`` takes them out. ``path`` is None where the
    config came from a mapping. ``interpolated`` maps the dotted path of each value that was
    filled in from the environment to the variable's name (several joined by ``,``).
    """

    server: ServerConfig
    job: JobConfig | None
    swe: SweConfig | None
    document: Mapping[str, Any]
    path: str | None
    interpolated: Mapping[str, str]

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        overrides: Mapping[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """The config at ``path`` with ``overrides`` put over it.

        ``overrides`` maps dotted paths from the root to values, or is nested like the file.
        ``environ`` is what ``${NAME}`` reads (default: ``os.environ``). Raises ConfigError with
        every problem at once.
        """
        return cls._finish(read_file(Path(path)), overrides, environ)

    @classmethod
    def from_dict(
        cls,
        mapping: Mapping[str, Any],
        overrides: Mapping[str, Any] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
    ) -> Self:
        """The config that a file with this content would give, ``${NAME}`` included."""
        if not isinstance(mapping, Mapping):
            said = f"expected a mapping with server and job, not {type(mapping).__name__}"
            raise ConfigError([Problem("(root)", said)])
        document = Document(None)
        document.data = as_json(mapping, document.problems)
        return cls._finish(document, overrides, environ)

    def with_overrides(
        self, overrides: Mapping[str, Any], *, environ: Mapping[str, str] | None = None
    ) -> Self:
        """This config with ``overrides`` (as for ``load``) put over it, checked anew.

        Only the overrides are interpolated: the rest was when it was loaded.
        """
        environ = os.environ if environ is None else environ
        patch = Document({})
        apply_overrides(patch, overrides)
        origins = interpolate(patch, environ)
        document = Document(self._root(), self.path, problems=patch.problems)
        apply_overrides(document, patch.data)
        kept = {
            path: name
            for path, name in self.interpolated.items()
            if not any(_within(path, changed) for changed in document.overridden)
        }
        return self._checked(document, kept | origins)

    def _root(self) -> dict[str, Any]:
        problems: list[Problem] = []
        job = as_json(self.document, problems)
        server = {
            key: value
            for key, value in dataclasses.asdict(self.server).items()
            if value is not None
        }
        if self.swe is not None:
            return {"server": server, **job["swe"]}
        return {"server": server, "job": job}

    @classmethod
    def _finish(
        cls,
        document: Document,
        overrides: Mapping[str, Any] | None,
        environ: Mapping[str, str] | None,
    ) -> Self:
        apply_overrides(document, overrides or _NOTHING)
        origins = interpolate(document, os.environ if environ is None else environ)
        return cls._checked(document, origins)

    @classmethod
    def _checked(cls, document: Document, interpolated: Mapping[str, str]) -> Self:
        root = load_root(document)
        job = document.data.get("job")
        if root.swe is not None:
            job = {"swe": {key: value for key, value in document.data.items() if key != "server"}}
        return cls(root.server, root.job, root.swe, job, document.file, dict(interpolated))


def _within(path: str, changed: tuple[str | int, ...]) -> bool:
    parts = path.split(".")
    return parts[: len(changed)] == [str(part) for part in changed]
