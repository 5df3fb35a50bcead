"""vLLM's own OpenAI-compatible server, on the CPU, as a process."""

from __future__ import annotations

__all__ = ["VllmServer"]

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

#: Seconds to come up: it starts three processes, each of which imports vLLM.
_DEADLINE = 600.0


class VllmServer:
    """Starts at once; ``base_url`` waits until it answers. It serves ``model`` as ``tiny`` to those
    with the key ``right``."""

    key = "right"

    def __init__(self, model: Path, log: Path, *arguments: str) -> None:
        self._log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "vllm.entrypoints.openai.api_server",
                    "--model", str(model), "--served-model-name", "tiny",
                    "--host", "127.0.0.1", "--port", "0", "--api-key", self.key,
                    "--dtype", "float32", "--enforce-eager", *arguments,
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
                # Without a compiler: what counts ranks would still be compiled.
                env={**os.environ, "VLLM_NO_USAGE_STATS": "1", "TORCHDYNAMO_DISABLE": "1"},
                start_new_session=True,
            )  # fmt: skip

    def base_url(self) -> str:
        deadline = time.monotonic() + _DEADLINE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            port = self._port()
            if port is not None and _answers(f"http://127.0.0.1:{port}/health"):
                return f"http://127.0.0.1:{port}/v1"
            time.sleep(0.2)
        raise AssertionError(f"the server did not come up:\n{self._log.read_text()[-5000:]}")

    def stop(self) -> None:
        """With its children, which are all of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def _port(self) -> int | None:
        """The one that the system chose, which the server does not tell."""
        import psutil

        with contextlib.suppress(psutil.Error):
            for connection in psutil.Process(self.process.pid).net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    return int(connection.laddr.port)
        return None


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False
