"""What each test said, read from a junit file and from the runner's own words.

Both come out of a place where a model's patch was at work, so neither is believed on its own: a
test has passed only where the junit file says so (or ``unittest -v``, for runners that leave no
such file) and nothing says that it failed. Code that a test imports runs in the test's own
process; what it forges with care, in every place at once, cannot be told from the truth.
"""

from __future__ import annotations

__all__ = ["Results", "Status", "case_of", "read_junit", "read_log", "read_results"]

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final
from xml.parsers import expat

#: A test as a junit file names it: class (or module) in dots, and name with its parameters.
Case = tuple[str, str]


class Status(enum.IntEnum):
    """From the best to the worst: of two words about a test the worse one counts."""

    PASSED = 0
    SKIPPED = 1
    XFAIL = 2  #: failed, as its author expected
    XPASS = 3  #: passed where its author expected a failure and forbade anything else
    FAILED = 4
    ERROR = 5


_WORDS: Final[Mapping[str, Status]] = {
    "ok": Status.PASSED,
    "FAIL": Status.FAILED,
    "ERROR": Status.ERROR,
    "expected failure": Status.XFAIL,
    "unexpected success": Status.XPASS,
}
#: sympy's own runner: the name, and a letter for each end.
_LETTERS: Final[Mapping[str, Status]] = {
    "ok": Status.PASSED,
    "F": Status.FAILED,
    "E": Status.ERROR,
    "f": Status.XFAIL,
    "X": Status.XPASS,
    "s": Status.SKIPPED,
}
_UNITTEST_ID: Final = re.compile(r"^(\w+) \(([\w.]+)\)")
_UNITTEST_END: Final = re.compile(
    r"^(?P<id>.*?) \.\.\. (?:.* )?(?P<word>ok|FAIL|ERROR|expected failure|unexpected success"
    r"|skipped\b.*)$"
)
_UNITTEST_FAULT: Final = re.compile(r"^(?P<word>FAIL|ERROR): (?P<id>\w+ \([\w.]+\))")
_PYTEST_FAULT: Final = re.compile(r"^(?P<word>FAILED|ERROR) (?P<rest>\S.*)$")
_LETTER_END: Final = re.compile(r"^(?P<id>test_\w+) (?P<letter>ok|F|E|f|X|s)$")
#: Characters that XML cannot hold, which pytest writes as #x1B.
_NOT_XML: Final = re.compile("[^\t\n\r -~\x80-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclasses.dataclass(frozen=True)
class Results:
    """``cases`` are a junit file's; ``said`` what the log says of tests by the very name it has
    for them; ``faults`` the names that the log calls failed."""

    cases: Mapping[Case, Status] = dataclasses.field(default_factory=dict)
    said: Mapping[str, Status] = dataclasses.field(default_factory=dict)
    faults: Mapping[str, Status] = dataclasses.field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many tests left a word, a module that could not be imported being one."""
        return len(self.cases) or len(self.said)

    def status_of(self, test: str) -> Status | None:
        """A test by its id in a data set; None where nothing was said of it."""
        return max(self._words(test), default=None)

    def _words(self, test: str) -> Iterator[Status]:
        case = case_of(test)
        if case in self.cases:
            yield self.cases[case]
        elif _cut_off(test):
            # Data sets whose ids were read from a log end them at the first space.
            yield from (
                status
                for (where, name), status in self.cases.items()
                if where == case[0] and name.startswith(case[1])
            )
        for name in {test, ".".join(case)}:
            if name in self.said:
                yield self.said[name]
            if name in self.faults:
                yield self.faults[name]


def case_of(test: str) -> Case:
    """The junit name of a test whose id is pytest's (``a/test_b.py::Class::test_c[1]``) or one of
    unittest's (``test_c (a.test_b.Class)``, ``a.test_b.Class.test_c``)."""
    if "::" in test:
        address, bracket, parameters = test.partition("[")
        module, *names = address.split("::")
        module = module.replace("/", ".").removesuffix(".py")
        *classes, name = names
        return ".".join((module, *classes)), _as_xml(name + bracket + parameters)
    named = _UNITTEST_ID.match(test)
    if named is not None:
        # From Python 3.11 on the name is there twice.
        return named[2].removesuffix(f".{named[1]}"), named[1]
    where, _, name = test.rpartition(".")
    return where, name


def _cut_off(test: str) -> bool:
    return "::" in test and "[" in test and not test.endswith("]")


def _as_xml(name: str) -> str:
    def number(found: re.Match[str]) -> str:
        code = ord(found[0])
        return f"#x{code:02X}" if code <= 0xFF else f"#x{code:04X}"

    return _NOT_XML.sub(number, name)


def read_results(junit: bytes | None, log: str) -> Results:
    """``junit`` None: the runner left none. Raises ValueError as ``read_junit`` does."""
    said, faults = read_log(log)
    if junit is None:
        return Results(said=said, faults=faults)
    return Results(cases=read_junit(junit), faults=faults)


def read_junit(content: bytes) -> dict[Case, Status]:
    """The cases of a junit file. Raises ValueError where it is no XML, or XML with a document
    type: no runner writes one, and it is where entities are declared."""
    reader = _JunitReader()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = reader.refuse
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise ValueError(f"the junit file cannot be read: {error}") from error
    return reader.cases


class _JunitReader:
    def __init__(self) -> None:
        self.cases: dict[Case, Status] = {}
        self._case: Case | None = None
        self._status = Status.PASSED

    def refuse(self, *_: Any) -> None:
        raise ValueError("the junit file declares a document type")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "testcase":
            self._case = attributes.get("classname", ""), attributes.get("name", "")
            self._status = Status.PASSED
        elif self._case is not None:
            self._status = max(self._status, _element_status(name, attributes))

    def end(self, name: str) -> None:
        if name == "testcase" and self._case is not None:
            # A test may be there twice: for its call, and for what went wrong in its teardown.
            self.cases[self._case] = max(self.cases.get(self._case, self._status), self._status)
            self._case = None


def _element_status(name: str, attributes: Mapping[str, str]) -> Status:
    if name == "failure":
        return Status.FAILED
    if name == "error":
        return Status.ERROR
    if name == "skipped":
        return Status.XFAIL if attributes.get("type") == "pytest.xfail" else Status.SKIPPED
    return Status.PASSED


def read_log(log: str) -> tuple[dict[str, Status], dict[str, Status]]:
    """What the log of ``unittest -v`` (Django's runner too) or of sympy's runner says of each
    test, and the names that it, or pytest's summary, calls failed."""
    said: dict[str, Status] = {}
    faults: dict[str, Status] = {}
    waiting: list[str] = []  # names of the test whose end has not been said yet
    for line in log.splitlines():
        for name, status in _faults(line):
            faults[name] = max(faults.get(name, status), status)
        begun = _UNITTEST_ID.match(line)
        if begun is not None:
            waiting = [begun[0]]
        ended = _UNITTEST_END.match(line)
        if ended is not None:
            # With a docstring, its first line stands where the name would; data sets that were
            # made from such logs use it as the id.
            names, word = [*waiting, ended["id"]], ended["word"]
        elif waiting and line in _WORDS:
            names, word = waiting, line  # the test had printed something after the dots
        elif (letter := _LETTER_END.match(line)) is not None:
            said[letter["id"]] = _LETTERS[letter["letter"]]
            continue
        else:
            if waiting and begun is None and line.endswith(" ..."):
                waiting.append(line.removesuffix(" ..."))
            continue
        status = _WORDS.get(word, Status.SKIPPED)
        for name in dict.fromkeys(each for known in names for each in _spellings(known)):
            said[name] = max(said.get(name, status), status)
        waiting = []
    return said, faults


def _faults(line: str) -> Iterator[tuple[str, Status]]:
    fault = _UNITTEST_FAULT.match(line)
    if fault is not None:
        for name in _spellings(fault["id"]):
            yield name, _WORDS[fault["word"]]
        return
    fault = _PYTEST_FAULT.match(line)
    if fault is not None:
        status = Status.FAILED if fault["word"] == "FAILED" else Status.ERROR
        # The reason follows " - ", which may be in the id as well: each cut is a name.
        parts = fault["rest"].split(" - ")
        for count in range(1, min(len(parts), 8) + 1):
            yield " - ".join(parts[:count]), status


def _spellings(name: str) -> tuple[str, ...]:
    """The ids that data sets have for what ``unittest -v`` calls ``name``."""
    if _UNITTEST_ID.fullmatch(name) is None:
        return (name,)
    where, test = case_of(name)
    return f"{test} ({where})", f"{test} ({where}.{test})", f"{where}.{test}"
