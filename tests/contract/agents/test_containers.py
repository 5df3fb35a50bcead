"""Episodes of the real SDK in containers, as far as a ``docker`` without an engine has them."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import WorkspaceError
from spider_worker.agents.container import ContainerHost, container_mounts
from spider_worker.agents.episode import Heard
from spider_worker.agents.proxy import LlmProxy, Prices, Ticket
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.docker import DockerBox, DockerWorkspace
from spider_worker.workspaces.repository import prepare, take_patch
from tests.contract.agents.conftest import PRICE
from tests.contract.agents.test_episodes import observations, shell
from tests.support.agent_model import AgentModel, Turn, running_model
from tests.support.boxes import alive, bare_task
from tests.support.fake_docker import FakeDocker, running_engine

IMAGE = "swebench/sweb.eval.x86_64.tests_1776_bare-1:latest"
TASK = Task("tests__bare-1", "tests/bare", "p", Origin("image", IMAGE))
REQUEST = {"max_iterations": 20, "max_budget": None, "condenser": False}


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    with running_engine(tmp_path, monkeypatch) as fake:
        tree = fake.image(IMAGE)
        bare_task(tree)
        fake.give_testbed(tree)
        yield fake


async def never() -> None:
    await asyncio.Event().wait()


def ignore(line: Mapping[str, Any], heard: Heard) -> None: ...


class Stage:
    """Containers with a host, and a scripted model behind a proxy. ``heard`` is the
    last episode, ``patch`` what it left, ``ticket`` its right to call the model."""

    def __init__(self, folder: Path, python: str, sockets: Path) -> None:
        self.python = python
        self.sockets = sockets
        mounts = container_mounts(python, folder / "containers", sockets)
        self.workspace = DockerWorkspace(folder / "boxes", mounts=mounts)
        self.log = folder / "agent.log"
        self.model: AgentModel | None = None
        self.ticket: Ticket | None = None
        self.heard = Heard()
        self.patch = ""

    def play(self, part: Sequence[Turn], **options: Any) -> Heard:
        with running_model({"play": part}) as self.model:
            return asyncio.run(self._play(self.model, options))

    async def _play(self, model: AgentModel, options: dict[str, Any]) -> Heard:
        async with self.host(model) as host, self.workspace.open(TASK) as box:
            await prepare(box, TASK)
            self.heard = await self.episode(host, box, "play", **options)
            self.patch = await take_patch(box)
            return self.heard

    def host(self, model: AgentModel) -> Hosting:
        return Hosting(self, model)

    async def episode(
        self,
        host: ContainerHost,
        box: DockerBox,
        part: str,
        *,
        timeout: float = 120.0,  # noqa: ASYNC109
        listener: Callable[[Mapping[str, Any], Heard], None] = ignore,
        stop: Callable[[], Awaitable[None]] = never,
    ) -> Heard:
        self.ticket = host.ticket(max_calls=None, max_cost=None)
        return await host.run(
            box,
            {**REQUEST, "instruction": f"Mend it. [[part:{part}]]"},
            ticket=self.ticket,
            log=self.log,
            timeout=timeout,
            listener=listener,
            stop=stop,
        )


class Hosting:
    """A host with its proxy, as a context."""

    def __init__(self, stage: Stage, model: AgentModel) -> None:
        self._proxy = LlmProxy(
            model.base_url,
            "the-real-key",
            socket=stage.sockets / "model",
            prices=Prices(PRICE, PRICE),
        )
        llm = {"model": "openai/scripted", "num_retries": 0}
        self._host = ContainerHost(stage.python, llm, proxy=self._proxy)

    async def __aenter__(self) -> ContainerHost:
        await self._proxy.start()
        return self._host

    async def __aexit__(self, *_: object) -> None:
        await self._host.close()


@pytest.fixture
def stage(engine: FakeDocker, python: str, tmp_path: Path) -> Iterator[Stage]:
    sockets = Path(tempfile.mkdtemp(prefix="spider-"))
    yield Stage(tmp_path, python, sockets)
    shutil.rmtree(sockets)


def test_it_works_in_the_images_tree_with_the_images_python(
    stage: Stage, engine: FakeDocker
) -> None:
    marker = f"97{os.getpid()}"
    heard = stage.play(
        [
            shell("pwd; python -c 'import sys; print(sys.prefix)'; git log --oneline | cat"),
            {"calls": [("terminal", {"command": "echo a"}), ("terminal", {"command": "echo b"})]},
            {
                "call": "file_editor",
                "args": {
                    "command": "str_replace",
                    "path": "/testbed/a.txt",
                    "old_str": "one",
                    "new_str": "two",
                },
            },
            shell("ls -d ~; echo $HOME; echo kept > ~/mine; cat ~/mine"),
            shell(f"setsid nohup sleep {marker} >/dev/null 2>&1 & sleep 0.1"),
        ]
    )
    assert (heard.status, heard.error) == ("finished", None)
    looked, first, second, _, home = observations(heard)[:5]
    assert looked.startswith("/testbed\n/opt/miniconda3/envs/testbed\n"), looked
    assert "Start here" in looked
    assert "a" in first.splitlines()
    assert "b" in second.splitlines()
    assert "\x1b" not in "".join(observations(heard))
    assert home.splitlines()[:3] == ["/tmp/.agent-home", "/tmp/.agent-home", "kept"]
    assert "+two" in stage.patch
    model = stage.model
    assert model is not None
    last = model.requests[-1]["messages"]
    assert heard.messages[: len(last)] == last
    assert heard.tools == model.requests[-1]["tools"]
    assert heard.turns == 6
    assert not alive(marker), "what it left running"
    assert stage.ticket is not None
    assert stage.ticket.cost == pytest.approx(6 * 110 * PRICE)
    assert set(model.keys) == {"Bearer the-real-key"}
    assert not engine.containers()


def test_the_key_and_the_workers_environment_are_nowhere(
    stage: Stage, engine: FakeDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary")
    heard = stage.play(
        [
            shell("env; cat /proc/*/environ 2>/dev/null | tr '\\0' '\\n'"),
            shell("cat /proc/*/cmdline 2>/dev/null | tr '\\0' ' '"),
            shell("ls -A / /tmp /run/spider /run/spider/lib; touch /run/spider/lib/x"),
            shell("python -c \"import socket; socket.create_connection(('127.0.0.1', 22), 2)\""),
        ]
    )
    assert heard.status == "finished"
    said = "".join(observations(heard))
    assert "PATH=" in said
    assert "spider_agent" in said
    assert "Read-only file system" in said
    assert "Connection refused" in said
    outside = json.dumps([engine.calls(), engine.environments()])
    assert stage.ticket is not None
    for secret in ("the-real-key", "hf_canary", "HF_TOKEN"):
        assert secret not in said
        assert secret not in outside
    assert stage.ticket.key not in outside
    assert stage.ticket.key not in said


def test_a_key_of_its_own_comes_in_by_standard_input_alone(
    stage: Stage, engine: FakeDocker
) -> None:
    """Without a proxy: the network that it then has is no matter here, its calls fail."""
    llm = {"model": "openai/scripted", "api_key": "the-own-key", "num_retries": 0,
           "base_url": "http://127.0.0.1:9/v1"}  # fmt: skip
    host = ContainerHost(stage.python, llm, proxy=None)

    async def run() -> Heard:
        async with stage.workspace.open(TASK) as box:
            assert host.ticket(max_calls=1, max_cost=1.0) is None
            return await stage.episode(host, box, "play")

    heard = asyncio.run(run())
    assert heard.status == "llm_error"
    assert "the-own-key" not in json.dumps([engine.calls(), engine.environments()])
    assert "the-own-key" not in stage.log.read_text()


def test_a_hung_tool_is_ended_with_all_that_it_started(stage: Stage, engine: FakeDocker) -> None:
    marker = f"98{os.getpid()}"
    hung = shell(f"echo 1 > made.txt; setsid nohup sleep {marker} & sleep {marker}")
    heard = stage.play([shell("echo kept"), hung], timeout=12)
    assert heard.status == "timeout"
    assert "12 s" in str(heard.error)
    assert not alive(marker)
    assert "kept" in observations(heard)[0]
    assert marker in heard.messages[-1]["tool_calls"][0]["function"]["arguments"]
    assert "made.txt" in stage.patch, "the tree outlives the processes"
    assert not engine.containers()


@pytest.mark.parametrize("for_good", [False, True])
def test_a_container_that_dies_is_told_as_the_end(
    stage: Stage, engine: FakeDocker, for_good: bool
) -> None:
    def listen(line: Mapping[str, Any], heard: Heard) -> None:
        if line["op"] == "messages" and len(heard.messages) == 5:
            (container,) = engine.containers()
            engine.die(container.name, for_good=for_good)

    turns = [shell("echo kept"), shell("sleep 600")]
    if for_good:
        with pytest.raises(WorkspaceError, match="No such container"):  # of take_patch
            stage.play(turns, listener=listen)
    else:
        stage.play(turns, listener=listen)
    assert stage.heard.status == "workspace_error"
    assert stage.heard.error == "its container ended while it was at work (137)"
    assert "kept" in observations(stage.heard)[0]


def test_an_agent_that_kills_its_own_process_is_told_of(stage: Stage) -> None:
    heard = stage.play([shell("echo kept"), shell("kill -9 $PPID; sleep 60")])
    assert heard.status == "agent_error"
    assert "ended with 137 and no last word" in str(heard.error)
    assert "kept" in observations(heard)[0]


def test_many_episodes_wait_without_a_thread_each(stage: Stage) -> None:
    """A loop has few threads: with one held by each episode, the next could not even start."""
    second_began = asyncio.Event()

    def listen(line: Mapping[str, Any], _: Heard) -> None:
        if line["op"] == "ready":
            second_began.set()

    async def run(model: AgentModel) -> list[Heard]:
        asyncio.get_running_loop().set_default_executor(
            concurrent.futures.ThreadPoolExecutor(max_workers=1)
        )
        async with (
            stage.host(model) as host,
            stage.workspace.open(TASK) as one,
            stage.workspace.open(TASK) as other,
        ):
            return await asyncio.gather(
                stage.episode(host, one, "hangs", stop=second_began.wait, timeout=60),
                stage.episode(host, other, "ends", listener=listen),
            )

    with running_model({"hangs": [{"hang": True}], "ends": [{"text": "Done."}]}) as model:
        first, second = asyncio.run(run(model))
    assert (first.status, second.status) == ("cancelled", "finished")


def test_an_interpreter_that_does_not_run_there_is_told_of(
    stage: Stage, engine: FakeDocker
) -> None:
    stage.python = f"/no/such/python-{uuid.uuid4().hex}"
    heard = stage.play([])
    assert heard.status == "agent_error"
    assert "no such file or directory" in str(heard.error)
    assert not engine.containers()


def test_no_docker_at_all_is_the_workspaces_error(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def run(model: AgentModel) -> None:
        async with stage.host(model) as host, stage.workspace.open(TASK) as box:
            with monkeypatch.context() as patched:
                patched.setenv("PATH", str(tmp_path))
                with pytest.raises(WorkspaceError, match="docker exec could not be started"):
                    await stage.episode(host, box, "play")

    with running_model({"play": []}) as model:
        asyncio.run(run(model))
