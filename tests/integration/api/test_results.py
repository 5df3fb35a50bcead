"""Results and artifacts: partial and whole, in every format, with ranges."""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from spider_worker.fleet import Fleet
from tests.support.hand_run import HandRun, record


@pytest.fixture
def job(ada: Any) -> str:
    job_id: str = ada.submit()
    return job_id


def indexes(records: list[dict[str, Any]]) -> list[int]:
    return [item["index"] for item in records]


def test_there_is_nothing_until_there_is_something(ada: Any, fleet: Fleet, job: str) -> None:
    def refused() -> None:
        answer = ada.get(f"/v1/jobs/{job}/result")
        assert answer.status_code == 404
        assert answer.json["detail"] == f"job {job} has no results yet"

    refused()
    HandRun(fleet, job)  # planned, and no row done
    refused()


def test_partial_results_come_from_shards_and_journals(ada: Any, fleet: Fleet, job: str) -> None:
    run = HandRun(fleet, job, units=2)
    run.work(record(0), record(1))
    run.journal(record(3))
    document = ada.get(f"/v1/jobs/{job}/result").json
    assert document["status"] == "running"
    assert document["job_id"] == job
    assert indexes(document["artifact"]) == [0, 1, 3]


def test_the_whole_result_is_one_document(ada: Any, fleet: Fleet, job: str) -> None:
    run = HandRun(fleet, job, units=2)
    records = [record(n, nested={"a": [1, None]}) for n in range(4)]
    run.work(*records[:2])
    run.work(*records[2:])
    run.finish()
    answer = ada.get(f"/v1/jobs/{job}/result")
    assert answer.content_type == "application/json"
    assert f"{job}.json" in answer.headers["Content-Disposition"]
    document = json.loads(answer.text)
    assert document["status"] == "completed"
    assert document["artifact"] == records
    status = ada.get(f"/v1/jobs/{job}").json
    same = document.keys() - {"artifact"}
    assert {name: document[name] for name in same} == {name: status[name] for name in same}
    lines = ada.get(f"/v1/jobs/{job}/result?format=jsonl")
    assert lines.content_type.startswith("application/x-ndjson")
    assert [json.loads(line) for line in lines.text.removesuffix("\n").split("\n")] == records


def test_a_completed_job_without_rows_has_an_empty_result(ada: Any, fleet: Fleet, job: str) -> None:
    run = HandRun(fleet, job, units=1)
    run.work()
    run.finish()
    assert ada.get(f"/v1/jobs/{job}/result").json["artifact"] == []
    assert ada.get(f"/v1/jobs/{job}/result?format=jsonl").text == ""


def test_parquet_follows_the_records(ada: Any, fleet: Fleet, job: str) -> None:
    def read() -> list[int]:
        answer = ada.get(f"/v1/jobs/{job}/result?format=parquet")
        assert answer.status_code == 200
        assert answer.content_type == "application/vnd.apache.parquet"
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(answer.data)).to_pylist()
        return indexes(rows)

    run = HandRun(fleet, job, units=2)
    run.work(record(0))
    assert read() == [0]
    run.work(record(1))
    assert read() == [0, 1]
    run.finish()
    assert read() == [0, 1]
    assert read() == [0, 1]
    kept = list((fleet.artifacts.root / "jobs" / job / "exports").iterdir())
    assert len(kept) == 1, "nothing but the ended job's file is kept"


def test_an_unknown_format_is_refused(ada: Any, job: str) -> None:
    answer = ada.get(f"/v1/jobs/{job}/result?format=csv")
    assert answer.status_code == 422
    assert answer.json["errors"][0]["path"] == "query.format"


def test_artifacts_are_listed_and_fetched_by_name(ada: Any, fleet: Fleet, job: str) -> None:
    run = HandRun(fleet, job, units=2)
    run.work(record(0))
    run.journal(record(1))
    (entry,) = ada.get(f"/v1/jobs/{job}/artifacts").json["artifacts"]
    assert entry["name"] == "shard-00000.jsonl"
    answer = ada.get(entry["path"])
    assert answer.status_code == 200
    assert len(answer.data) == entry["size"]
    assert json.loads(answer.data) == record(0)
    for name in ("journal/u1", "../job.json", "%2e%2e/job.json", "nothing", "/etc/passwd"):
        assert ada.get(f"/v1/jobs/{job}/artifacts/{name}").status_code in (404, 308), name


def test_ranges(ada: Any, fleet: Fleet, job: str) -> None:
    HandRun(fleet, job).work(record(0))
    path = f"/v1/jobs/{job}/artifacts/shard-00000.jsonl"
    whole = ada.get(path)
    part = ada.get(path, headers={"Range": "bytes=5-9"})
    assert part.status_code == 206
    assert part.data == whole.data[5:10]
    assert part.headers["Content-Range"] == f"bytes 5-9/{len(whole.data)}"
    tail = ada.get(path, headers={"Range": "bytes=-4", "If-Range": whole.headers["ETag"]})
    assert tail.data == whole.data[-4:]
    changed = ada.get(path, headers={"Range": "bytes=-4", "If-Range": '"other"'})
    assert changed.status_code == 200
    outside = ada.get(path, headers={"Range": "bytes=999999-"})
    assert outside.status_code == 416
    assert outside.content_type == "application/problem+json"
    same = ada.get(path, headers={"If-None-Match": whole.headers["ETag"]})
    assert same.status_code == 304


def test_logs_are_text(ada: Any, fleet: Fleet, job: str) -> None:
    assert ada.get(f"/v1/jobs/{job}/logs").text == ""
    fleet.artifacts.log_file(job, "r1").write_text("one\ntwo\n")
    answer = ada.get(f"/v1/jobs/{job}/logs")
    assert answer.content_type == "text/plain; charset=utf-8"
    assert answer.text == "one\ntwo\n"
