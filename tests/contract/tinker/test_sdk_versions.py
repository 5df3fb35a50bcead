"""The same adapters with other versions of the SDK, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tinker_server import SERVER, TinkerServer

ROOT = Path(__file__).parents[3]
SDKS = ROOT / ".venv-tinker-sdk"


def run_tests(which: str, version: str, *arguments: str, **environment: str) -> None:
    """Run pytest over ``arguments`` with the SDK in ``which``."""
    folder = SDKS / which
    if not (SDKS / ".spider-sdks").exists():
        pytest.skip("no other versions of the SDK (make tinker-sdks adds them)")
    variables = {**os.environ, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", "import tinker; print(tinker.__version__)"]
    found = subprocess.run(command, env=variables, check=True, capture_output=True, text=True)
    assert found.stdout.startswith(version)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_the_oldest_on_the_wire() -> None:
    run_tests("oldest", "0.9", "tests/contract/tinker/test_exchanges.py")


@pytest.mark.skipif(SERVER != "0.16", reason="that server speaks with newer ones alone")
def test_the_oldest_with_the_real_server(tinker_server: TinkerServer) -> None:
    run_tests(
        "oldest",
        "0.9",
        "tests/contract/trainers",
        "tests/contract/tinker/test_engine.py",
        "-k",
        "tinker",
        SPIDER_TINKER_URL=tinker_server.url,
        SPIDER_TINKER_MODEL=str(tinker_server.model),
    )


def test_the_newest_on_the_wire() -> None:
    # It leaves a connection of its own open.
    run_tests(
        "newest",
        "0.38",
        "tests/contract/tinker/test_exchanges.py",
        "-W",
        "ignore::ResourceWarning",
        "-W",
        "ignore::pytest.PytestUnraisableExceptionWarning",
    )
