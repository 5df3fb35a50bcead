"""Commands against a real server that answers by a script: words, JSON, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.cli.main import run
from tests.support.scripted_server import (
    ScriptedServer,
    answer_bytes,
    answer_json,
    event,
    event_stream,
    frame,
    job_status,
    named_frame,
    problem,
    status_document,
)

JOB, EVENTS, RESULT = "/v1/jobs/j1", "/v1/jobs/j1/events", "/v1/jobs/j1/result"
DOCUMENT = {
    "model": {"provider": "vllm", "name": "m"},
    "source": {"dataset": "d", "field": "q"},
}
Capture = pytest.CaptureFixture[str]
Config = Callable[..., str]


def log(end: str, **data: Any) -> list[dict[str, Any]]:
    return [
        event(0, "job.queued", "waiting for a worker"),
        event(1, "job.running"),
        event(2, "progress", metrics={"rows_done": 3, "rows_total": 3, "rows_error": 1}),
        event(3, f"job.{end}", end, **data),
    ]


def ending(server: ScriptedServer, end: str, **changes: Any) -> None:
    """Script a job that is accepted and then ends as ``end``."""
    entries = log(end)
    metrics = {"metrics": {"rows_done": 3, "rows_total": 3, "rows_error": 1}, **changes}
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}, 201))
    server.on("GET", JOB, job_status("queued", []), job_status(end, entries, **metrics))
    final = status_document(end, entries, **metrics)
    server.on("GET", EVENTS, event_stream([*map(frame, entries), named_frame("end", final)]))


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


# submit


def test_a_followed_submit(server: ScriptedServer, config: Config, capsys: Capture) -> None:
    ending(server, "completed", remote_artifact="https://hub.example/d")
    assert run(["submit", config()]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "job j1 queued"
    assert "waiting for a worker" in lines[1]
    assert lines[3].endswith("3/3 rows · 1 error")
    assert lines[-3:] == [
        "on the Hub: https://hub.example/d",
        "download the results with: spider download j1",
        "1 row failed, as the results tell; again: spider retry j1",
    ]
    assert err == "forwarded to the job, by name: MODEL_KEY\n"
    assert "mk-1" not in out + err


def test_results_come_to_the_local_path(
    server: ScriptedServer, config: Config, capsys: Capture, tmp_path: Path
) -> None:
    ending(server, "completed")
    server.on("GET", RESULT, answer_bytes(b"rows"))
    assert run(["submit", config("  output: {local_path: out/r.jsonl}\n")]) == 0
    assert (tmp_path / "out/r.jsonl").read_bytes() == b"rows"
    assert "results are in out/r.jsonl" in capsys.readouterr().out


def test_follow_in_json(server: ScriptedServer, config: Config, capsys: Capture) -> None:
    ending(server, "completed")
    server.on("GET", RESULT, answer_bytes(b"rows"))
    assert run(["submit", config("  output: {local_path: r.jsonl}\n"), "--json"]) == 0
    out, err = capsys.readouterr()
    first, *events, final, saved = json_lines(out)
    assert first == {"job_id": "j1", "status": "queued"}
    assert [entry["code"] for entry in events] == [entry["code"] for entry in log("completed")]
    assert final["status"] == "completed"
    assert saved == {"job_id": "j1", "downloaded": "r.jsonl"}
    assert err == "forwarded to the job, by name: MODEL_KEY\n"


def test_a_failed_job_is_1(server: ScriptedServer, config: Config, capsys: Capture) -> None:
    ending(server, "failed", error="no good row")
    assert run(["submit", config()]) == 1
    err = capsys.readouterr().err
    assert "job j1 failed: no good row" in err
    assert "spider logs j1" in err
    assert "what is finished is kept: spider download j1" in err


def test_a_cancelled_job_is_4(server: ScriptedServer, config: Config, capsys: Capture) -> None:
    ending(server, "cancelled")
    assert run(["submit", config(), "--json"]) == 4
    assert json_lines(capsys.readouterr().out)[-1]["exit_code"] == 4


def test_detach_returns_at_once(server: ScriptedServer, config: Config, capsys: Capture) -> None:
    ending(server, "completed")
    assert run(["submit", config(), "--detach"]) == 0
    assert "spider watch j1" in capsys.readouterr().out
    assert [seen.method for seen in server.seen] == ["POST"]


def test_options_reach_the_job(server: ScriptedServer, config: Config, tmp_path: Path) -> None:
    ending(server, "completed")
    (tmp_path / "p.py").write_text(
        "def before(row):\n    return row['question']\n\ndef after(row):\n    return row\n"
    )
    os.environ["EXTRA_NAME"] = "extra"
    try:
        args = ["--set", "job.generation.parameters.temperature=0.2", "--env", "EXTRA_NAME"]
        functions = ["--pre-processor", "p.py:before", "--post-processor", "p.py:after"]
        key = ["--idempotency-key", "mine"]
        assert run(["submit", config(), "--detach", *args, *functions, *key]) == 0
    finally:
        del os.environ["EXTRA_NAME"]
    sent = server.seen[0]
    assert sent.headers["idempotency-key"] == "mine"
    job = sent.json["job"]
    assert job["generation"]["parameters"]["temperature"] == 0.2
    assert job["pre_processor"]["name"] == "before"
    assert job["post_processor"]["name"] == "after"
    assert sent.json["env"] == {"MODEL_KEY": "mk-1", "EXTRA_NAME": "extra"}


def test_a_swe_file_goes_out_with_its_tasks_and_apart_from_its_secrets(
    server: ScriptedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-token")
    rows = b'{"instance_id": "a", "image_name": "i"}\n'
    (tmp_path / "tasks.jsonl").write_bytes(rows)
    (tmp_path / "swe.yaml").write_text(
        "dataset: ./tasks.jsonl\nllm_model: openai/m\nllm_api_key: canary-key\nhf_repo_id: me/d\n"
    )
    ending(server, "completed")
    digest = hashlib.sha256(rows).hexdigest()
    upload = f"/v1/inputs/{digest}"
    server.on("PUT", upload, answer_json({"sha256": digest, "size": len(rows)}, 201))
    assert run(["submit", "swe.yaml", "--detach", "--set", "num_workers=3"]) == 0
    (uploaded,) = server.requests("PUT", upload)
    assert uploaded.body == rows
    sent = server.seen[-1]
    assert sent.path == "/v1/jobs"
    swe = sent.json["job"]["swe"]
    name = swe.pop("llm_api_key_env")
    assert sent.json["env"] == {name: "canary-key", "HF_TOKEN": "canary-token"}
    assert swe == {
        "dataset": "tasks.jsonl", "llm_model": "openai/m", "hf_repo_id": "me/d", "num_workers": 3,
        "inputs": [{"name": "tasks.jsonl", "sha256": digest}],
    }  # fmt: skip
    out, err = capsys.readouterr()
    assert f"forwarded to the job, by name: {', '.join(sorted(['HF_TOKEN', name]))}" in err
    assert "canary" not in out + err


@pytest.mark.parametrize(
    ("where", "text", "told"),
    [
        ("p.py", "", "file.py:function"),
        ("none.py:f", "", "there is no file"),
        ("p.py:g", "def f(row): ...\n", "g"),
        ("p.py:f", "def f(:\n", "line 1"),
    ],
)
def test_a_processor_that_is_not_there(
    server: ScriptedServer,
    config: Config,
    capsys: Capture,
    tmp_path: Path,
    where: str,
    text: str,
    told: str,
) -> None:
    (tmp_path / "p.py").write_text(text)
    assert run(["submit", config(), "--pre-processor", where]) == 2
    assert told in capsys.readouterr().err
    assert server.seen == []


def test_what_the_server_finds_reads_like_a_local_problem(
    server: ScriptedServer, config: Config, capsys: Capture
) -> None:
    fields = [{"path": "job.model.provider", "message": "vllm is not offered here"}]
    server.on("POST", "/v1/jobs", problem(422, "not valid", errors=fields))
    assert run(["submit", config()]) == 2
    assert "job.model.provider: vllm is not offered here" in capsys.readouterr().err


def test_no_server_is_3(
    server: ScriptedServer, config: Config, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIDER_BASE_URL", "http://127.0.0.1:1")
    assert run(["submit", config()]) == 3
    assert "cannot connect to http://127.0.0.1:1" in capsys.readouterr().err


def test_a_key_that_is_not_accepted_is_2(server: ScriptedServer, capsys: Capture) -> None:
    server.on("GET", JOB, problem(401, "this key is not valid"))
    assert run(["status", "j1"]) == 2
    err = capsys.readouterr().err
    assert "SPIDER_API_KEY" in err
    assert "user.toml, which SPIDER_CONFIG names" in err  # the reason why there is no key


def spider(*args: str, **options: Any) -> subprocess.Popen[str]:
    # A shell that runs the tests in the background has SIGINT ignored, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from spider_sdk.cli.main import main; main()"
    )
    return subprocess.Popen([sys.executable, "-c", code, *args], text=True, **options)


def test_ctrl_c_detaches_and_never_cancels(server: ScriptedServer, config: Config) -> None:
    entries = log("completed")
    server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}))
    server.on("GET", JOB, job_status("running", entries[:2]))
    server.on("GET", EVENTS, event_stream(map(frame, entries[:2]), then="hold"))
    pipe = subprocess.PIPE
    unbuffered = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with spider("submit", config(), stdout=pipe, stderr=pipe, env=unbuffered) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "job.running" in line:
                break
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "job j1 goes on. Watch it again with: spider watch j1" in err
    assert "Traceback" not in err
    assert {seen.path for seen in server.seen if seen.method == "POST"} == {"/v1/jobs"}


def test_lines_that_say_nothing_new_are_left_out(server: ScriptedServer, capsys: Capture) -> None:
    counts = {"rows_done": 3, "rows_total": 9, "rows_error": 2}
    entries = [
        event(0, "job.running"),
        *(event(number, "progress", metrics=counts) for number in range(1, 5)),
        event(5, "progress", metrics={**counts, "rows_done": 9}),
        event(6, "job.completed"),
    ]
    done = {**counts, "rows_done": 9}
    server.on("GET", JOB, job_status("running", []), job_status("completed", [], metrics=done))
    final = named_frame("end", status_document("completed", [], metrics=done))
    server.on("GET", EVENTS, event_stream([*map(frame, entries), final]))
    assert run(["watch", "j1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[-6:-2] for line in out if " progress " in line] == [
        ["progress", "3/9", "rows", "·"], ["progress", "9/9", "rows", "·"]
    ]  # fmt: skip
    assert out[-1] == "2 rows failed, as the results tell; again: spider retry j1"


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "NO_COLOR"])
def test_a_terminal_shows_three_lines(server: ScriptedServer, colour: bool) -> None:
    metrics = {
        "rows_done": 412, "rows_total": 1000, "rows_error": 3,
        "prompt_tokens": 1_200_000, "completion_tokens": 3_400_000, "cost_usd": 2.81,
    }  # fmt: skip
    entries = [
        event(0, "job.running"),
        event(1, "progress", metrics=metrics, engine={"in_flight": 24, "limit": 64}),
        {**event(2, "unit.retrying", "shard-1: broke"), "level": "warning"},
        event(3, "job.completed"),
    ]
    done = job_status("completed", entries, metrics=metrics)
    server.on("GET", JOB, job_status("running", []), done)
    final = named_frame("end", status_document("completed", entries, metrics=metrics))
    server.on("GET", EVENTS, event_stream([*map(frame, entries), final]))
    keep, give = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    env = {**env, "NO_COLOR": "" if colour else "1"}
    with spider("watch", "j1", stdout=give, stderr=give, stdin=give, env=env) as process:
        os.close(give)
        shown = b""
        while chunk := _read(keep):
            shown += chunk
        assert process.wait() == 0
    os.close(keep)
    text = shown.decode()
    assert "job j1 completed · 412/1000 rows · 3 errors" in text
    assert "in 1.2M out 3.4M tokens · $2.81" in text
    assert "shard-1: broke" in text
    assert ("\x1b[33m" in text) is colour


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, 65536)
    except OSError:  # how Linux says that the other side has closed
        return b""


# Jobs that are there.


def test_status(server: ScriptedServer, capsys: Capture) -> None:
    document = {"error": "no good row", "metrics": {"rows_done": 2}}
    server.on("GET", JOB, job_status("failed", [], **document))
    assert run(["status", "j1"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "job j1 failed · 2 rows"
    assert "error: no good row" in out
    assert run(["status", "j1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "failed"


def test_list(server: ScriptedServer, capsys: Capture) -> None:
    jobs = [status_document("running", metrics={"rows_done": 2}), status_document("queued")]
    server.on("GET", "/v1/jobs", answer_json({"jobs": jobs}))
    assert run(["list", "--limit", "5", "--status", "running"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "j1  running    2026-01-01T00:00:00Z  2 rows",
        "j1  queued     2026-01-01T00:00:00Z",
    ]
    assert server.seen[0].query == "limit=5&status=running"
    assert run(["list", "--json"]) == 0
    assert [job["status"] for job in json_lines(capsys.readouterr().out)] == ["running", "queued"]


def test_logs(server: ScriptedServer, capsys: Capture) -> None:
    server.on("GET", "/v1/jobs/j1/logs", answer_bytes(b"one\ntwo\n", kind="text/plain"))
    assert run(["logs", "j1"]) == 0
    assert capsys.readouterr().out == "one\ntwo\n"
    assert run(["logs", "j1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"job_id": "j1", "logs": "one\ntwo\n"}


def test_cancel(server: ScriptedServer, capsys: Capture) -> None:
    running, gone = status_document("running"), status_document("cancelled")
    server.on("POST", "/v1/jobs/j1/cancel", answer_json(running), answer_json(gone))
    assert run(["cancel", "j1"]) == 0
    assert run(["cancel", "j1"]) == 0
    assert capsys.readouterr().out == "job j1 is stopping\njob j1 cancelled\n"


def test_watch_from_an_event_on(server: ScriptedServer, capsys: Capture) -> None:
    server.on("GET", JOB, job_status("completed", log("completed")))
    server.on("GET", EVENTS, event_stream(map(frame, log("completed")[2:])))
    assert run(["watch", "j1", "--since", "2", "--json"]) == 0
    offsets = [entry.get("offset") for entry in json_lines(capsys.readouterr().out)]
    assert offsets == [2, 3, None]


def test_retry_and_follow(server: ScriptedServer, capsys: Capture) -> None:
    before = [event(0, "job.queued"), event(1, "job.failed")]
    after = [*before, event(2, "job.queued"), event(3, "job.completed")]
    server.on(
        "GET",
        JOB,
        job_status("failed", before, job=DOCUMENT),
        job_status("failed", before, job=DOCUMENT),
        job_status("failed", before, job=DOCUMENT),
        job_status("queued", after[:3]),
        job_status("completed", after),
    )
    server.on("POST", "/v1/jobs/j1/retry", answer_json(status_document("queued")))
    server.on("GET", EVENTS, event_stream(map(frame, after), then="hold"))
    assert run(["retry", "j1", "--follow"]) == 0
    out = capsys.readouterr().out
    assert "job.failed" not in out
    assert "job.completed" in out


def test_a_retry_that_is_refused(server: ScriptedServer, capsys: Capture) -> None:
    server.on("GET", JOB, job_status("running", [], job=DOCUMENT))
    server.on("POST", "/v1/jobs/j1/retry", problem(409, "job j1 is running"))
    assert run(["retry", "j1"]) == 2
    assert "job j1 is running" in capsys.readouterr().err


def test_download(server: ScriptedServer, capsys: Capture, tmp_path: Path) -> None:
    server.on("GET", RESULT, answer_bytes(b"rows"))
    assert run(["download", "j1"]) == 0
    assert run(["download", "j1", "-o", "x.json", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "results are in j1.jsonl"
    assert json.loads(out[1]) == {"job_id": "j1", "downloaded": "x.json", "bytes": 4}
    assert run(["download", "j1", "-o", "x.txt"]) == 2
    assert sorted(os.listdir(tmp_path)) == ["j1.jsonl", "x.json"]


# No server.


def test_validate_prints_every_problem_with_its_line(
    server: ScriptedServer, config: Config, capsys: Capture
) -> None:
    config("  outptu: {}\n  parallelism: many\n")
    assert run(["validate", "job.yaml"]) == 2
    err = capsys.readouterr().err
    assert "job.yaml:12: job.outptu" in err
    assert "output" in err
    assert "job.yaml:13: job.parallelism" in err
    assert run(["validate", "job.yaml", "--json"]) == 2
    errors = json.loads(capsys.readouterr().out)["error"]["errors"]
    assert [(entry["line"], entry["path"]) for entry in errors] == [
        (12, "job.outptu"),
        (13, "job.parallelism"),
    ]
    assert server.seen == []


def test_validate_says_what_would_go_along(
    server: ScriptedServer,
    config: Config,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    assert run(["validate", config(**{"openai/gsm8k": "rows.jsonl"})]) == 0
    out = capsys.readouterr().out
    assert "job.yaml is valid" in out
    assert "rows.jsonl" in out
    assert "MODEL_KEY" in out
    monkeypatch.delenv("MODEL_KEY")
    assert run(["validate", "job.yaml"]) == 0
    assert "MODEL_KEY is not set" in capsys.readouterr().err


def test_validate_asks_for_what_submit_would_ask_for(
    server: ScriptedServer, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    (tmp_path / "own.yaml").write_text(
        "job:\n  model: {provider: openai, name: m}\n  source: {dataset: a/b, field: q}\n"
    )

    def found() -> Any:
        assert run(["validate", "own.yaml", "--json"]) == 0
        return json_lines(capsys.readouterr().out)[0]

    assert found()["missing_env"] == ["OPENAI_API_KEY"]
    # A server of one's own may want no key.
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
    assert (found()["missing_env"], found()["forwarded"]) == ([], ["OPENAI_BASE_URL"])


def test_validate_does_not_repeat_a_key_given_as_a_name(
    server: ScriptedServer, config: Config, capsys: Capture
) -> None:
    assert run(["validate", config(), "--env", "sk-0123456789"]) == 2
    out, err = capsys.readouterr()
    assert "sk-0123456789" not in out + err
    assert "the name of an environment variable" in err


def test_validate_takes_a_swe_job(
    server: ScriptedServer, config: Config, capsys: Capture, tmp_path: Path
) -> None:
    (tmp_path / "swe.yaml").write_text(
        'dataset: "SWE-bench/SWE-smith"\nsplit: train\nagent_class: CodeActAgent\n'
        "max_iterations: 30\nllm_model: gpt-4o\n"
    )
    assert run(["validate", "swe.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "swe.yaml is valid" in out
    assert "cannot be submitted" not in err


def test_init_writes_what_validates_and_keeps_what_is_there(
    server: ScriptedServer, capsys: Capture, tmp_path: Path
) -> None:
    assert run(["init"]) == 0
    assert run(["validate", "job.yaml"]) == 0
    (tmp_path / "job.yaml").write_text("mine")
    assert run(["init"]) == 2
    assert (tmp_path / "job.yaml").read_text() == "mine"
    assert "job.yaml exists" in capsys.readouterr().err


def test_config_show(
    server: ScriptedServer, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPIDER_API_KEY", "sk_1_0123456789abcdef")
    (tmp_path / "user.toml").write_text('redis_url = "redis://other:1/0"\n')
    assert run(["config", "show", "--origin", "--json"]) == 0
    lines = {entry["variable"]: entry for entry in json_lines(capsys.readouterr().out)}
    assert lines["SPIDER_BASE_URL"]["origin"] == "environment"
    assert lines["SPIDER_REDIS_URL"]["origin"].endswith("user.toml")
    assert lines["SPIDER_LEASE"]["origin"] == "default"
    assert run(["config", "show"]) == 0
    out = capsys.readouterr().out
    assert "0123456789abcdef" not in out
    assert "SPIDER_API_KEY" in out
    assert "Seconds a unit's lease lives without a heartbeat." in out
