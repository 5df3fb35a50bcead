"""The repository of a box: made so that it gives nothing away, and asked what has changed in it.

An agent that finds the answer in the history of its repository teaches nothing. So the tree becomes
a repository of one commit, made from the files alone; no object of the old one is left. The same
commit is kept in the box's vault: what an agent does to ``.git`` (commits, hooks, settings, or
removing it) has no influence on the patch.

All git runs in the box, with no user's, system's or agent's settings; none of it runs a hook.
"""

from __future__ import annotations

__all__ = ["PATCH_BYTES", "UnusablePatch", "prepare", "take_patch"]

import asyncio
import contextlib
import shlex
import tarfile
from pathlib import Path
from typing import Final

from spider_sdk.errors import WorkspaceError
from spider_worker.swe_tasks.base import Task
from spider_worker.workspaces.base import Box, Finished
from spider_worker.workspaces.git import ENVIRONMENT, OPTIONS

#: A patch of more bytes is none: nobody wrote that by hand.
PATCH_BYTES: Final = 16 << 20

#: ``g`` is git with our settings, ``work`` a folder of the script's own.
_START: Final = f"""
set -eu
g() {{ git {shlex.join(OPTIONS)} "$@"; }}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"""

# A repository within the tree would be a mere link in ours, and has a history of its own.
_NO_NESTED_REPOSITORIES: Final = """
find . -mindepth 2 -name .git -prune -exec rm -rf {} +
"""

# Beside what the origin tracks, images keep what was built of the state without the fault. Bytecode
# goes at once, and when the fault is in, copies (``build/lib``) of what it changed. A file is
# hashed where its size says that it may be such a copy.
_NO_COPIES: Final = """
if [ -s "$work/good" ]; then
    sizes=
    while read -r blob; do
        size=$(g cat-file -s "$blob")
        [ "$size" = 0 ] || sizes="$sizes -o -size ${size}c"
    done < "$work/good"
    export GOOD="$work/good" SIZES="${sizes# -o }"
    g ls-files -z -o >> "$work/untracked"
    [ -z "$SIZES" ] || sort -z -u "$work/untracked" | sed -z 's|^|./|' |
        xargs -0 -r sh -c 'find "$@" -maxdepth 0 -type f "(" $SIZES ")" -print0' sh |
        xargs -0 -r -n 1 sh -c '
            blob=$(GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0=* \\
                git hash-object --no-filters -- "$1")
            if grep -q -x -F -e "$blob" "$GOOD"; then rm -f -- "$1"; fi' sh
fi
"""

# What the origin tracks although it ignores it, stays tracked.
_BREAK: Final = (
    """
cat > "$work/patch"
repository=1
[ -e .git ] || { g init -q .; repository=; }
rm -f .git/index.lock
g ls-files -s -z | grep -z '^160000 ' | cut -z -f 2- > "$work/links" || true
xargs -0 -r git rm -q -f --cached --ignore-unmatch -- < "$work/links"
"""
    + _NO_NESTED_REPOSITORIES
    + """
g ls-files -z -o -- '*.orig' '*.rej' '*.pyc' '*.pyo' '__pycache__/*' '*/__pycache__/*' |
    xargs -0 -r rm -f --
[ -z "$repository" ] || g ls-files -z -o > "$work/untracked"
g add -A .
before=$(g write-tree)
if [ -s "$work/patch" ]; then
    if ! g apply --index --whitespace=nowarn "$work/patch"; then
        echo "the bug patch does not apply" >&2
        exit 1
    fi
    if [ "$(g write-tree)" = "$before" ]; then
        echo "the bug patch changes nothing" >&2
        exit 1
    fi
    g diff-index --cached --no-renames --diff-filter=DMT "$before" |
        cut -d ' ' -f 3 | sort -u > "$work/good"
fi
"""
    + _NO_COPIES
)

# Prints an archive of what the vault is to hold. The index is made anew, so that files are hashed
# as they will be when the patch is taken; otherwise line ends that the origin never normalised
# would show up as changes.
_FORGET: Final = (
    """
g add -A .
tracked=$(g write-tree)
g read-tree "$tracked"
"""
    + _NO_NESTED_REPOSITORIES
    + """
g add -A .
commit=$(g commit-tree -m 'Start here' "$(g write-tree)" < /dev/null)
echo "$commit" | g pack-objects --revs --window=0 -q --stdout > "$work/pack"
rm -rf .git
g init -q --template= .
g index-pack --stdin < "$work/pack" > /dev/null
g -c core.logAllRefUpdates=false update-ref refs/heads/main "$commit"
g read-tree HEAD
g update-index -q --refresh || true
tar -c -f - -C .git objects/pack refs/heads/main
"""
)

