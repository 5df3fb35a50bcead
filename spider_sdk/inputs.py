"""Local data files of a job: found, hashed and uploaded by content.

A worker opens no path that a job names, so what ``source.dataset`` names on this machine
(or ``source.options.data_files``, where ``dataset`` is a format such as ``json``; beside a
data set of the Hub they are files of its repository) travels as an *input*: the file's SHA-256
is its name on the server, and ``source.inputs`` in the job lists ``{"name", "sha256"}``.
Relative paths are taken from the working directory, as ``load_dataset`` does. What a SWE job's
``dataset`` names is ``swe_inputs``' matter.
"""

from __future__ import annotations

__all__ = ["LocalFile", "Localised", "localise", "upload"]

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from spider_sdk import swe_inputs
from spider_sdk.errors import ApiError, ConfigError, Problem
from spider_sdk.localfiles import LocalFile, Localised, hashed
from spider_sdk.transport import Transport

logger = logging.getLogger(__name__)

FORMATS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".arrow": "arrow", ".txt": "text",
}  # fmt: skip
"""Suffix: the ``load_dataset`` builder that reads it."""
BUILDERS = frozenset(FORMATS.values())
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
SPLITS = frozenset({"train", "validation", "test"})


def localise(job: Mapping[str, Any], folder: Path | None = None) -> Localised:
    """Find the local data of a job as it goes over the wire; ``job`` itself stays as it is.

    A data set that looks like a path but is none raises ConfigError; files skipped in a folder
    (hidden ones, links, other kinds of file) are logged as warnings. A SWE job needs ``folder``:
    what its repositories are made into must stay there until it is uploaded.
    """
    if isinstance(job.get("swe"), Mapping):
        assert folder is not None, "a SWE job's bundles need a place"
        return swe_inputs.localise(job, folder)
    source = job.get("source")
    dataset = source.get("dataset") if isinstance(source, Mapping) else None
    if not isinstance(source, Mapping) or not isinstance(dataset, str):
        return Localised(dict(job), ())
    options = source.get("options") or {}
    if dataset in BUILDERS and options.get("data_files"):
        where = "job.source.options.data_files"
        found = _named_by_split(list(_data_files(options["data_files"], where)), where)
        name = dataset
    else:
        where = "job.source.dataset"
        found = _dataset(dataset)
        name = Path(dataset).expanduser().resolve().name
    if not found:
        return Localised(dict(job), ())
    _check(found, where)
    files = tuple(hashed(name, path, "job.source") for name, path in found)
    inputs = [{"name": file.name, "sha256": file.sha256} for file in files]
    changed = {**source, "dataset": name, "inputs": [*(source.get("inputs") or ()), *inputs]}
    rest = {key: value for key, value in options.items() if key != "data_files"}
    if "options" in changed:
        changed["options"] = rest
    return Localised({**job, "source": changed}, files)


def upload(transport: Transport, files: Iterable[LocalFile]) -> int:
    """Send what the server does not hold yet. Returns the number of bytes sent."""
    sent = 0
    for file in {file.sha256: file for file in files}.values():
        path = f"/v1/inputs/{file.sha256}"
        if _is_there(transport, path):
            logger.info("input %s is on the server already", file.name)
            continue
        logger.info("uploading %s (%s)", file.name, _size(file.size))
        transport.request("PUT", path, body=_opener(file.path), safe=True)
        sent += file.size
    return sent


def _opener(path: Path) -> Callable[[], Any]:
    return lambda: path.open("rb")


def _is_there(transport: Transport, path: str) -> bool:
    try:
        transport.request("HEAD", path)
    except ApiError as error:
        if error.status in (404, 405):
            return False
        raise
    return True


