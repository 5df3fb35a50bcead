"""The root of ``spider-scaffold``: a help that needs nothing, and its exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest

from spider_scaffold.cli import COMMANDS, run

HEAVY = {"torch", "celery", "datasets", "flask", "redis", "transformers", "huggingface_hub"}
HEAVY |= {"pyarrow", "httpx2"}
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("args", [[], *([name] for name in COMMANDS)])
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys\n"
        "from spider_scaffold.cli import run\n"
        f"assert run({[*args, '--help']!r}) == 0\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not set(done.stderr.splitlines()) & HEAVY


def test_help_lists_every_command(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, line) in COMMANDS.items():
        assert f"\n  {name} " in out
        assert line in out


def test_an_unknown_command(capsys: Capture) -> None:
    assert run(["open"]) == 2
    assert "No such command" in capsys.readouterr().err


def test_the_version(capsys: Capture) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("spider-scaffold, version ")
