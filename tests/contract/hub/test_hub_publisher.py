"""HubPublisher with the real huggingface_hub against the emulator, read by load_dataset."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from spider_sdk.config.model import HubConfig, JobConfig, ModelConfig, OutputConfig, SourceConfig
from spider_sdk.errors import AuthError, FatalJobError, NotSupported, PipelineError
from spider_worker.sinks import hub as hub_module
from spider_worker.sinks import hub_repo as hub_repo_module
from spider_worker.sinks.base import PublishedShard, ShardSource
from spider_worker.sinks.card import CardFacts
from spider_worker.sinks.hub import HubPublisher, build_publisher
from spider_worker.sinks.hub_repo import ATTEMPTS, HubRepo
from tests.support.hub_emulator import READ_TOKEN, WRITE_TOKEN, HubEmulator
from tests.support.hub_loader import HubLoader

JOB = JobConfig(
    model=ModelConfig(provider="vllm", name="org/teacher"),
    source=SourceConfig(dataset="org/questions"),
)
SUMMARY = {"rows_ok": 4, "rows_error": 1, "rows_dropped": 0, "cost_usd": 0.5}


def record(index: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"{index}-0",
        "index": index,
        "sample": 0,
        "prompt": f"question {index}",
        "messages": [{"role": "user", "content": f"question {index}"}],
        "completion": f"answer {index}",
        "reasoning_content": None,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": index},
        "error": None,
        **more,
    }


def failed(index: int) -> dict[str, Any]:
    error = {"stage": "generation", "type": "timeout", "message": "late", "traceback": None}
    return record(index, completion=None, finish_reason=None, usage=None, error=error)


def shard(number: int, records: Sequence[dict[str, Any]], version: str = "v1") -> ShardSource:
    return ShardSource(number, version, len(records), lambda: iter(records))


class Crash(BaseException):
    """The process dies here."""


@dataclasses.dataclass
class Job:
    """What outlives a publisher: the saved state. A new publisher is made for each call,
    as by a fleet whose publications run anywhere."""

    hub: HubEmulator
    repo_id: str
    work_dir: Path
    options: dict[str, Any]
    saved: str = '{"publisher": null, "published": []}'
    waits: list[float] = dataclasses.field(default_factory=list)

    def publisher(self) -> HubPublisher:
        options = {
            "token": WRITE_TOKEN,
            "facts": CardFacts.from_job(JOB),
            "endpoint": self.hub.endpoint,
            "work_dir": self.work_dir,
            "sleep": self.waits.append,
            "state": json.loads(self.saved)["publisher"],
            **self.options,
        }
        return HubPublisher(self.repo_id, **options)

    def published(self) -> dict[int, PublishedShard]:
        return {p["number"]: PublishedShard(**p) for p in json.loads(self.saved)["published"]}

    def publish(self, *shards: ShardSource) -> list[PublishedShard]:
        publisher = self.publisher()
        done = publisher.publish(shards, self.published())
        published = [dataclasses.asdict(one) for one in done]
        self.saved = json.dumps({"publisher": publisher.state(), "published": published})
        assert not list(self.work_dir.glob("*.parquet"))
        return done

    def finish(self) -> str:
        return self.publisher().finish(self.published(), SUMMARY)

    @property
    def files(self) -> dict[str, bytes]:
        """The shards on the Hub."""
        files = self.hub.repo(self.repo_id).files
        return {path: blob.content for path, blob in files.items() if path.endswith(".parquet")}

    def ids(self) -> list[str]:
        tables = [pq.read_table(io.BytesIO(data)) for _, data in sorted(self.files.items())]
        return [identity for table in tables for identity in table["id"].to_pylist()]

    def schemas(self) -> set[str]:
        return {str(pq.read_schema(io.BytesIO(data))) for data in self.files.values()}

    @property
    def commits(self) -> int:
        return len(self.hub.repo(self.repo_id).commits) - 1


@pytest.fixture
def make_job(hub: HubEmulator, repo_id: str, tmp_path: Path) -> Callable[..., Job]:
    def make(**options: Any) -> Job:
        job = Job(hub, repo_id, tmp_path / "work", options)
        job.publisher().check_access()
        return job

    return make


@pytest.fixture
def api(hub: HubEmulator) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token=WRITE_TOKEN)


# The right to write ------------------------------------------------------------------


def check(hub: HubEmulator, repo_id: str, tmp_path: Path, **options: Any) -> None:
    Job(hub, repo_id, tmp_path, options).publisher().check_access()


def test_no_token_names_the_variable(hub: HubEmulator, repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(AuthError, match="HF_TOKEN"):
        check(hub, repo_id, tmp_path, token=None)


def test_a_token_that_is_not_accepted(hub: HubEmulator, repo_id: str, tmp_path: Path) -> None:
    with pytest.raises(AuthError, match=r"does not accept HF_TOKEN.*settings/tokens"):
        check(hub, repo_id, tmp_path, token="hf_unknown")


def test_a_read_token_is_found_out_before_the_first_row(
    hub: HubEmulator, repo_id: str, tmp_path: Path, api: HfApi
) -> None:
    with pytest.raises(AuthError, match="not a read token"):
        check(hub, repo_id, tmp_path, token=READ_TOKEN)
    # Also where the repository exists, and creating it would not be needed.
    api.create_repo(repo_id, repo_type="dataset")
    with pytest.raises(AuthError, match="not a read token"):
        check(hub, repo_id, tmp_path, token=READ_TOKEN)


def test_a_foreign_namespace(hub: HubEmulator, tmp_path: Path) -> None:
    with pytest.raises(AuthError, match="somebody/data"):
        check(hub, "somebody/data", tmp_path)


def test_checking_creates_the_repository_once_and_commits_nothing(
    hub: HubEmulator, repo_id: str, tmp_path: Path
) -> None:
    check(hub, repo_id, tmp_path, private=True)
    check(hub, repo_id, tmp_path, private=True)
    assert hub.repo(repo_id).private
    assert len(hub.repo(repo_id).commits) == 1


def test_private_rows_do_not_go_to_a_public_repository(
    hub: HubEmulator, repo_id: str, tmp_path: Path
) -> None:
    check(hub, repo_id, tmp_path)
    with pytest.raises(FatalJobError, match="is public"):
        check(hub, repo_id, tmp_path, private=True)


def test_a_card_that_could_not_be_kept_is_found_before_the_first_row(
    hub: HubEmulator, repo_id: str, tmp_path: Path, api: HfApi
) -> None:
    api.create_repo(repo_id, repo_type="dataset")
    line = {"content": "LS0tCmE6IFsKLS0tCg==", "path": "README.md", "encoding": "base64"}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "file", "value": line}]
    hub.repo(repo_id).commit(lines, "alice")
    with pytest.raises(FatalJobError, match="front matter"):
        check(hub, repo_id, tmp_path)


# Publishing --------------------------------------------------------------------------


def test_a_job_published_in_parts_loads_at_every_step(
    make_job: Callable[..., Job], loader: HubLoader
) -> None:
    job = make_job(config_name="math")
    first = shard(0, [record(0), record(1)])
    (done,) = job.publish(first)
    assert done.path == "data/math/train-00000.parquet"
    assert [row["id"] for row in loader.load(job.repo_id, "math")["rows"]] == ["0-0", "1-0"]
    job.publish(first, shard(1, [record(2), failed(3)]))
    assert job.finish() == f"{job.hub.endpoint}/datasets/{job.repo_id}"
    assert job.commits == 3
    loaded = loader.load(job.repo_id, "math")
    assert [row["id"] for row in loaded["rows"]] == ["0-0", "1-0", "2-0"]
    assert loaded["rows"][2] == {k: v for k, v in record(2).items() if k != "error"}
    assert "error" not in loaded["features"]
    card = job.hub.repo(job.repo_id).files["README.md"].content.decode()
    assert "org/teacher" in card
    assert yaml.safe_load(card.split("---\n")[1])["configs"][0]["config_name"] == "math"


WIDER: list[tuple[Any, Any]] = [
    (None, {"a": 1}),
    (1, 2.5),
    (1, "text"),
    ({"a": 1}, {"b": [1]}),
    ([], [{"x": "y"}]),
    ({}, {"k": None}),
    (None, None),
]


def test_a_later_shard_may_widen_columns(make_job: Callable[..., Job], loader: HubLoader) -> None:
    job = make_job()
    narrow = {f"c{n}": before for n, (before, _) in enumerate(WIDER)}
    wide = {f"c{n}": after for n, (_, after) in enumerate(WIDER)}
    call = {"id": "1", "function": {"name": "f", "arguments": "{}"}}
    told = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    first, second = shard(0, [record(0, **narrow)]), shard(1, [record(1, **wide, messages=told)])
    job.publish(first)
    assert len(loader.load(job.repo_id)["rows"]) == 1
    job.publish(first, second, shard(2, [{"id": "9-0", "index": 9, "sample": 0, "new": True}]))
    assert job.commits == 2  # the older shard is written again in the same commit
    zero, one, nine = loader.load(job.repo_id)["rows"]
    assert (zero["c0"], one["c0"]) == (None, {"a": 1})
    assert (zero["c1"], one["c1"]) == (1.0, 2.5)
    assert (zero["c2"], one["c2"]) == ("1", '"text"')
    assert (zero["c3"], one["c3"]) == ({"a": 1, "b": None}, {"a": None, "b": [1]})
    assert (zero["c4"], one["c4"]) == ([], [{"x": "y"}])
    assert one["messages"] == told
    assert zero["messages"][0]["tool_calls"] is None
    assert nine["new"] is True
    assert nine["completion"] is None


def test_hints_spare_a_rewrite(make_job: Callable[..., Job]) -> None:
    job = make_job()
    first = shard(0, [record(0, usage=None)])
    job.publish(first)
    before = job.files
    job.publish(first, shard(1, [record(1, reasoning_content="hm")]))
    assert (
        job.files["data/default/train-00000.parquet"] == before["data/default/train-00000.parquet"]
    )
    assert job.hub.count("lfs_upload") == 2


def test_a_retried_shard_replaces_its_file_and_an_empty_one_has_none(
    make_job: Callable[..., Job],
) -> None:
    job = make_job()
    job.publish(shard(0, [failed(0)]), shard(1, [record(1)]), shard(2, [record(2)]))
    assert job.ids() == ["1-0", "2-0"]
    done = job.publish(
        shard(0, [record(0)], "v2"), shard(1, [failed(1)], "v2"), shard(2, [record(2)])
    )
    assert job.ids() == ["0-0", "2-0"]
    assert [(one.path, one.rows) for one in done][1] == ("", 0)
    assert job.commits == 2


def test_nothing_new_is_no_commit(make_job: Callable[..., Job]) -> None:
    job = make_job()
    shards = [shard(0, [record(0)]), shard(1, [record(1)])]
    job.publish(*shards)
    job.finish()
    assert job.commits == 2
    job.publish(*shards)
    job.finish()
    assert job.publish() == []
    assert job.commits == 2


def test_shards_of_an_earlier_run_go_and_other_files_stay(
    make_job: Callable[..., Job], api: HfApi, loader: HubLoader
) -> None:
    earlier = make_job()
    earlier.publish(*[shard(n, [record(n, odd={"a": n})]) for n in range(3)])
    others = ["data/default/mine.txt", "data/other/train-00007.parquet", "notes.md"]
    adds = [CommitOperationAdd(path, b"x") for path in others]
    api.create_commit(earlier.repo_id, adds, commit_message="mine", repo_type="dataset")
    job = make_job()
    job.publish(shard(0, [record(100, odd="text")]))
    assert loader.load(job.repo_id, "default")["rows"][0]["odd"] == "text"
    job.finish()
    files = set(job.hub.repo(job.repo_id).files)
    assert files >= {*others, "data/default/train-00000.parquet"}
    assert not files & {"data/default/train-00001.parquet", "data/default/train-00002.parquet"}


def test_a_file_that_was_changed_or_removed_on_the_hub_is_put_back(
    make_job: Callable[..., Job], api: HfApi
) -> None:
    job = make_job()
    shards = [shard(0, [record(0)]), shard(1, [record(1)])]
    job.publish(*shards)
    api.delete_file("data/default/train-00001.parquet", job.repo_id, repo_type="dataset")
    job.publish(*shards)
    assert job.ids() == ["0-0", "1-0"]


def test_large_publications_are_cut_into_commits(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_module, "MAX_FILES", 2)
    job = make_job()
    job.publish(*[shard(n, [record(n)]) for n in range(5)])
    assert job.commits == 3
    assert job.ids() == [f"{n}-0" for n in range(5)]


# What can go wrong -------------------------------------------------------------------


def dying(seconds: float) -> None:
    raise Crash


def life(job: Job) -> Iterator[Callable[[], object]]:
    """A job's publications, the second of which widens the schema over two commits."""
    shards = [shard(n, [record(n, score=n), failed(100 + n)]) for n in range(2)]
    shards += [shard(n, [record(n, score=n + 0.5)]) for n in range(2, 4)]
    yield lambda: job.publish(*shards[:2])
    yield lambda: job.publish(*shards)
    retried = [shard(1, [record(1, score=1), record(101)], "v2")]
    yield lambda: job.publish(shards[0], *retried, *shards[2:])
    yield job.finish


@pytest.mark.parametrize("kind", ["cut", "cut_after"])
@pytest.mark.parametrize("nth", range(1, 6))
def test_a_crash_at_any_commit_loses_and_repeats_nothing(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch, kind: str, nth: int
) -> None:
    monkeypatch.setattr(hub_module, "MAX_FILES", 2)
    job = make_job()
    job.hub.fault("commit", kind, nth=nth)
    job.options["sleep"] = dying  # the first wait, after the lost answer, is the end of it
    crashes = 0
    for step in life(job):
        try:
            step()
        except Crash:
            crashes += 1
            step()  # by a new publisher, from the state that was saved before
    assert crashes == 1
    assert sorted(job.ids()) == sorted(["0-0", "1-0", "101-0", "2-0", "3-0"])
    assert len(job.files) == 4
    assert len(job.schemas()) == 1
    assert job.commits == 5, "as many as without a crash"


def test_a_crash_before_anything_was_saved_and_a_narrower_second_attempt(
    make_job: Callable[..., Job], loader: HubLoader
) -> None:
    job = make_job()
    first = shard(0, [record(0, score=1)])
    job.publish(first)
    before = job.saved
    job.publish(first, shard(1, [record(1, score=0.5)]))
    job.saved = before  # the commit stands, its state was lost …
    job.publish(first, shard(1, [record(1, score=2)], "v2"))  # … and the shard came back as ints
    assert [row["score"] for row in loader.load(job.repo_id)["rows"]] == [1, 2]
    assert len(job.schemas()) == 1


