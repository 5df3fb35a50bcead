"""Trajectories pushed with the real huggingface_hub to the emulator, read by load_dataset."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from spider_sdk.errors import AuthError, FatalJobError, UsageError
from spider_worker.trajectories import shards
from spider_worker.trajectories.output_file import append, rewrite
from spider_worker.trajectories.push import Pushed, push
from tests.support.hub_emulator import READ_TOKEN, WRITE_TOKEN, HubEmulator
from tests.support.hub_loader import HubLoader
from tests.support.trajectories import CONFIG, TOOLS, record, write_run

SCRIPT = Path(__file__).parents[3] / "scripts" / "push_openhands_traj_dataset.py"
AUTO = "gpt-4o_SWE-bench__SWE-smith_30iter"

Push = Callable[..., Pushed]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    broken = record("d", status="workspace_error", messages=[], git_patch=None, cost=None)
    return write_run(
        tmp_path / "run",
        [
            record("c", status="timeout", cost=1.0),
            record("b", resolved=False, cost=None),
            record("a", resolved=True, cost=0.5, n=1),
            broken,
            record("c", attempt=2, cost=2.0),
        ],
    )


@pytest.fixture
def pushing(hub: HubEmulator, repo_id: str, output: Path) -> Push:
    def do(**more: Any) -> Pushed:
        options = {"token": WRITE_TOKEN, "endpoint": hub.endpoint, "sleep": lambda _: None, **more}
        path = options.pop("path", output)
        return push(path, options.pop("repo_id", repo_id), **options)

    return do


def files(hub: HubEmulator, repo_id: str) -> dict[str, bytes]:
    there = hub.repo(repo_id).files
    return {path: blob.content for path, blob in there.items() if path != ".gitattributes"}


def commits(hub: HubEmulator, repo_id: str) -> int:
    return len(hub.repo(repo_id).commits) - 1


@pytest.mark.parametrize("messages_format", ["text", "openai"])
def test_what_is_pushed_loads_with_datasets(
    hub: HubEmulator, loader: HubLoader, pushing: Push, repo_id: str, messages_format: str
) -> None:
    pushed = pushing(messages_format=messages_format)
    assert pushed == Pushed(f"{hub.endpoint}/datasets/{repo_id}", AUTO, 3, True, {}, left_out=1)
    assert set(files(hub, repo_id)) == {"README.md", f"data/{AUTO}/train-00000.parquet"}
    assert commits(hub, repo_id) == 1
    loaded = loader.load(repo_id, AUTO)
    rows = loaded["rows"]
    assert [(row["instance_id"], row["n"]) for row in rows] == [("a", 1), ("b", 0), ("c", 0)]
    assert [row["resolved"] for row in rows] == [True, False, None]
    # What failed before it succeeded has cost too; an unknown cost is no zero.
    assert [row["cost"] for row in rows] == [0.5, None, 3.0]
    assert json.loads(rows[0]["tools"]) == TOOLS
    first = rows[0]["messages"]
    assert len(rows[0]["train"]) == len(first)
    if messages_format == "text":
        assert {tuple(message) for message in first} == {("role", "content")}
        assert {message["role"] for message in first} == {"system", "user", "assistant"}
    else:
        assert first[2]["tool_calls"][0]["function"]["arguments"] == '{"command": "ls"}'
        assert first[3]["tool_call_id"] == "c1"
    assert loaded["features"]["resolved"] == "Value('bool')"
    assert loaded["features"]["error"] == "Value('string')"
    card = files(hub, repo_id)["README.md"].decode()
    assert "| Runs | 4: 3 `finished`, 1 `workspace_error` |" in card
    assert "$3.50, and 2 attempts of unknown cost" in card


def test_a_second_push_changes_nothing_and_a_verdict_one_commit(
    hub: HubEmulator, pushing: Push, repo_id: str, output: Path
) -> None:
    first = pushing()
    again = pushing()
    assert (first.committed, again.committed) == (True, False)
    assert commits(hub, repo_id) == 1
    rewrite(output, lambda one: {**one.data, "resolved": True})
    assert pushing().committed
    assert commits(hub, repo_id) == 2


def test_the_order_in_which_runs_ended_does_not_matter(
    hub: HubEmulator, pushing: Push, repo_id: str, tmp_path: Path
) -> None:
    one, two = (record(name) for name in "ab")
    pushing(path=write_run(tmp_path / "x", [one, two]))
    assert not pushing(path=write_run(tmp_path / "y", [two, one])).committed


def test_other_configurations_and_files_stay(
    hub: HubEmulator, loader: HubLoader, pushing: Push, repo_id: str
) -> None:
    api = HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)
    pushing(config_name="one", messages_format="openai")
    card = files(hub, repo_id)["README.md"] + b"\nMy words.\n"
    mine = [
        CommitOperationAdd("README.md", card),
        CommitOperationAdd("notes.txt", b"mine"),
        CommitOperationAdd("data/two/train-00007.parquet", b"of an earlier, longer push"),
        CommitOperationAdd("data/two/other.txt", b"mine too"),
    ]
    api.create_commit(repo_id, mine, commit_message="mine", repo_type="dataset")
    before = files(hub, repo_id)
    pushing(config_name="two", push_filter="resolved")
    after = files(hub, repo_id)
    assert set(after) == {
        "README.md", "notes.txt", "data/one/train-00000.parquet", "data/two/train-00000.parquet",
        "data/two/other.txt",
    }  # fmt: skip
    assert after["data/one/train-00000.parquet"] == before["data/one/train-00000.parquet"]
    assert "My words." in after["README.md"].decode()
    assert len(loader.load(repo_id, "one")["rows"]) == 3
    assert [row["instance_id"] for row in loader.load(repo_id, "two")["rows"]] == ["a"]
    # The first configuration's push finds everything in place, and the card as it should be.
    assert not pushing(config_name="one", messages_format="openai").committed


def test_large_runs_have_several_files_and_a_smaller_one_takes_them_away(
    hub: HubEmulator, loader: HubLoader, pushing: Push, repo_id: str,
) -> None:  # fmt: skip
    whole = shards.write_shards
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "spider_worker.trajectories.push.write_shards",
            lambda *args, **more: whole(*args, **more, shard_bytes=1),
        )
        pushing(config_name="one")
    data = [path for path in files(hub, repo_id) if path.startswith("data/")]
    assert data == [f"data/one/train-{n:05d}.parquet" for n in range(3)]
    assert len(loader.load(repo_id, "one")["rows"]) == 3
    pushing(config_name="one")
    assert [path for path in files(hub, repo_id) if path.startswith("data/")] == data[:1]
    assert len(loader.load(repo_id, "one")["rows"]) == 3


def test_no_secret_leaves(hub: HubEmulator, pushing: Push, repo_id: str, output: Path) -> None:
    shape = "ghp_" + "aB3" * 12
    known = 'job "key" 1234'
    leak = f"HF_TOKEN={WRITE_TOKEN}\nLLM={known}\nGH={shape}"
    messages = [
        *record()["messages"],
        {"role": "tool", "tool_call_id": "c3", "content": leak},
        {"role": "assistant", "content": f"It is {known}"},
    ]
    leaky = record(
        "leaky",
        messages=messages,
        history=[{"kind": "ObservationEvent", "env": {"out": leak}}],
        git_patch=f"+{shape}\n",
        error=f"failed with {known}",
    )
    leaky["instance"]["problem_statement"] = shape
    append(output, leaky)
    pushed = pushing(secrets=[known])
    assert pushed.redacted == {"leaky": {"job-secret": 6, "github-token": 4}}
    everything = b""
    for path, content in files(hub, repo_id).items():
        if path.endswith(".parquet"):
            rows = pq.read_table(io.BytesIO(content)).to_pylist()
            content = json.dumps(rows, ensure_ascii=False).encode()
        everything += content
    for secret in (WRITE_TOKEN, known, json.dumps(known)[1:-1], shape):
        assert secret.encode() not in everything
    assert CONFIG.llm_base_url is not None
    assert CONFIG.llm_base_url.encode() not in everything
    assert b"[REDACTED:github-token]" in everything
    assert "4 `github-token`, 6 `job-secret`" in files(hub, repo_id)["README.md"].decode()
    # Only what leaves is changed.
    assert shape in output.read_text()


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"token": None}, AuthError, "without a token: set HF_TOKEN"),
        ({"token": READ_TOKEN}, AuthError, "no right to write"),
        ({"repo_id": "no-namespace"}, UsageError, "namespace/name"),
        ({"config_name": "a/b"}, UsageError, "hf_config_name begins with"),
        ({"config_name": ".."}, UsageError, "hf_config_name begins with"),
        ({"config_name": "_a"}, UsageError, "hf_config_name begins with"),
        ({"messages_format": "chat"}, UsageError, "text or openai"),
        ({"push_filter": "best"}, UsageError, "all, finished or resolved"),
        ({"path": Path("nothing.jsonl")}, UsageError, "no such file"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_anything_is_made(
    hub: HubEmulator,
    pushing: Push,
    repo_id: str,
    options: dict[str, Any],
    error: type[Exception],
    said: str,
) -> None:
    with pytest.raises(error, match=said):
        pushing(**options)
    with pytest.raises(LookupError):
        hub.repo(repo_id)


def test_nothing_to_push_is_said_with_the_reason(pushing: Push, tmp_path: Path) -> None:
    unjudged = write_run(tmp_path / "x", [record("a"), record("b", status="timeout")])
    with pytest.raises(UsageError, match=r"none of 2 runs passes.*resolved; none has been judged"):
        pushing(path=unjudged, push_filter="resolved")
    empty = write_run(tmp_path / "y", [record("a", status="workspace_error", messages=[])])
    with pytest.raises(UsageError, match=r"of 1 runs .* none has a turn of the agent"):
        pushing(path=empty)


def test_a_public_repository_is_no_place_for_a_private_push(pushing: Push) -> None:
    pushing()
    with pytest.raises(FatalJobError, match="hf_private is true, but"):
        pushing(private=True)


def test_a_lost_answer_to_the_commit_makes_no_second_one(
    hub: HubEmulator, pushing: Push, repo_id: str
) -> None:
    hub.fault("commit", "cut_after")
    pushing()
    assert commits(hub, repo_id) == 1
    assert len(files(hub, repo_id)) == 2


def test_the_script_pushes_by_hand(
    hub: HubEmulator, loader: HubLoader, repo_id: str, output: Path
) -> None:
    append(output, record("leaky", error="ghp_" + "aB3" * 12 + " my-own-secret-value together-77"))
    env = {
        **os.environ,
        "HF_TOKEN": WRITE_TOKEN,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MY_KEY": "my-own-secret-value",
        "TOGETHER_API_KEY": "together-77",
    }
    flags = ["--input", output, "--repo-id", repo_id, "--config-name", "mine"]
    flags += ["--push-filter", "finished", "--messages-format", "openai", "--secret-env", "MY_KEY"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT, *flags, *more], env=env, capture_output=True, text=True
        )

    done = run()
    assert done.returncode == 0, done.stderr
    url = f"{hub.endpoint}/datasets/{repo_id}"
    assert done.stdout == f"{url}: 4 rows in configuration mine (pushed)\n"
    assert "taken out of leaky: github-token (1), job-secret (2)" in done.stderr
    assert "my-own" not in done.stderr
    assert hub.repo(repo_id).private
    assert "stood there already" in run().stdout
    assert len(loader.load(repo_id, "mine")["rows"]) == 4
    env.pop("HF_TOKEN")
    refused = run()
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: Nothing can be pushed")
