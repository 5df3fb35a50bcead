"""Episodes of the real SDK: how they end, what they tell, and what they leave."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from spider_worker.agents import episode
from spider_worker.agents.episode import Heard
from spider_worker.agents.interpreter import QUIET
from spider_worker.agents.pool import AgentPool
from spider_worker.workspaces.pids import can_bound, pids_group
from tests.contract.agents.conftest import PRICE, Stage


def shell(command: str, **fields: Any) -> dict[str, Any]:
    return {"call": "terminal", "args": {"command": command}, **fields}


def observations(heard: Heard) -> list[str]:
    """What the tools answered, in order."""
    found = []
    for message in heard.messages:
        if message["role"] == "tool":
            content = message["content"]
            found.append(
                content if isinstance(content, str) else "".join(one["text"] for one in content)
            )
    return found


def alive(marker: str) -> list[str]:
    """Command lines of processes that hold ``marker``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line:
                found.append(line.decode(errors="replace"))
    return found


def test_it_works_in_the_tree_and_tells_what_the_model_saw(stage: Stage) -> None:
    heard = stage.play(
        [
            shell("echo one; pwd", reasoning="first look"),
            {"calls": [("terminal", {"command": "echo a"}), ("terminal", {"command": "echo b"})]},
            {"call": "terminal", "args": "{no json"},
            {
                "call": "file_editor",
                "args": {
                    "command": "create",
                    "path": f"{stage.path}/made.py",
                    "file_text": "made = 1\n",
                },
            },
        ]
    )
    assert (heard.status, heard.error) == ("finished", None)
    assert (stage.tree / "made.py").read_text() == "made = 1\n"
    model = stage.model
    assert model is not None
    last = model.requests[-1]
    sent = [{k: v for k, v in one.items() if k != "reasoning_content"} for one in heard.messages]
    # Beyond what the model was shown last: its last answer, and what became of it.
    assert sent[: len(last["messages"])] == last["messages"]
    assert [one["role"] for one in sent[len(last["messages"]) :]] == ["assistant", "tool"]
    assert heard.tools == last["tools"]
    assert heard.messages[2]["reasoning_content"] == "first look"
    assert [call["function"]["arguments"] for call in heard.messages[4]["tool_calls"]] == [
        json.dumps({"command": "echo a"}),
        json.dumps({"command": "echo b"}),
    ]
    assert "one" in observations(heard)[0]
    assert stage.path in observations(heard)[0]
    assert heard.turns == 5
    assert heard.metrics["accumulated_cost"] == pytest.approx(5 * 110 * PRICE)
    assert {event["kind"] for event in heard.history} >= {"SystemPromptEvent", "ActionEvent"}


def test_the_proxy_adds_the_key_and_counts(stage: Stage) -> None:
    stage.play([shell("true")])
    assert stage.model is not None
    assert set(stage.model.keys) == {"Bearer the-real-key"}
    ticket = stage.ticket
    assert ticket is not None
    assert (ticket.calls, ticket.answers, ticket.prompt_tokens) == (2, 2, 200)
    assert ticket.cost == pytest.approx(2 * 110 * PRICE)


def test_plain_text_finishes(stage: Stage) -> None:
    heard = stage.play([{"text": "There is nothing to do."}])
    assert heard.status == "finished"
    assert heard.messages[-1]["role"] == "assistant"


def test_going_round_in_circles_is_stuck(stage: Stage) -> None:
    heard = stage.play([shell("cat nothing-there")] * 12)
    assert heard.status == "stuck"
    assert heard.turns < 12


def test_its_iterations_are_bounded(stage: Stage) -> None:
    heard = stage.play([shell(f"echo {number}") for number in range(9)], max_iterations=3)
    assert heard.status == "max_iterations"
    assert heard.turns == 3
    assert len(observations(heard)) == 3


def test_its_money_is_bounded_by_the_agent_and_by_the_proxy(stage: Stage) -> None:
    turns = [shell(f"echo {number}") for number in range(9)]
    heard = stage.play(turns, max_budget=2.5 * 110 * PRICE)
    assert (heard.status, heard.turns) == ("max_budget", 3)
    heard = stage.play(turns, max_cost=1.5 * 110 * PRICE)  # an agent that does not count
    assert heard.status == "llm_error"
    assert "the cap of $" in str(heard.error)
    assert stage.ticket is not None
    assert stage.ticket.calls == 2


