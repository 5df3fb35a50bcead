"""Which service each model of a job is at, and with whose key.

A key of an on-policy job may stand under ``on_policy_options`` as well as under ``model``, and a
teacher without an address and a key of its own is at the student's service. Client and worker ask
here, so that the key that a job is said to need is the one that its engines use.
"""

from __future__ import annotations

__all__ = ["BASE_URL", "KEY_OF_HOST", "student_service", "teacher_service", "usual_key"]

import dataclasses
from typing import Final
from urllib.parse import urlsplit

from spider_sdk.config.model import JobConfig, ModelConfig, TeacherConfig

KEY_OF_HOST: Final = {
    "api.openai.com": "OPENAI_API_KEY",
    "openrouter.ai": "OPENROUTER_API_KEY",
    "api.together.xyz": "TOGETHER_API_KEY",
    "api.fireworks.ai": "FIREWORKS_API_KEY",
    "tinker.thinkingmachines.dev": "TINKER_API_KEY",
}
"""The variables that public services document for their keys. None of these hosts answers without
one."""

BASE_URL: Final = {"openai": "OPENAI_BASE_URL", "tinker": "TINKER_BASE_URL"}
"""By provider: the variable that names the address where the config gives none."""


def usual_key(provider: str, base_url: str | None) -> str | None:
    """The variable that a service's key is usually kept in. A server that is none of the known
    ones gets no key that was not named for it."""
    if base_url:
        return KEY_OF_HOST.get(urlsplit(base_url).hostname or "")
    return {"openai": "OPENAI_API_KEY", "tinker": "TINKER_API_KEY"}.get(provider)


def student_service(job: JobConfig) -> ModelConfig:
    """``job.model`` with the key that its service is given: the one in ``on_policy_options`` goes
    before that under ``model``."""
    options = job.generation.on_policy_options
    if options is None or not (options.api_key or options.api_key_env):
        return job.model
    return dataclasses.replace(job.model, api_key=options.api_key, api_key_env=options.api_key_env)


def teacher_service(job: JobConfig, teacher: TeacherConfig) -> TeacherConfig:
    """The teacher with its provider, and with what it has from the student's service where it is
    at the same: the address, and, unless it has one of its own, the key. A teacher that gives
    another address has neither from there: a key that went along would be given away."""
    student = student_service(job)
    found = dataclasses.replace(teacher, provider=teacher.provider or student.provider)
    if (
        student.provider not in BASE_URL
        or found.provider != student.provider
        or teacher.base_url not in (None, student.base_url)
    ):
        return found
    found = dataclasses.replace(found, base_url=student.base_url)
    if teacher.api_key or teacher.api_key_env:
        return found
    return dataclasses.replace(found, api_key=student.api_key, api_key_env=student.api_key_env)
