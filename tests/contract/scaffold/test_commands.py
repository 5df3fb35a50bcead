"""``evaluate`` in real boxes, and ``push`` to the Hub emulator."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import pyarrow.parquet as pq
import pytest

from spider_scaffold.cli import run
from spider_sdk.config.model import SweConfig
from spider_worker.trajectories import push as pushing
from spider_worker.trajectories import record
from spider_worker.trajectories.metadata import run_metadata
from spider_worker.trajectories.output_file import append, read
from tests.support.hub_emulator import READ_TOKEN, USER, WRITE_TOKEN, HubEmulator
from tests.support.swe_repos import SweRepo, make_repos, write_jsonl
from tests.support.trajectories import record as made_up
from tests.support.trajectories import write_run

Capture = pytest.CaptureFixture[str]
_numbers = itertools.count()


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> list[SweRepo]:
    made = make_repos(tmp_path_factory.mktemp("repos"))
    return [repo for repo in made if repo.folder.name in ("calc", "spaces")]


def test_an_output_file_is_judged_in_boxes(
    repos: list[SweRepo], tmp_path: Path, capsys: Capture
) -> None:
    one, two = repos
    dataset = write_jsonl(tmp_path / "tasks.jsonl", repos)
    output = tmp_path / "run/output.jsonl"
    patches = [(one, one.gold_patch), (two, "nonsense")]
    for repo, patch in patches:
        append(
            output,
            record.build(
                instance_id=repo.instance_id, status="finished", instance={}, metadata={},
                git_patch=patch,
            ),
        )  # fmt: skip
    append(output, record.build(instance_id="x", status="timeout", instance={}, metadata={}))
    settings = {"dataset": str(dataset), "data_split": "train", "details": {"workspace": "bwrap"}}
    output.with_name("metadata.json").write_text(json.dumps(settings))
    assert run(["evaluate", "--input", str(output), "--num-workers", "2"]) == 0
    assert [found.resolved for found in read(output)] == [True, False, None]
    out, err = capsys.readouterr()
    assert f"{one.instance_id}: resolved" in out
    assert f"{two.instance_id}: not resolved: the patch does not apply" in out
    assert "2 judged: 1 resolved, 1 not\n" in out
    assert "finished      2       2         1" in out
    assert f"since {dataset} (train) does not have them: 1 instance (x)" in err
    assert list((output.parent / ".spider/gold-checks").iterdir())

    assert run(["evaluate", "--input", str(output), "--json"]) == 0
    summed, tree = map(json.loads, capsys.readouterr().out.splitlines())
    assert (summed["evaluation"]["judged"], summed["evaluation"]["skipped"]) == (0, 2)
    assert tree["summary"]["resolved"] == 1


@pytest.fixture(scope="module")
def _hub() -> Iterator[HubEmulator]:
    with HubEmulator() as hub:
        yield hub
        huggingface_hub.close_session()


@pytest.fixture
def hub(
    _hub: HubEmulator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[HubEmulator]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", _hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key-like-no-other")
    huggingface_hub.utils.disable_progress_bars()
    yield _hub
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    found = made_up("b", instruction="use a-key-like-no-other")
    output = write_run(tmp_path / "run", [made_up("a", resolved=True), found])
    repo_id = f"{USER}/scaffold-{next(_numbers)}"
    return ["push", "--input", str(output), "--repo-id", repo_id]


def test_a_run_is_pushed(hub: HubEmulator, arguments: list[str], capsys: Capture) -> None:
    more = ["--private", "--config-name", "one", "--messages-format", "openai"]
    assert run([*arguments, *more]) == 0
    out, err = capsys.readouterr()
    assert out == (
        f"{hub.endpoint}/datasets/{arguments[-1]}: 2 rows in configuration one, pushed\n"
    )
    assert err.startswith("taken out of b: ")
    files = hub.repo(arguments[-1]).files
    assert "data/one/train-00000.parquet" in files
    assert not any(b"a-key-like-no-other" in blob.content for blob in files.values())

    assert run([*arguments, *more, "--push-filter", "resolved", "--json"]) == 0
    pushed = json.loads(capsys.readouterr().out)
    assert (pushed["rows"], pushed["committed"], pushed["redacted"]) == (1, True, {})


def test_runs_without_a_turn_are_left_out_and_said(
    hub: HubEmulator, arguments: list[str], capsys: Capture
) -> None:
    output = Path(arguments[2])
    append(output, made_up("c", status="workspace_error", messages=[], git_patch=None))
    assert run(arguments) == 0
    out, err = capsys.readouterr()
    assert ": 2 rows in " in out
    assert "left out, without a turn of the agent: 1 run\n" in err
    card = hub.repo(arguments[-1]).files["README.md"].content.decode()
    assert "| Rows here | 2: every run, however it ended, but for 1 without a turn" in card
    assert run([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == 1


def test_the_keys_of_the_shipped_examples_stay_here(
    hub: HubEmulator, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {
        name: f"value-of-{name[:4].lower()}-77"
        for name in ("FIREWORKS_API_KEY", "TOGETHER_API_KEY", "VLLM_API_KEY", "OWN_KEY")
    }
    for name, value in keys.items():
        monkeypatch.setenv(name, value)
    output = write_run(tmp_path / "run", [made_up("a", instruction=" ".join(keys.values()))])
    config = SweConfig(llm_model="openai/gpt-4o", llm_api_key_env="OWN_KEY")
    output.with_name("metadata.json").write_text(json.dumps(run_metadata(config)))
    repo_id = f"{USER}/scaffold-{next(_numbers)}"
    assert run(["push", "--input", str(output), "--repo-id", repo_id]) == 0
    assert capsys.readouterr().err == "taken out of a: job-secret (4)\n"
    (table,) = [
        pq.read_table(io.BytesIO(blob.content))
        for name, blob in hub.repo(repo_id).files.items()
        if name.endswith(".parquet")
    ]
    assert table["instruction"].to_pylist() == [" ".join(["[REDACTED:job-secret]"] * 4)]


@pytest.mark.parametrize(("token", "said"), [("", "HF_TOKEN"), (READ_TOKEN, "HF_TOKEN")])
def test_a_token_that_may_not(
    hub: HubEmulator,
    arguments: list[str],
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    said: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    assert run(arguments) == 2
    assert said in capsys.readouterr().err


def test_a_hub_that_does_not_answer(
    hub: HubEmulator, arguments: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert pushing.push.__kwdefaults__ is not None
    monkeypatch.setitem(pushing.push.__kwdefaults__, "sleep", lambda _: None)
    assert run(arguments) == 3
    assert "no answer from the Hub" in capsys.readouterr().err
