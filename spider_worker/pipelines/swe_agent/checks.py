"""What is found out before any money is spent: whether the model's endpoint answers and takes the
key, whether the data set's tasks can be opened in the workspace, and whether agents run there."""

from __future__ import annotations

__all__ = ["check_fit", "check_image", "check_interpreter", "check_remotes", "probe"]

import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

import aiohttp

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError, WorkspaceError
from spider_worker.agents.interpreter import HELP_IN_IMAGES
from spider_worker.engines.network import guarded_connector
from spider_worker.pipelines.swe_agent.parts import Endpoint
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import Box, Workspace
from spider_worker.workspaces.docker_client import docker
from spider_worker.workspaces.remote import remote_options

_SECONDS: Final = 30.0
_CONNECT_SECONDS: Final = 15.0
_PULL_SECONDS: Final = 3600.0
_RUN_SECONDS: Final = 60.0
_LISTED_BYTES: Final = 8 << 20
#: What the agents' SDK needs of the C library, and of libraries that a compiled Python has outside
#: of its folder.
_NEEDED: Final = "import ctypes, ssl"


async def probe(job: SweConfig, endpoint: Endpoint, *, allow_private: bool) -> Endpoint:
    """Ask an endpoint behind the proxy for the list of its models. One that has none, or that
    takes its time, passes: nothing is known then. Returns the endpoint, under the model's name
    without its prefix where it lists that one alone.

    Raises AuthError where it refuses the key, FatalJobError where nobody answers.
    """
    if not endpoint.proxied:
        return endpoint
    assert endpoint.base_url is not None
    where = "llm_base_url" if job.llm_base_url is not None else "llm_model"
    url = endpoint.base_url.rstrip("/") + "/models"
    headers = {"Authorization": f"Bearer {endpoint.key}"} if endpoint.key else {}
    try:
        async with (
            aiohttp.ClientSession(
                connector=guarded_connector(
                    allow_private=allow_private, proxied=False, where=where
                ),
                timeout=aiohttp.ClientTimeout(total=_SECONDS, connect=_CONNECT_SECONDS),
            ) as session,
            # A redirect could lead anywhere, with the key.
            session.get(url, headers=headers, allow_redirects=False) as answer,
        ):
            status, said = answer.status, await answer.content.read(_LISTED_BYTES)
    except (aiohttp.ClientError, OSError) as error:
        if isinstance(error, TimeoutError) and not isinstance(
            error, aiohttp.ConnectionTimeoutError
        ):
            return endpoint
        raise FatalJobError(
            f"{where}: nobody answers at {endpoint.base_url} ({type(error).__name__}: {error}); "
            "start the server, or mend the address, and submit again"
        ) from error
    text = said.decode("utf-8", "replace")
    # A key may be good for calls of models and for nothing else.
    if status in (401, 403) and "scope" not in text:
        raise AuthError(_refused(job, endpoint, text))
    if status == 200 and job.llm_base_url is not None:
        name = _listed(endpoint.model.removeprefix("openai/"), text)
        return dataclasses.replace(endpoint, model=f"openai/{name}")
    return endpoint


def _refused(job: SweConfig, endpoint: Endpoint, said: str) -> str:
    """The words for an endpoint that does not take the key."""
    said = " ".join(said.split())[:500]
    if endpoint.key is None:
        return (
            f"the model's endpoint wants a key for {job.llm_model}, and the job names none; set "
            f"llm_api_key_env: {said}"
        )
    said = said.replace(endpoint.key, "[key]")
    return f"the model's endpoint refused the key of {job.llm_model}: {said}"


def _listed(name: str, text: str) -> str:
    """``name``, or what follows its first slash where the list has that and not the whole: names
    are written with LiteLLM's word for the protocol, and with an owner's, which looks the same."""
    try:
        listed: Any = json.loads(text)["data"]
        names = {entry["id"] for entry in listed}
    except (ValueError, TypeError, KeyError):
        return name
    bare = name.partition("/")[2]
    return bare if name not in names and bare in names else name


def check_fit(tasks: Sequence[Task], workspace: str) -> None:
    """Raise FatalJobError where a workspace of this kind cannot open one of the tasks."""
    images = workspace == "docker"
    unfit = [task for task in tasks if (task.origin.kind == "image") != images]
    if not unfit:
        return
    one, count = unfit[0], f"{len(unfit)} of the {len(tasks)} selected"
    if images:
        raise FatalJobError(
            f"workspace: docker opens container images, and {count} instances bring a repository "
            f"instead ({one.instance_id}); take workspace: bwrap"
        )
    raise FatalJobError(
        f"workspace: {workspace} opens repositories, and {count} instances come as container "
        f"images ({one.instance_id}: {one.origin.ref}); take workspace: docker"
    )


def check_remotes(tasks: Iterable[Task], *, allow_private: bool) -> None:
    """Raise FatalJobError where a repository is to come from an address that no job may reach.
    Blocking: resolves names."""
    for address in {task.origin.ref for task in tasks if task.origin.kind == "git"}:
        try:
            remote_options(address, allow_private=allow_private)
        except WorkspaceError as error:
            raise FatalJobError(error.message) from error


async def check_image(task: Task) -> None:
    """Have the image of a task here. Raises FatalJobError where it cannot be pulled."""
    image = task.origin.ref
    if (await docker("image", "inspect", "--format", "{{.Id}}", image)).ok:
        return
    what = f"workspace: docker: the image {image} of {task.instance_id} cannot be pulled"
    try:
        await docker("pull", "--quiet", image, timeout=_PULL_SECONDS, what=what)
    except WorkspaceError as error:
        raise FatalJobError(error.message) from error


async def check_interpreter(task: Task, workspace: Workspace, python: str) -> None:
    """Run the agents' interpreter once in the image of a task.

    Raises EngineUnavailable where it does not run there: it was built for another C library, say.
    FatalJobError where there is no container to run it in.
    """
    try:
        async with workspace.open(task) as box:
            said = await _complaint(box, python)
    except WorkspaceError as error:
        raise FatalJobError(f"workspace: docker: {error.message}") from error
    if said is not None:
        raise EngineUnavailable(
            f"workspace: docker: the agents' interpreter {python} does not run in the image "
            f"{task.origin.ref} of {task.instance_id}: {said}. {HELP_IN_IMAGES}"
        )


async def _complaint(box: Box, python: str) -> str | None:
    """What it says where it does not run."""
    try:
        done = await box.run([python, "-I", "-c", _NEEDED], timeout=_RUN_SECONDS)
    except WorkspaceError as error:
        return error.message
    if done.ok:
        return None
    if done.code is None:
        return f"it did not end within {_RUN_SECONDS:g} s"
    return done.text.strip()[-1000:] or f"it ended with {done.code}"
