"""``spider-scaffold openhands`` against a server that answers by a script."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spider_scaffold import jobfile, servers
from spider_scaffold.cli import run
from spider_scaffold.jobfile import JobFile
from spider_sdk.config import AppConfig
from spider_sdk.errors import ServerUnreachable, UsageError
from spider_worker.trajectories.card import recipe
from spider_worker.trajectories.metadata import run_metadata
from spider_worker.trajectories.output_file import append, read, read_index, rewrite
from tests.support.scripted_server import answer_json, problem
from tests.support.swe_jobs import TREE, Jobs, attempt

Capture = pytest.CaptureFixture[str]
Config = Callable[..., str]


def lines() -> list[tuple[str, int, str]]:
    return [(one.instance_id, one.attempt, one.status) for one in read(TREE / "output.jsonl")]


def openhands(config: str, *options: str) -> int:
    return run(["openhands", "--config", config, *options])


def done_tree(*records: dict[str, object]) -> None:
    for one in records:
        append(TREE / "output.jsonl", one)


def test_a_job_fills_its_tree(jobs: Jobs, config: Config, capsys: Capture) -> None:
    jobs.run("a", attempt("a", "llm_error"), attempt("a", attempt=2, cost=0.5, resolved=True))
    jobs.run("b", attempt("b", "timeout", cost=1.0))
    jobs.ends("completed", remote_artifact="https://hub.example/d")
    assert openhands(config(), "--num-workers", "3", "--set", "max_iterations=30") == 0
    assert jobs.submitted[0]["num_workers"] == 3
    assert lines() == [("a", 1, "llm_error"), ("a", 2, "finished"), ("b", 1, "timeout")]
    assert (TREE / "infer_logs/instance_a.log").read_text() == "log of a\n"
    metadata = json.loads((TREE / "metadata.json").read_text())
    assert metadata["llm_config"]["model"] == "openai/m"
    out, err = capsys.readouterr()
    assert "instance.ended  a: finished" in out
    assert "finished      1       1         1" in out
    assert "cost: $1.75" in out
    assert "on the Hub: https://hub.example/d" in out
    assert "1 run did not get to an end; run the same command again to retry" in out
    assert err == "forwarded to the job, by name: MODEL_KEY\n"
    assert "mk-1" not in (TREE / ".spider/job.json").read_text()
    assert sorted(path.name for path in (TREE / ".spider").iterdir()) == ["job.json", "lock"]


def test_in_json(jobs: Jobs, config: Config, capsys: Capture) -> None:
    jobs.run("a", attempt("a", cost=None))
    jobs.ends("completed")
    assert openhands(config(), "--json") == 0
    first, *events, document, tree = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"job_id": "j1", "status": "queued"}
    assert [one["code"] for one in events][2:4] == ["instance.started", "instance.ended"]
    assert document["status"] == "completed"
    assert tree["output"] == str(TREE / "output.jsonl")
    assert tree["summary"]["statuses"] == {"finished": {"runs": 1, "judged": 0, "resolved": 0}}
    assert (tree["summary"]["cost_usd"], tree["summary"]["attempts_of_unknown_cost"]) == (None, 1)


@pytest.mark.parametrize(("end", "code"), [("failed", 1), ("cancelled", 4)])
def test_an_end_that_is_none_keeps_what_there_is(
    jobs: Jobs, config: Config, capsys: Capture, end: str, code: int
) -> None:
    jobs.run("a", attempt("a"))
    jobs.ends(end, error="no good" if end == "failed" else None)
    assert openhands(config()) == code
    assert lines() == [("a", 1, "finished")]
    err = capsys.readouterr().err
    assert ("job j1 failed: no good" in err) == (end == "failed")
    assert ("run the same command again" in err) == (end == "cancelled")


def test_what_is_whole_asks_no_server(jobs: Jobs, config: Config, capsys: Capture) -> None:
    jobs.run("a", attempt("a"))
    jobs.ends("completed")
    assert openhands(config()) == 0
    before = len(jobs.server.seen)
    capsys.readouterr()
    assert openhands(config(), "--num-workers", "4") == 0
    assert len(jobs.server.seen) == before
    assert "nothing is left to do: every run is done" in capsys.readouterr().out


def test_an_unfinished_job_is_gone_on_with(jobs: Jobs, config: Config, capsys: Capture) -> None:
    jobs.run("a", attempt("a"))
    jobs.ends("cancelled")
    assert openhands(config()) == 4
    jobs.run("b", attempt("b"))
    jobs.ends("completed", before="running")
    capsys.readouterr()
    assert openhands(config(), "--num-workers", "2") == 0
    assert len(jobs.submitted) == 1
    assert lines() == [("a", 1, "finished"), ("b", 1, "finished")]
    fetched = jobs.fetched()
    assert len(fetched) == len(set(fetched)), "something was fetched twice"
    out, err = capsys.readouterr()
    assert "job j1 running: going on with it" in out
    assert "which differs in num_workers" in err


def test_what_failed_is_retried_in_the_same_job(jobs: Jobs, config: Config) -> None:
    first = attempt("a", "llm_error", cost=2.0)
    jobs.run("a", first)
    jobs.ends("completed", metrics={"rows_error": 1, "rows_done": 1})
    assert openhands(config("max_budget_total: 5\n")) == 0
    jobs.ends("completed", before="completed", metrics={"rows_error": 1})
    jobs.run("a", first, attempt("a", attempt=2), at="2026-01-02")
    assert openhands(config("max_budget_total: 9\n")) == 0
    (retry,) = jobs.server.requests("POST", "/v1/jobs/j1/retry")
    assert retry.json == {"env": {"MODEL_KEY": "mk-1"}, "max_budget_total": 9.0}
    assert len(jobs.submitted) == 1
    assert lines() == [("a", 1, "llm_error"), ("a", 2, "finished")]


def test_a_verdict_in_the_tree_survives(jobs: Jobs, config: Config) -> None:
    jobs.run("a", attempt("a"))
    jobs.run("b", attempt("b", "timeout"))
    jobs.ends("completed", metrics={"rows_error": 1})
    assert openhands(config()) == 0
    rewrite(TREE / "output.jsonl", lambda one: {**one.data, "resolved": True})
    jobs.run("b", attempt("b", "timeout"), attempt("b", attempt=2), at="2026-01-02")
    jobs.ends("completed", before="completed", metrics={"rows_error": 0})
    assert openhands(config()) == 0
    entries = read_index(TREE / "output.jsonl").latest
    assert {key[0]: entry.resolved for key, entry in entries.items()} == {"a": True, "b": None}


def test_a_job_that_is_gone_is_replaced_by_one_for_the_rest(
    jobs: Jobs, config: Config, capsys: Capture
) -> None:
    jobs.run("x.1", attempt("x.1", cost=1.0))
    jobs.run("b", attempt("b", "llm_error", cost=0.5))
    jobs.ends("completed", metrics={"rows_error": 1})
    extra = "max_instances: 2\nmax_budget_total: 4\n"
    assert openhands(config(extra)) == 0
    jobs.names.clear()
    jobs.run("b", attempt("b"))
    jobs.ends("completed")
    follow = jobs.server.routes["GET", "/v1/jobs/j1"][0]
    jobs.server.on("GET", "/v1/jobs/j1", problem(404, "no such job"), follow)
    assert openhands(config(extra)) == 0
    _, swe = jobs.submitted
    assert (swe.get("instance_filter"), swe["leave_out"]) == (None, "done.jsonl")
    assert (swe["max_instances"], swe["max_budget_total"]) == (2, 2.5)
    assert jobs.uploaded("done.jsonl") == '["x.1", 0]\n'
    assert lines() == [("x.1", 1, "finished"), ("b", 1, "llm_error"), ("b", 2, "finished")]
    assert JobFile.load(TREE).complete  # type: ignore[union-attr]
    assert "1 run done before are left out" in capsys.readouterr().out


def test_more_instances_are_a_job_for_the_rest(jobs: Jobs, config: Config) -> None:
    jobs.run("a", attempt("a"))
    jobs.ends("completed")
    assert openhands(config("max_instances: 1\n")) == 0
    jobs.ends("completed", before="completed")
    assert openhands(config("max_instances: 3\n")) == 0
    assert jobs.submitted[1]["max_instances"] == 3
    assert jobs.uploaded("done.jsonl") == '["a", 0]\n'


def test_independent_runs_are_left_out_one_by_one(jobs: Jobs, config: Config) -> None:
    done_tree(attempt("a"), attempt("a", n=1), attempt("b", n=1), attempt("c", "llm_error"))
    jobs.run("b", attempt("b"))
    jobs.ends("completed")
    assert openhands(config("n_attempts: 2\ninstance_filter: (?i)[A-C]\n")) == 0
    assert jobs.uploaded("done.jsonl") == '["a", 0]\n["a", 1]\n["b", 1]\n'
    assert jobs.submitted[0]["instance_filter"] == "(?i)[A-C]"
    jobs.ends("completed", before="completed")
    assert openhands(config("n_attempts: 1\ninstance_filter: c|a\n")) == 0
    assert jobs.uploaded("done.jsonl") == '["a", 0]\n'


def test_what_the_config_leaves_out_stays_left_out(
    jobs: Jobs, config: Config, capsys: Capture
) -> None:
    Path("mine.jsonl").write_text('["z", 0]\n')
    jobs.run("a", attempt("a"))
    jobs.ends("completed")
    assert openhands(config("leave_out: mine.jsonl\n")) == 0
    assert jobs.uploaded("mine.jsonl") == '["z", 0]\n'
    jobs.ends("completed", before="completed")
    assert openhands(config("leave_out: mine.jsonl\nseed: 1\n")) == 0
    assert jobs.uploaded("done.jsonl") == '["a", 0]\n["z", 0]\n'
    assert openhands(config("leave_out: none.jsonl\nseed: 2\n")) == 2
    assert "none.jsonl cannot be read: No such file" in capsys.readouterr().err


def test_a_job_for_the_rest_leaves_publishing_to_the_tree(
    jobs: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    done_tree(attempt("a"))
    jobs.run("b", attempt("b"))
    jobs.ends("completed")
    pushed = []
    monkeypatch.setattr(
        "spider_scaffold.push.publish",
        lambda state, output, repo_id, **more: pushed.append((output, repo_id, more)),
    )
    extra = "hf_repo_id: me/d\nhf_private: true\n"
    assert openhands(config(extra)) == 0
    assert openhands(config(extra)) == 0
    assert jobs.submitted[0].get("hf_repo_id") is None
    ((output, repo_id, more),) = pushed
    assert (output, repo_id, more["private"]) == (TREE / "output.jsonl", "me/d", True)
    assert more["token"] == "hf_x"
    assert "mk-1" in more["secrets"]


def test_another_selection_does_not_replace_what_was_published(
    jobs: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    pushed: list[int] = []
    monkeypatch.setattr(
        "spider_scaffold.push.publish",
        lambda state, output, repo_id, **more: pushed.append(len(read_index(output).latest)),
    )
    jobs.run("a", attempt("a"))
    jobs.ends("completed", remote_artifact="https://hub.example/d")
    assert openhands(config("hf_repo_id: me/d\ninstance_filter: a\n")) == 0
    jobs.names.clear()
    jobs.run("b", attempt("b"))
    jobs.ends("completed", before="completed")
    assert openhands(config("hf_repo_id: me/d\ninstance_filter: b\n")) == 0
    assert [one.get("hf_repo_id") for one in jobs.submitted] == ["me/d", None]
    assert pushed == [2]


def test_a_whole_tree_is_published_where_it_was_not(
    jobs: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    jobs.run("a", attempt("a"))
    jobs.ends("completed", remote_artifact="https://hub.example/d")
    pushed: list[str] = []

    def publish(state: object, output: Path, repo_id: str, **more: object) -> None:
        if not pushed:
            pushed.append("")
            raise ServerUnreachable
        pushed.append(repo_id)

    monkeypatch.setattr("spider_scaffold.push.publish", publish)
    assert openhands(config("hf_repo_id: me/d\n")) == 0
    assert openhands(config("hf_repo_id: me/d\n")) == 0
    assert pushed == [], "the job did it"
    assert openhands(config("hf_repo_id: me/other\n")) == 3
    assert openhands(config("hf_repo_id: me/other\n")) == 0
    assert openhands(config("hf_repo_id: me/other\n")) == 0
    assert pushed == ["", "me/other"]
    assert len(jobs.submitted) == 1


def test_a_whole_tree_is_published_anew_where_it_is_to_be_so_otherwise(
    jobs: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    jobs.run("a", attempt("a", resolved=True))
    jobs.ends("completed", remote_artifact="https://hub.example/d")
    pushed: list[object] = []
    monkeypatch.setattr(
        "spider_scaffold.push.publish",
        lambda state, output, repo_id, **more: pushed.append(more),
    )
    text = "hf_repo_id: me/d\nevaluate: true\n"
    assert openhands(config(text)) == 0
    changes = ("messages_format: openai", "push_filter: resolved", "hf_config_name: c",
               "hf_private: true")  # fmt: skip
    for number, change in enumerate(changes, 1):
        text += f"{change}\n"
        for _ in range(2):
            assert openhands(config(text)) == 0
            assert len(pushed) == number
    assert pushed[0]["messages_format"] == "openai"  # type: ignore[index]
    assert len(jobs.submitted) == 1


def test_what_a_job_published_is_what_it_was_submitted_with(
    jobs: Jobs, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    jobs.ends("completed")
    with monkeypatch.context() as patch:
        patch.setattr("spider_scaffold.openhands._conclude", lambda *_: None)
        patch.setattr("spider_scaffold.run.Run.close", lambda *_: False)
        assert openhands(config("hf_repo_id: me/d\n")) == 0
    pushed: list[str] = []
    monkeypatch.setattr(
        "spider_scaffold.push.publish",
        lambda state, output, repo_id, **more: pushed.append(more["messages_format"]),
    )
    jobs.run("a", attempt("a"))
    jobs.ends("completed", before="running", remote_artifact="https://hub.example/d")
    changed = config("hf_repo_id: me/d\nmessages_format: openai\n")
    assert openhands(changed) == 0
    assert pushed == []
    assert openhands(changed) == 0
    assert pushed == ["openai"]


@pytest.mark.parametrize(
    ("extra", "options", "said"),
    [
        ("", ["--local", "--server", "http://x"], "give --local or --server, not both"),
        ("max_instances: 0\n", [], "max_instances"),
        ("instance_filter: '('\n", [], "no regular expression"),
        ("llm_model: 5\n", [], "llm_model"),
    ],
)
def test_what_cannot_be_is_one_clear_error(
    jobs: Jobs, config: Config, capsys: Capture, extra: str, options: list[str], said: str
) -> None:
    assert openhands(config(extra), *options) == 2
    assert said in capsys.readouterr().err
    assert not jobs.server.seen
    assert not TREE.exists()


def test_a_key_that_is_not_set_is_told_before_anything_runs(
    config: Config, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MODEL_KEY")
    assert openhands(config(), "--local") == 2
    assert "MODEL_KEY" in capsys.readouterr().err


def test_a_job_that_is_no_swe_job(jobs: Jobs, plain: Path, capsys: Capture) -> None:
    (plain / "job.yaml").write_text(
        "job: {model: {provider: vllm, name: m}, source: {dataset: d, field: q}}\n"
    )
    assert openhands("job.yaml") == 2
    assert "submit it with: spider submit" in capsys.readouterr().err


def test_a_tree_of_another_experiment_is_refused(
    jobs: Jobs, config: Config, capsys: Capture
) -> None:
    jobs.run("a", attempt("a"))
    jobs.ends("completed")
    assert openhands(config()) == 0
    assert openhands(config("temperature: 0.5\n")) == 2
    assert "llm_config.temperature was null, is 0.5" in capsys.readouterr().err
    assert len(jobs.submitted) == 1


def test_a_tree_in_which_nothing_was_made_takes_other_settings(
    jobs: Jobs, config: Config, capsys: Capture
) -> None:
    jobs.ends("failed", error="no Docker engine")
    assert openhands(config(), "--workspace", "docker") == 1
    jobs.run("a", attempt("a"))
    jobs.ends("completed")
    (TREE / ".spider/job.json").unlink()  # the server here knows one job alone
    assert openhands(config(), "--workspace", "bwrap") == 0, capsys.readouterr().err
    assert [job["workspace"] for job in jobs.submitted] == ["docker", "bwrap"]
    assert json.loads((TREE / "metadata.json").read_text())["details"]["workspace"] == "bwrap"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "there is no file"),
        ('{"instance_id": \n', "line 1: no JSON"),
        ('{"instance_id": "a", "repo_source": "gone"}\n', "there is no folder or file"),
        ('{"instance_id": "a"}\n\n{"repo": "r"}\n', "line 3: it has no instance_id"),
        ('{"instance_id": "a"}\n', "has no instance that matches 'b'"),
    ],
)
def test_local_tasks_are_looked_through_before_anything_is_begun(
    jobs: Jobs, config: Config, plain: Path, capsys: Capture, rows: str | None, said: str
) -> None:
    if rows is not None:
        (plain / "tasks.jsonl").write_text(rows)
    options = ("--set", "dataset=./tasks.jsonl", "--instance-filter", "b")
    assert openhands(config(), *options) == 2
    assert said in capsys.readouterr().err
    assert jobs.server.seen == []
    assert sorted(path.name for path in plain.iterdir() if path.is_dir()) == []


def test_an_upgrade_goes_on_with_a_tree(jobs: Jobs, config: Config, capsys: Capture) -> None:
    jobs.run("a", attempt("a"))
    jobs.ends("cancelled")
    assert openhands(config()) == 4
    path = TREE / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"agent_config": {"spider": "0"}}))
    jobs.ends("completed", before="running")
    capsys.readouterr()
    assert openhands(config()) == 0
    assert f"{TREE} was made by spider 0; this is spider " in capsys.readouterr().err
    assert openhands(config()) == 0
    assert "was made by" not in capsys.readouterr().err


def jobs_metadata(**versions: str) -> bytes:
    """``metadata.json`` as a server of another release leaves it."""
    swe = AppConfig.load("swe.yaml").swe
    assert swe is not None
    made = run_metadata(
        dataclasses.replace(swe, eval_output_dir="on/the/server"),
        agent_config={"spider": "9.9"},
        git_commit="theirs",
        start_time=datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC),
    )
    made["details"] |= {"spider": "9.9", **versions}
    return json.dumps(made).encode()


def ours() -> dict[str, Any]:
    metadata: dict[str, Any] = json.loads((TREE / "metadata.json").read_text())
    return metadata


def test_the_tree_names_the_versions_that_its_job_was_made_with(jobs: Jobs, config: Config) -> None:
    """So the card that is made here is the one that the job made."""
    path = config()
    jobs.run("a", attempt("a"))
    jobs.ends("cancelled")
    assert openhands(path) == 4
    begun = ours()
    assert "openhands-sdk" not in begun["details"], "the job left none"
    made = jobs_metadata(**{"openhands-sdk": "1.2", "openhands-tools": "1.3"})
    jobs.names["metadata.json"] = (made, "2026-01-01")
    jobs.shows()
    jobs.ends("completed", before="running")
    assert openhands(path) == 0
    versions = {"spider": "9.9", "openhands-sdk": "1.2", "openhands-tools": "1.3"}
    details = begun["details"] | versions
    assert ours() == {**begun, "details": details, "agent_config": {"spider": "9.9"}}
    card = json.dumps(recipe(ours()))
    assert card == json.dumps(recipe(json.loads(made)))
    assert openhands(path) == 0
    assert json.dumps(recipe(ours())) == card
    assert sorted(one.name for one in TREE.iterdir() if one.name[0] == ".") == [".spider"]
    assert sorted(path.name for path in (TREE / ".spider").iterdir()) == ["job.json", "lock"]


def test_a_job_that_leaves_no_versions_takes_none_from_the_tree(jobs: Jobs, config: Config) -> None:
    path = config()
    jobs.run("a", attempt("a", "llm_error"))
    made = jobs_metadata(**{"openhands-sdk": "1.2"})
    jobs.names["metadata.json"] = (made, "2026-01-01")
    jobs.shows()
    failed = {"metrics": {"rows_error": 1}}
    jobs.ends("completed", **failed)
    assert openhands(path) == 0
    # What is run again leaves the job's own as it was, and is told nothing new of it.
    jobs.ends("failed", before="completed", **failed)
    assert openhands(path) == 1
    assert recipe(ours()) == recipe(json.loads(made))
    del jobs.names["metadata.json"]
    jobs.shows()
    assert openhands(path) == 1
    assert ours()["details"]["openhands-sdk"] == "1.2"


def test_a_spent_budget_is_told(jobs: Jobs, config: Config, capsys: Capture) -> None:
    done_tree(attempt("a", "llm_error", cost=3.0))
    assert openhands(config("max_budget_total: 3\n")) == 2
    assert "$3.00 of $3.00 were spent in this tree; raise it" in capsys.readouterr().err
    assert jobs.submitted == []


def test_an_unknown_cost_counts_with_all_that_was_allowed(jobs: Jobs, config: Config) -> None:
    unknown = {"accumulated_cost": None, "max_budget_per_task": 2.0}
    uncapped = {"accumulated_cost": None}
    done_tree(
        attempt("a", "llm_error", cost=0.5, attempt=1),
        attempt("a", "llm_error", metrics=unknown, attempt=2),
        attempt("b", "llm_error", metrics=uncapped),
    )
    jobs.ends("completed")
    openhands(config("max_budget_total: 4\n"))
    assert jobs.submitted[0]["max_budget_total"] == 1.5


def test_two_at_once_in_a_tree(jobs: Jobs, config: Config, capsys: Capture) -> None:
    with jobfile.locked(TREE):
        assert openhands(config()) == 2
    assert "another spider-scaffold is at work" in capsys.readouterr().err


def test_a_server_that_is_not_there(config: Config, capsys: Capture) -> None:
    assert openhands(config(), "--server", "http://127.0.0.1:9") == 3
    assert JobFile.load(TREE).job_id is None  # type: ignore[union-attr]


def test_a_submission_that_was_cut_off_is_sent_with_the_same_key(
    jobs: Jobs, config: Config, capsys: Capture
) -> None:
    accepted = jobs.server.routes["POST", "/v1/jobs"][0]
    jobs.server.on("POST", "/v1/jobs", problem(500, "broke"))
    assert openhands(config()) == 3
    jobs.server.on("POST", "/v1/jobs", accepted)
    jobs.run("a", attempt("a"))
    jobs.ends("completed")
    assert openhands(config()) == 0
    keys = {one.headers["idempotency-key"] for one in jobs.server.requests("POST", "/v1/jobs")}
    assert len(keys) == 1


def test_ctrl_c_detaches_and_says_how_to_go_on(
    jobs: Jobs, config: Config, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.run("a", attempt("a"))
    jobs.ends("completed")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spider_scaffold.board.Board.update", interrupted)
    options = ("--num-workers", "2", "--set", "llm_api_key_env=MODEL_KEY", "--set", "seed=1")
    assert openhands(config(), *options) == 130
    err = capsys.readouterr().err
    assert "job j1 goes on at http://127.0.0.1" in err
    assert (
        "go on with: spider-scaffold openhands --config swe.yaml --num-workers 2 "
        "--set llm_api_key_env=MODEL_KEY --set seed=1" in err
    )
    assert lines() == [("a", 1, "finished")]  # what had ended by then is here
    assert "spider cancel j1 --base-url http://127.0.0.1" in err
    assert [one.method for one in jobs.server.seen if "cancel" in one.path] == []


def test_which_server(plain: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = AppConfig.load(config())
    named = AppConfig.load(config("server: {base_url: 'http://file'}\n"))

    def where(config: AppConfig, server: str | None = None, *, local: bool = False) -> str | None:
        return servers.named_server(config, local=local, server=server)

    assert where(loaded) is None
    (plain / "user.toml").write_text('base_url = "http://user"\n')
    assert where(loaded) == "http://user"
    monkeypatch.setenv("SPIDER_BASE_URL", "http://env")
    assert where(loaded) == "http://env"
    assert where(named) == "http://file"
    assert where(named, "http://flag") == "http://flag"
    assert where(named, local=True) is None
    with pytest.raises(UsageError):
        where(named, "http://flag", local=True)


def test_a_damaged_job_file(jobs: Jobs, config: Config, capsys: Capture) -> None:
    (TREE / ".spider").mkdir(parents=True)
    (TREE / ".spider/job.json").write_text("{")
    assert openhands(config()) == 2
    assert "job.json cannot be read" in capsys.readouterr().err


def test_files_of_the_job_that_are_no_part_of_the_tree_stay_there(
    jobs: Jobs, config: Config
) -> None:
    jobs.run("a", attempt("a"))
    jobs.names["output.jsonl"] = (b"{}\n", "2026")
    jobs.names["infer_logs/../../x"] = (b"x", "2026")
    jobs.shows()
    jobs.ends("completed")
    assert openhands(config()) == 2  # a name that leads out of the tree
    del jobs.names["infer_logs/../../x"]
    jobs.shows()
    jobs.ends("completed", before="running")
    assert openhands(config()) == 0
    assert "output.jsonl" not in jobs.fetched()


def test_json_of_an_error(jobs: Jobs, config: Config, capsys: Capture) -> None:
    jobs.server.on("POST", "/v1/jobs", answer_json({"detail": "no"}, 422))
    assert openhands(config(), "--json") == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exit_code"] == 2
