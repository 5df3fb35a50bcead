"""An agent's shell before its first command, in the agents' environment."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[3]

WAIT = """
import sys
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from openhands.tools.terminal import TerminalAction
from spider_agent import episode

def wait(execute):
    one = episode._Episode.__new__(episode._Episode)
    one._conversation = SimpleNamespace(execute_tool=lambda name, action: execute(action))
    one._wait_for_shell()
"""

#: A shell that reads its start-up files for longer than the SDK waits for it.
SLOW = """
from openhands.tools.terminal.terminal.subprocess_terminal import SubprocessTerminal
from openhands.tools.terminal.terminal.terminal_session import TerminalSession

session = TerminalSession(SubprocessTerminal(sys.argv[2]))
session.initialize()
wait(session.execute)
for number in range(4):
    seen = session.execute(TerminalAction(command=f"echo said-{number}; (exit {number})"))
    print(">", f"said-{number}" in seen.text, seen.exit_code)
session.close()
"""

#: A terminal whose prompts come late: the first commands are ended by those of earlier ones,
#: whatever of their output there is by then.
LATE = """
statuses = [0, None, 102, 0]

def execute(action):
    asked = action.command
    print(">", asked)
    own = int(asked.removeprefix("(exit ").removesuffix(")"))
    return SimpleNamespace(text="ready-1", exit_code=statuses.pop(0) if statuses else own)

episode._PAUSE = 0
wait(execute)
"""


def told(python: str, program: str, folder: Path) -> list[str]:
    done = subprocess.run(
        [python, "-c", WAIT + program, str(ROOT), str(folder)],
        env={**os.environ, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("> ")]


def test_the_first_commands_get_their_own_answers(python: str, tmp_path: Path) -> None:
    (tmp_path / ".bashrc").write_text("sleep 2.5\n")
    assert told(python, SLOW, tmp_path) == [f"> True {number}" for number in range(4)]


def test_a_shell_is_waited_for_until_its_prompts_are_in_step(python: str, tmp_path: Path) -> None:
    asked = [f"> (exit {100 + number})" for number in range(6)]
    # In step at the third, not at the fourth, then twice.
    assert told(python, LATE, tmp_path) == asked
