"""Run a task's tests in a box, and bring back what they said.

One command does it all: it runs the tests with their output in a file, and then prints that file
and the junit file, packed. Both lie in a folder beside the tree with a name that no patch can know,
so a junit file or a link that a patch puts into the tree is never read. What a test leaves running
ends with the command.
"""

from __future__ import annotations

__all__ = ["ENVIRONMENT", "SuiteRun", "run_suite"]

import asyncio
import base64
import binascii
import dataclasses
import secrets
import shlex
import zlib
from collections.abc import Mapping
from typing import Final

from spider_sdk.errors import WorkspaceError
from spider_worker.evaluation.commands import suite_command
from spider_worker.evaluation.statuses import Results, read_results
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import Box
from spider_worker.workspaces.git import OPTIONS

#: What makes two runs of the same tests alike.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "PYTHONHASHSEED": "0",
    "TZ": "UTC",
    "LC_ALL": "C.UTF-8",
    "LANG": "C.UTF-8",
}
_LOG_BYTES: Final = 4 << 20  # of the log's end
_JUNIT_BYTES: Final = 64 << 20
_KEPT_LOG: Final = 20_000  # characters of the log's end, for whoever asks why
#: Names, at the end of a line, of what compilers and Cython read.
_COMPILED: Final = r'[.](pyx|pxd|pxi|c|cc|cpp|cxx|h|hh|hpp|f|f90)("|[.](in|tp|src))?$'

# $1 is the command of the tests, $2 a word that separates the parts of what is printed, $3 whether
# what is compiled is built again: in place, so that what is installed stays as the image has it. It
# may fail, as it may in the data sets' harness; the tests then run on what was built before.
_SCRIPT: Final = f"""
out=$(mktemp -d -p "${{HOME:-/tmp}}") || exit 97
for conda in /opt/miniconda3 /opt/conda; do
    if [ -d "$conda/envs/testbed" ] && [ -f "$conda/bin/activate" ]; then
        . "$conda/bin/activate" testbed >"$out/log" 2>&1
        break
    fi
done
if [ "$3" = yes ] && [ -f setup.py ] &&
    git {shlex.join(OPTIONS)} status --porcelain --no-renames -uall | grep -qiE '{_COMPILED}'; then
    python setup.py build_ext --inplace 2>&1 </dev/null | sed 's/^/build_ext: /' >>"$out/log"
fi
options="-rA --color=no -p no:cacheprovider --junitxml=$out/junit.xml"
PYTEST_ADDOPTS="$options" bash -c "$1" >>"$out/log" 2>&1 </dev/null
printf '\\n%s exit %s\\n' "$2" "$?"
tail -c {_LOG_BYTES} "$out/log" | gzip -c | base64
printf '%s junit\\n' "$2"
if [ -f "$out/junit.xml" ] && [ ! -L "$out/junit.xml" ]; then
    head -c {_JUNIT_BYTES} "$out/junit.xml" | gzip -c | base64
fi
printf '%s end\\n' "$2"
rm -rf "$out"
"""


@dataclasses.dataclass(frozen=True)
class SuiteRun:
    """``exit_code`` None: the tests ran past their time (``timed_out``). ``fault`` says why nothing
    can be told from what came back; None where something can. ``log`` is the end of the output."""

    results: Results
    exit_code: int | None
    seconds: float
    log: str = ""
    fault: str | None = None

    @property
    def timed_out(self) -> bool:
        return self.exit_code is None


async def run_suite(
    box: Box,
    task: Task,
    *,
    timeout: float,  # noqa: ASYNC109 - the box kills, cancelling would wait
) -> SuiteRun:
    """Run the task's tests on the tree as it is. ``timeout`` is in seconds.

    Raises WorkspaceError where the command cannot be started.
    """
    word = f"spider-{secrets.token_hex(16)}"
    file = box.vault / word
    # What comes as a repository says in its command what has to be built.
    builds = "yes" if task.origin.kind == "image" else "no"
    try:
        done = await box.run(
            ("bash", "-c", _SCRIPT, "spider", suite_command(task), word, builds),
            timeout=timeout, env=ENVIRONMENT, network=False, stdout=file,
        )  # fmt: skip
        printed = await asyncio.to_thread(file.read_text, "utf-8", "replace")
    finally:
        file.unlink(missing_ok=True)
    if done.code is None:
        return SuiteRun(Results(), None, done.seconds)
    if done.code == 97:
        raise WorkspaceError(f"no folder for the tests' results can be made: {done.text.strip()}")
    try:
        code, log, junit = _parts(printed, word)
    except ValueError as error:
        return SuiteRun(Results(), done.code, done.seconds, done.text[-_KEPT_LOG:], str(error))
    try:
        results, fault = read_results(junit, log), None
    except ValueError as error:
        results, fault = Results(), str(error)
    if fault is None and results.count == 0:
        fault = "no test has run"
    return SuiteRun(results, code, done.seconds, log[-_KEPT_LOG:], fault)


def _parts(output: str, word: str) -> tuple[int, str, bytes | None]:
    """The tests' own status, their log and their junit file. Raises ValueError."""
    _, _, rest = output.partition(f"{word} exit ")
    code, _, rest = rest.partition("\n")
    log, middle, rest = rest.partition(f"{word} junit\n")
    junit, end, _ = rest.partition(f"{word} end\n")
    if not middle or not end or not code.isdigit():
        raise ValueError("the results of the tests did not come back whole")
    return (
        int(code),
        _unpack(log, _LOG_BYTES).decode("utf-8", "replace"),
        _unpack(junit, _JUNIT_BYTES) if junit.strip() else None,
    )


def _unpack(text: str, limit: int) -> bytes:
    """Raises ValueError for what is not packed as the script packs it, or has ``limit`` bytes and
    may therefore lack its end."""
    unpacker = zlib.decompressobj(wbits=31)
    try:
        content = unpacker.decompress(base64.b64decode(text), limit + 1)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"the results of the tests did not come back whole: {error}") from error
    if len(content) > limit:
        raise ValueError("the results of the tests are too large")
    return content
