"""What the pool's process has imported before it forks."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from spider_worker.agents.interpreter import QUIET, library
from tests.support.agent_model import running_model

SCRIPT = """
import os, sys, tempfile
sys.path.insert(0, {library!r})
from openhands.tools.terminal.terminal import terminal_session
polled = terminal_session.POLL_INTERVAL
import spider_agent.episode
from spider_agent.lines import LineWriter, Request
from spider_agent.zygote import LATER, warm_up
warm_up()
import json
missing = [name for name in LATER if name not in sys.modules]
threads = len(os.listdir("/proc/self/task"))
before = set(sys.modules)
from pydantic import BaseModel
made = []
complete = BaseModel.model_rebuild.__func__
def rebuild(cls, **options):
    made.append(cls.__name__)
    return complete(cls, **options)
BaseModel.model_rebuild = classmethod(rebuild)
folder = tempfile.mkdtemp()
llm = {{"model": "openai/scripted", "base_url": {url!r}, "api_key": "none"}}
request = Request("Do it. [[part:play]]", folder, folder + "/.state", llm, max_iterations=5)
spider_agent.episode.run_episode(request, LineWriter(open(os.devnull, "w")))
polled = [polled, terminal_session.POLL_INTERVAL]
later = sorted(set(sys.modules) - before)
print(json.dumps([missing, threads, later, made, polled]), flush=True)
os._exit(0)
"""


def test_an_episode_imports_and_completes_next_to_nothing(python: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    names = ("TMPDIR", "TMUX_TMPDIR")
    places = {"HOME": str(tmp_path / "home"), **dict.fromkeys(names, str(tmp_path))}
    env = {**QUIET, **places, "PATH": os.environ["PATH"]}
    turns = [{"call": "terminal", "args": {"command": "echo on"}}]
    with running_model({"play": turns}) as model:
        script = SCRIPT.format(library=str(library(tmp_path / "lib")), url=model.base_url)
        done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, env=env)
        # It ends without a word to its terminal, as an episode does, and has no warden.
        subprocess.run(["tmux", "-L", "openhands", "kill-server"], env=env, check=True)
        assert len(model.requests) >= 2, done.stderr
    missing, threads, later, made, (theirs, ours) = json.loads(done.stdout.splitlines()[-1])
    assert missing == []  # names that the pinned libraries do not have any more
    assert threads == 1  # or nothing could be forked
    assert len(later) < 20, later  # there are three hundred without
    assert theirs > ours > 0  # seconds; the name is the SDK's, and may go
    assert made == []  # types that are only completed when they are needed
