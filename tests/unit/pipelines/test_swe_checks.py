"""What is found out before agents begin, and what ends a job whose model went away."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError
from spider_worker.pipelines.swe_agent.checks import (
    check_fit,
    check_image,
    check_interpreter,
    probe,
)
from spider_worker.pipelines.swe_agent.parts import Endpoint
from spider_worker.pipelines.swe_agent.silence import Silence
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.docker import DockerWorkspace
from tests.support.boxes import bare_task
from tests.support.fake_docker import running_engine

Handler = Callable[[web.Request], Awaitable[web.Response]]


def probed(
    answer: Callable[[web.Request], web.Response],
    *,
    name: str = "org/m",
    key: str | None = "the-real-key",
    allow_private: bool = True,
) -> Endpoint:
    async def models(request: web.Request) -> web.Response:
        return answer(request)

    async def main() -> Endpoint:
        app = web.Application()
        app.router.add_get("/v1/models", models)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        base = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            job = SweConfig(llm_model=name, llm_base_url=base)
            endpoint = Endpoint(f"openai/{name}", base, key, True)
            return await probe(job, endpoint, allow_private=allow_private)
        finally:
            await runner.cleanup()

    return asyncio.run(main())


def listed(*names: str) -> web.Response:
    return web.json_response({"data": [{"id": name} for name in names]})


def test_the_endpoint_is_asked_with_the_key() -> None:
    keys: list[str | None] = []

    def answer(request: web.Request) -> web.Response:
        keys.append(request.headers.get("Authorization"))
        return listed("org/m")

    probed(answer)
    probed(answer, key=None)
    assert keys == ["Bearer the-real-key", None]


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_said_without_it(status: int) -> None:
    def answer(_: web.Request) -> web.Response:
        return web.Response(status=status, text="bad key: the-real-key")

    with pytest.raises(AuthError, match=r"refused the key of org/m: bad key: \[key\]"):
        probed(answer)
    with pytest.raises(AuthError, match="names none; set llm_api_key_env"):
        probed(answer, key=None)


def test_a_key_that_may_not_list_models_passes() -> None:
    probed(lambda _: web.Response(status=403, text="Missing scopes: api.model.read"))


@pytest.mark.parametrize("status", [404, 405, 500])
def test_an_endpoint_without_a_list_passes(status: int) -> None:
    probed(lambda _: web.Response(status=status))


@pytest.mark.parametrize("body", ["", "[]", "{}", '{"data": [1]}', '{"data": [{"id": []}]}'])
def test_a_list_that_is_none_passes(body: str) -> None:
    probed(lambda _: web.Response(text=body))


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (["m"], "openai/m"),
        (["openai/m", "m"], "openai/openai/m"),
        (["another"], "openai/openai/m"),  # it may list only some of its models
    ],
)
def test_the_server_is_asked_for_the_name_that_it_lists(names: list[str], asked: str) -> None:
    found = probed(lambda _: listed(*names), name="openai/m")
    assert found.model == asked


def test_nobody_at_the_address_is_said_before_anything_begins() -> None:
    job = SweConfig(llm_model="m", llm_base_url="http://127.0.0.1:9/v1")
    endpoint = Endpoint("openai/m", job.llm_base_url, None, True)
    with pytest.raises(FatalJobError, match="llm_base_url: nobody answers at http://127"):
        asyncio.run(probe(job, endpoint, allow_private=True))


def test_a_private_address_is_not_asked() -> None:
    with pytest.raises(FatalJobError, match=r"llm_base_url leads to 127.0.0.1, a private"):
        probed(lambda _: listed(), allow_private=False)


def test_an_agent_that_calls_by_itself_has_nothing_to_be_asked() -> None:
    endpoint = Endpoint("anthropic/m", None, "k", False)
    asyncio.run(probe(SweConfig(llm_model="anthropic/m"), endpoint, allow_private=False))


def task(kind: str) -> Task:
    return Task("one__one.1", "one/one", "It is broken.", Origin(kind, "the-ref"))


@pytest.mark.parametrize(
    ("kinds", "workspace", "said"),
    [
        (["image", "image"], "bwrap", r"2 of the 2 .*\(one__one.1: the-ref\); .*: docker$"),
        (["bundle", "image"], "local", "1 of the 2 .*: docker$"),
        (["image", "git"], "docker", "1 of the 2 selected instances bring .*: bwrap$"),
    ],
)
def test_tasks_that_do_not_fit_the_workspace(kinds: list[str], workspace: str, said: str) -> None:
    with pytest.raises(FatalJobError, match=said):
        check_fit([task(kind) for kind in kinds], workspace)


def test_tasks_that_fit() -> None:
    check_fit([task("image")], "docker")
    check_fit([task("git"), task("bundle"), task("dir")], "bwrap")


def test_an_image_is_here_before_agents_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = task("image")
    with running_engine(tmp_path, monkeypatch) as engine:
        with pytest.raises(FatalJobError, match=r"the image the-ref of one__one.1 cannot be pull"):
            asyncio.run(check_image(one))
        bare_task(engine.image("the-ref", pulled=False))
        asyncio.run(check_image(one))
        asyncio.run(check_image(one))
        assert [call[-1] for call in engine.calls("pull")] == ["the-ref", "the-ref"]


def test_an_interpreter_that_does_not_run_in_the_image_is_said_before_agents_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = DockerWorkspace(tmp_path / "boxes")

    def check(python: str) -> None:
        asyncio.run(check_interpreter(task("image"), workspace, python))

    with running_engine(tmp_path, monkeypatch) as engine:
        tree = engine.image("the-ref")
        bare_task(tree)
        newer = tree.parent / "opt" / "python"
        newer.parent.mkdir()
        newer.write_text("#!/bin/sh\necho libc.so.6: version GLIBC_2.99 not found >&2; exit 1\n")
        newer.chmod(0o755)
        check(sys.executable)
        said = r"/opt/python does not run in the image the-ref of one__one.1: .*_2.99 not .* uv's"
        with pytest.raises(EngineUnavailable, match=said):
            check("/opt/python")
        with pytest.raises(EngineUnavailable, match=r"exec failed: .*no such file or directory"):
            check("/no/such/python")
        engine.fail("create", "bind source path does not exist: /a")
        with pytest.raises(FatalJobError, match=r"no container of the-ref .* does not exist: /a"):
            check(sys.executable)
        assert not engine.containers()


def record(status: str, *roles: str) -> dict[str, Any]:
    return {"status": status, "error": "no route", "messages": [{"role": role} for role in roles]}


def test_a_row_of_instances_without_an_answer_ends_the_job() -> None:
    silence = Silence("m", limit=3)
    mute, spoke = record("llm_error", "system", "user"), record("llm_error", "user", "assistant")
    for one in (mute, mute, spoke, mute, mute, record("workspace_error"), record("cancelled")):
        silence.ended(one)
    with pytest.raises(FatalJobError, match=r"3 instances in a row .* answer of m; .*no route"):
        silence.ended(mute)


def test_agents_that_broke_by_themselves_say_nothing_about_the_model() -> None:
    silence = Silence("m", limit=2)
    mute, broken = record("llm_error", "user"), record("agent_error", "user")
    for one in (broken, broken, broken, mute, broken):
        silence.ended(one)
    with pytest.raises(FatalJobError, match="2 instances in a row"):
        silence.ended(mute)


@pytest.mark.parametrize("status", ["agent_error", "workspace_error", "cancelled"])
def test_an_answer_is_one_whatever_broke_after_it(status: str) -> None:
    silence = Silence("m", limit=2)
    mute = record("llm_error", "user")
    for one in (mute, record(status, "user", "assistant"), mute):
        silence.ended(one)
