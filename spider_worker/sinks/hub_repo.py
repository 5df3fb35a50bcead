"""A repository on the Hub: the calls that publishing needs, with Spider's errors.

The one importer of huggingface_hub among the sinks. Who retries what:

- Listing and uploading LFS content are retried by huggingface_hub itself (five times, with
  Retry-After honoured).
- Everything else but a commit is retried here, by ``_retrying``.
- A commit is never sent again blindly, since a lost answer says nothing about whether it was
  applied: ``commit`` raises CommitUnsettled, and ``settle`` looks at the repository first.
"""

from __future__ import annotations

__all__ = ["CommitUnsettled", "HubRepo", "RemoteFile"]

import dataclasses
import hashlib
import re
import time
import urllib.parse
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    RepoFile,
    constants,
    get_session,
    hf_raise_for_status,
)
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from spider_sdk.errors import AuthError, FatalJobError, PipelineError, SpiderError

T = TypeVar("T")

Operation = CommitOperationAdd | CommitOperationDelete

#: What the client's HTTP library raises when there is no answer (HfHubHTTPError, its
#: subclass, is an answer). Found this way because the library differs between versions.
_HTTP_ERROR: Final[type[Exception]] = HfHubHTTPError.__bases__[0]

ATTEMPTS: Final = 6
FIRST_WAIT: Final = 1.0  #: seconds; doubles
LONGEST_WAIT: Final = 3900.0  #: seconds; the Hub's limits are for an hour at most

#: Seconds without a byte before a request counts as unanswered. A large commit takes the Hub
#: a minute or two; without a limit, which is huggingface_hub's way, a dead connection would
#: hold up the job for good.
SILENCE: Final = 300.0

_TRANSIENT: Final = frozenset({408, 425, 429, 500, 502, 503, 504})


