"""An agent's commands run as its own user, and get nothing out of its process all the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.agents import test_containers
from tests.contract.agents.conftest import Stage
from tests.contract.agents.test_episodes import observations, shell

engine, containers = test_containers.engine, test_containers.stage

#: Tries every process of the agent's program: one word each that could be read.
_LOOK = r"""
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    try:
        if b"spider_agent" not in open(f"/proc/{pid}/cmdline", "rb").read():
            continue
    except OSError:
        continue
    print("an agent")
    for name in ("mem", "environ", "maps", "fd/0", "fd/1", "fd/5"):
        try:
            open(f"/proc/{pid}/{name}", "rb").read(0)
            if name in ("environ", "maps"):
                assert open(f"/proc/{pid}/{name}", "rb").read(1)
            print("open:", name)
        except FileNotFoundError:
            pass
        except (OSError, AssertionError):
            print("shut:", name)
"""
LOOK: Any = (
    {
        "call": "file_editor",
        "args": {"command": "create", "path": "/tmp/look.py", "file_text": _LOOK},
    },
    shell("python3 /tmp/look.py"),
)


def test_a_confined_agents_memory_is_shut(stage: Stage) -> None:
    if not stage.pool.confined:
        pytest.skip("workspace local keeps an agent from nothing")
    heard = stage.play([*LOOK, shell("echo it works; tmux -V >/dev/null; id -u")])
    said, after = observations(heard)[1:3]
    assert "an agent" in said
    assert "shut: mem" in said
    assert "open:" not in said
    assert "it works" in after


def test_an_agents_memory_is_shut_in_a_container(containers: test_containers.Stage) -> None:
    heard = containers.play([*LOOK])
    said = observations(heard)[1]
    assert "shut: mem" in said
    assert "open:" not in said