# Into a repository of the script's own that borrows the vault's objects. Attributes that the agent
# wrote may be nonsense, on which git gives up: the second try goes without any.
_TAKE: Final = (
    _START
    + """
chmod -R u+rwX .
"""
    + _NO_NESTED_REPOSITORIES
    + """
g init -q --bare --template= "$work/git"
mkdir -p "$work/git/info"
echo "$VAULT/base.git/objects" > "$work/git/objects/info/alternates"
export GIT_DIR="$work/git" GIT_WORK_TREE="$PWD"
stage() { g read-tree "$BASE" && g -c core.bare=false add -A --ignore-errors .; }
difference() {
    g -c core.bare=false diff --cached --binary --no-color --no-ext-diff --no-textconv \\
        --no-renames --src-prefix=a/ --dst-prefix=b/ "$BASE" -- > "$work/patch"
}
if [ "$AS_BINARY" = 1 ]; then
    echo '* -diff' > "$work/git/info/attributes"
fi
if ! stage 2> "$work/said"; then
    echo '* !text !eol !crlf !ident !filter !working-tree-encoding' >> "$work/git/info/attributes"
    stage 2> "$work/said" || cat "$work/said" >&2
fi
difference
head -c "$LIMIT" "$work/patch"
"""
)


class UnusablePatch(WorkspaceError):
    """What is different in a tree is more than a patch may be, or has names that none can hold."""


async def prepare(
    box: Box,
    task: Task,
    *,
    timeout: float = 1800.0,  # noqa: ASYNC109
    network: bool = False,
    turn: contextlib.AbstractAsyncContextManager[object] | None = None,
) -> str:
    """Make a fresh box ready for an agent, or for a judge: the task's bug patch applied, its set-up
    commands run, and its repository one commit, whose name is returned. The same task gives the
    same commit. ``timeout`` is in seconds for each step; ``network`` is what the set-up commands
    have. ``turn`` is held while git works, which takes all of a core, and not during those; it can
    be entered again. None: there is nobody to wait for.

    Raises WorkspaceError where the bug patch does not apply or changes nothing, or a set-up
    command fails.
    """
    patch = task.bug_patch.encode("utf-8", "surrogateescape")
    # Git applies a patch without a change, as one without a patch, and says nothing.
    if task.bug_patch and not task.bug_patch.strip():
        raise WorkspaceError(f"{task.instance_id}: the bug patch is blank")
    archive = box.vault / "base.tar"
    turn = turn or contextlib.nullcontext()
    if task.setup_cmds:
        async with turn:
            done = await box.run(
                ["sh", "-c", _START + _BREAK], timeout=timeout, stdin=patch, env=ENVIRONMENT
            )
        _expect(done, task, "putting the fault in")
        for command in task.setup_cmds:
            done = await box.run(["sh", "-c", command], timeout=timeout, network=network)
            _expect(done, task, f"the set-up command {command!r}")
    script = _START + (_FORGET if task.setup_cmds else _BREAK + _FORGET)
    async with turn:
        done = await box.run(
            ["sh", "-c", script], timeout=timeout, stdin=patch, env=ENVIRONMENT, stdout=archive
        )
    _expect(done, task, "preparing the repository")
    await asyncio.to_thread(_unpack, archive, box.vault / "base.git")
    return _commit(box)


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise WorkspaceError(f"the first commit could not be kept: {error}") from error
    archive.unlink()


def _commit(box: Box) -> str:
    return (box.vault / "base.git/refs/heads/main").read_text().strip()


async def take_patch(box: Box, *, timeout: float = 600.0) -> str:  # noqa: ASYNC109
    """What is different in the tree from how ``prepare`` left it, as a patch for ``git apply``:
    new files too, but for those that the tree's ``.gitignore`` names. "" for nothing. A repository
    within the tree loses its ``.git``, its files count. Call it when the agent has ended.

    The text is UTF-8 at any rate: where a changed file is in another encoding, all changes are
    given as binary ones. Raises UnusablePatch for one of more than PATCH_BYTES.
    """
    commit = _commit(box)
    for as_binary in ("0", "1"):
        file = box.vault / f"patch-{as_binary}"
        file.unlink(missing_ok=True)
        env = {
            **ENVIRONMENT,
            "BASE": commit,
            "VAULT": box.vault_path,
            "AS_BINARY": as_binary,
            "LIMIT": str(PATCH_BYTES + 1),
        }
        done = await box.run(["sh", "-c", _TAKE], timeout=timeout, env=env, stdout=file)
        if not done.ok:
            raise WorkspaceError(f"the patch could not be taken: {_reason(done)}")
        patch = file.read_bytes()
        file.unlink()
        if len(patch) > PATCH_BYTES:
            raise UnusablePatch(f"the patch has more than {PATCH_BYTES >> 20} MiB")
        try:
            return patch.decode()
        except UnicodeDecodeError:
            continue
    raise UnusablePatch("the names of changed files are not UTF-8")


def _expect(done: Finished, task: Task, what: str) -> None:
    if not done.ok:
        raise WorkspaceError(f"{task.instance_id}: {what} failed: {_reason(done)}")


def _reason(done: Finished) -> str:
    if done.code is None:
        return f"it did not end within {done.seconds:.0f} s"
    return done.text.strip()[-2000:] or f"it ended with {done.code}"
