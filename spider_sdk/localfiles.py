"""Files of this machine that travel with a job, by content."""

from __future__ import annotations

__all__ = ["LocalFile", "Localised", "hashed"]

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any

from spider_sdk.errors import ConfigError, Problem


@dataclasses.dataclass(frozen=True)
class LocalFile:
    """A file to upload. ``name`` has no folder in it; ``size`` is in bytes."""

    name: str
    path: Path
    sha256: str
    size: int


@dataclasses.dataclass(frozen=True)
class Localised:
    """A job whose local paths were replaced by names of inputs, and the files behind them."""

    job: dict[str, Any]
    files: tuple[LocalFile, ...]


def hashed(name: str, path: Path, where: str) -> LocalFile:
    """The file at ``path``, to be called ``name``. Raises ConfigError, about the key ``where``."""
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return LocalFile(name, path, digest, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise ConfigError([Problem(where, f"{path} cannot be read: {error}")]) from error
