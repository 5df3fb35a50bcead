"""Local tasks of a SWE job: the JSON lines that ``dataset`` names, and the repositories in them.

A worker opens no path that a job names. So the file travels as an input, and with it whatever its
rows name in ``repo_source`` on this machine: a folder with a git repository as a bundle of it, a
bundle as it is. The copy that is uploaded names them ``input:<sha256>`` instead. Paths in rows are
taken from the folder of the file; addresses (``https://…``, ``git@host:…``) stay as they are. The
file that ``leave_out`` names travels likewise.
"""

from __future__ import annotations

__all__ = ["REFERENCE", "check_local", "localise"]

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import ConfigError, Problem, UsageError
from spider_sdk.localfiles import LocalFile, Localised, hashed
from spider_sdk.remotes import is_remote, remote_problem
from spider_sdk.repositories import bundle_folder, is_bundle

REFERENCE: Final = "input:"
"""What a row's ``repo_source`` begins with where the rest is the SHA-256 of an input."""

_KEY: Final = "dataset"
_SUFFIXES: Final = (".jsonl", ".ndjson")
_NAME: Final = re.compile(r"[^\w.-]+", re.ASCII)


def localise(document: Mapping[str, Any], folder: Path) -> Localised:
    """Find the local data of a SWE job's wire document, which itself stays as it is.

    Bundles and the rewritten file are made in ``folder`` and must stay until they are uploaded.
    Raises ConfigError, with the line of each row that names what is not there.
    """
    swe = document["swe"]
    if swe.get("inputs"):
        return Localised(dict(document), ())
    changed, files = _data(swe, folder)
    if swe.get("leave_out") is not None:
        left_out = _left_out(swe["leave_out"], {file.name for file in files})
        changed, files = {**changed, "leave_out": left_out.name}, (*files, left_out)
    if not files:
        return Localised(dict(document), ())
    inputs = [{"name": file.name, "sha256": file.sha256} for file in files]
    return Localised({**document, "swe": {**changed, "inputs": inputs}}, files)


def check_local(swe: Mapping[str, Any]) -> None:
    """Look through the local data of a SWE job for what can be known without making anything of
    it: that the files are there and are JSON lines, the repositories too, and that some instance
    is selected. Raises ConfigError."""
    dataset = swe.get("dataset")
    path = _local(dataset) if isinstance(dataset, str) else None
    if path is None:
        return
    wanted = swe.get("instance_filter")
    pattern = None if wanted is None else re.compile(wanted)
    selected = 0
    problems: list[Problem] = []
    for number, row in _rows(path):
        name, source = row.get("instance_id"), row.get("repo_source")
        if not isinstance(name, str) or not name:
            problems.append(_problem(path, number, "it has no instance_id"))
            continue
        selected += pattern is None or pattern.match(name) is not None
        if isinstance(source, str) and source and not is_remote(source):
            where = path.parent / Path(source).expanduser()
            if not where.exists():
                said = f"repo_source: there is no folder or file {where.resolve()}"
                problems.append(_problem(path, number, said))
    if problems:
        raise ConfigError(problems)
    if not selected:
        which = "holds no task" if pattern is None else f"has no instance that matches {wanted!r}"
        raise _wrong(f"{path} {which}")


def _data(swe: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], tuple[LocalFile, ...]]:
    """The job with the data set by its name alone, and the files that this takes."""
    dataset = swe.get("dataset")
    path = _local(dataset) if isinstance(dataset, str) else None
    if path is None:
        return dict(swe), ()
    rows = list(_rows(path))
    repositories = _Repositories(path, rows, folder)
    files = repositories.files
    data = hashed(path.name, path, _KEY)
    if files:
        copy = folder / "rows.jsonl"
        with copy.open("w", encoding="utf-8") as file:
            for number, row in rows:
                file.write(json.dumps(repositories.renamed(number, row)) + "\n")
        data = hashed(path.name, copy, _KEY)
    return {**swe, "dataset": path.name}, (data, *files)


