"""What the operator lets jobs do, checked when a job is submitted.

A worker checks the same where it acts (an address when it connects, a path when it opens it):
this is the early word to the user, and the second lock.
"""

from __future__ import annotations

__all__ = ["Policy"]

import dataclasses
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from spider_sdk.addresses import address_problem
from spider_sdk.errors import Problem
from spider_worker.settings import WorkerSettings

Resolve = Callable[[str, int], Sequence[str]]

_METADATA_NAMES: Final = frozenset({"metadata", "metadata.google.internal", "instance-data"})

#: Subtrees that are the user's own text: nothing in them is an option of ours.
_OPAQUE: Final = frozenset(
    {"metadata", "pre_processor", "post_processor", "evaluator", "tools", "env"}
)
_SERVICES: Final = frozenset({"openai", "tinker"})  # their names may hold many slashes
_PATH_START: Final = re.compile(r"(/|\\|~|\.{1,2}([/\\]|$)|file:|[A-Za-z]:[/\\])")


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


@dataclasses.dataclass(frozen=True)
class Policy:
    """``data_roots`` are folders under which a job may name data and models."""

    allow_private_urls: bool = False
    allow_remote_code: bool = False
    allow_packages: bool = True
    data_roots: tuple[Path, ...] = ()
    resolve: Resolve = resolve

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> Policy:
        roots = (settings.data_roots or "").split(os.pathsep)
        return cls(
            allow_private_urls=settings.allow_private_urls,
            allow_remote_code=settings.allow_remote_code,
            allow_packages=settings.allow_packages,
            data_roots=tuple(Path(root).expanduser().resolve() for root in roots if root),
        )

    def problems(self, job: Mapping[str, Any]) -> list[Problem]:
        """Everything in a job's document that this deployment refuses, by paths as in a file."""
        found = [*self._urls(job), *self._code(job), *self._paths(job)]
        under = "job.swe."  # which a SWE job's keys have on the wire alone
        return [
            dataclasses.replace(one, path=one.path.removeprefix(under)) if "swe" in job else one
            for one in found
        ]

    # Addresses.

    def _urls(self, job: Mapping[str, Any]) -> Iterator[Problem]:
        for path, name, value in _options(job):
            if isinstance(value, str) and value and name.endswith("base_url"):
                said = self.url_problem(value)
                if said:
                    yield Problem(path, said)

    def url_problem(self, url: str) -> str | None:
        """Why a job may not name this endpoint, or None."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            return f"{url!r} is no address: {error}"
        if parts.scheme not in ("http", "https") or not host:
            return f"expected an address that begins with http:// or https://, not {url!r}"
        if parts.username is not None or parts.password is not None:
            return "an address must hold no user name and no password; use api_key"
        if host.rstrip(".").lower() in _METADATA_NAMES:
            return f"{host} is a metadata service, which no job may reach"
        try:
            addresses = self.resolve(host, port or (443 if parts.scheme == "https" else 80))
        except UnicodeError as error:
            return f"{host!r} is no host name: {error}"
        except OSError:
            # Nothing to judge here: the name may be one of the workers' network, or only their
            # proxy's to resolve. They judge the address when they connect.
            return None
        allowed = self.allow_private_urls
        said = (address_problem(one, allow_private=allowed) for one in addresses)
        return next((f"leads to {what}" for what in said if what), None)

    # Code.

    def _code(self, job: Mapping[str, Any]) -> Iterator[Problem]:
        if not self.allow_remote_code:
            for path, name, value in _options(job):
                if name == "trust_remote_code" and value:
                    yield Problem(
                        path,
                        "this server runs no code of model or data repositories (its operator "
                        "can allow it, with SPIDER_ALLOW_REMOTE_CODE=true)",
                    )
        if not self.allow_packages and _get(job, "runtime", "packages"):
            yield Problem(
                "job.runtime.packages",
                "this server installs no packages for jobs (its operator can allow it, with "
                "SPIDER_ALLOW_PACKAGES=true)",
            )

    # Files.

    def _paths(self, job: Mapping[str, Any]) -> Iterator[Problem]:
        swe = _get(job, "swe")
        uploaded = [_get(item, "name") for item in _get(swe, "inputs") or ()]
        if _get(swe, "dataset") not in uploaded:
            yield from self._name("job.swe.dataset", _get(swe, "dataset"), False)
        inputs = _get(job, "source", "inputs") or ()
        for path, value, served in _model_names(job):
            yield from self._name(path, value, served)
        dataset = _get(job, "source", "dataset")
        if not inputs:  # with inputs, the data set's name is only what it is called
            yield from self._name("job.source.dataset", dataset, False)
        names = {_get(item, "name") for item in inputs}
        for path, value in _strings(_get(job, "source", "options"), "job.source.options"):
            if value.startswith(("http://", "https://")):
                said = self.url_problem(value)
                if said:
                    yield Problem(path, said)
            elif _PATH_START.match(value) and value not in names and not self._under_a_root(value):
                yield Problem(path, self._path_message(value))

    def _name(self, path: str, value: Any, served: bool) -> Iterator[Problem]:
        """A name on the Hub passes, and what a service calls its model (``served``)."""
        if not isinstance(value, str):
            return
        if _PATH_START.match(value) or ".." in Path(value).parts:
            local = True
        else:
            local = value.count("/") > 1 and "://" not in value and not served
        if local and not self._under_a_root(value):
            yield Problem(path, self._path_message(value))

    def _under_a_root(self, text: str) -> bool:
        """A relative path may be meant from where a worker stands or from a root; which folder
        there is, the worker knows. What climbs out of every one of them is refused here."""
        if text.startswith("file:") or "\0" in text or "\\" in text:
            return False
        path = Path(os.path.expanduser(text))
        tried = [path] if path.is_absolute() else [Path.cwd() / path]
        tried += [] if path.is_absolute() else [root / path for root in self.data_roots]
        resolved = [candidate.resolve() for candidate in tried]
        return any(p.is_relative_to(root) for p in resolved for root in self.data_roots)

    def _path_message(self, text: str) -> str:
        return (
            f"{text!r} is a path, and a worker opens no path that a job names: submit the job "
            "from where the data is and the client uploads it, use a name on the Hub, or have "
            "the operator add the folder to SPIDER_DATA_ROOTS"
        )


def _model_names(job: Mapping[str, Any]) -> Iterator[tuple[str, Any, bool]]:
    """(dotted path, value, whether a service knows the name) of what names a model."""
    provider = _get(job, "model", "provider")
    yield "job.model.name", _get(job, "model", "name"), provider in _SERVICES
    yield "job.model.student_checkpoint_path", _get(job, "model", "student_checkpoint_path"), False
    options, under = _get(job, "generation", "on_policy_options"), "generation.on_policy_options"
    path = f"job.{under}.student_checkpoint_path"
    yield path, _get(options, "student_checkpoint_path"), False
    teachers = _get(options, "teacher")
    for number, one in enumerate(teachers if isinstance(teachers, list) else [teachers]):
        path = f"job.{under}.teacher" + (f".{number}" if isinstance(teachers, list) else "")
        given = _get(one, "provider") or provider
        served = given in _SERVICES or bool(_get(one, "base_url"))
        if isinstance(one, str):
            yield path, one, served
        yield f"{path}.name", _get(one, "name"), served
        yield f"{path}.parameters.tokenizer", _get(one, "parameters", "tokenizer"), False


def _options(tree: Any, path: str = "job") -> Iterator[tuple[str, str, Any]]:
    """(dotted path, name, value) of every option in a job, the user's own texts apart."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            if name not in _OPAQUE:
                yield f"{path}.{name}", str(name), value
                yield from _options(value, f"{path}.{name}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _options(value, f"{path}.{number}")


def _strings(tree: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(tree, str):
        yield path, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _strings(value, f"{path}.{name}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from _strings(value, f"{path}.{number}")


def _get(tree: Any, *names: str) -> Any:
    for name in names:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree
