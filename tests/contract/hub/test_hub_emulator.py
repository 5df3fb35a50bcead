"""The emulator, seen by the real huggingface_hub client and by datasets.load_dataset."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

from tests.support.hub_emulator import ORG, READ_TOKEN, USER, WRITE_TOKEN, HubEmulator
from tests.support.hub_loader import HubLoader

D = "dataset"


@pytest.fixture
def api(hub: HubEmulator) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def test_who_a_token_is_and_what_it_may(hub: HubEmulator, api: HfApi, repo_id: str) -> None:
    assert api.whoami()["name"] == USER
    with pytest.raises(HfHubHTTPError) as bad:
        api.whoami(token="hf_unknown")
    assert status_of(bad) == 401
    with pytest.raises(HfHubHTTPError) as read_only:
        api.create_repo(repo_id, repo_type=D, token=READ_TOKEN)
    assert status_of(read_only) == 403
    api.create_repo(repo_id, repo_type=D)
    with pytest.raises(HfHubHTTPError) as commit:
        api.upload_file(
            path_or_fileobj=b"x", path_in_repo="a", repo_id=repo_id, repo_type=D, token=READ_TOKEN
        )
    assert status_of(commit) == 403
    with pytest.raises(HfHubHTTPError) as foreign:
        api.create_repo("somebody/else", repo_type=D)
    assert status_of(foreign) == 403
    assert api.create_repo(f"{ORG}/{repo_id.split('/')[1]}", repo_type=D, exist_ok=True)


def test_creating_twice_conflicts_unless_it_may_exist(api: HfApi, repo_id: str) -> None:
    url = api.create_repo(repo_id, repo_type=D, private=True)
    assert url.repo_id == repo_id
    with pytest.raises(HfHubHTTPError) as again:
        api.create_repo(repo_id, repo_type=D)
    assert status_of(again) == 409
    assert api.create_repo(repo_id, repo_type=D, exist_ok=True).repo_id == repo_id
    assert api.dataset_info(repo_id).private is True
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=api.endpoint, token=False).dataset_info(repo_id)


def test_commits_lfs_listing_and_download(
    hub: HubEmulator, api: HfApi, repo_id: str, tmp_path: Path
) -> None:
    api.create_repo(repo_id, repo_type=D)
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": list(range(1000))}), table)
    additions = [CommitOperationAdd("README.md", b"---\ntags: [x]\n---\nhello\n")]
    additions += [CommitOperationAdd(f"data/{n}.parquet", table) for n in range(5)]
    info = api.create_commit(repo_id, additions, commit_message="five tables", repo_type=D)
    assert len(hub.repo(repo_id).uploads) == 1
    # Listing goes over several pages.
    tree = list(api.list_repo_tree(repo_id, repo_type=D, recursive=True))
    assert hub.count("tree") == 3
    files = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    assert len(files) == 7
    assert files["data/0.parquet"].lfs is not None
    assert files["data/0.parquet"].lfs.size == table.stat().st_size
    assert files["README.md"].lfs is None
    (found,) = api.get_paths_info(repo_id, ["data/3.parquet", "nothing"], repo_type=D)
    assert found.path == "data/3.parquet"
    got = api.hf_hub_download(repo_id, "data/4.parquet", repo_type=D, cache_dir=tmp_path / "cache")
    assert Path(got).read_bytes() == table.read_bytes()
    removal = [CommitOperationDelete("data/4.parquet")]
    api.create_commit(repo_id, removal, commit_message="one less", repo_type=D)
    assert not api.file_exists(repo_id, "data/4.parquet", repo_type=D)
    assert api.file_exists(repo_id, "data/4.parquet", repo_type=D, revision=info.oid)
    titles = [commit.title for commit in api.list_repo_commits(repo_id, repo_type=D)]
    assert titles == ["one less", "five tables", "initial commit"]


def test_a_commit_on_an_old_parent_is_refused(hub: HubEmulator, api: HfApi, repo_id: str) -> None:
    api.create_repo(repo_id, repo_type=D)
    parent = hub.repo(repo_id).head.oid
    add = [CommitOperationAdd("a.txt", b"1")]
    api.create_commit(repo_id, add, commit_message="a", repo_type=D, parent_commit=parent)
    add = [CommitOperationAdd("b.txt", b"1")]
    with pytest.raises(HfHubHTTPError) as stale:
        api.create_commit(repo_id, add, commit_message="b", repo_type=D, parent_commit=parent)
    assert status_of(stale) == 412
    assert "b.txt" not in hub.repo(repo_id).files


def test_faults_strike_where_they_are_told(hub: HubEmulator, api: HfApi, repo_id: str) -> None:
    api.create_repo(repo_id, repo_type=D)
    hub.fault("commit", "status", nth=2, status=500)
    hub.fault("commit", "cut_after", nth=3)

    def commit(name: str) -> None:
        add = [CommitOperationAdd(name, b"1")]
        api.create_commit(repo_id, add, commit_message=name, repo_type=D)

    commit("a")
    with pytest.raises(HfHubHTTPError):
        commit("b")
    with pytest.raises(httpx2.RemoteProtocolError):
        commit("c")
    commit("d")
    assert [commit.title for commit in hub.repo(repo_id).commits[1:]] == ["a", "c", "d"]


def test_load_dataset_reads_parquet_shards(
    api: HfApi, repo_id: str, loader: HubLoader, tmp_path: Path
) -> None:
    api.create_repo(repo_id, repo_type=D, private=True)
    additions = []
    for number in range(4):
        shard = tmp_path / f"{number}.parquet"
        pq.write_table(pa.table({"a": [number * 2, number * 2 + 1]}), shard)
        additions.append(CommitOperationAdd(f"data/train-{number:05d}.parquet", shard))
    api.create_commit(repo_id, additions, commit_message="shards", repo_type=D)
    assert [row["a"] for row in loader.load(repo_id)["rows"]] == list(range(8))


def test_it_runs_as_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "tests.support.hub_emulator"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        api = HfApi(endpoint=facts["endpoint"], token=facts["write_token"])
        api.create_repo(f"{USER}/x", repo_type=D)
        fault = json.dumps({"route": "whoami", "kind": "status", "status": 503}).encode()
        request = urllib.request.Request(f"{facts['endpoint']}/_emulator/faults", data=fault)
        urllib.request.urlopen(request).close()
        with pytest.raises(HfHubHTTPError):
            api.whoami()
        with urllib.request.urlopen(f"{facts['endpoint']}/_emulator/state") as answer:
            state = json.load(answer)
        assert state["repos"][0]["id"] == f"{USER}/x"
        process.terminate()
        assert process.wait(timeout=10) == 0
