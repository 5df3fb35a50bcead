"""Rows through the pipeline: what is asked, what is recorded, what is counted."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config.model import GenerationConfig, OutputConfig, Pricing
from spider_sdk.errors import AuthError, FatalJobError, NotSupported, PipelineError, RowError
from spider_worker.engines.base import Completion, Usage
from spider_worker.testing import FakeEngine, InMemorySource, LocalResult
from tests.unit.offline_gen.jobs import Setup, rows


def test_every_row_becomes_a_record_in_order(tmp_path: Path) -> None:
    # Later rows are answered first, so that the order of completion is not that of the source.
    engine = FakeEngine(latency=lambda m: 0.02 - int(m[-1]["content"][1:]) / 1000)
    done = Setup(tmp_path, engine=engine).go()
    records = done.records()
    assert [record["id"] for record in records] == [f"{index}-0" for index in range(10)]
    assert records[3] == {
        "id": "3-0",
        "index": 3,
        "sample": 0,
        "prompt": "q3",
        "messages": [{"role": "user", "content": "q3"}],
        "completion": "echo: q3",
        "reasoning_content": None,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        "error": None,
        "question": "q3",
        "number": 3,
    }
    assert [s.unit for s in done.store.shards()] == ["rows-00000", "rows-00001", "rows-00002"]
    assert done.result.error is None
    assert done.store["rows_total"] == 10


def test_counters_and_cost(tmp_path: Path) -> None:
    done = Setup(tmp_path, pricing=Pricing(1.0, 10.0)).go()
    counters = done.counters()
    assert counters.pop("cost_usd") == pytest.approx((10 * 1.0 + 20 * 10.0) / 1e6)
    assert counters == {
        "rows_done": 10,
        "rows_ok": 10,
        "rows_error": 0,
        "rows_dropped": 0,
        "rows_cached": 0,
        "prompt_tokens": 10,
        "completion_tokens": 20,
    }


def test_cost_is_absent_where_an_endpoint_keeps_its_usage_to_itself(tmp_path: Path) -> None:
    def script(messages: Any, params: Any) -> Completion:
        known = messages[-1]["content"] != "q0"
        return Completion("a", "stop", Usage(3, 1) if known else Usage(None, None))

    done = Setup(tmp_path, engine=FakeEngine(script), pricing=Pricing(1.0, 1.0), shard_size=10).go()
    assert "cost_usd" not in done.counters()
    assert done.counters()["prompt_tokens"] == 27
    summary = json.loads((tmp_path / "artifacts" / "summary.json").read_text())
    assert summary["counters"]["cost_usd"] is None


def test_samples_have_seeds_of_their_own_that_last(tmp_path: Path) -> None:
    def run(folder: str) -> list[int]:
        engine = FakeEngine()
        generation = GenerationConfig({"temperature": 1.0}, duplications=3, seed=7)
        done = Setup(tmp_path / folder, engine=engine, generation=generation, shard_size=2).go()
        assert [r["id"] for r in done.records()][:4] == ["0-0", "0-1", "0-2", "1-0"]
        assert done.counters()["rows_done"] == done.store["rows_total"] == 30
        assert {params["temperature"] for params in engine.params} == {1.0}
        return [params["seed"] for params in engine.params]

    first = run("a")
    assert len(set(first)) == 30
    assert first == run("b")


def test_no_seed_is_sent_where_none_is_set(tmp_path: Path) -> None:
    engine = FakeEngine()
    Setup(tmp_path, engine=engine).go()
    assert all("seed" not in params for params in engine.params)


def test_system_prompt_comes_first_unless_the_row_has_one(tmp_path: Path) -> None:
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "b"}]
    source = InMemorySource([{"question": "a"}, {"question": own}])
    done = Setup(tmp_path, source=source, generation=GenerationConfig(system_prompt="Be.")).go()
    first, second = done.records()
    assert first["messages"] == [
        {"role": "system", "content": "Be."},
        {"role": "user", "content": "a"},
    ]
    assert second["messages"] == own
    assert second["prompt"] is None


def test_a_column_named_as_the_record_s_own_moves_aside(tmp_path: Path) -> None:
    source = InMemorySource([{"question": "a", "id": 5, "source_id": 6, "error": "x"}])
    (record,) = Setup(tmp_path, source=source).go().records()
    assert (record["id"], record["source_source_id"], record["source_id"]) == ("0-0", 5, 6)
    assert (record["error"], record["source_error"]) == (None, "x")


def test_values_that_orjson_refuses_are_kept(tmp_path: Path) -> None:
    source = InMemorySource([{"question": "a", "big": 2**70, "half": "\ud800"}])
    (record,) = Setup(tmp_path, source=source).go().records()
    assert (record["big"], record["half"]) == (2**70, "\ud800")


def test_rows_that_always_fail_are_error_rows_and_the_job_completes(tmp_path: Path) -> None:
    def script(messages: Any, params: Any) -> str:
        text = messages[-1]["content"]
        if text in ("q2", "q5"):
            raise RowError("no luck with sk-secret-1", stage="generation", kind="http_500")
        if text == "q7":
            raise KeyError("template")
        return "fine"

    setup = Setup(
        tmp_path, engine=FakeEngine(script), secrets={"K": "sk-secret-1", "WANDB_MODE": "luck"}
    )

    async def main() -> tuple[LocalResult, list[Any]]:
        ctx = setup.context()
        return await setup.run(ctx=ctx), ctx.events

    done, events = asyncio.run(main())
    told = [(code, message) for level, code, message, _ in events if level == "warning"]
    # One event for each kind of error, not for each row.
    assert told == [
        ("row.error", "row 2-0: generation: http_500: no luck with ***"),
        ("row.error", "row 7-0: generation: KeyError: 'template'"),
    ]
    # What takes its time before the first row is said when it begins.
    said = [code for level, code, _, _ in events if level == "info"]
    assert said == ["job.planning", "engine.starting", "engine.ready"]
    assert done.result.error is None
    assert (done.counters()["rows_ok"], done.counters()["rows_error"]) == (7, 3)
    errors = {r["id"]: r for r in done.records() if r["error"]}
    assert set(errors) == {"2-0", "5-0", "7-0"}
    assert errors["2-0"]["error"] == {
        "stage": "generation",
        "type": "http_500",
        "message": "no luck with ***",
        "traceback": None,
    }
    assert errors["2-0"]["completion"] is None
    assert errors["2-0"]["question"] == "q2"
    assert errors["7-0"]["error"]["type"] == "KeyError"
    assert "Traceback" in errors["7-0"]["error"]["traceback"]


def test_no_good_row_fails_the_job_with_what_went_wrong(tmp_path: Path) -> None:
    def script(messages: Any, params: Any) -> str:
        kind = "even" if int(messages[-1]["content"][1:]) % 2 == 0 else "odd"
        raise RowError(f"{kind} row", stage="generation", kind="bad")

    done = Setup(tmp_path, engine=FakeEngine(script)).go()
    assert done.result.error == (
        "no good row: 10 failed and 0 were dropped. Errors seen:\n"
        "- generation: bad: even row (row 0-0)\n- generation: bad: odd row (row 1-0)"
    )


def test_an_empty_source_is_refused_when_planned(tmp_path: Path) -> None:
    with pytest.raises(FatalJobError, match="selects no rows"):
        Setup(tmp_path, source=InMemorySource([])).go()


def test_a_field_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(FatalJobError, match=r"'prompt' is no column.*question, number"):
        Setup(tmp_path, field="prompt").go()


@pytest.mark.parametrize("error", [AuthError("key refused"), PipelineError("engine died")])
def test_an_engine_that_fails_as_a_whole_ends_the_attempt(
    tmp_path: Path, error: PipelineError
) -> None:
    def script(messages: Any, params: Any) -> str:
        if messages[-1]["content"] == "q3":
            raise error
        return "fine"

    with pytest.raises(type(error), match=error.message):
        Setup(tmp_path, engine=FakeEngine(script)).go()


def test_requests_in_flight_stay_within_the_bound_over_overlapping_units(tmp_path: Path) -> None:
    engine = FakeEngine(capacity=8, latency=0.002)
    setup = Setup(tmp_path, engine=engine, source=InMemorySource(rows(60)), shard_size=10)
    setup.go()
    assert engine.peak == 8
    bounded = FakeEngine(capacity=8, latency=0.002)
    generation = GenerationConfig(max_batch_size=3)
    Setup(tmp_path / "b", engine=bounded, generation=generation).go()
    assert bounded.peak == 3


def test_a_source_shorter_than_planned_is_no_quiet_loss(tmp_path: Path) -> None:
    class Shrinking(InMemorySource):
        def count(self) -> int:
            return 12

    with pytest.raises(PipelineError, match="the source ended after row 9; 12 rows"):
        Setup(tmp_path, source=Shrinking(rows(10))).go()


def test_what_cannot_be_honoured_is_refused_by_name(tmp_path: Path) -> None:
    import dataclasses

    from spider_sdk.config.model import HubConfig
    from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline
    from spider_worker.testing import fake_parts

    parts = fake_parts(InMemorySource(rows(1)), FakeEngine())
    job = Setup(tmp_path).job()
    with pytest.raises(NotSupported, match=r"job\.tools"):
        OfflineGenPipeline(dataclasses.replace(job, tools=({"name": "t"},)), parts)
    model = OutputConfig(mode="upload_hf", hf=HubConfig("a/b", repo_type="model"))
    with pytest.raises(NotSupported, match="repo_type 'model'"):
        OfflineGenPipeline(dataclasses.replace(job, output=model), parts)


def test_parquet_output_is_an_artifact_with_every_record(tmp_path: Path) -> None:
    done = Setup(tmp_path, output=OutputConfig(format="parquet")).go()
    assert set(done.result.files) == {"summary.json", "result.parquet"}
    lines = (tmp_path / "artifacts" / "result.parquet").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == list(range(10))
