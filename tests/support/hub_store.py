"""Repositories with commits, as the Hub keeps them: what ``hub_emulator`` serves over HTTP.

Everything lives in memory. A commit is a whole snapshot (path → blob), so any revision can
still be read; blobs are shared between snapshots.
"""

from __future__ import annotations

__all__ = ["Blob", "Commit", "HubError", "HubStore", "Repo", "git_hash"]

import dataclasses
import datetime
import hashlib
import json
import threading
from collections.abc import Iterable, Mapping
from typing import Any

LFS_SUFFIXES = (".parquet", ".arrow", ".bin", ".gz", ".zip", ".npy", ".safetensors", ".pt")
LFS_SIZE = 10 * 2**20
GITATTRIBUTES = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES)


class HubError(Exception):
    """An answer other than success; ``code`` goes into ``X-Error-Code``."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file's content. ``lfs`` says how it was committed."""

    content: bytes
    lfs: bool

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        lines = f"oid sha256:{self.sha256}\nsize {self.size}\n"
        return b"version https://git-lfs.github.com/spec/v1\n" + lines.encode()

    @property
    def oid(self) -> str:
        """The git object id: of the pointer for an LFS file, of the content otherwise."""
        return git_hash(self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def describe(self, path: str) -> dict[str, Any]:
        """The file as the tree and paths-info routes give it."""
        entry: dict[str, Any] = {
            "type": "file", "oid": self.oid, "size": self.size, "path": path,
        }  # fmt: skip
        if self.lfs:
            pointer_size = len(self.pointer)
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return entry


@dataclasses.dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: Mapping[str, Blob]


class Repo:
    """One repository with one branch, ``main``."""

    def __init__(self, repo_id: str, repo_type: str, *, private: bool, author: str) -> None:
        self.id = repo_id
        self.type = repo_type
        self.private = private
        self.uploads: dict[str, bytes] = {}  #: LFS objects by sha256, committed or not
        self.commits: list[Commit] = []
        files = {".gitattributes": Blob(GITATTRIBUTES.encode(), lfs=False)}
        self._append("initial commit", "", author, files)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    @property
    def files(self) -> Mapping[str, Blob]:
        """The files of ``main``, by path."""
        return self.head.files

    def at(self, revision: str) -> Commit:
        if revision in ("main", "refs/heads/main"):
            return self.head
        for commit in self.commits:
            if commit.oid == revision:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def blob(self, revision: str, path: str) -> Blob:
        try:
            return self.at(revision).files[path]
        except KeyError:
            raise HubError(404, "Entry not found", "EntryNotFound") from None

    def commit(self, lines: Iterable[Mapping[str, Any]], author: str) -> Commit:
        """Apply the NDJSON lines of a commit request, all or nothing."""
        header: Mapping[str, Any] | None = None
        files = dict(self.files)
        for line in lines:
            if line["key"] == "header":
                header = line["value"]
            else:
                self._apply(files, line["key"], line["value"])
        if header is None or not header.get("summary"):
            raise HubError(400, "The commit has no header with a summary")
        parent = header.get("parentCommit")
        if parent is not None and parent != self.head.oid:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        return self._append(header["summary"], header.get("description", ""), author, files)

    def _apply(self, files: dict[str, Blob], key: str, value: Mapping[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            import base64

            files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.uploads:
                raise HubError(400, f"LFS pointer of {path} points to a file that was not uploaded")
            files[path] = Blob(self.uploads[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        elif key == "deletedFolder":
            inside = [name for name in files if name.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise HubError(
                    404, f"A folder with this name doesn't exist: {path}", "EntryNotFound"
                )
            for name in inside:
                del files[name]
        else:
            raise HubError(400, f"Unknown commit operation: {key}")

    def _append(self, title: str, message: str, author: str, files: Mapping[str, Blob]) -> Commit:
        now = datetime.datetime.now(datetime.UTC)
        date = now.strftime("%Y-%m-%dT%H:%M:%S.") + f"{now.microsecond // 1000:03d}Z"
        parent = self.commits[-1].oid if self.commits else None
        identity = [self.id, len(self.commits), parent, title, {p: b.oid for p, b in files.items()}]
        oid = hashlib.sha1(json.dumps(identity).encode()).hexdigest()
        commit = Commit(oid, parent, title, message, author, date, dict(files))
        self.commits.append(commit)
        return commit

    def tree(self, revision: str, folder: str, *, recursive: bool) -> list[dict[str, Any]]:
        """Entries under ``folder`` ("" is the root), sorted by path."""
        prefix = folder.strip("/") + "/" if folder.strip("/") else ""
        files = self.at(revision).files
        entries: dict[str, dict[str, Any]] = {}
        for path, blob in files.items():
            if not path.startswith(prefix):
                continue
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
                name = prefix + "/".join(parts[:depth])
                entries[name] = self.describe_folder(name)
            if recursive or len(parts) == 1:
                entries[path] = blob.describe(path)
        if prefix and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return [entries[path] for path in sorted(entries)]

    @staticmethod
    def describe_folder(path: str) -> dict[str, Any]:
        return {"type": "directory", "oid": git_hash(path.encode()), "size": 0, "path": path}

    def paths_info(self, revision: str, paths: Iterable[str]) -> list[dict[str, Any]]:
        """Entries for those of ``paths`` that exist; others are left out, as on the Hub."""
        files = self.at(revision).files
        found = []
        for path in paths:
            if path in files:
                found.append(files[path].describe(path))
            elif any(name.startswith(path.rstrip("/") + "/") for name in files):
                found.append(self.describe_folder(path))
        return found


class HubStore:
    """All repositories. ``lock`` guards every read and write of them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._repos: dict[tuple[str, str], Repo] = {}

    def create(self, repo_id: str, repo_type: str, *, private: bool, author: str) -> Repo:
        if (repo_type, repo_id) in self._repos:
            raise HubError(409, f"You already created this {repo_type} repo: {repo_id}")
        repo = Repo(repo_id, repo_type, private=private, author=author)
        self._repos[repo_type, repo_id] = repo
        return repo

    def find(self, repo_id: str, repo_type: str = "dataset") -> Repo | None:
        return self._repos.get((repo_type, repo_id))

    def delete(self, repo_id: str, repo_type: str) -> None:
        if self._repos.pop((repo_type, repo_id), None) is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
