"""The SDK's client on the real server: submit, follow, download, retry."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from spider_sdk import AppConfig, Client
from spider_sdk.errors import ConfigError, NotFound, Unauthorized
from spider_worker.fleet import Fleet
from spider_worker.fleet.keys import ApiKeys
from spider_worker.settings import FleetSettings
from tests.support.api_server import ApiServer
from tests.support.hand_run import HandRun, record

CONFIG = """
job:
  model: {{provider: openai, name: m, base_url: "https://models.example/v1", api_key: sk-canary}}
  source: {{dataset: "{data}", field: question}}
"""


def test_a_jobs_whole_life_through_the_sdk(
    fleet: Fleet, fleet_settings: FleetSettings, tmp_path: Path
) -> None:
    _, token = ApiKeys(fleet.redis, fleet.secret_box).create("me")
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "?"}\n')
    path = tmp_path / "job.yaml"
    path.write_text(CONFIG.format(data=data))
    config = AppConfig.load(path)
    with (
        ApiServer(fleet_settings, tmp_path) as server,
        Client(config, base_url=server.base_url, api_key=token) as client,
    ):
        job = client.submit_job()["job_id"]
        assert "sk-canary" not in json.dumps(fleet.jobs.get(job).document)
        assert "sk-canary" in fleet.jobs.secrets(job).values()
        source = client.get_job_status(job)["job"]["source"]
        assert fleet.inputs.has(source["inputs"][0]["sha256"])

        def work() -> None:
            run = HandRun(fleet, job, units=1)
            run.work(record(0), record(1, error={"stage": "generation"}), rows_error=1)
            run.finish()

        worker = threading.Thread(target=work)
        worker.start()
        seen: list[dict[str, Any]] = []
        final = client.poll_job(job, timeout=60, on_update=lambda update: seen.append(dict(update)))
        worker.join()
        assert final["status"] == "completed"
        assert seen
        target = tmp_path / "result.json"
        client.download_result(job, str(target))
        result = json.loads(target.read_text())
        assert [item["index"] for item in result["artifact"]] == [0, 1]
        for suffix in ("jsonl", "parquet"):
            assert client.download_result(job, str(tmp_path / f"r.{suffix}")).stat().st_size > 0
        assert [item["job_id"] for item in client.list_jobs()] == [job]
        events = [event.offset for event in client.events(job)]
        assert events == list(range(len(events)))
        assert client.retry_job(job)["status"] == "queued"
        assert client.cancel_job(job)["status"] == "cancelled"
        with pytest.raises(NotFound):
            client.get_job_status("f" * 16)
        with pytest.raises(ConfigError, match="source"):
            client.submit_job({"source": {"dataset": "/etc/passwd.jsonl", "field": "q"}})
        with (
            Client(base_url=server.base_url, api_key="sk_wrong") as stranger,
            pytest.raises(Unauthorized),
        ):
            stranger.list_jobs()
