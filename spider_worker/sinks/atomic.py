"""Files that are either whole or not there, whatever dies in between."""

from __future__ import annotations

__all__ = ["atomic_path", "sync_folder"]

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, to be written inside the block.

    After the block the file is synced, takes the name ``path`` (replacing what was
    there) and the folder is synced. If the block raises, the temporary file is removed
    and ``path`` stays as it was. Raises FileNotFoundError if the block wrote nothing.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        # Opened again because the writer (pyarrow, for one) closes its own descriptor.
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
