"""What an evaluation does to its file. The judge is planned: others test it on real trees."""

import asyncio
import json
import threading

import pytest

from spider_sdk.errors import EngineUnavailable, UsageError
from spider_worker.evaluation import evaluate, policy
from spider_worker.evaluation.evaluate import evaluate_file
from spider_worker.evaluation.verdict import Report, patch_digest
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.trajectories.output_file import append, rewrite


class Place:
    kind = "local"

    def __init__(self):
        self.checks = 0

    async def check(self):
        self.checks += 1


class PlannedJudge:
    """Judges by what the patch says; ``hook`` is awaited before each answer."""

    hook = None

    def __init__(self, *_, **options):
        self.options = options

    async def judge(self, task, patch):
        if type(self).hook is not None:
            await type(self).hook(task, patch)
        fields = {
            "good": {"resolved": True},
            "flaky": {"resolved": True, "flaky": ("t",)},
            "bad": {"resolved": False},
            "invalid": {"resolved": None, "invalid_task": True},
            "lost": {"resolved": None, "error_eval": True, "error": "no box"},
        }[patch]
        return Report(patch_sha256=patch_digest(patch), policy=policy.NAME, **fields)


@pytest.fixture(autouse=True)
def planned(monkeypatch):
    monkeypatch.setattr(evaluate, "Judge", PlannedJudge)
    monkeypatch.setattr(PlannedJudge, "hook", None)
    return PlannedJudge


def line(name, patch, **more):
    return {
        "instance_id": name, "status": "finished", "history": [{"x": "é\ud83d"}],
        "test_result": {"git_patch": patch, "kept": 1}, "resolved": None, "report": None, **more,
    }  # fmt: skip


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read(path):
    return [json.loads(text) for text in path.read_text().splitlines()]


def tasks(*names):
    return {name: Task(name, "r", "p", Origin("dir", "/x")) for name in names}


def go(path, names, place=None, **options):
    return asyncio.run(evaluate_file(path, tasks(*names), place or Place(), **options))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "output.jsonl"


def test_every_record_gets_its_report_where_readers_look(path):
    patches = ["good", "bad", "invalid", "lost", "flaky"]
    before = [line(f"i-{patch}", patch) for patch in patches]
    write(path, *before)
    seen = []
    names = [record["instance_id"] for record in before]
    summary = go(path, names, num_workers=3, on_result=seen.append)
    after = read(path)
    assert [record["resolved"] for record in after] == [True, False, None, None, True]
    for old, new in zip(before, after, strict=True):
        assert new["report"] == new["test_result"].pop("report")
        assert new["report"]["resolved"] is new["resolved"]
        assert new | {"resolved": None, "report": None} == old
    assert after[2]["report"]["invalid_task"]
    assert {one.instance_id for one in seen} == set(names)
    assert (summary.judged, summary.resolved, summary.unresolved) == (5, 2, 1)
    assert (summary.undecided, summary.invalid, summary.flaky, summary.torn) == (2, 1, 1, 0)


def test_what_is_settled_is_left_out_unless_forced(path):
    patches = {"a": "good", "b": "bad", "c": "invalid", "d": "lost"}
    names = list(patches)
    write(path, *(line(name, patch) for name, patch in patches.items()))
    go(path, names)
    place = Place()
    again = go(path, names, place)
    assert (again.judged, again.skipped, place.checks) == (1, 3, 1), "only what was lost"
    assert go(path, names, force=True).judged == 4


def test_what_was_kept_from_its_end_is_not_judged(path):
    runs = [
        line("a", None, status="workspace_error"),
        line("b", None, status="llm_error"),
        line("c", "good", status="cancelled"),
        line("d", None, status="timeout"),
        line("e", "", status="agent_error"),
    ]
    write(path, *runs)
    place = Place()
    summary = go(path, "abcde", place)
    assert (summary.unjudged, summary.judged, place.checks) == (5, 0, 0)
    assert go(path, "abcde", force=True).unjudged == 5
    assert read(path) == runs
    write(path, line("a", "bad", status="timeout"), {**line("b", "bad", error="x"), "status": None})
    assert go(path, "ab").unresolved == 2


def test_what_a_public_harness_said_is_left_alone_unless_forced(path):
    def judged(name, patch, resolved):
        said = {"resolved": resolved, "policy": "harness", "patch_sha256": patch_digest(patch)}
        return line(name, patch, resolved=resolved, report=said)

    write(path, judged("a", "bad", True), judged("b", "good", False), judged("c", "good", None))
    summary = go(path, "abc")
    assert (summary.skipped, summary.judged) == (2, 1)
    assert [record["resolved"] for record in read(path)] == [True, False, True]
    go(path, "abc", force=True)
    assert [record["resolved"] for record in read(path)] == [False, True, True]


def test_a_verdict_is_never_replaced_by_none(path):
    write(path, line("a", "lost", resolved=True, report={"resolved": True}))
    summary = go(path, "a", force=True)
    assert (summary.kept, summary.undecided) == (1, 1)
    assert read(path)[0]["resolved"] is True
    said = {"resolved": True, "patch_sha256": patch_digest("another")}
    write(path, line("a", "lost", resolved=True, report=said))
    assert go(path, "a").kept == 0
    assert read(path)[0]["resolved"] is None


