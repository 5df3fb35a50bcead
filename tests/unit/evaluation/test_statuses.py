"""What each test said."""

import subprocess
import sys
from pathlib import Path

import pytest

from spider_worker.evaluation.statuses import Status, case_of, read_junit, read_log, read_results

SUITE = """\
import unittest
import pytest

class TestGroup:
    @pytest.mark.parametrize("value", ["a b", "x::y", "e\\x1bsc", "a - b", "[q]", "é"])
    def test_each(self, value):
        assert value != "x::y"

    class TestInner:
        def test_deep(self):
            pass

def test_skip():
    pytest.skip("no")

@pytest.mark.xfail
def test_expected():
    assert False

@pytest.mark.xfail(strict=True)
def test_forbidden():
    pass

@pytest.fixture
def torn_down():
    yield
    raise OSError("late")

def test_teardown(torn_down):
    pass

@pytest.fixture
def never():
    raise OSError("early")

def test_setup(never):
    pass

class Old(unittest.TestCase):
    def test_old(self):
        pass
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The suite above, run by the real pytest: its junit file and its output."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pkg").mkdir()
    (folder / "pkg" / "test_it.py").write_text(SUITE)
    (folder / "pkg" / "test_broken.py").write_text("import nothing_like_this\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "--continue-on-collection-errors",
         "-p", "no:cacheprovider", "--junitxml", folder / "j.xml"],
        cwd=folder, capture_output=True, text=True, check=False, env={"LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    return (folder / "j.xml").read_bytes(), done.stdout


@pytest.mark.parametrize(
    ("test", "status"),
    [
        ("pkg/test_it.py::TestGroup::test_each[a b]", Status.PASSED),
        ("pkg/test_it.py::TestGroup::test_each[x::y]", Status.FAILED),
        ("pkg/test_it.py::TestGroup::test_each[e\\x1bsc]", Status.PASSED),
        ("pkg/test_it.py::TestGroup::test_each[a - b]", Status.PASSED),
        ("pkg/test_it.py::TestGroup::test_each[[q]]", Status.PASSED),
        ("pkg/test_it.py::TestGroup::test_each[\\xe9]", Status.PASSED),
        ("pkg/test_it.py::TestGroup::TestInner::test_deep", Status.PASSED),
        ("pkg/test_it.py::test_skip", Status.SKIPPED),
        ("pkg/test_it.py::test_expected", Status.XFAIL),
        ("pkg/test_it.py::test_forbidden", Status.FAILED),
        ("pkg/test_it.py::test_teardown", Status.ERROR),
        ("pkg/test_it.py::test_setup", Status.ERROR),
        ("pkg/test_it.py::Old::test_old", Status.PASSED),
        ("test_old (pkg.test_it.Old)", Status.PASSED),
        ("test_old (pkg.test_it.Old.test_old)", Status.PASSED),
        ("pkg.test_it.Old.test_old", Status.PASSED),
        ("pkg/test_it.py::test_absent", None),
        ("pkg/test_it.py::TestGroup::test_each", None),
    ],
)
def test_a_test_of_pytest_is_found_by_its_id(ran, test, status):
    assert read_results(*ran).status_of(test) == status


def test_an_id_that_was_cut_at_a_space_stands_for_all_that_begin_so(ran):
    results = read_results(*ran)
    assert results.status_of("pkg/test_it.py::TestGroup::test_each[a") is Status.PASSED
    assert results.status_of("pkg/test_it.py::TestGroup::test_each[") is Status.FAILED
    assert results.status_of("pkg/test_it.py::TestOther::test_each[a") is None


def test_a_module_that_cannot_be_imported_counts_as_a_word(ran):
    junit, log = ran
    results = read_results(junit, log)
    assert results.cases["", "pkg.test_broken"] is Status.ERROR
    assert results.faults["pkg/test_broken.py"] is Status.ERROR


def test_a_junit_file_that_praises_what_the_log_calls_failed_is_not_believed():
    forged = b'<testsuite><testcase classname="test_a" name="test_b[x - y]"/></testsuite>'
    log = "FAILED test_a.py::test_b[x - y] - AssertionError: no - really\n"
    results = read_results(forged, log)
    assert results.status_of("test_a.py::test_b[x - y]") is Status.FAILED


def test_without_a_junit_file_the_summary_of_pytest_lets_nothing_pass():
    results = read_results(None, "PASSED test_a.py::test_b\n")
    assert (results.count, results.status_of("test_a.py::test_b")) == (0, None)


def test_of_two_words_about_a_test_the_worse_counts():
    twice = (
        b'<t><testcase classname="m" name="t"><error/></testcase>'
        b'<testcase classname="m" name="t"/></t>'
    )
    assert read_junit(twice) == {("m", "t"): Status.ERROR}


BOMB = b"""<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>
<testsuite><testcase classname="m" name="&b;"/></testsuite>"""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "document type"),
        (b'<!DOCTYPE t SYSTEM "file:///etc/passwd"><t/>', "document type"),
        (b"<testsuite><testcase", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_hostile_or_broken_xml_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        read_junit(content)


def test_deep_xml_is_read_without_recursion():
    depth = 200_000
    content = b"<t>" + b"<a>" * depth + b"</a>" * depth + b'<testcase classname="m" name="t"/></t>'
    assert read_junit(content) == {("m", "t"): Status.PASSED}


UNITTEST = '''\
import unittest

class Things(unittest.TestCase):
    def test_good(self):
        pass
    def test_bad(self):
        self.fail("no")
    def test_worse(self):
        raise OSError("no")
    def test_words(self):
        """Words stand for the name."""
    def test_prints(self):
        print("something of its own")
    def test_parts(self):
        with self.subTest(i=1):
            self.fail("no")
    @unittest.skip("not today")
    def test_skipped(self):
        pass
    @unittest.expectedFailure
    def test_expected(self):
        self.fail("no")
    @unittest.expectedFailure
    def test_surprise(self):
        pass

class Never(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        raise OSError("no")
    def test_never(self):
        pass
'''


def test_a_log_of_unittest_is_read(tmp_path: Path):
    (tmp_path / "test_u.py").write_text(UNITTEST)
    done = subprocess.run(
        [sys.executable, "-m", "unittest", "-v", "test_u"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    results = read_results(None, done.stdout + done.stderr)
    expected = {
        "test_good": Status.PASSED,
        "test_bad": Status.FAILED,
        "test_worse": Status.ERROR,
        "test_words": Status.PASSED,
        "test_prints": Status.PASSED,
        "test_parts": Status.FAILED,
        "test_skipped": Status.SKIPPED,
        "test_expected": Status.XFAIL,
        "test_surprise": Status.XPASS,
    }
    for name, status in expected.items():
        for test in (
            f"{name} (test_u.Things)",
            f"{name} (test_u.Things.{name})",
            f"test_u.Things.{name}",
            f"test_u.py::Things::{name}",
        ):
            assert results.status_of(test) is status, test
    assert results.status_of("Words stand for the name.") is Status.PASSED
    assert results.status_of("test_never (test_u.Never)") is None
    assert results.count > 0


def test_output_between_the_dots_and_the_end_is_left_out():
    log = (
        "test_a (m.C) ... noise on the same line\n"
        "and more\n"
        "ok\n"
        "test_b (m.C)\n"
        "What it is for ... ERROR\n"
        "test_c (m.C) ... warning: x ... FAIL\n"
    )
    said, _ = read_log(log)
    assert said["test_a (m.C)"] is Status.PASSED
    assert said["test_b (m.C)"] is Status.ERROR
    assert said["What it is for"] is Status.ERROR
    assert said["test_c (m.C)"] is Status.FAILED


def test_a_fault_after_the_list_counts_more_than_ok():
    log = "test_a (m.C) ... ok\n\nFAIL: test_a (m.C) (i=1)\n"
    assert read_results(None, log).status_of("test_a (m.C)") is Status.FAILED


def test_the_letters_of_sympys_runner_are_read():
    said, _ = read_log("test_one ok\ntest_two F\ntest_three E\ntest_four f\ntest_five ok \n")
    assert said == {
        "test_one": Status.PASSED,
        "test_two": Status.FAILED,
        "test_three": Status.ERROR,
        "test_four": Status.XFAIL,
    }


@pytest.mark.parametrize(
    ("test", "case"),
    [
        ("a/b/test_c.py::test_d", ("a.b.test_c", "test_d")),
        ("test_c.py::T::U::test_d[x::y/z.py]", ("test_c.T.U", "test_d[x::y/z.py]")),
        ("src/mod.py::mod.func", ("src.mod", "mod.func")),
        ("test_d (a.b.T)", ("a.b.T", "test_d")),
        ("test_d", ("", "test_d")),
        ("test.py::test_d[\x1b\ud800]", ("test", "test_d[#x1B#xD800]")),
    ],
)
def test_an_id_becomes_a_junit_name(test, case):
    assert case_of(test) == case
