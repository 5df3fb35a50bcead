"""What a run's tree remembers of the job that fills it.

In ``.spider/`` of the tree, beside what ``trajectories.layout`` draws: ``job.json``, a lock, and
the folder of an embedded fleet while it is needed. Without them the tree is as good as before; a
run that is started again then begins a job of its own for what is not done.
"""

from __future__ import annotations

__all__ = ["FOLDER", "JobFile", "locked"]

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self

from spider_sdk.errors import UsageError
from spider_worker.sinks.atomic import atomic_path

FOLDER: Final = ".spider"


@dataclasses.dataclass
class JobFile:
    """``server`` is the API's address (None: a fleet in this tree); ``key`` makes a repeated
    submission the same job; ``asked`` is the job as the config has it, without secrets. ``job_id``
    is None until the server has answered.

    Where the tree held runs of earlier jobs, the job has a part of it alone (``carried``).
    ``bases`` says for each run how many attempts it had before the job, ``spent`` what they count
    with against a cap, in dollars. ``taken`` has the version of each artifact that was fetched.
    ``complete``: nothing of the job is left to do; ``published`` has the options under which what
    the tree has was published (None: it was not).
    """

    server: str | None
    key: str
    asked: dict[str, Any]
    job_id: str | None = None
    carried: bool = False
    bases: dict[str, int] = dataclasses.field(default_factory=dict)
    spent: float = 0.0
    taken: dict[str, str] = dataclasses.field(default_factory=dict)
    complete: bool = False
    published: dict[str, Any] | None = None

    @classmethod
    def load(cls, tree: Path) -> Self | None:
        """None where there is none. Raises UsageError for one that cannot be read."""
        path = tree / FOLDER / "job.json"
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} cannot be read ({error}); remove it to go on") from error

    def save(self, tree: Path) -> None:
        path = tree / FOLDER / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", "utf-8")

    def differing(self, asked: Mapping[str, Any], indifferent: frozenset[str]) -> list[str]:
        """The config's keys that are not as they were."""
        keys = sorted((self.asked.keys() | asked.keys()) - indifferent)
        return [key for key in keys if self.asked.get(key) != asked.get(key)]


@contextlib.contextmanager
def locked(tree: Path) -> Iterator[None]:
    """Hold the tree. Raises UsageError where another process does."""
    folder = tree / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = f"another spider-scaffold is at work in {tree}; wait for it, or stop it"
            raise UsageError(said) from None
        yield
    finally:
        os.close(descriptor)
