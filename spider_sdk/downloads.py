"""Results to a local file, whole or not at all."""

from __future__ import annotations

__all__ = ["FORMATS", "KEPT_BY_THE_FLEET", "download", "download_artifact", "resolve_destination"]

import contextlib
import os
import tempfile
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from spider_sdk.errors import ServerBusy, ServerUnreachable, UsageError
from spider_sdk.transport import Transport, job_path

FORMATS: Final = ("json", "jsonl", "parquet")
ATTEMPTS: Final = 3
KEPT_BY_THE_FLEET: Final = ("state/", "shards/")
"""Beginnings of the names of artifacts that a job goes on from: records come as its result, and
who has a run's adapter has no need of its state."""


def resolve_destination(
    destination: str | os.PathLike[str], format: str | None, job_id: str, default: str = "jsonl"
) -> tuple[Path, str]:
    """Where to write, and in which format: ``format``, else by the suffix.

    A folder gets ``{job_id}.{format or default}``. Raises UsageError for a format that there
    is not and for a suffix that names none.
    """
    if format is not None and format not in FORMATS:
        raise UsageError(f"format must be one of {', '.join(FORMATS)}, not {format!r}")
    text = os.fspath(destination)
    path = Path(text).expanduser()
    if path.is_dir() or text.endswith(("/", os.sep)):
        chosen = format or default
        return path / f"{job_id}.{chosen}", chosen
    if format is not None:
        return path, format
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in FORMATS:
        raise UsageError(
            f"cannot tell the format of {path}: end it with .json, .jsonl or .parquet, or give "
            "a format"
        )
    return path, suffix


def download(transport: Transport, job_id: str, path: Path, format: str) -> Path:
    """Write a job's result to ``path``, replacing what is there only once all has arrived.

    The bytes go to a temporary file in the same folder, are synced, and then take the name in
    one step; whatever fails before leaves ``path`` as it was and no file behind. A download
    that is cut starts again, up to three times (a result may have grown in between, so it is
    never continued); that retry is owned here.
    """
    params = None if format == "json" else {"format": format}
    return _patiently(transport, job_path(job_id, "result"), path, params)


def download_artifact(transport: Transport, job_id: str, name: str, folder: Path) -> Path:
    """Write a job's artifact under ``folder``, by its name there, as ``download`` does. Raises
    UsageError for a name that would lead out of the folder."""
    parts = name.split("/")
    if any(part in ("", ".", "..") or os.sep in part for part in parts):
        raise UsageError(f"the artifact {name!r} has no name that a file could have")
    url = "/".join((job_path(job_id, "artifacts"), *(urllib.parse.quote(p, "") for p in parts)))
    return _patiently(transport, url, folder.joinpath(*parts), None)


def _patiently(
    transport: Transport, url: str, path: Path, params: Mapping[str, str] | None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            return _once(transport, url, path, params)
        except (ServerUnreachable, ServerBusy):
            if attempt + 1 == ATTEMPTS:
                raise
            transport.pause(attempt)
    raise AssertionError("the loop above returns or raises")


def _once(transport: Transport, url: str, path: Path, params: Mapping[str, str] | None) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            with transport.stream(url, params=params, headers={"Accept": "*/*"}) as response:
                for chunk in response.iter_bytes():
                    file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())  # mkstemp makes files for their owner alone
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
