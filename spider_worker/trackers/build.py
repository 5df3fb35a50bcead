"""The tracker that a job asks for, as the pipeline uses it."""

from __future__ import annotations

__all__ = ["build_tracker"]

import dataclasses
import os
import socket
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from spider_sdk.addresses import address_problem
from spider_sdk.config.model import JobConfig, OnPolicyOptions
from spider_sdk.errors import AuthError, FatalJobError, NotSupported, PipelineError
from spider_worker.trackers.base import RunSpec
from spider_worker.trackers.process import Say, TrackerProcess

#: Of the worker's own environment: what finds programs, proxies and certificates. A job's other
#: keys, which lie there too while it runs, are none of a tracker's business.
_PASSED: Final = (
    "PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY",
    "http_proxy", "https_proxy", "all_proxy", "no_proxy",
)  # fmt: skip
_MODES: Final = {
    "": "online",
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
#: Options that are no part of the recipe.
_NOT_SHOWN: Final = frozenset(
    {"teacher", "api_key", "api_key_env", "wandb_project", "wandb_name", "tracker"}
)


class Context(Protocol):
    """What is asked of a JobContext."""

    @property
    def job_id(self) -> str: ...
    @property
    def job(self) -> JobConfig: ...
    @property
    def secrets(self) -> Mapping[str, str]: ...
    @property
    def scratch(self) -> Any: ...
    @property
    def event(self) -> Say: ...


def build_tracker(
    ctx: Context, step: int | None, *, allow_private: bool = False
) -> TrackerProcess | None:
    """The tracker of ``ctx``'s job; None where it names no project, or WANDB_MODE is ``disabled``.

    ``step`` is the one that the run goes on from (None: a new run). ``allow_private`` lets a job's
    own WANDB_BASE_URL or TRACKIO_SERVER_URL lead to a private address. Raises AuthError where a
    key is missing, NotSupported or FatalJobError for what cannot be honoured.
    """
    options = ctx.job.generation.on_policy_options
    if options is None or not options.wandb_project:
        return None
    folder = ctx.scratch / "tracker"
    spec = RunSpec(
        kind=options.tracker,
        project=options.wandb_project,
        run_id=f"spider-{ctx.job_id}",
        name=options.wandb_name or ctx.job_id,
        folder=str(folder),
        resume=step,
        config=_config(ctx.job, ctx.job_id),
    )
    env = {name: os.environ[name] for name in _PASSED if name in os.environ}
    # Where the SDKs would look for keys of the worker's own user, and leave their files.
    env |= {"HOME": str(folder), "TMPDIR": str(folder)}
    env["PYTHONPATH"] = str(Path(__file__).parents[2])
    keys: dict[str, str] = {}
    if options.tracker == "trackio":
        spec = _trackio(ctx, spec, env, keys, allow_private)
    elif (mode := _wandb_mode(ctx)) == "disabled":
        return None
    else:
        spec = _wandb(ctx, spec, env, keys, allow_private, offline=mode == "offline")
    return TrackerProcess(spec, env={**env, **keys}, say=ctx.event, secrets=tuple(keys.values()))


def _wandb_mode(ctx: Context) -> str:
    """Of the job, or of the worker: an operator without a way out sets it there."""
    asked = ctx.secrets.get("WANDB_MODE") or os.environ.get("WANDB_MODE", "")
    if asked not in _MODES:
        raise NotSupported(f"WANDB_MODE={asked} is not supported; use online, offline or disabled")
    return _MODES[asked]


def _wandb(
    ctx: Context,
    spec: RunSpec,
    env: dict[str, str],
    keys: dict[str, str],
    allow_private: bool,
    *,
    offline: bool,
) -> RunSpec:
    entity, _, project = spec.project.rpartition("/")
    bad = sorted(set(project) & set("/\\#?%:")) or ("/" if "/" in entity else "")
    if bad or not project:
        raise FatalJobError(
            f"wandb_project: {spec.project!r} is no name of a project at Weights & Biases, which"
            f" may not hold any of / \\ # ? % : (team/project names a team's)"
        )
    spec = dataclasses.replace(spec, project=project, entity=entity or _given(ctx, "WANDB_ENTITY"))
    env["WANDB_ERROR_REPORTING"] = "false"
    env["WANDB_MODE"] = "offline" if offline else "online"
    if offline:
        return dataclasses.replace(spec, offline=True)
    if not ctx.secrets.get("WANDB_API_KEY"):
        raise AuthError(
            f"wandb_project names {spec.project!r} at Weights & Biases, but the job carries no"
            " WANDB_API_KEY. Export it where you submit the job, from where it is forwarded by"
            " itself; or export WANDB_MODE=offline, and the run is kept with the job as a file for"
            " wandb sync"
        )
    keys["WANDB_API_KEY"] = ctx.secrets["WANDB_API_KEY"]
    url = _address(ctx, "WANDB_BASE_URL", allow_private)
    if url is not None:
        env["WANDB_BASE_URL"] = url
    return dataclasses.replace(spec, url=url)


def _trackio(
    ctx: Context, spec: RunSpec, env: dict[str, str], keys: dict[str, str], allow_private: bool
) -> RunSpec:
    # trackio knows a run by its name, and two jobs may have the same wandb_name.
    if spec.name != ctx.job_id:
        spec = dataclasses.replace(spec, name=f"{spec.name}-{ctx.job_id}")
    folder = Path(spec.folder)
    env["TRACKIO_DIR"] = str(folder / "trackio")
    # One file that can be handed on, wherever the folder lies.
    env |= {"TRACKIO_STORAGE_MODE": "sqlite", "TRACKIO_SQLITE_JOURNAL_MODE": "delete"}
    space = ctx.secrets.get("TRACKIO_SPACE_ID")
    if space:
        if not ctx.secrets.get("HF_TOKEN"):
            raise AuthError(
                f"TRACKIO_SPACE_ID names the Space {space}, but the job carries no HF_TOKEN that"
                " may write to it; export one where you submit the job"
            )
        keys["HF_TOKEN"] = ctx.secrets["HF_TOKEN"]
        env["TRACKIO_SPACE_ID"] = space
        return dataclasses.replace(spec, url=space)
    url = _address(ctx, "TRACKIO_SERVER_URL", allow_private)
    if url is None:
        return dataclasses.replace(spec, offline=True)
    keys["TRACKIO_SERVER_URL"] = url  # its query may hold the token
    token = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query).get("write_token", [""])[0]
    token = token or ctx.secrets.get("TRACKIO_WRITE_TOKEN", "")
    if not token:
        raise AuthError(
            "TRACKIO_SERVER_URL names a server, but the job carries no TRACKIO_WRITE_TOKEN;"
            " export the one that the server printed when it was started"
        )
    keys["TRACKIO_WRITE_TOKEN"] = token
    return dataclasses.replace(spec, url=url.partition("?")[0])