def test_a_failing_endpoint_is_the_models_error(stage: Stage) -> None:
    heard = stage.play([shell("echo before"), {"status": 500}])
    assert heard.status == "llm_error"
    assert "before" in observations(heard)[0]
    assert stage.ticket is not None
    assert stage.ticket.failures >= 1


@pytest.mark.parametrize("code", [400, 404, 422])
def test_a_request_that_is_wrong_is_an_end_of_its_own(stage: Stage, code: int) -> None:
    heard = stage.play([shell("echo before"), {"status": code, "message": "no such field"}])
    assert heard.status == "llm_refused"
    assert "no such field" in str(heard.error)
    assert "before" in observations(heard)[0]


def test_a_conversation_that_is_too_long_is_an_end_of_its_own(stage: Stage) -> None:
    said = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens"
    heard = stage.play([shell("echo before"), {"status": 400, "message": said}])
    assert heard.status == "context_window"
    assert "4096 tokens" in str(heard.error)
    assert "before" in observations(heard)[0]


def test_a_refused_key_is_known_as_one(stage: Stage) -> None:
    heard = stage.play([{"status": 401, "message": "no such key"}])
    assert heard.status == "llm_error"
    assert stage.ticket is not None
    assert "no such key" in str(stage.ticket.refused)
    assert stage.ticket.answers == 0


def test_a_hung_tool_is_ended_with_all_that_it_started(stage: Stage) -> None:
    marker = f"98{os.getpid()}"
    heard = stage.play(
        [shell("echo kept"), shell(f"setsid nohup sleep {marker} & sleep {marker}")], timeout=8
    )
    assert heard.status == "timeout"
    assert "8 s" in str(heard.error)
    assert not alive(marker)
    # What was done until then is kept, the call that hung included.
    assert "kept" in observations(heard)[0]
    assert marker in heard.messages[-1]["tool_calls"][0]["function"]["arguments"]


def test_a_hung_model_is_ended(stage: Stage) -> None:
    heard = stage.play([shell("echo kept"), {"hang": True}], timeout=8)
    assert heard.status == "timeout"
    assert "kept" in observations(heard)[0]
    assert heard.turns == 1


