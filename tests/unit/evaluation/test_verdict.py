"""Resolved or not."""

import json

import pytest

from spider_worker.evaluation.harness import SuiteRun
from spider_worker.evaluation.statuses import Results, Status
from spider_worker.evaluation.verdict import Report, judge_run, patch_digest
from spider_worker.swe_tasks.base import Origin, Task

FIX, KEEP = "t.py::fix", "t.py::keep"
TASK = Task("i", "r", "p", Origin("dir", "/x"), fail_to_pass=(FIX,), pass_to_pass=(KEEP,))


def run(**statuses):
    cases = {("t", name): Status[word] for name, word in statuses.items()}
    return SuiteRun(Results(cases=cases), 0, 1.0)


@pytest.mark.parametrize(
    ("fix", "keep", "resolved"),
    [
        ("PASSED", "PASSED", True),
        ("PASSED", "SKIPPED", True),
        ("PASSED", "XFAIL", True),
        ("PASSED", "XPASS", False),
        ("PASSED", "FAILED", False),
        ("PASSED", "ERROR", False),
        ("FAILED", "PASSED", False),
        ("ERROR", "PASSED", False),
        ("SKIPPED", "PASSED", False),
        ("XFAIL", "PASSED", False),
    ],
)
def test_every_test_has_to_say_what_its_list_asks(fix, keep, resolved):
    report = judge_run(TASK, run(fix=fix, keep=keep))
    assert report.resolved is resolved
    assert report.settled


@pytest.mark.parametrize(("said", "missing"), [("fix", KEEP), ("keep", FIX)])
def test_a_missing_test_has_failed(said, missing):
    report = judge_run(TASK, run(**{said: "PASSED"}))
    assert report.resolved is False
    groups = (report.fail_to_pass, report.pass_to_pass)
    assert [test for group in groups for test in group.missing] == [missing]
    assert [test for group in groups for test in group.failed] == [missing]


def test_no_test_that_fails_before_is_no_proof():
    task = Task("i", "r", "p", Origin("dir", "/x"), pass_to_pass=(KEEP,))
    assert judge_run(task, run(keep="PASSED")).resolved is False


def test_where_nothing_can_be_told_there_is_no_answer():
    report = judge_run(TASK, SuiteRun(Results(), 4, 1.0, fault="no test has run"))
    assert (report.resolved, report.error_eval, report.settled) == (None, True, False)
    assert report.error == "no test has run"


def test_a_run_past_its_time_is_not_resolved():
    report = judge_run(TASK, SuiteRun(Results(), None, 9.0))
    assert (report.resolved, report.test_timeout, report.error_eval) == (False, True, False)


def test_a_report_is_plain_json_with_the_keys_of_older_readers():
    report = judge_run(TASK, run(fix="PASSED", keep="FAILED")).to_json()
    assert json.loads(json.dumps(report)) == report
    assert report["tests"] == {
        "fail_to_pass": {"passed": [FIX], "failed": [], "missing": []},
        "pass_to_pass": {"passed": [], "failed": [KEEP], "missing": []},
    }
    older = {"empty_generation", "resolved", "failed_apply_patch", "error_eval", "test_timeout"}
    assert older <= set(report)
    assert "log" not in report
    assert Report(resolved=False).to_json()["tests"] is None


def test_a_digest_tells_patches_apart_also_with_half_a_character():
    assert patch_digest("a") != patch_digest("b")
    assert patch_digest("\ud800") == patch_digest("\ud800")