def test_lost_state_is_found_again(make_job: Callable[..., Job]) -> None:
    job = make_job()
    shards = [shard(0, [record(0)]), shard(1, [record(1)])]
    job.publish(*shards)
    job.saved = '{"publisher": null, "published": []}'
    job.publish(*shards)
    assert job.commits == 1
    assert job.hub.count("lfs_upload") == 2


def test_a_foreign_commit_in_between_is_built_upon(
    make_job: Callable[..., Job], api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    upload = HubRepo.upload
    strangers = iter([b"one", b"two"])

    def interrupted(self: HubRepo, additions: Sequence[CommitOperationAdd]) -> None:
        upload(self, additions)
        for text in strangers:
            card = b"---\nlicense: mit\n---\n" + text
            api.upload_file(
                path_or_fileobj=card, path_in_repo="README.md", repo_id=job.repo_id,
                repo_type="dataset",
            )  # fmt: skip
            break

    monkeypatch.setattr(HubRepo, "upload", interrupted)
    job.publish(shard(0, [record(0)]))
    assert job.ids() == ["0-0"]
    assert [s.status for s in job.hub.requests if s.route == "commit"].count(412) == 2
    card = job.hub.repo(job.repo_id).files["README.md"].content
    assert b"license: mit" in card
    assert b"two" in card


def test_waits_are_the_hubs_where_it_says_so_and_bounded(make_job: Callable[..., Job]) -> None:
    job = make_job()
    limit = {"RateLimit": '"api";r=0;t=55'}
    job.hub.fault("commit", "status", status=429, headers={"Retry-After": "33"})
    job.hub.fault("commit", "status", nth=2, status=429, headers=limit)
    job.hub.fault("commit", "status_after", nth=3, status=502)
    job.publish(shard(0, [record(0)]))
    assert job.waits == [33.0, 55.0, 4.0]
    assert job.commits == 1  # the 502 came after the commit was applied
    job.waits.clear()
    job.hub.fault("commit", "status", status=500, times=100)
    with pytest.raises(PipelineError, match="500"):
        job.publish(shard(0, [record(0)]), shard(1, [record(1)]))
    assert len(job.waits) == ATTEMPTS - 1
    assert not list(job.work_dir.glob("*.parquet"))


def test_a_hub_that_falls_silent_does_not_hold_up_the_job(
    make_job: Callable[..., Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_repo_module, "SILENCE", 1.5)
    job = make_job()
    job.hub.fault("commit", "hang_after")
    job.publish(shard(0, [record(0)]))
    assert job.waits == [1.0]
    assert job.commits == 1


def test_other_calls_are_repeated_too(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.hub.fault("info", "cut", times=2)
    job.hub.fault("resolve", "status", status=503)
    job.publish(shard(0, [record(0)]))
    assert job.waits == [1.0, 2.0, 1.0]
    assert job.ids() == ["0-0"]


def test_a_token_that_lost_its_right_while_the_job_ran(make_job: Callable[..., Job]) -> None:
    job = make_job()
    job.options["token"] = READ_TOKEN
    with pytest.raises(AuthError, match="HF_TOKEN"):
        job.publish(shard(0, [record(0)]))


def test_no_more_commits_an_hour_than_the_hub_takes(make_job: Callable[..., Job]) -> None:
    job = make_job(commits_per_hour=2)
    shards = [shard(n, [record(n)]) for n in range(3)]
    for n in range(2):
        job.publish(*shards[: n + 1])
    assert job.waits == []
    job.publish(*shards)
    (wait,) = job.waits
    assert 3500 < wait <= 3600


# From the config ---------------------------------------------------------------------


def job_with(**hub: Any) -> JobConfig:
    output = OutputConfig(mode="upload_hf", hf=HubConfig(**{"repo_id": "a/b", **hub}))
    return dataclasses.replace(JOB, output=output)


@pytest.mark.parametrize(
    ("hub", "error", "names"),
    [
        ({"repo_type": "model"}, NotSupported, "repo_type"),
        ({"repo_id": "justname"}, FatalJobError, "repo_id"),
        ({"config_name": "a/b"}, FatalJobError, "config_name"),
    ],
)
def test_outputs_that_cannot_be_honoured_are_refused_by_name(
    hub: dict[str, Any], error: type[Exception], names: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=names):
        build_publisher(job_with(**hub), token="hf_x", work_dir=tmp_path)
    with pytest.raises(FatalJobError, match=r"output\.hf"):
        build_publisher(JOB, token="hf_x", work_dir=tmp_path)


def test_the_endpoint_is_the_environments(
    hub: HubEmulator, repo_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    publisher = build_publisher(job_with(repo_id=repo_id), token=WRITE_TOKEN, work_dir=tmp_path)
    publisher.check_access()
    publisher.publish([shard(0, [record(0)])], {})
    assert "data/default/train-00000.parquet" in hub.repo(repo_id).files
