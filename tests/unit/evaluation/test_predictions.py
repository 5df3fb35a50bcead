"""To the public harnesses and back."""

import json

import pytest

from spider_sdk.errors import UsageError
from spider_worker.evaluation.predictions import export_predictions, read_harness_report


def record(name, patch, **more):
    return {
        "instance_id": name,
        "test_result": {"git_patch": patch},
        "metadata": {"llm_config": {"model": "openai/m"}},
        "status": "finished",
        **more,
    }


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_the_attempt_that_counts_is_exported_and_each_run_has_a_file(tmp_path):
    source, target = tmp_path / "output.jsonl", tmp_path / "p.jsonl"
    records = [
        record("a", "old", attempt=1),
        record("b", None),
        record("a", "new Ü", attempt=2),
        record("a", "other", n=1),
        record("d", None, status="llm_error"),
        record("e", "part", status="cancelled"),
    ]
    source.write_text("".join(json.dumps(one) + "\n" for one in records) + '{"instance_id": "c')
    written = export_predictions(source, target)
    assert (written.files, written.left_out) == ((target, tmp_path / "p-n1.jsonl"), 2)
    assert lines(target) == [
        {"instance_id": "a", "model_name_or_path": "openai/m", "model_patch": "new Ü"},
        {"instance_id": "b", "model_name_or_path": "openai/m", "model_patch": ""},
    ]
    assert [one["model_patch"] for one in lines(written.files[1])] == ["other"]


def test_the_models_name_may_be_given(tmp_path):
    source, target = tmp_path / "output.jsonl", tmp_path / "p.jsonl"
    source.write_text(json.dumps({"instance_id": "a"}) + "\n")
    export_predictions(source, target)
    assert lines(target)[0]["model_name_or_path"] == "unknown"
    export_predictions(source, target, model="mine")
    assert lines(target)[0]["model_name_or_path"] == "mine"


RUN_REPORT = {
    "total_instances": 5, "schema_version": 2,
    "completed_ids": ["a", "b"], "incomplete_ids": ["e"], "empty_patch_ids": ["c"],
    "submitted_ids": ["a", "b", "c", "d"], "resolved_ids": ["a"], "unresolved_ids": ["b", "z"],
    "error_ids": ["d"],
}  # fmt: skip


def test_a_run_report_is_read_and_nothing_is_dropped_in_silence(tmp_path):
    path = tmp_path / "m.run.json"
    path.write_text(json.dumps(RUN_REPORT))
    found = read_harness_report(path, frozenset("abcdef"))
    assert {name: report.resolved for name, report in found.reports.items()} == {
        "a": True, "b": False, "c": False, "d": None,
    }  # fmt: skip
    assert found.reports["c"].empty_generation
    assert found.reports["d"].error_eval
    assert found.unknown == ("z",)
    assert found.silent == ("e", "f")


def statuses(**failed):
    return {
        name: {"success": [f"{name}::ok"], "failure": failed.get(name, [])}
        for name in ("FAIL_TO_PASS", "PASS_TO_PASS", "FAIL_TO_FAIL", "PASS_TO_FAIL")
    }


def test_a_folder_is_read_and_an_instances_own_report_says_more(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN_REPORT))
    (tmp_path / "notes.json").write_text("[1]")
    reports = {
        "a": {"a": {"patch_exists": True, "resolved": True, "tests_status": statuses()}},
        "e": {"patch_exists": True, "resolved": False,
              "tests_status": statuses(PASS_TO_PASS=["t"])},
        "f": {"timed_out": True, "timeout": 90},
        "g": {"g": {"patch_is_None": True, "patch_exists": False, "resolved": False}},
        "h": {"h": {"patch_exists": True, "patch_successfully_applied": False, "resolved": False}},
        "i": {"i": {"resolved": True, "tests_status": {"FAIL_TO_PASS": {"success": ["t"]}}}},
        "j": {"j": {"resolved": True, "tests_status": {"FAIL_TO_PASS": None}}},
    }  # fmt: skip
    for name, content in reports.items():
        (tmp_path / "logs" / name).mkdir(parents=True)
        (tmp_path / "logs" / name / "report.json").write_text(json.dumps(content))
    found = read_harness_report(tmp_path, frozenset("abcdefghij"))
    assert found.silent == ()
    i, j = found.reports["i"], found.reports["j"]
    assert (i.resolved, i.fail_to_pass.passed, i.fail_to_pass.failed) == (True, ("t",), ())
    assert (j.resolved, j.fail_to_pass) == (True, None)
    a, e = found.reports["a"], found.reports["e"]
    assert (a.resolved, a.fail_to_pass.passed) == (True, ("FAIL_TO_PASS::ok",))
    assert (e.resolved, e.pass_to_pass.failed) == (False, ("t",))
    assert found.reports["f"].test_timeout
    assert found.reports["g"].empty_generation
    assert found.reports["h"].failed_apply_patch
    assert {report.policy for report in found.reports.values()} == {"harness"}


def test_the_run_report_of_swe_smith_is_read(tmp_path):
    (tmp_path / "report.json").write_text(
        json.dumps({"resolved": 1, "unresolved": 1, "total": 2,
                    "ids_resolved": ["a"], "ids_unresolved": ["b"]})
    )  # fmt: skip
    found = read_harness_report(tmp_path / "report.json", frozenset("ab"))
    assert {name: report.resolved for name, report in found.reports.items()} == {
        "a": True, "b": False,
    }  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"a": {"x": 1}}', "\ud800"])
def test_what_is_no_report_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match="report"):
        read_harness_report(path, frozenset("a"))


def test_no_report_is_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        read_harness_report(tmp_path / "absent.json", frozenset("a"))
    with pytest.raises(UsageError, match="holds no report"):
        read_harness_report(tmp_path, frozenset("a"))
