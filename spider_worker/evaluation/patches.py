"""Put a patch into a prepared tree, and take back the edits that do not count.

The tree is a git repository whose HEAD is the state with the fault (``prepare``). Each of three
ways is tried on that very state: what one of them leaves behind would be in the next one's way.
"""

from __future__ import annotations

__all__ = ["METHODS", "Applied", "apply_patch", "apply_test_patch"]

import base64
import binascii
import dataclasses
import re
import secrets
import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Final

from spider_sdk.errors import WorkspaceError
from spider_worker.evaluation import policy
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import Box, Finished
from spider_worker.workspaces.git import ENVIRONMENT, OPTIONS

#: The ways a patch is put in, in the order in which they are tried.
METHODS: Final = ("git apply", "git apply --reject", "patch --fuzz=5")

_SECONDS: Final = 300.0
_SAID: Final = 4000  # characters of what git and patch say about a patch that does not fit
#: ``patch`` would write there, and what git says of the tree afterwards could be the patch's word.
_INTO_GIT: Final = re.compile(
    r"^(?:\+\+\+|---|\*\*\*|Index:|diff|rename|copy).*(?:^|[\s/\"])\.git(?:[\s/\"]|$)",
    re.MULTILINE | re.IGNORECASE,
)

_GIT: Final = f"""
g() {{ git {shlex.join(OPTIONS)} "$@"; }}
"""

# The patch comes on stdin. $1 separates what is printed, $2 is -R or nothing, $3 whether the
# third way may be taken. A file that was ignored before is none of the patch's.
_APPLY: Final = (
    _GIT
    + r"""
tmp=$(mktemp -d -p "${HOME:-/tmp}") || exit 97
trap 'rm -rf "$tmp"' EXIT
cat >"$tmp/patch" && : >"$tmp/said" || exit 97
others() { g ls-files -o -z | LC_ALL=C sort -z; }
others >"$tmp/before" || exit 98
new() { others | LC_ALL=C comm -z -13 "$tmp/before" -; }
undo() { g reset -q --hard HEAD && new | xargs -0 -r rm -f -- || exit 98; }
way1() { g apply $2 --whitespace=nowarn "$tmp/patch"; }
way2() { g apply $2 --whitespace=nowarn --reject "$tmp/patch"; }
way3() {
    [ "$3" = yes ] || { echo 'patch is not tried: a name leads into .git'; return 1; }
    patch $2 --force --fuzz=5 --no-backup-if-mismatch -p1 -i "$tmp/patch"
}
for way in 1 2 3 0; do
    [ $way = 0 ] && break
    "way$way" "$@" >>"$tmp/said" 2>&1 </dev/null && break
    undo
done
tail -c 4000 "$tmp/said"
printf '\n%s way %s\n' "$1" "$way"
{ g diff --name-only --no-renames -z HEAD; new; } >"$tmp/names"
if [ $way != 0 ]; then
    g apply $2 --numstat -z "$tmp/patch" 2>/dev/null |
        sed -z 's/^[^\t]*\t[^\t]*\t//' >>"$tmp/names"
fi
base64 "$tmp/names"
printf '%s known\n' "$1"
export -f g
xargs -0 -r bash -c 'g ls-tree -r -z --name-only --full-tree HEAD -- "$@"' g <"$tmp/names" | base64
printf '%s end\n' "$1"
"""
)
# The names come on stdin.
_REMOVE: Final = "xargs -0 -r rm -rf --"
_CHECK_OUT: Final = f"xargs -0 -r git {shlex.join(OPTIONS)} checkout -q HEAD --"


@dataclasses.dataclass(frozen=True)
class Applied:
    """``method`` is one of ``METHODS``; None where the patch does not fit in any way, and the tree
    is then as before. ``restored`` are the files whose edits were taken back, ``said`` what git
    and patch say of what did not fit."""

    method: str | None
    restored: tuple[str, ...] = ()
    said: str = ""


