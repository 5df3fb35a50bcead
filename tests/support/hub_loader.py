"""``datasets.load_dataset`` in a process of its own, as a user of a published data set runs it.

``HF_ENDPOINT`` is read when ``datasets`` is imported, so a process per Hub is the honest way;
it stays for many loads because the import takes seconds.
"""

from __future__ import annotations

__all__ = ["HubLoader", "LoadFailed", "hub_environment"]

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Self


def hub_environment(endpoint: str, home: Path) -> dict[str, str]:
    """This process's environment, for one that sees the Hub at ``endpoint`` and has no token;
    ``home`` holds its caches."""
    left_out = {"HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"}
    return {
        **{name: value for name, value in os.environ.items() if name not in left_out},
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


class LoadFailed(Exception):
    """What ``load_dataset`` raised, as text."""


class HubLoader:
    """Loads data sets from the Hub at ``endpoint``; ``home`` holds its caches."""

    def __init__(self, endpoint: str, home: Path, token: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**hub_environment(endpoint, home), "HF_TOKEN": token},
        )

    def load(self, repo_id: str, config: str | None = None, split: str = "train") -> dict[str, Any]:
        """``{"rows": […], "features": {column: text}}``. Raises LoadFailed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([repo_id, config, split]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise LoadFailed(answer["error"])
        return dict(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def _serve() -> None:
    import datasets

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the library prints must not mix with the answers
    for line in sys.stdin:
        repo_id, config, split = json.loads(line)
        try:
            loaded = datasets.load_dataset(
                repo_id, config, split=split, download_mode="force_redownload"
            )
            features = {name: str(kind) for name, kind in loaded.features.items()}
            answer: dict[str, Any] = {"rows": loaded.to_list(), "features": features}
        except Exception as error:  # noqa: BLE001 (the boundary: the caller raises it again)
            answer = {"error": f"{type(error).__name__}: {error}: {error.__cause__!r}"}
        answers.write(json.dumps(answer, default=str) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
