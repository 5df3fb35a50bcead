"""Config files and job documents: read, checked, parted from their secrets.

``AppConfig.load`` reads a user's YAML; ``parse_job`` reads the job of a wire document and is
what the API and the worker use. Whatever is wrong is a ConfigError that tells it all at once.
"""

from __future__ import annotations

__all__ = [
    "AppConfig",
    "Job",
    "check_env_names",
    "check_submittable",
    "job_document",
    "lift_secrets",
    "optional_secrets",
    "parse_job",
    "parse_override",
    "required_secrets",
    "strip_secrets",
]

from spider_sdk.config.app import AppConfig
from spider_sdk.config.loader import job_document, parse_job
from spider_sdk.config.model import Job
from spider_sdk.config.names import check_env_names
from spider_sdk.config.plain import parse_override
from spider_sdk.config.rules import check_submittable
from spider_sdk.config.secrets import (
    lift_secrets,
    optional_secrets,
    required_secrets,
    strip_secrets,
)