async def apply_patch(box: Box, task: Task, patch: str, *, reverse: bool = False) -> Applied:
    """Put ``patch`` (``reverse``: take it back) into the tree, by the policy (``policy``).

    Raises WorkspaceError where the tree or the tools of the box fail.
    """
    method, said, names, known = await _apply(box, patch, reverse=reverse)
    if method is None:
        return Applied(None, (), said)
    judging = frozenset(policy.judging_files(task))
    back = {
        name for name in names if policy.takes_back(name, new=name not in known, judging=judging)
    }
    for name in names - back:
        if PurePosixPath(name).name in policy.SHARED and await _configures(box, name):
            back.add(name)
    await _take_back(box, back, names - known, known)
    return Applied(method, tuple(sorted(back)), said)


async def apply_test_patch(box: Box, task: Task) -> str | None:
    """Put the task's own tests in, after ``apply_patch``, which has left the files that they are
    in as they were. None, or why they do not fit. Raises WorkspaceError."""
    if not task.test_patch.strip():
        return None
    command = ("git", *OPTIONS, "apply", "--whitespace=nowarn", "-")
    done = await _run(box, command, _encode(task.test_patch))
    return None if done.ok else done.text.strip()[-_SAID:]


async def _apply(
    box: Box, patch: str, *, reverse: bool
) -> tuple[str | None, str, frozenset[str], frozenset[str]]:
    """The way that worked, what was said, the names of all that changed, and those of HEAD."""
    word = f"spider-{secrets.token_hex(16)}"
    allowed = "no" if _INTO_GIT.search(patch) else "yes"
    command = ("bash", "-c", _APPLY, "spider", word, "-R" if reverse else "", allowed)
    done = await _run(box, command, _encode(patch))
    said, _, rest = done.text.rpartition(f"{word} way ")
    way, _, rest = rest.partition("\n")
    names, middle, rest = rest.partition(f"{word} known\n")
    known, end, _ = rest.partition(f"{word} end\n")
    if not done.ok or not way.isdigit() or not middle or not end:
        raise WorkspaceError(f"a patch could not be applied: {done.text.strip()[-_SAID:]}")
    method = METHODS[int(way) - 1] if way != "0" else None
    return method, said.strip()[-_SAID:], _names(names), _names(known)


def _encode(patch: str) -> bytes:
    """A last line without its end is no patch to git."""
    whole = patch if patch.endswith("\n") else patch + "\n"
    return whole.encode("utf-8", "surrogateescape")


def _names(packed: str) -> frozenset[str]:
    try:
        content = base64.b64decode(packed)
    except binascii.Error as error:
        raise WorkspaceError(f"the names of changed files did not come back: {error}") from error
    names = content.decode("utf-8", "surrogateescape").split("\0")
    return frozenset(name for name in names if name)


async def _configures(box: Box, name: str) -> bool:
    """Whether an edit to a shared file changes what configures the runner, or might."""
    command = ("git", *OPTIONS, "show", f"HEAD:{name}")
    done = await box.run(command, timeout=_SECONDS, env=ENVIRONMENT)
    try:
        before = policy.runner_sections(name, done.output if done.ok else None)
        after = policy.runner_sections(name, await box.read(name))
    except (ValueError, WorkspaceError):  # not to be read, or no file any more
        return True
    return bool(before != after)


async def _take_back(box: Box, back: set[str], new: frozenset[str], known: frozenset[str]) -> None:
    # A file or link in the place of a file's folder is for git to remove, and it does.
    for command, names in ((_REMOVE, back & new), (_CHECK_OUT, back & known)):
        packed = "".join(f"{name}\0" for name in sorted(names))
        done = await _run(box, ("bash", "-c", command), packed.encode("utf-8", "surrogateescape"))
        if not done.ok:
            said = done.text.strip()[-_SAID:]
            raise WorkspaceError(f"edits could not be taken back: {said}")


async def _run(box: Box, command: Sequence[str], stdin: bytes) -> Finished:
    done = await box.run(command, timeout=_SECONDS, stdin=stdin, env=ENVIRONMENT)
    if done.code is None:
        raise WorkspaceError(f"{command[0]} did not end within {_SECONDS:g} s")
    return done