def test_force_has_the_tasks_checked_anew(path, planned, monkeypatch):
    made = []
    init = planned.__init__

    def noting(self, *args, **options):
        made.append(options["fresh"])
        init(self, *args, **options)

    monkeypatch.setattr(planned, "__init__", noting)
    write(path, line("a", "good"))
    go(path, "a")
    go(path, "a", force=True)
    assert made == [False, True]


def test_another_patch_or_policy_is_judged_anew(path, monkeypatch):
    write(path, line("a", "good"), line("b", "good"))
    go(path, "ab")
    a, b = read(path)
    a["test_result"]["git_patch"] = "bad"
    write(path, a, b)
    assert go(path, "ab").judged == 1
    assert [record["resolved"] for record in read(path)] == [False, True]
    monkeypatch.setattr(policy, "NAME", "tests-0")
    assert go(path, "ab").judged == 2


def test_only_the_attempt_that_counts_is_judged(path):
    write(path, line("a", "bad"), line("a", "good", attempt=2), line("a", "bad", n=1))
    summary = go(path, "a")
    assert summary.judged == 2
    assert [record["resolved"] for record in read(path)] == [None, True, False]


def test_records_without_a_task_are_said_and_stay(path):
    write(path, line("a", "good"), line("x", "good"))
    assert go(path, "a").unknown == ("x",)
    assert read(path)[1] == line("x", "good")


def test_a_torn_last_line_is_kept_out_and_said(path):
    write(path, line("a", "good"))
    with path.open("a") as file:
        file.write('{"instance_id": "b", "te')
    summary = go(path, "ab")
    assert summary.torn == len('{"instance_id": "b", "te')
    assert [record["instance_id"] for record in read(path)] == ["a"]


def test_a_last_line_without_its_end_is_no_torn_one(path):
    path.write_text(json.dumps(line("a", "good")))
    assert go(path, "a").torn == 0
    assert read(path)[0]["resolved"] is True


def test_lines_that_others_add_meanwhile_stay(path, planned):
    write(path, line("a", "good"), line("b", "bad"))
    added = []

    async def hook(task, patch):
        one = line(f"late-{task.instance_id}", "good")
        added.append(one["instance_id"])
        await asyncio.to_thread(append, path, one)

    planned.hook = staticmethod(hook)
    go(path, "ab", num_workers=2, interval=0.0)
    assert {record["instance_id"] for record in read(path)} == {"a", "b", *added}
    assert len(added) == 2


def test_many_writers_at_once_lose_nothing(path):
    names = [f"i{number}" for number in range(20)]
    write(path, *(line(name, "good") for name in names))
    stop = threading.Event()
    added = []

    def add():
        while not stop.is_set():
            added.append(f"late-{len(added)}")
            append(path, line(added[-1], "bad"))

    writer = threading.Thread(target=add)
    writer.start()
    try:
        go(path, names, num_workers=4, interval=0.0)
    finally:
        stop.set()
        writer.join()
    found = {record["instance_id"]: record["resolved"] for record in read(path)}
    assert set(found) == {*names, *added}
    assert all(found[name] is True for name in names)


def test_a_line_that_changed_meanwhile_gets_no_report_of_its_old_patch(path, planned):
    write(path, line("a", "good"), line("b", "bad"))

    async def hook(task, patch):
        def change(record):
            other = {"git_patch": "another"}
            return (
                record.data | {"test_result": other} if record.instance_id == "a" else record.data
            )

        await asyncio.to_thread(rewrite, path, change)

    planned.hook = staticmethod(hook)
    go(path, "ab")
    assert [record["resolved"] for record in read(path)] == [None, False]


def test_no_more_than_num_workers_are_at_work(path, planned):
    names = [f"i{number}" for number in range(9)]
    write(path, *(line(name, "good") for name in names))
    now, most = set(), 0

    async def hook(task, patch):
        nonlocal most
        now.add(task.instance_id)
        most = max(most, len(now))
        for _ in range(5):
            await asyncio.sleep(0)
        now.discard(task.instance_id)

    planned.hook = staticmethod(hook)
    go(path, names, num_workers=3)
    assert most == 3


def test_a_cancelled_evaluation_keeps_what_it_knows(path, planned):
    write(path, line("a", "good"), line("b", "bad"))

    async def run():
        stuck = asyncio.Event()

        async def hook(task, patch):
            if task.instance_id == "b":
                stuck.set()
                await asyncio.Event().wait()

        planned.hook = staticmethod(hook)
        job = asyncio.create_task(evaluate_file(path, tasks("a", "b"), Place()))
        await stuck.wait()
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(run())
    assert [record["resolved"] for record in read(path)] == [True, None]


def test_no_boxes_at_all_is_one_plain_error(path, planned):
    write(path, line("a", "good"), line("b", "bad"))

    async def hook(task, patch):
        if task.instance_id == "b":
            raise EngineUnavailable("no docker")

    planned.hook = staticmethod(hook)
    with pytest.raises(EngineUnavailable, match="no docker"):
        go(path, "ab")
    assert [record["resolved"] for record in read(path)] == [True, None]


def test_a_file_that_is_not_there_or_holds_no_records_is_refused(path):
    with pytest.raises(FileNotFoundError):
        go(path, "a")
    path.write_text("nonsense\n" + json.dumps(line("a", "good")) + "\n")
    with pytest.raises(UsageError, match="line 1"):
        go(path, "a")


def test_nothing_to_do_needs_no_place(path):
    place = Place()
    path.write_text("")
    assert go(path, "a", place).judged == 0
    assert place.checks == 0
