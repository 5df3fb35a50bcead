"""Files of a tree that is a folder of this host, touched without following a link.

An agent can put a link to any file of the host where a file of the tree was: whoever reads or
writes it from outside of the box would follow it, with rights that the agent has not.
"""

from __future__ import annotations

__all__ = ["put_file", "read_file", "remove_folder"]

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from spider_sdk.errors import WorkspaceError

_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def put_file(tree: Path, name: str, content: bytes, *, executable: bool = False) -> None:
    """Write a file, making the folders above it; what is in its place, a link too, is replaced.

    ``name`` is relative to the tree. Raises WorkspaceError where a folder above it is a link or
    no folder, or the name leads out of the tree.
    """
    try:
        with _parent(tree, name, make=True) as (folder, last):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(last, dir_fd=folder)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            file = os.open(last, flags, 0o755 if executable else 0o644, dir_fd=folder)
            with open(file, "wb") as stream:
                stream.write(content)
    except OSError as error:
        raise WorkspaceError(f"{name} cannot be written: {error.strerror}") from error


def read_file(tree: Path, name: str, *, limit: int) -> bytes | None:
    """A regular file's first ``limit`` bytes; None where there is none.

    Raises WorkspaceError where it or a folder above it is a link, or it is no regular file.
    """
    try:
        with _parent(tree, name, make=False) as (folder, last):
            # NONBLOCK: opening a named pipe would wait for a writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(last, flags, dir_fd=folder)
            with open(file, "rb") as stream:
                if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                    raise WorkspaceError(f"{name} is no regular file")
                return stream.read(limit)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return None
        raise WorkspaceError(f"{name} cannot be read: {error.strerror}") from error


@contextlib.contextmanager
def _parent(tree: Path, name: str, *, make: bool) -> Iterator[tuple[int, str]]:
    """The folder of a name, opened, and the name's last part."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise WorkspaceError(f"{name!r} is no name within the tree")
    folder = os.open(tree, _FOLDER)
    try:
        for part in parts[:-1]:
            if make:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=folder)
            below = os.open(part, _FOLDER, dir_fd=folder)
            os.close(folder)
            folder = below
        yield folder, parts[-1]
    finally:
        os.close(folder)


def remove_folder(folder: Path) -> None:
    """Remove a folder with everything in it, also where folders in it may not be written to.
    Blocking. Raises WorkspaceError where something stays."""
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except PermissionError:
        _open_up(folder)
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise WorkspaceError(f"a workspace cannot be removed: {error}") from error
    except OSError as error:
        raise WorkspaceError(f"a workspace cannot be removed: {error}") from error


def _open_up(folder: Path) -> None:
    os.chmod(folder, 0o700)
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _open_up(Path(entry.path))