def _given(ctx: Context, variable: str) -> str | None:
    return ctx.secrets.get(variable) or None


def _address(ctx: Context, variable: str, allow_private: bool) -> str | None:
    """The service's address: the job's, or the worker's own. The job's may lead nowhere that a job
    may not reach. Resolved here and again by the SDK: a name server that changes its answer in
    between is not held off, as it is for engines."""
    given = _given(ctx, variable)
    if given is None:
        return os.environ.get(variable) or None
    parts = urllib.parse.urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise FatalJobError(f"{variable} is no address that begins with http:// or https://")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise PipelineError(f"{variable}: {parts.hostname} cannot be found: {error}") from error
    for *_, address in found:
        problem = address_problem(str(address[0]), allow_private=allow_private)
        if problem is not None:
            raise FatalJobError(f"{variable} leads to {problem}.")
    return given


def _config(job: JobConfig, job_id: str) -> dict[str, Any]:
    """The recipe as a tracker shows it beside a run: flat, so that runs can be compared by it."""
    options = job.generation.on_policy_options
    assert options is not None
    kept = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(OnPolicyOptions)
        if field.name not in _NOT_SHOWN
    }
    return {
        "job_id": job_id,
        "student": job.model.name,
        "provider": job.model.provider,
        "teacher": ", ".join(teacher.name for teacher in options.teacher),
        "dataset": job.source.dataset,
        **kept,
        "metadata": dict(job.metadata),
    }
