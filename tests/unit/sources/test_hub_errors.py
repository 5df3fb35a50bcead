"""What a job is told when the Hub does not hand out a data set: the real client, asked to
load from a server of the test's own."""

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from huggingface_hub.errors import HfHubHTTPError

from spider_sdk.errors import FatalJobError, PipelineError
from spider_worker.sources.loading import DatasetSpec, hub_errors

REQUEST = httpx.Request("GET", "https://hub.invalid/api")
SPEC = DatasetSpec(path="org/data", shown="org/data")

ANSWERS = {
    "missing": (401, "RepoNotFound", "Repository Not Found"),
    "gated": (403, "GatedRepo", "Access to this dataset is restricted"),
    "forbidden": (403, "", "Forbidden"),
}

LOADS = """
import json, sys
from spider_sdk.config.model import SourceConfig
from spider_worker.sources.build import build_source
told = {}
for name in json.loads(sys.argv[1]):
    for streaming in (False, True):
        config = SourceConfig(dataset=f"org/{name}", streaming=streaming)
        try:
            next(build_source(config, {}, None, "hf_token").batches(0, None))
        except Exception as error:
            told[f"{name}-{streaming}"] = [type(error).__name__, str(error)]
print(json.dumps(told))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = next((name for name in ANSWERS if f"/{name}" in self.path), "missing")
        status, code, message = ANSWERS[name]
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET  # noqa: N815 - the names that http.server calls

    def log_message(self, format: str, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def told(names: list[str], env: dict[str, str], home: Path) -> dict[str, list[str]]:
    """What loading each data set raised, in a process that has the settings from its start."""
    run = subprocess.run(
        [sys.executable, "-c", LOADS, json.dumps(names)],
        env={"HF_HOME": str(home), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    answer: dict[str, list[str]] = json.loads(run.stdout)
    return answer


def test_refusals_of_the_hub(endpoint: str, tmp_path: Path) -> None:
    said = told(list(ANSWERS), {"HF_ENDPOINT": endpoint}, tmp_path)
    for streaming in (False, True):
        kind, text = said[f"missing-{streaming}"]
        assert kind == "FatalJobError"
        assert "org/missing does not exist on the Hub, or is private" in text
        kind, text = said[f"gated-{streaming}"]
        assert kind == "AuthError"
        assert "ask for access" in text
        assert said[f"forbidden-{streaming}"][0] == "AuthError"


def test_offline(tmp_path: Path) -> None:
    said = told(["data"], {"HF_HUB_OFFLINE": "1"}, tmp_path)
    for kind, text in said.values():
        assert kind == "FatalJobError"
        assert "HF_HUB_OFFLINE is set" in text


@pytest.mark.parametrize(
    "error",
    [
        # Raised, not served: the client repeats such requests for most of a minute.
        HfHubHTTPError("busy", response=httpx.Response(429, request=REQUEST)),
        HfHubHTTPError("down", response=httpx.Response(502, request=REQUEST)),
        httpx.ReadTimeout("slow", request=REQUEST),
        ConnectionError("refused"),
        OSError(28, "No space left on device"),
    ],
)
def test_what_another_attempt_may_mend_does_not_fail_the_job(error: Exception) -> None:
    with pytest.raises(PipelineError, match="org/data") as caught, hub_errors(SPEC):
        raise error
    assert not isinstance(caught.value, FatalJobError)


def test_an_error_of_ours_passes_as_it_is() -> None:
    error = FatalJobError("as it is")
    with pytest.raises(FatalJobError) as caught, hub_errors(SPEC):
        raise error
    assert caught.value is error
