from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_api.embedded.state import StateFolder


@pytest.fixture
def state(tmp_path: Path) -> Iterator[StateFolder]:
    """A state folder whose lock is held."""
    with StateFolder(tmp_path / "state") as folder:
        yield folder
