"""Cached virtual environments for ``runtime.packages``.

An environment is a folder under the cache, named after its requirements and the Python
version, built beside it and renamed into place: one that is there is whole. Only wheels are
installed, since building a source distribution runs its code on the worker, outside any
sandbox. A requirement without a pinned version is resolved when its environment is first
built, and stays so until an operator deletes the folder.
"""

from __future__ import annotations

__all__ = ["PackageEnvironment", "check_requirements"]

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from spider_sdk.errors import FatalJobError, SandboxError

_TAIL_CHARS = 2_000
_LOCK_POLL = 0.2

# The installer sees the operator's settings of installers and networks; not the job's
# secrets, which lie in os.environ while its unit runs here.
_PASSED = frozenset(
    {"PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "XDG_CACHE_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR",
     "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NETRC"}
)  # fmt: skip
_PASSED_PREFIXES = ("PIP_", "UV_")
_PASSED_SUFFIXES = ("_PROXY", "_proxy")


def check_requirements(packages: Sequence[str]) -> tuple[str, ...]:
    """Requirements in one spelling, sorted. Raises FatalJobError for the first that is not a
    package's name with extras, versions and markers: a path or a URL would have the worker
    open what a job names."""
    checked = []
    for text in packages:
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            reason = str(error).splitlines()[0]
            raise FatalJobError(f"runtime.packages: {text!r} is no requirement: {reason}") from None
        if requirement.url is not None:
            raise FatalJobError(
                f"runtime.packages: {text!r} names a URL or a path; only packages of the "
                "worker's index can be installed, as NAME or NAME==VERSION"
            )
        requirement.name = canonicalize_name(requirement.name)
        checked.append(str(requirement))
    return tuple(sorted(set(checked)))


@dataclasses.dataclass(frozen=True)
class PackageEnvironment:
    """The environment for some requirements. ``cache`` is the folder of all of them,
    ``python`` the interpreter it is made from, ``timeout`` in seconds for building it."""

    packages: tuple[str, ...]
    cache: Path
    python: str = sys.executable
    timeout: float = 900.0

    def ensure(self) -> str:
        """The environment's interpreter, built if it is not there.

        Blocking, up to ``timeout``; of several callers, on any number of workers that share
        the cache, one builds. Raises FatalJobError with the end of the installer's output.
        """
        packages = check_requirements(self.packages)
        folder = self.cache.absolute() / self._key(packages)
        python = folder / "bin" / "python"
        if not python.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with self._locked(folder.with_suffix(".lock")):
                if not python.exists():
                    self._build(packages, folder)
        return str(python)

    def _key(self, packages: Sequence[str]) -> str:
        version = _run([self.python, "-I", "-VV"], os.environ, 60.0)
        # Whoever points the installer at an index of their own gets environments of their own.
        env = sorted(item for item in os.environ.items() if item[0].startswith(_PASSED_PREFIXES))
        text = json.dumps([packages, version, os.uname().machine, env])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @contextlib.contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        deadline = time.monotonic() + self.timeout
        with path.open("a") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise SandboxError(
                            f"another process has been building {path.stem} in {self.cache} for "
                            f"more than {self.timeout:g} s"
                        ) from None
                    time.sleep(_LOCK_POLL)
            yield

    def _build(self, packages: Sequence[str], folder: Path) -> None:
        building = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            env = _installer_env(os.environ)
            python = str(building / "bin" / "python")
            uv = shutil.which("uv")
            if uv is not None:
                # --no-config: a pyproject.toml in the worker's folder is not the job's.
                made = [uv, "--no-config", "venv", "--quiet", "--allow-existing", "--python"]
                install = [uv, "--no-config", "pip", "install", "--quiet", "--no-build", "-p"]
                _run([*made, self.python, str(building)], env, self.timeout)
                _run([*install, python, *packages], env, self.timeout)
            else:
                install = ["-I", "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
                _run([self.python, "-I", "-m", "venv", str(building)], env, self.timeout)
                _run([python, *install, *packages], env, self.timeout)
            building.chmod(0o755)
            (building / "requirements.txt").write_text("\n".join(packages) + "\n")
            building.rename(folder)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise


def _installer_env(env: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in env.items()
        if name in _PASSED or name.startswith(_PASSED_PREFIXES) or name.endswith(_PASSED_SUFFIXES)
    }


def _run(command: Sequence[str], env: Mapping[str, str], timeout: float) -> str:
    """The output of a command. Raises FatalJobError with the end of it where it fails."""
    try:
        run = subprocess.run(  # noqa: S603
            command, env=env, timeout=timeout, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise FatalJobError(f"runtime.packages: installing took more than {timeout:g} s") from None
    except OSError as error:
        raise SandboxError(f"runtime.packages: {command[0]} does not run: {error}") from error
    if run.returncode != 0:
        raise FatalJobError(
            "runtime.packages cannot be installed (wheels only, no source distributions):\n"
            + run.stdout[-_TAIL_CHARS:].strip()
        )
    return run.stdout
