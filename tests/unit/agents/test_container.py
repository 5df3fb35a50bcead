"""What of this host is shown in containers, and what must not be."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from spider_sdk.errors import EngineUnavailable
from spider_worker.agents.container import container_mounts


def interpreter(folder: Path, *prefixes: str) -> str:
    """A program that calls these its prefixes, with its own folder as the first."""
    program = folder / "env" / "bin" / "python"
    program.parent.mkdir(parents=True)
    answer = json.dumps([str(folder / "env"), *prefixes])
    program.write_text(f"#!/bin/sh\necho '{answer}'\n")
    program.chmod(0o755)
    return str(program)


@pytest.mark.parametrize(
    "prefix",
    [
        "/usr", "/usr/local", "/usr/lib/pypy3.11", "/usr/local/bin/python3.12", "/opt",
        "/opt/conda", "/opt/miniconda3", "/opt/miniconda3/envs/testbed", "/testbed/.venv",
    ],
)  # fmt: skip
def test_an_interpreter_that_would_hide_what_an_image_has_is_refused(
    prefix: str, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, prefix)
    with pytest.raises(EngineUnavailable, match=f"{python} needs {prefix} of .*uv python install"):
        container_mounts(python, tmp_path / "shown", tmp_path)


@pytest.mark.parametrize("prefix", ["/usr/local/uv/cpython-3.12", "/opt/conda/envs/agent"])
def test_an_interpreter_in_a_folder_of_its_own_is_shown_where_it_is(
    prefix: str, tmp_path: Path
) -> None:
    python = interpreter(tmp_path, prefix)
    mounts = container_mounts(python, tmp_path / "shown", tmp_path)
    env = str(tmp_path / "env")
    assert mounts[:2] == [(env, env), (prefix, prefix)]