def _dataset(dataset: str) -> list[tuple[str, Path]]:
    """The files behind ``source.dataset``; none where it is a name on the Hub."""
    where = "job.source.dataset"
    path = Path(dataset).expanduser()
    explicit = _looks_local(dataset)
    if path.is_file():
        return [(path.name, path)]
    if path.is_dir():
        files = list(_folder(path))
        if not files and explicit:
            kinds = ", ".join(FORMATS)
            raise ConfigError([Problem(where, f"{path} holds no data file ({kinds})")])
        return files
    if explicit:
        raise ConfigError([Problem(where, f"there is no file or folder {path.absolute()}")])
    return []


def _data_files(value: Any, where: str, split: str | None = None) -> Iterator[tuple[str, Path]]:
    """The files behind ``data_files``, each with its split."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _data_files(entry, f"{where}.{key}", str(key))
        return
    if isinstance(value, (list, tuple)):
        for number, entry in enumerate(value):
            yield from _data_files(entry, f"{where}.{number}", split)
        return
    if not isinstance(value, str) or "://" in value:
        raise ConfigError([Problem(where, f"expected a file on this machine, not {value!r}")])
    path = Path(value).expanduser()
    matches = [path] if path.is_file() else [Path(m) for m in glob.glob(str(path), recursive=True)]
    matches = sorted(match for match in matches if match.is_file())
    if not matches:
        raise ConfigError([Problem(where, f"there is no file {path.absolute()}")])
    for match in matches:
        yield split or "train", match


def _named_by_split(files: list[tuple[str, Path]], where: str) -> list[tuple[str, Path]]:
    """Names from which the worker reads the split again: its first known word counts, and a
    file that comes alone is ``train``."""
    splits = {split for split, _ in files}
    if not splits <= SPLITS:
        unknown = ", ".join(sorted(splits - SPLITS))
        known = ", ".join(sorted(SPLITS))
        raise ConfigError([Problem(where, f"uploaded files have splits {known}, not {unknown}")])
    if len(files) == 1:
        split, path = files[0]
        if split != "train":
            text = "one file alone is the split train: give its path without a split"
            raise ConfigError([Problem(f"{where}.{split}", text)])
        return [(path.name, path)]
    return [(f"{split}-{path.name}", path) for split, path in files]


def _check(found: list[tuple[str, Path]], where: str) -> None:
    """Refuse here what a worker would refuse later."""
    by_name: dict[str, Path] = {}
    builders: dict[str, str] = {}
    for name, path in found:
        other = by_name.setdefault(name, path.resolve())
        if other != path.resolve():
            text = f"{other} and {path.resolve()} would both be called {name}; rename one"
            raise ConfigError([Problem(where, text)])
        builders.setdefault(_kind(name), path.name)
    if len(builders) > 1:
        text = f"files of several formats ({', '.join(builders.values())}); give files of one"
        raise ConfigError([Problem(where, text)])


def _folder(root: Path) -> Iterator[tuple[str, Path]]:
    """Data files under ``root``. A subfolder becomes part of the name (``train/a.jsonl`` is
    ``train-a.jsonl``), since it may tell the split."""
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        for name in sorted(folders):
            if name.startswith(".") or (here / name).is_symlink():
                _skip(here / name)
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            path = here / name
            if name.startswith(".") or path.is_symlink() or not _has_data_suffix(name):
                _skip(path)
                continue
            yield "-".join(path.relative_to(root).parts), path


def _skip(path: Path) -> None:
    if path.is_symlink():
        why = "a symbolic link"
    elif path.name.startswith("."):
        why = "hidden"
    else:
        why = "no data file by its name"
    logger.warning("not uploaded: %s (%s)", path, why)


def _looks_local(text: str) -> bool:
    return text.startswith(("./", "../", "/", "~")) or _has_data_suffix(text)


def _has_data_suffix(name: str) -> bool:
    return bool(_kind(name))


def _kind(name: str) -> str:
    """The builder that reads a file of this name; empty where none does."""
    path = Path(name.lower())
    if path.suffix in COMPRESSED:
        path = path.with_suffix("")
    return FORMATS.get(path.suffix, "")


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"