def test_an_agent_that_does_not_come_up_is_no_timeout(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(episode, "_START_SECONDS", 0.001)
    heard = stage.play([shell("echo never")])
    assert (heard.status, heard.error) == (
        "agent_error",
        "the agent did not come up within 0.001 s",
    )


def test_what_was_heard_outlives_the_pool(stage: Stage) -> None:
    """The process that forks agents may be killed for its memory while they are at work."""

    def lose(line: Any, _: Heard) -> None:
        if line["op"] == "messages" and line["messages"][-1]["role"] == "tool":
            assert stage.pool._process is not None
            stage.pool._process.kill()

    heard = stage.play([shell("echo kept"), {"hang": True}], listener=lose)
    assert heard.status == "agent_error"
    assert "lost with what it ran in" in str(heard.error)
    assert "kept" in observations(heard)[0]
    assert heard.turns == 1


def test_it_ends_when_it_is_told_to(stage: Stage) -> None:
    marker = f"97{os.getpid()}"

    async def at_work() -> None:
        while not alive(marker):  # noqa: ASYNC110 - a process of the agent's
            await asyncio.sleep(0.05)

    command = f"setsid nohup sleep {marker} & sleep {marker}"
    heard = stage.play([shell(command)], stop=at_work)
    assert heard.status == "cancelled"
    assert not alive(marker)
    assert heard.messages[-1]["role"] == "assistant"


def test_an_agent_that_kills_its_own_process_is_told_of(stage: Stage) -> None:
    if not stage.pool.confined:
        pytest.skip("workspace local keeps an agent from nothing")
    heard = stage.play([shell("echo kept"), shell("pkill -9 -f spider_agent; kill -9 $PPID")])
    assert heard.status in ("agent_error", "finished")
    assert "kept" in observations(heard)[0]


def test_it_sees_nothing_of_the_workers_environment(stage: Stage, canary: str) -> None:
    heard = stage.play([shell("env"), shell("cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'")])
    own, everyones = observations(heard)[:2]
    assert "PATH=" in own
    assert "PATH=" in everyones
    assert canary not in own
    assert "the-real-key" not in own
    assert not [name for name in QUIET if name in own]
    if stage.pool.confined:
        assert canary not in everyones
        assert "the-real-key" not in everyones


def test_a_confined_agent_sees_its_tree_alone(stage: Stage) -> None:
    if not stage.pool.confined:
        pytest.skip("workspace local keeps an agent from nothing")
    other = stage.tree.parent.parent / "box-other"
    other.mkdir(exist_ok=True)
    (other / "secret").write_text("another instance")
    heard = stage.play(
        [
            shell(f"ls -A {other.parent}; cat {other}/secret; echo end"),
            shell(
                "touch /usr/mine /etc/mine /root/mine; echo x > /proc/sys/kernel/hostname; id -u"
            ),
            shell("unshare -Ur true; mount -t tmpfs none /mnt; echo end"),
            shell("ls /proc | grep -c '^[0-9]'; hostname"),
            shell(
                "python3 -c \"import socket; socket.create_connection(('127.0.0.1', 22), 2)\"; "
                "ip -o link | grep -v ' lo:'; echo end"
            ),
        ]
    )
    neighbours, system, kernel, processes, network = observations(heard)[:5]
    assert "another instance" not in neighbours
    assert "box-" not in neighbours.replace(f"{other}/secret", "")
    assert system.count("cannot touch") == 3
    assert "hostname: " in system
    assert "unshare: " in kernel
    assert "mount: " in kernel
    assert int(processes.split()[0]) < 20
    assert "Error" in network
    for name in ("/usr/mine", "/etc/mine", "/root/mine"):
        assert not Path(name).exists()


def test_a_fork_bomb_stays_in_its_group(stage: Stage) -> None:
    if not can_bound():
        pytest.skip("no control group of process numbers may be made here")
    marker = f"77{os.getpid()}"
    bomb = f"for i in $(seq 400); do (sleep {marker} &) ; done; echo done"
    with pids_group(stage.tree.parent.name, 120) as group:
        heard = stage.play([shell(bomb), shell("echo over")], cgroup=group, timeout=60)
        assert group is not None
        assert int((group.parent / "pids.max").read_text()) == 120
        # The kernel's own count of the processes that it did not let it have.
        refused = (group.parent / "pids.events").read_text().split()
        assert refused[0] == "max"
        assert int(refused[1]) > 0
    # Not even the agent's next command could be started, or it waited for one that could not.
    assert "Resource temporarily unavailable" in " ".join(observations(heard))
    assert heard.status is not None
    assert not alive(marker)


def test_a_lost_pool_is_started_again(stage: Stage) -> None:
    process = stage.pool._process
    assert process is not None
    process.kill()
    process.wait()
    assert stage.play([{"text": "Still here."}]).status == "finished"


@pytest.mark.parametrize("confined", [True, False])
def test_without_tmux_the_model_sees_no_terminals_marks(
    confined: bool, run: Any, python: str, root: Path, tmp_path: Path
) -> None:
    """The SDK then types what it runs into a shell, and shells mark what is typed so fast."""
    if confined and shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap (make system installs it)")
    folder = root / f"env-{tmp_path.name}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    no_tmux = folder / "bin" / "tmux"
    no_tmux.write_text("#!/bin/sh\nexit 127\n")
    no_tmux.chmod(0o755)
    pool = AgentPool(
        python,
        folder=tmp_path,
        boxes=root / "boxes" if confined else None,
        shell_python=f"{folder}/bin/python",
    )
    run(pool.start())
    try:
        heard = Stage(pool, run, root, tmp_path).play([shell("which tmux"), shell("echo two")])
    finally:
        run(pool.close())
    said = observations(heard)
    assert str(no_tmux) in said[0]
    assert "two" in said[1].splitlines()
    assert "\x1b" not in "".join(said)


def test_interpreters_under_tmp_are_seen_there(
    run: Any, python: str, root: Path, tmp_path: Path
) -> None:
    """Where the project lies there, say: an agent's own ``/tmp`` must not hide them."""
    if shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap (make system installs it)")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pool = AgentPool(
        python, folder=tmp_path, boxes=root / "boxes", shell_python=f"{folder}/bin/python"
    )
    run(pool.start())
    try:
        stage = Stage(pool, run, root, tmp_path)
        heard = stage.play([shell("which python; python -c 'print(6 * 7)'; ls /tmp; touch /tmp/x")])
    finally:
        run(pool.close())
        shutil.rmtree(folder)
    said = observations(heard)[0]
    assert f"{folder}/bin/python" in said
    assert "42" in said
    assert "touch: " not in said
    assert "spider-agents-" not in said