class CommitUnsettled(Exception):
    """A commit was refused for its parent, or nobody knows whether it was applied.

    ``wait`` is the seconds that the Hub asked to wait, or None.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """``sha256`` is known of LFS files alone, ``git_id`` (git's hash of the content as a blob) of
    all others; None otherwise."""

    size: int
    sha256: str | None
    git_id: str | None = None

    def holds(self, local: Path) -> bool:
        """Whether it has the content of that file."""
        size = local.stat().st_size
        if self.size != size:
            return False
        with local.open("rb") as file:
            if self.sha256 is not None:
                return hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            blob = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
            while block := file.read(1 << 20):
                blob.update(block)
        return blob.hexdigest() == self.git_id


class HubRepo:
    """``repo_type`` is ``dataset`` or ``model``. ``endpoint`` None: HF_ENDPOINT or the public Hub.
    ``sleep`` takes seconds. ``options`` is what the names of the user's options begin with in
    messages: ``repo_id`` and ``private`` of a job's output section."""

    def __init__(
        self,
        repo_id: str,
        *,
        token: str,
        repo_type: str = "dataset",
        endpoint: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
        options: str = "output.hf.",
    ) -> None:
        self.repo_id = repo_id
        self._options = options
        self.repo_type = repo_type
        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._token = token
        self._api = HfApi(endpoint=self.endpoint, token=token, library_name="spider")
        self.sleep = sleep

    @property
    def _what(self) -> str:
        return f"{self.repo_type} {self.repo_id}"

    @property
    def url(self) -> str:
        folder = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        return f"{self.endpoint}/{folder}{self.repo_id}"

    def ensure(self, *, private: bool) -> None:
        """Create the repository unless it is there.

        Raises AuthError when it is missing and may not be created, FatalJobError when it is
        there and public although ``private`` is asked for.
        """
        try:
            self._retrying(lambda: self._create(private=private), "create the repository")
            return
        except HfHubHTTPError as error:
            status = _status(error)
            # A token scoped to one repository may write to it and yet create none, so only
            # a missing repository makes a 403 final; prove_write decides the rest.
            if status not in (HTTPStatus.CONFLICT, HTTPStatus.FORBIDDEN):
                raise self.explain(error, "create the repository") from error
            refusal = error
        try:
            info = self._retrying(self._info, "look at the repository")
        except HfHubHTTPError as error:
            if _status(refusal) == HTTPStatus.FORBIDDEN:
                raise self.explain(refusal, "create the repository") from error
            raise self.explain(error, "look at the repository") from error
        if private and info.private is False:
            raise FatalJobError(
                f"{self._options}private is true, but the {self._what} already exists on "
                "the Hub and is public; make it private there, choose another "
                f"{self._options}repo_id, or set {self._options}private: false"
            )

    def _create(self, *, private: bool) -> None:
        self._api.create_repo(self.repo_id, repo_type=self.repo_type, private=private)

    def _info(self) -> Any:
        return self._api.repo_info(self.repo_id, repo_type=self.repo_type)

    def prove_write(self) -> None:
        """Raise AuthError unless this token may write to the repository. Changes nothing:
        it asks, as before a commit, how a small README would have to be uploaded."""
        probe = CommitOperationAdd("README.md", b"#\n")
        self._limit_silence()
        try:
            self._api.preupload_lfs_files(self.repo_id, [probe], repo_type=self.repo_type)
        except HfHubHTTPError as error:
            raise self.explain(error, "write to the repository") from error
        except _HTTP_ERROR as error:
            raise PipelineError(f"No answer from the Hub at {self.endpoint}: {error}") from error

    def head(self) -> str:
        """The commit id of ``main``."""
        info = self._checked(self._info, "look at the repository")
        if info.sha is None:
            raise PipelineError(f"The Hub gave no commit id for the {self._what}")
        return str(info.sha)

    def files(
        self, folder: str | None, revision: str, *, recursive: bool = False
    ) -> dict[str, RemoteFile]:
        """Files directly in ``folder`` (None: the root), or with ``recursive`` all below it, by
        path; empty where there is no such folder."""

        def entries() -> list[object]:
            self._limit_silence()
            return list(
                self._api.list_repo_tree(
                    self.repo_id,
                    folder,
                    recursive=recursive,
                    repo_type=self.repo_type,
                    revision=revision,
                )
            )

        try:
            found = entries()
        except EntryNotFoundError:
            return {}
        except HfHubHTTPError as error:
            raise self.explain(error, "list the files") from error
        except _HTTP_ERROR as error:
            raise PipelineError(f"No answer from the Hub at {self.endpoint}: {error}") from error
        return {
            entry.path: RemoteFile(entry.size, entry.lfs.sha256)
            if entry.lfs
            else RemoteFile(entry.size, None, entry.blob_id)
            for entry in found
            if isinstance(entry, RepoFile)
        }

    def read_text(self, path: str, revision: str) -> str | None:
        """The file's text, None only where the Hub says that there is none."""
        url = f"{self.url}/resolve/{revision}/{urllib.parse.quote(path)}"
        headers = {"Authorization": f"Bearer {self._token}"}

        def get() -> str:
            response = get_session().get(url, headers=headers)
            hf_raise_for_status(response)
            return response.content.decode("utf-8", "replace")

        try:
            return self._checked(get, f"read {path}")
        except EntryNotFoundError:
            return None

    def upload(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Store the contents, without a commit. What is stored already is not sent again."""
        self._limit_silence()
        try:
            self._api.preupload_lfs_files(
                self.repo_id, additions, repo_type=self.repo_type, free_memory=False
            )
        except HfHubHTTPError as error:
            raise self.explain(error, "upload") from error
        except (RuntimeError, ValueError, OSError, _HTTP_ERROR) as error:
            # huggingface_hub and hf_xet wrap what went wrong in plain exceptions.
            cause = error.__cause__
            if isinstance(cause, HfHubHTTPError):
                raise self.explain(cause, "upload") from error
            raise PipelineError(f"The upload to {self.url} failed: {cause or error}") from error

    def settle(
        self,
        wanted: Callable[[str], Sequence[Operation]],
        message: str,
        *,
        before: Callable[[], None] = lambda: None,
    ) -> bool:
        """Commit what ``wanted`` names for a revision; nothing, no commit. Returns whether there
        was one.

        The one owner of a commit's repetition: after each that was not settled the repository is
        looked at anew. ``before`` is called before each, once everything is uploaded.
        """
        for attempt in range(1, ATTEMPTS + 1):
            head = self.head()
            operations = wanted(head)
            if not operations:
                return False
            self.upload([op for op in operations if isinstance(op, CommitOperationAdd)])
            before()
            try:
                self.commit(operations, message, head)
            except CommitUnsettled as error:
                if attempt == ATTEMPTS:
                    raise PipelineError(
                        f"{ATTEMPTS} commits to {self.url} did not go through; the last said: "
                        f"{error}"
                    ) from error
                self.pause(attempt, error.wait)
            else:
                return True
        raise AssertionError("unreachable")

    def commit(self, operations: Sequence[Operation], message: str, parent: str) -> str:
        """One commit on top of ``parent``; returns its id. Raises CommitUnsettled."""
        self._limit_silence()
        try:
            done = self._api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                repo_type=self.repo_type,
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            status = _status(error)
            if status == HTTPStatus.PRECONDITION_FAILED or status in _TRANSIENT:
                raise CommitUnsettled(f"HTTP {status}", self._asked_wait(error)) from error
            raise self.explain(error, "commit") from error
        except _HTTP_ERROR as error:
            raise CommitUnsettled(f"no answer ({type(error).__name__})") from error
        except ValueError as error:
            raise FatalJobError(f"The Hub refused the card of {self.url}: {error}") from error
        return str(done.oid)

    def explain(self, error: HfHubHTTPError, doing: str) -> SpiderError:
        """The error to raise for an answer that no further attempt here will change."""
        status = _status(error)
        said = error.server_message or str(error).strip().splitlines()[0]
        where = f"could not {doing} ({self.url}): HTTP {status}, {said}"
        if status == HTTPStatus.UNAUTHORIZED:
            return AuthError(
                f"The Hub does not accept HF_TOKEN: {where}. Make a token with write access at "
                f"{self.endpoint}/settings/tokens and submit the job again with it in HF_TOKEN"
            )
        if status in (HTTPStatus.FORBIDDEN, HTTPStatus.NOT_FOUND):
            return AuthError(
                f"HF_TOKEN gives no right to write to the {self._what}: {where}. Use a "
                "token with write access to that namespace (not a read token), or change "
                f"{self._options}repo_id"
            )
        if status in _TRANSIENT:
            return PipelineError(f"The Hub {where}, after {ATTEMPTS} attempts")
        return FatalJobError(f"The Hub {where}")

    def _checked(self, call: Callable[[], T], doing: str) -> T:
        """``_retrying`` with errors explained, but for EntryNotFoundError."""
        try:
            return self._retrying(call, doing)
        except EntryNotFoundError:
            raise
        except HfHubHTTPError as error:
            raise self.explain(error, doing) from error

    def _retrying(self, call: Callable[[], T], doing: str) -> T:
        """Up to ATTEMPTS times. Raises the last HfHubHTTPError, or PipelineError where
        there was no answer at all."""
        for attempt in range(1, ATTEMPTS + 1):
            self._limit_silence()
            try:
                return call()
            except HfHubHTTPError as error:
                wait = self._asked_wait(error)
                if _status(error) not in _TRANSIENT or attempt == ATTEMPTS:
                    raise
            except _HTTP_ERROR as error:
                wait = None
                if attempt == ATTEMPTS:
                    raise PipelineError(
                        f"Could not {doing}: no answer from the Hub at {self.endpoint} "
                        f"({type(error).__name__}: {error})"
                    ) from error
            self.pause(attempt, wait)
        raise AssertionError("unreachable")

    @staticmethod
    def _limit_silence() -> None:
        """Of huggingface_hub's session, which it may have made anew since the last call."""
        get_session().timeout = SILENCE

    def pause(self, attempt: int, asked: float | None) -> None:
        """Sleep before the attempt after the ``attempt``-th (from 1)."""
        self.sleep(max(FIRST_WAIT * 2 ** (attempt - 1), min(asked or 0.0, LONGEST_WAIT)))

    @staticmethod
    def _asked_wait(error: HfHubHTTPError) -> float | None:
        """Seconds from ``Retry-After`` or from the Hub's ``RateLimit: "api";r=0;t=55``."""
        headers = error.response.headers if error.response is not None else {}
        if headers.get("Retry-After", "").isdigit():
            return float(headers["Retry-After"])
        limit = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
        return float(limit[1]) if limit else None


def _status(error: HfHubHTTPError) -> int:
    return int(error.response.status_code) if error.response is not None else 0