def _left_out(named: Any, taken: set[str]) -> LocalFile:
    path = Path(str(named)).expanduser()
    name = path.name
    while name in taken:
        name = f"_{name}"
    return hashed(name, path, "leave_out")


def _local(dataset: str) -> Path | None:
    """The file that ``dataset`` names on this machine; None where it is a name on the Hub."""
    path = Path(dataset).expanduser()
    explicit = dataset.startswith(("./", "../", "/", "~")) or path.suffix.lower() in _SUFFIXES
    if path.is_file() or explicit:
        if not path.exists():
            raise _wrong(f"there is no file {path.absolute()}")
        if not path.is_file() or path.suffix.lower() not in _SUFFIXES:
            raise _wrong(f"{path} is no file of JSON lines (.jsonl), as local tasks come in")
        return path
    return None


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, row) of each line that is not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _row(path, number, line)
    except (OSError, UnicodeDecodeError) as error:
        raise _wrong(f"{path} cannot be read: {error}") from error


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _wrong(f"{path}, line {number}: no JSON ({error})") from error
    if not isinstance(row, dict):
        raise _wrong(f"{path}, line {number}: expected an object, one task a line")
    return row


class _Repositories:
    """The repositories that rows name here, each made into one file whoever names it."""

    def __init__(self, path: Path, rows: list[tuple[int, dict[str, Any]]], folder: Path) -> None:
        self._folder = folder
        self._references: dict[int, str] = {}  #: by line
        self._files: dict[str, LocalFile] = {}  #: by content
        problems: list[Problem] = []
        named: dict[Path, list[tuple[int, Any]]] = {}
        for number, row in rows:
            source = row.get("repo_source")
            if source is None or source == "":
                continue
            if not isinstance(source, str):
                problems.append(_problem(path, number, "repo_source is no text"))
            elif is_remote(source):
                if (said := remote_problem(source)) is not None:
                    problems.append(_problem(path, number, f"repo_source: {said}"))
            else:
                where = (path.parent / Path(source).expanduser()).resolve()
                named.setdefault(where, []).append((number, row.get("base_commit")))
        for where, uses in named.items():
            try:
                file = self._file(where, [str(commit) for _, commit in uses if commit])
            except (UsageError, OSError) as error:
                problems.append(_problem(path, uses[0][0], f"repo_source: {error}"))
                continue
            self._references |= {number: f"{REFERENCE}{file.sha256}" for number, _ in uses}
        if problems:
            raise ConfigError(problems)
        taken = {path.name}
        self.files = tuple(_named_apart(file, taken) for file in self._files.values())

    def renamed(self, number: int, row: dict[str, Any]) -> dict[str, Any]:
        """The row as it goes over the wire."""
        reference = self._references.get(number)
        return row if reference is None else {**row, "repo_source": reference}

    def _file(self, where: Path, commits: list[str]) -> LocalFile:
        """Raises UsageError, OSError."""
        if where.is_dir():
            bundle = self._folder / f"{len(self._files)}.bundle"
            bundle_folder(where, commits, bundle)
        elif not where.exists():
            raise UsageError(f"there is no folder or file {where}")
        elif not is_bundle(where):
            raise UsageError(f"{where} is neither a folder nor a git bundle")
        else:
            bundle = where
        file = hashed(f"{_NAME.sub('-', where.stem) or 'repository'}.bundle", bundle, _KEY)
        return self._files.setdefault(file.sha256, file)


def _named_apart(file: LocalFile, taken: set[str]) -> LocalFile:
    stem, name, number = file.name.removesuffix(".bundle")[:200], file.name, 1
    while name in taken:
        number += 1
        name = f"{stem}-{number}.bundle"
    taken.add(name)
    return LocalFile(name, file.path, file.sha256, file.size)


def _problem(path: Path, number: int, said: str) -> Problem:
    return Problem(_KEY, f"{path}, line {number}: {said}")


def _wrong(said: str) -> ConfigError:
    return ConfigError([Problem(_KEY, said)])
