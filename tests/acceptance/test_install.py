"""``pip install -e ".[client]"`` and ``".[server]"`` in environments where nothing else is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spider_sdk.jobs import QUEUES

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ("pyproject.toml", "setup.cfg", "README.md", "constraints.txt")
PACKAGES = ("spider_sdk", "spider_worker", "spider_api")
ABSENT = ("celery", "redis", "torch", "datasets", "flask", "huggingface_hub", "transformers")


class Environment:
    """A fresh virtual environment with a checkout of its own installed into it."""

    def __init__(self, folder: Path, extra: str) -> None:
        self.checkout = folder / "checkout"
        self._venv = folder / "venv"
        self._env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SPIDER_", "PYTHON", "VIRTUAL_ENV"))
        }
        if links := self._env.get("PIP_FIND_LINKS"):
            self._env.setdefault("UV_FIND_LINKS", links)
        self._copy()
        self._install(extra)

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, outside of any checkout."""
        program, *rest = arguments
        done = subprocess.run(
            [str(self._venv / "bin" / program), *rest],
            cwd=self._venv,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check:
            assert done.returncode == 0, done.stdout + done.stderr
        return done

    def _copy(self) -> None:
        self.checkout.mkdir(parents=True)
        for name in SHIPPED:
            shutil.copy(ROOT / name, self.checkout / name)
        for name in PACKAGES:
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, self.checkout / name, ignore=ignore)

    def _install(self, extra: str) -> None:
        uv = shutil.which("uv")
        python = str(self._venv / "bin" / "python")
        what = ["--constraint", "constraints.txt", "-e", f".[{extra}]"]
        if uv:
            self._step(uv, "venv", "--quiet", "--python", sys.executable, str(self._venv))
            self._step(uv, "pip", "install", "--quiet", "--python", python, *what)
        else:
            self._step(sys.executable, "-m", "venv", str(self._venv))
            self._step(python, "-m", "pip", "install", "--quiet", *what)

    def _step(self, *command: str) -> None:
        done = subprocess.run(
            command, cwd=self.checkout, env=self._env, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("client")
    yield Environment(folder, "client")
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("server")
    yield Environment(folder, "server")
    shutil.rmtree(folder, ignore_errors=True)  # a gigabyte, with torch


def test_a_client_has_the_command_line(client: Environment) -> None:
    for command in ("submit", "watch", "download", "validate"):
        assert command in client.run("spider", "--help").stdout


def test_a_client_has_the_sdk(client: Environment) -> None:
    client.run("python", "-c", "from spider_sdk import AppConfig, Client, SpiderClient")


def test_a_client_is_light(client: Environment) -> None:
    code = "import importlib.util as u, sys; print(*[n for n in sys.argv[1:] if u.find_spec(n)])"
    assert client.run("python", "-c", code, *ABSENT).stdout.split() == []


def test_a_client_validates_the_starter_config(client: Environment, tmp_path: Path) -> None:
    config = tmp_path / "job.yaml"
    client.run("spider", "init", str(config))
    client.run("spider", "validate", str(config))


def test_a_client_names_the_extra_that_a_command_needs(client: Environment) -> None:
    done = client.run("spider", "up", check=False)
    assert done.returncode == 2
    assert "spider-distill[server]" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy(server: Environment) -> None:
    code = (
        "import sys\n"
        "from spider_sdk.cli.main import run\n"
        "run(['--help'])\n"
        "print('loaded:', *[name for name in sys.argv[1:] if name in sys.modules])"
    )
    assert server.run("python", "-c", code, *ABSENT).stdout.splitlines()[-1] == "loaded:"


def test_a_server_imports_all_of_spider(server: Environment) -> None:
    code = (
        "import importlib, pkgutil, sys\n"
        "for root in sys.argv[1:]:\n"
        "    package = importlib.import_module(root)\n"
        "    for module in pkgutil.walk_packages(package.__path__, root + '.'):\n"
        "        importlib.import_module(module.name)\n"
    )
    server.run("python", "-c", code, *PACKAGES)


def test_celery_finds_the_app_and_its_queues(server: Environment) -> None:
    report = server.run("celery", "-A", "spider_worker", "report").stdout
    for queue in QUEUES:
        assert queue in report


def test_a_typo_in_a_queue_stops_the_worker(server: Environment) -> None:
    done = server.run(
        "celery", "-A", "spider_worker", "worker", "-Q", "offlin-gen", "--pool", "threads",
        check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "offlin-gen" in done.stdout + done.stderr


def test_the_api_has_its_command(server: Environment) -> None:
    assert "--port" in server.run("spider-api", "--help").stdout


def test_every_shipped_command_loads(server: Environment) -> None:
    for command in ("up", "demo", "keys", "rebuild", "preview"):
        server.run("spider", command, "--help")
