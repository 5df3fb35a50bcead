"""What the off-policy pipeline promises, whatever it is put together from."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

from spider_worker.testing import run_job_locally

if TYPE_CHECKING:
    from tests.contract.pipeline.conftest import World


def test_rows_and_samples_become_records_in_order(world: World) -> None:
    job = world.job()
    done = asyncio.run(run_job_locally(world.build(job), world.context(job)))
    records = done.records()
    assert [(r["index"], r["sample"]) for r in records] == [
        (i, s) for i in range(8) for s in (0, 1)
    ]
    for record in records:
        assert record["error"] is None
        assert record["id"] == f"{record['index']}-{record['sample']}"
        assert record["messages"] == [{"role": "user", "content": f"number {record['number']}"}]
        assert isinstance(record["completion"], str)
        assert record["finish_reason"] in ("stop", "length")
        assert record["usage"]["prompt_tokens"] > 0
    counters = done.counters()
    assert counters["rows_ok"] == counters["rows_done"] == done.store["rows_total"] == 16
    spent = counters["prompt_tokens"] + 2 * counters["completion_tokens"]
    assert abs(counters["cost_usd"] - spent / 1e6) < 1e-12
    assert done.result.error is None


def test_processors_drop_fail_and_add(world: World) -> None:
    job = world.job(processors=True)
    done = asyncio.run(run_job_locally(world.build(job), world.context(job)))
    by_row = {r["index"]: r for r in done.records() if r["sample"] == 1}
    assert sorted(by_row) == [0, 2, 4, 5, 6, 7]
    assert by_row[0]["prompt"] == "count number 0"
    assert by_row[0]["seen"] is True
    assert by_row[0]["length"] == len(by_row[0]["completion"])
    assert by_row[2]["error"]["stage"] == "pre_processor"
    assert by_row[2]["error"]["type"] == "ValueError"
    assert "two is refused" in by_row[2]["error"]["traceback"]
    assert by_row[4]["error"]["stage"] == "post_processor"
    assert by_row[4]["completion"] is not None
    counters = done.counters()
    assert (counters["rows_ok"], counters["rows_error"], counters["rows_dropped"]) == (8, 4, 4)


def test_running_again_changes_nothing_and_retry_only_what_failed(world: World) -> None:
    job = world.job(processors=True)
    first = asyncio.run(run_job_locally(world.build(job), world.context(job)))
    before = first.records()
    again = asyncio.run(run_job_locally(world.build(job), world.context(job)))
    assert again.records() == before
    tried = asyncio.run(run_job_locally(world.build(job), world.context(job), retry=True))
    assert [r["id"] for r in tried.records()] == [r["id"] for r in before]
    good = [r for r in before if r["error"] is None]
    assert [r for r in tried.records() if r["error"] is None] == good
    # The completions of row 4 were there; row 2 has never cost anything.
    assert tried.counters()["completion_tokens"] == first.counters()["completion_tokens"]


def test_the_artifacts_are_there_and_carry_no_secret(world: World) -> None:
    job = world.job()
    done = asyncio.run(run_job_locally(world.build(job), world.context(job)))
    assert set(done.result.files) == {"summary.json", "result.parquet"}
    summary = json.loads((world.folder / "artifacts" / "summary.json").read_text())
    assert summary["counters"]["rows_ok"] == 16
    for path in world.folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert all(secret.encode() not in content for secret in world.secrets.values())
