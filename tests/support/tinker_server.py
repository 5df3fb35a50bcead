"""A real Tinker-compatible server for tests: SkyRL's, on the CPU, in an environment of its own.

``make tinker-cpu`` makes the environment ``.venv-tinker``; without it the tests that need the
server are skipped. One server serves a whole session of pytest, over the model that
``make_served_model`` makes. Variables choose another one:

``SPIDER_TINKER_SERVER``  ``0.25``: the server that speaks with tinker 0.25, in ``.venv-tinker-025``
``SPIDER_TINKER_URL``     a server that runs already, over the model in ``SPIDER_TINKER_MODEL``
"""

from __future__ import annotations

__all__ = ["SERVER", "ServerProcess", "TinkerServer", "make_served_model", "tinker_server"]

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.tiny_model import make_tiny_model

SERVER = os.environ.get("SPIDER_TINKER_SERVER", "0.16")
"""Which: by the version of the SDK that it speaks with."""
_ROOT = Path(__file__).parents[2]
_ADDRESS = re.compile(r"http://127\.0\.0\.1:(\d+)")
_MAX_RANK = 16
#: Fixed sizes, whatever comes in, so that few programs are compiled.
_BACKEND = {
    "max_lora_adapters": 4,
    "max_lora_rank": _MAX_RANK,
    "train_micro_batch_size": 1,
    "sample_max_num_sequences": 8,
}
#: The server starts its engine as ``uv run … -m MODULE …``, and a later one wants to be started
#: so itself. This runs the module in the server's own environment, with or without uv installed.
_UV = """#!/bin/sh
while [ "$1" != -m ]; do shift; done
case "$2" in
    *.api)
        "$SPIDER_TINKER_PYTHON" "$@" &  # not exec: it looks at who started it
        while kill -0 $! 2>/dev/null; do
            # With whoever started the server its engine ends, too.
            kill -0 "$SPIDER_TINKER_STARTER" 2>/dev/null || kill -9 0
            sleep 1
        done
        ;;
    *) exec "$SPIDER_TINKER_PYTHON" "$@" ;;
esac
"""


@dataclasses.dataclass(frozen=True)
class _Installation:
    environment: str
    module: str
    target: str

    @property
    def python(self) -> Path:
        return _ROOT / self.environment / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return _ROOT / self.environment / ".spider-tinker"


_INSTALLATIONS = {
    "0.16": _Installation(".venv-tinker", "tx.tinker.api", "tinker-cpu"),
    "0.25": _Installation(".venv-tinker-025", "skyrl.tinker.api", "test-tinker-025"),
}


def _installation() -> _Installation:
    return _INSTALLATIONS[SERVER]


class TinkerServer:
    """``model`` is the folder that it serves, ``max_rank`` the highest rank that it takes."""

    max_rank = _MAX_RANK

    def __init__(self, model: Path, url: str = "") -> None:
        self.model, self.url = model, url

    @property
    def name(self) -> str:
        """What the server calls its model."""
        return str(self.model)


class ServerProcess(TinkerServer):
    """Started here; a context manager. Database, checkpoints and log lie in ``folder``."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__(model)
        self._installation = _installation()
        self._folder = folder
        self.log = folder / "server.log"
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def missing() -> str | None:
        """Why there is no server to be started, or None."""
        installation = _installation()
        if installation.stamp.exists():
            return None
        return (
            f"no Tinker-compatible server in {installation.environment} (make"
            f" {installation.target} makes it where it can be had)"
        )

    def start(self) -> None:
        """Returns when the engine behind the server has answered."""
        uv = self._folder / "bin" / "uv"
        uv.parent.mkdir()
        uv.write_text(_UV, encoding="utf-8")
        uv.chmod(0o755)
        cache = self._installation.stamp.parent / "compiled"
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("TX_", "PYTHONPATH"))},
            "PATH": f"{uv.parent}{os.pathsep}{os.environ['PATH']}",
            "SPIDER_TINKER_PYTHON": str(self._installation.python),
            "SPIDER_TINKER_STARTER": str(os.getpid()),
            "JAX_PLATFORMS": "cpu",
            # Compiling takes most of the time, the first time.
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
            "HF_HUB_OFFLINE": "1",
        }
        command = [str(uv), "run", "-m", self._installation.module]
        command += ["--base-model", str(self.model), "--backend", "jax"]
        command += ["--backend-config", json.dumps(_BACKEND)]
        command += ["--checkpoints-base", str(self._folder / "checkpoints")]
        command += ["--database-url", f"sqlite:///{self._folder / 'server.db'}"]
        command += ["--host", "127.0.0.1", "--port", "0"]
        with self.log.open("wb") as log:
            # A session of its own: the engine is the server's child, and ends with it.
            self.process = subprocess.Popen(
                command,
                cwd=self._folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Signal the server and its engine (SIGKILL for a crash), and wait for their end."""
        process, self.process = self.process, None
        if process is None:
            return
        _signal(process.pid, number)
        deadline = time.monotonic() + 20
        while _alive(process):
            if time.monotonic() > deadline:
                _signal(process.pid, signal.SIGKILL)
            time.sleep(0.05)

    def __enter__(self) -> ServerProcess:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait(self) -> None:
        deadline = time.monotonic() + 600
        while not (found := _ADDRESS.search(self.log.read_text(errors="replace"))):
            self._check(deadline)
        self.url = found.group(0)
        with httpx.Client(base_url=self.url, timeout=30) as client:
            session = client.post(
                "/api/v1/create_session", json={"tags": [], "sdk_version": "0.16.1"}
            ).raise_for_status()
            # The API answers at once, the engine when it has loaded its model. What is asked for
            # is refused, and leaves nothing behind.
            future = client.post(
                "/api/v1/create_model",
                json={
                    "session_id": session.json()["session_id"],
                    "base_model": self.name,
                    "lora_config": {"rank": 10 * _MAX_RANK, "seed": 0},
                },
            ).raise_for_status()
            while True:
                try:
                    client.post(
                        "/api/v1/retrieve_future", json={"request_id": future.json()["request_id"]}
                    )
                except httpx.TimeoutException:
                    self._check(deadline)
                else:
                    return

    def _check(self, deadline: float) -> None:
        assert self.process is not None
        time.sleep(0.05)
        if self.process.poll() is not None or time.monotonic() > deadline:
            text = self.log.read_text(errors="replace")
            raise AssertionError(f"the Tinker server did not start:\n{text[-4000:]}")


def make_served_model(folder: Path) -> Path:
    """The tiny model in float32 and as transformers 4.57 writes it, which the server needs; later
    versions read it, too."""
    import torch
    from transformers import AutoModelForCausalLM

    make_tiny_model(folder, context=256)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).save_pretrained(folder)
    _edit(folder / "config.json", rope_theta=10000.0)
    _edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return folder


@pytest.fixture(scope="session")
def tinker_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinkerServer]:
    """One server for the session."""
    if url := os.environ.get("SPIDER_TINKER_URL"):
        yield TinkerServer(Path(os.environ["SPIDER_TINKER_MODEL"]), url)
        return
    if said := ServerProcess.missing():
        pytest.skip(said)
    model = make_served_model(tmp_path_factory.mktemp("served"))
    with ServerProcess(model, tmp_path_factory.mktemp("tinker")) as server:
        yield server


def _edit(path: Path, **values: object) -> None:
    text = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**text, **values}, indent=2), encoding="utf-8")


def _signal(session: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)


def _alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the session runs; its leader is reaped here."""
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True
