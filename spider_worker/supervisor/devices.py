"""Accelerators of this host, each behind a lock that dies with whoever uses it."""

from __future__ import annotations

__all__ = ["DevicePool", "Devices"]

import contextlib
import dataclasses
import fcntl
import os
import subprocess
import threading
from pathlib import Path
from typing import Final

from spider_sdk.errors import EngineUnavailable

#: Where ``nvidia0`` and so on are.
NODES: Final = Path("/dev")


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices taken for a runner. The runner inherits ``locks``: while it or a child of its
    lives, even past its supervisor, the devices count as taken."""

    ids: tuple[str, ...] = ()
    locks: tuple[int, ...] = ()

    def release(self) -> None:
        """Close our copies of the locks; idempotent in effect, called once."""
        for lock in self.locks:
            with contextlib.suppress(OSError):
                os.close(lock)


class DevicePool:
    def __init__(self, ids: tuple[str, ...], folder: Path) -> None:
        self.ids = ids
        self._folder = folder
        self._lock = threading.Lock()

    @classmethod
    def of_host(cls, devices: str | None, folder: Path) -> DevicePool:
        """``devices`` as configured (``none``: no device), else CUDA_VISIBLE_DEVICES, else what
        the driver lists."""
        text = devices if devices is not None else os.environ.get("CUDA_VISIBLE_DEVICES")
        if text is None:
            text = ",".join(_of_driver())
        elif text.lower() == "none":
            text = ""
        return cls(tuple(part.strip() for part in text.split(",") if part.strip()), folder)

    def take(self, count: int) -> Devices | None:
        """Lock ``count`` free devices; None while others of them are in use.

        Raises EngineUnavailable where this worker never has that many. A worker without
        any takes none: its engine says by itself whether it can do without.
        """
        if count == 0 or not self.ids:
            return Devices()
        if count > len(self.ids):
            raise EngineUnavailable(
                f"the model needs {count} accelerators and this worker has {len(self.ids)}: lower "
                "tensor_parallel_size, or run a worker with more (SPIDER_DEVICES)"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        taken = Devices()
        with self._lock:
            for device in self.ids:
                lock = self._try(device)
                if lock is not None:
                    taken = Devices((*taken.ids, device), (*taken.locks, lock))
                if len(taken.ids) == count:
                    return taken
        taken.release()
        return None

    def _try(self, device: str) -> int | None:
        path = self._folder / f"device-{device.replace('/', '_')}.lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return None
        return lock


def _of_driver() -> list[str]:
    """What nvidia-smi lists; where there is no such program, as in some containers, as many as
    there are nodes of the driver's."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],  # noqa: S607 (operator's PATH)
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except FileNotFoundError:
        return [str(number) for number, _ in enumerate(NODES.glob("nvidia[0-9]*"))]
    except (OSError, subprocess.SubprocessError):
        return []
    return listing.stdout.split()
