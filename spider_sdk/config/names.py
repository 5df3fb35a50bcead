"""Which keys of a document name secrets, and which environment variables a job may set."""

from __future__ import annotations

__all__ = ["GENERATED", "check_env_names", "env_name_problem", "is_secret_key", "maybe_secret_key"]

import re
from collections.abc import Iterable
from typing import Final

from spider_sdk.errors import ConfigError, Problem

GENERATED: Final = "SPIDER_SECRET_"
"""The prefix of names made up for secrets that a config gives without one; they end in
``_API_KEY``."""

_SECRET = re.compile(
    r"(^|_)(api_?keys?|passw(or)?d|secret|secret_key|access_key|private_key"
    r"|(auth|access|api|bearer|github|gh|hf|hub)_token)$|^token$"
    r"|^(proxy_)?authorization$|^cookie$"  # HTTP headers
)
# Settings of the fleet begin with the same word (SPIDER_SECRET_KEY): the ending tells them apart.
_GENERATED = re.compile(rf"{GENERATED}[A-Z0-9_]+_API_KEY", re.ASCII)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)

# What changes how a process starts, what it loads, where it reads and writes, or whom it asks.
_DENIED: Final = frozenset(
    {
        "ALL_PROXY",
        "BASH_ENV",
        "CC",
        "CURL_CA_BUNDLE",
        "CXX",
        "ENV",
        "GCONV_PATH",
        "HOME",
        "HTTPS_PROXY",
        "HTTP_PROXY",
        "IFS",
        "LOCPATH",
        "NODE_OPTIONS",
        "NO_PROXY",
        "PATH",
        "REQUESTS_CA_BUNDLE",
        "SHELL",
        "TEMP",
        "TMP",
        "TMPDIR",
    }
)
_DENIED_PREFIXES: Final = (
    "BASH_FUNC_",
    "CELERY_",
    "CUDA_",
    "DYLD_",
    "FLASHINFER_",
    "GIT_",
    "GLIBC_",
    "HF_",
    "HUGGINGFACE_",
    "LD_",
    "MALLOC_",
    "NCCL_",
    "NUMBA_",
    "NVIDIA_",
    "OPENSSL_",
    "PIP_",
    "PYTHON",
    "RAY_",
    "SPIDER_",
    "SSL_CERT_",
    "TORCH",
    "TRANSFORMERS_",
    "TRITON_",
    "UV_",
    "VLLM_",
    "XDG_",
)
_ALLOWED: Final = frozenset({"HF_TOKEN", "VLLM_API_KEY"})


def is_secret_key(key: str) -> bool:
    """Whether a value under this key is a secret by its name (``api_key``, ``hf_token``,
    ``password``, ``Authorization`` …; not ``eos_token``, nor a reference such as
    ``api_key_env``)."""
    return _SECRET.search(_snake(key)) is not None


def maybe_secret_key(key: str) -> bool:
    """Whether a value that came from an environment variable is a secret under this key: every
    ``*_token`` counts then, since nobody keeps an end-of-text token in a variable."""
    snake = _snake(key)
    return is_secret_key(key) or snake.endswith(("_token", "_secret", "_credentials"))


def _snake(key: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key)
    return words.replace("-", "_").lower()


def env_name_problem(name: str) -> str | None:
    """Why a job may not set this variable, or None. Says nothing of what the text was where
    it is no variable's name: a key that was put in the wrong place must not be shown."""
    if _NAME.fullmatch(name) is None:
        return (
            "expected the name of an environment variable (letters, digits and _), "
            "not a key or other text"
        )
    upper = name.upper()
    if name in _ALLOWED or _GENERATED.fullmatch(name):
        return None
    if upper in _DENIED or upper.startswith(_DENIED_PREFIXES):
        return (
            f"{name} may not be set by a job: how a worker's processes run is its operator's to "
            f"say; use another name"
        )
    return None


def check_env_names(names: Iterable[str], where: str = "env") -> None:
    """Raise ConfigError with a problem for each name that a job may not set in a worker."""
    problems = [
        Problem(f"{where}.{name}" if _NAME.fullmatch(name) else where, said)
        for name in names
        if (said := env_name_problem(name)) is not None
    ]
    if problems:
        raise ConfigError(problems)
