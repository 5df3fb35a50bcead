"""OpenHands' SDK by itself, as a user would run it over many instances on one machine.

    .venv-agent/bin/python benchmarks/peers/bare_agents.py SPEC.json OUT.json

Runs in the agents' environment (``make agent``) and imports nothing of ours. ``SPEC.json`` is what
``bench_swe`` writes. It imports the SDK once and forks a process an instance, ``workers`` at a
time: clone, put the fault in, make it one commit, let the agent work, take the difference, write
down what was said. No box is closed around an agent, its model is reached directly, and nobody
counts its money or watches its time. The clock runs from the first fork to the last end.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from openhands.sdk import LLM, Agent
from openhands.sdk.conversation.impl.local_conversation import LocalConversation
from openhands.tools.preset.default import get_default_tools
from pydantic import SecretStr

_GIT = ("git", "-c", "user.name=bare", "-c", "user.email=bare@localhost", "-c", "gc.auto=0")


def prepare(task: dict[str, Any], tree: Path) -> None:
    """The tree that the agent is to see: one commit, with the fault in it."""
    tree.parent.mkdir(parents=True)
    subprocess.run(["git", "clone", "-q", "-n", task["source"], str(tree)], check=True)
    git(tree, "checkout", "-q", "--detach", task["base_commit"])
    git(tree, "apply", "--whitespace=nowarn", "-", stdin=task["bug_patch"])
    shutil.rmtree(tree / ".git")
    git(tree, "init", "-q", "-b", "main")
    git(tree, "add", "-A")
    git(tree, "commit", "-q", "--no-verify", "-m", "Start here")


def git(tree: Path, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [*_GIT, *arguments], cwd=tree, input=stdin.encode(), stdout=subprocess.PIPE, check=True
    )
    return done.stdout.decode()


def work(task: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any]:
    began = time.monotonic()
    folder = Path(task["folder"])
    tree = folder / "tree"
    prepare(task, tree)
    (folder / "home").mkdir()
    # A terminal of its own, and none of the user's start-up files.
    os.environ |= {"HOME": str(folder / "home"), "TMUX_TMPDIR": str(folder / "home")}
    prepared = time.monotonic()
    llm = LLM(**spec["llm"], api_key=SecretStr("none"), usage_id="agent")
    agent = Agent(
        llm=llm,
        tools=get_default_tools(enable_browser=False),
        system_prompt_kwargs={"cli_mode": True},
    )
    conversation = LocalConversation(
        agent=agent,
        workspace=str(tree),
        max_iteration_per_run=spec["max_iterations"],
        visualizer=None,
    )
    conversation.send_message(task["instruction"])
    conversation.run()
    history = [event.model_dump(mode="json") for event in conversation.state.events]
    metrics = conversation.conversation_stats.get_combined_metrics().get()
    status = str(conversation.state.execution_status.value)
    conversation.close()
    talked = time.monotonic()
    git(tree, "add", "-A")
    patch = git(tree, "diff", "--cached", "--binary", "HEAD")
    record = {"id": task["id"], "status": status, "patch": patch, "metrics": metrics}
    (folder / "record.json").write_text(json.dumps(record | {"history": history}))
    shutil.rmtree(tree)
    return {
        "id": task["id"],
        "status": status,
        "turns": len(metrics["token_usages"]),
        "patch_bytes": len(patch),
        "prepare": prepared - began,
        "conversation": talked - prepared,
        "patch": time.monotonic() - talked,
    }


def child(task: dict[str, Any], spec: dict[str, Any]) -> None:
    """Never returns: the loop above is the parent's."""
    try:
        result = work(task, spec)
    except BaseException:  # noqa: BLE001 - said, and then the process ends
        result = {"id": task["id"], "status": "error", "said": traceback.format_exc()}
    Path(task["folder"] + ".json").write_text(json.dumps(result))
    os._exit(0)


def run(spec: dict[str, Any]) -> dict[str, Any]:
    gc.collect()
    gc.freeze()  # what is shared with the children stays so
    waiting = list(reversed(spec["tasks"]))
    running = 0
    began = time.monotonic()
    while waiting or running:
        if waiting and running < spec["workers"]:
            task = waiting.pop()
            if os.fork() == 0:
                child(task, spec)
            running += 1
        else:
            os.wait()
            running -= 1
    seconds = time.monotonic() - began
    results = [json.loads(Path(task["folder"] + ".json").read_text()) for task in spec["tasks"]]
    return {"seconds": seconds, "instances": results}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(run(spec)), encoding="utf-8")


if __name__ == "__main__":
    main()
