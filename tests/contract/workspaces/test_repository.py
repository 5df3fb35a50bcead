"""The repository that an agent is given, and the patch that is taken of what it did."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from spider_sdk.errors import WorkspaceError
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces import repository
from spider_worker.workspaces.base import Box
from spider_worker.workspaces.repository import UnusablePatch, prepare, take_patch
from tests.support.boxes import KINDS, bare_task, workspace
from tests.support.swe_repos import SweRepo, make_repos

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> list[SweRepo]:
    return make_repos(tmp_path_factory.mktemp("repos"))


def task_of(repo: SweRepo, kind: str = "dir") -> Task:
    return Task(
        instance_id=repo.instance_id,
        repo=repo.repo,
        problem_statement=repo.problem_statement,
        origin=Origin(kind, str(repo.bundle if kind == "bundle" else repo.folder)),
        base_commit=repo.base_commit,
        bug_patch=repo.bug_patch,
        gold_patch=repo.gold_patch,
        test_patch=repo.test_patch,
        setup_cmds=repo.setup_cmds,
    )


def in_box(
    task: Task, root: Path, use: Callable[[Box], Awaitable[object]], kind: str = "bwrap"
) -> str:
    async def run() -> str:
        async with workspace(kind, root / "boxes").open(task) as box:
            commit = await prepare(box, task)
            await use(box)
            return commit

    return asyncio.run(run())


async def sh(box: Box, line: str, stdin: bytes = b"") -> str:
    done = await box.run(["sh", "-c", line], timeout=60, stdin=stdin)
    assert done.ok, done.text
    return done.text


ASK = {
    "log": "git log --all --format=%s%an%ad --date=iso",
    "refs": "git for-each-ref; cat .git/packed-refs 2>/dev/null || true",
    "reflog": "git reflog --all; find .git -path '*logs*' -type f -o -name '*_HEAD'",
    "lost": "git fsck --lost-found --no-progress 2>&1",
    "alternates": "cat .git/objects/info/alternates 2>/dev/null || true",
    "hooks": "find .git/hooks -type f 2>/dev/null || true",
    "nested": "find . -mindepth 2 -name .git; find . -name '*.orig' -o -name '*.rej'",
    "status": "git status --porcelain",
}
OBJECTS = (
    "git cat-file --batch-all-objects --batch-check='%(objectname) %(objecttype)' |"
    " while read name type; do echo $type; git cat-file $type $name; echo; done"
)


@kinds
@pytest.mark.parametrize("number", range(12))
def test_nothing_of_the_answer_is_to_be_found(
    kind: str, number: int, repos: list[SweRepo], tmp_path: Path
) -> None:
    repo = repos[number]
    source = ("dir", "bundle")[number % 2]

    async def use(box: Box) -> None:
        whole = await sh(box, "; echo =; ".join(f"({command})" for command in ASK.values()))
        said = dict(zip(ASK, re.split("^=\n", whole, flags=re.MULTILINE), strict=True))
        assert said["log"].splitlines() == ["Start herespider2000-01-01 00:00:00 +0000"]
        assert len(said["refs"].splitlines()) == 1
        assert "refs/heads/main" in said["refs"]
        assert said["reflog"] == ""
        for name in ("lost", "alternates", "hooks", "nested", "status"):
            assert said[name] == "", name
        objects = await sh(box, OBJECTS)
        assert objects.count("\nauthor ") == 1
        assert repo.marker not in objects
        assert await sh(box, f"grep -r -a -l {repo.marker} . ~ {box.vault_path} || true") == ""

    in_box(task_of(repo, source), tmp_path, use, kind)


@pytest.mark.parametrize("number", range(12))
def test_the_fault_is_in_the_tree_and_its_mending_is_the_patch(
    number: int, repos: list[SweRepo], tmp_path: Path
) -> None:
    repo = repos[number]
    patches: list[str] = []

    async def use(box: Box) -> None:
        assert await take_patch(box) == ""
        await sh(box, "git apply --whitespace=nowarn -", stdin=repo.gold_patch.encode())
        patches.append(await take_patch(box))
        # The good state is what the origin had before the fault was put in.
        want = "v1" if not repo.bug_patch else repo.base_commit
        names = subprocess.run(  # noqa: ASYNC221 - nothing else is going on
            ["git", "ls-tree", "-r", "-z", "--name-only", want],
            cwd=repo.folder, capture_output=True, check=True,
        )  # fmt: skip
        for name in names.stdout.decode().split("\0")[:-1]:
            there = subprocess.run(  # noqa: ASYNC221
                ["git", "show", f"{want}:{name}"], cwd=repo.folder, capture_output=True, check=True
            )
            assert await box.read(name) == there.stdout, name

    async def again(box: Box) -> None:
        await sh(box, "git apply --whitespace=nowarn -", stdin=patches[0].encode())
        assert await take_patch(box) == patches[0]

    task = task_of(repo)
    assert in_box(task, tmp_path, use) == in_box(task_of(repo, "bundle"), tmp_path, again)
    assert repo.marker in patches[0] or "GIT binary patch" in patches[0]


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ("no patch at all\n", "does not apply"),
        ("--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-two\n+three\n", "does not apply"),
        ("--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-one\n+one\n", "changes nothing"),
        ("--- a/../x\n+++ b/../x\n@@ -0,0 +1 @@\n+x\n", "does not apply"),
        (" \n", "is blank"),
    ],
)
def test_a_fault_that_does_not_get_in_is_an_error(patch: str, said: str, tmp_path: Path) -> None:
    task = bare_task(tmp_path / "origin")
    task = Task("i-7", task.repo, "p", task.origin, bug_patch=patch)
    with pytest.raises(WorkspaceError, match=f"(?s)i-7.*{said}"):
        in_box(task, tmp_path, _nothing)


async def _nothing(box: Box) -> None: ...


def test_set_up_commands_run_in_the_broken_tree_and_may_fail(tmp_path: Path) -> None:
    task = bare_task(tmp_path / "origin")
    bug = "--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-one\n+two\n"
    setup = ("git log -1 --format=%s > log.txt", "cat a.txt > b.txt")

    async def use(box: Box) -> None:
        assert await box.read("b.txt") == b"two\n"
        assert await box.read("log.txt") == b"Start\n", "before the history goes"
        assert await take_patch(box) == ""

    in_box(Task("i", "r", "p", task.origin, bug_patch=bug, setup_cmds=setup), tmp_path, use)
    failing = Task("i", "r", "p", task.origin, setup_cmds=("echo why >&2; exit 3",))
    with pytest.raises(WorkspaceError, match=r"set-up command .* failed: why"):
        in_box(failing, tmp_path, use)


GOOD = "def mean(xs):\n    return sum(xs) / len(xs)\n"
BUG = """\
--- a/pkg/calc.py
+++ b/pkg/calc.py
@@ -1,2 +1,2 @@
 def mean(xs):
-    return sum(xs) / len(xs)
+    return sum(xs) // len(xs)
--- a/pkg/gone.py
+++ /dev/null
@@ -1 +0,0 @@
-gone = 1
"""


@pytest.mark.parametrize("setup", [(), ("cp pkg/calc.py build/lib/pkg/new.py",)])
def test_no_copy_of_the_good_state_is_left_where_git_does_not_look(
    setup: tuple[str, ...], tmp_path: Path
) -> None:
    """An image has been built in: its tree has what Python and setuptools made of it."""
    folder = tmp_path / "origin"
    task = bare_task(folder)
    (folder / "pkg").mkdir()
    (folder / "pkg/calc.py").write_text(GOOD)
    (folder / "pkg/gone.py").write_text("gone = 1\n")
    (folder / "pkg/__init__.py").write_text("")
    (folder / "copy.py").write_text(GOOD)  # the project's own, for all that is known
    (folder / ".gitignore").write_text("build/\n__pycache__/\n*.egg\n")
    for command in (
        ("add", "-A"),
        ("-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "P"),
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    built = (
        "python3 -m compileall -q pkg; mkdir -p build/lib; cp -r pkg build/lib/;"
        " mkdir 'build/odd  name'; cp pkg/calc.py 'build/odd  name/-x';"
        " cp pkg/gone.py build/new$(printf '\\nline').py;"
        " echo 'ab' > build/kept.txt; cp pkg/__init__.py build/empty;"
        " ln -s ../pkg/calc.py build/link; tr '[a-z]' '[b-za]' < pkg/calc.py > build/same-size;"
        " touch top.pyc x.egg; cp pkg/calc.py loose.py"
    )

    async def run() -> None:
        async with workspace("local", tmp_path / "boxes").open(task) as box:
            await sh(box, built)
            assert int(await sh(box, "grep -r -l 'xs) / len' . --include='*' | wc -l")) >= 4
            broken = dataclasses.replace(task, bug_patch=BUG, setup_cmds=setup)
            await prepare(box, broken)
            found = await sh(box, "grep -r -l -e 'xs) / len' -e 'gone = 1' . || true")
            assert found.split() == ["./copy.py"]
            assert await sh(box, "find . -name '*.pyc' -o -name __pycache__ -type f") == ""
            left = await sh(box, "find build top.pyc x.egg -type f -o -type l 2>/dev/null | sort")
            new = ["build/lib/pkg/new.py"] if setup else []
            assert left.split() == [
                "build/empty", "build/kept.txt", "build/lib/pkg/__init__.py", *new, "build/link",
                "build/same-size", "x.egg",
            ]  # fmt: skip
            assert await take_patch(box) == ""

    asyncio.run(run())


# -- what an agent may do ----------------------------------------------------------------------

CHANGE = "echo two > a.txt; echo new > 'new file.txt'; "
TAMPERINGS = {
    "nothing": "",
    "commits": "git add -A; git -c user.name=a -c user.email=b commit -q -m done; ",
    "no .git": "rm -rf .git; ",
    "a .git of its own": "rm -rf .git; git init -q; git add -A; ",
    "a .git file": "rm -rf .git; echo 'gitdir: /nowhere' > .git; ",
    "a broken .git": "rm -rf .git/objects .git/HEAD; ",
    "hooks": (
        "mkdir -p .git/hooks; for h in pre-commit post-index-change fsmonitor-watchman; do"
        " printf '#!/bin/sh\\necho hooked > hooked.txt\\n' > .git/hooks/$h;"
        " chmod +x .git/hooks/$h; done; git config core.fsmonitor .git/hooks/fsmonitor-watchman; "
    ),
    "drivers": (
        "git config diff.evil.textconv 'echo textconv'; git config diff.evil.command 'echo ext';"
        " git config filter.evil.clean 'echo cleaned'; git config diff.external 'echo ext';"
        " mkdir -p .git/info; echo '* diff=evil filter=evil' > .git/info/attributes; "
    ),
    "settings": (
        "git config core.worktree /tmp; git config core.excludesFile /testbed/a.txt;"
        " git config core.autocrlf true; git config diff.noprefix true; git config color.ui always;"
        " mkdir -p .git/info; echo '*' > .git/info/exclude; "
    ),
    "home": (
        "git config --global diff.noprefix true; git config --global core.autocrlf true;"
        " echo '*' > ~/ignore; git config --global core.excludesFile ~/ignore; "
    ),
    "index": "git update-index --assume-unchanged a.txt; git update-index --skip-worktree a.txt; ",
    "lock": "touch .git/index.lock .git/HEAD.lock; ",
    "another head": "git symbolic-ref HEAD refs/heads/else; git checkout -q --orphan o; ",
    "closed files": "chmod 000 'new file.txt'; ",
}


@kinds
@pytest.mark.parametrize("name", TAMPERINGS)
def test_what_is_done_to_git_does_not_touch_the_patch(name: str, kind: str, tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        before = TAMPERINGS[name] if name == "index" else ""
        after = "" if name == "index" else TAMPERINGS[name]
        await sh(box, before + CHANGE + after + "true")
        patch = await take_patch(box)
        assert patch == (
            "diff --git a/a.txt b/a.txt\nindex 5626abf..f719efd 100644\n"
            "--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-one\n+two\n"
            "diff --git a/new file.txt b/new file.txt\nnew file mode 100644\n"
            "index 0000000..3e75765\n--- /dev/null\n+++ b/new file.txt\t\n@@ -0,0 +1 @@\n+new\n"
        )

    in_box(bare_task(tmp_path / "origin"), tmp_path, use, kind)


def test_the_vault_is_out_of_the_agents_reach(tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        done = await box.run(["sh", "-c", "rm -rf /vault/*; touch /vault/x"], timeout=60)
        assert not done.ok
        await sh(box, "echo two > a.txt")
        assert "+two" in await take_patch(box)

    in_box(bare_task(tmp_path / "origin"), tmp_path, use)


def test_what_is_ignored_stays_out_and_what_was_tracked_stays_in(tmp_path: Path) -> None:
    folder = tmp_path / "origin"
    task = bare_task(folder)
    (folder / ".gitignore").write_text("*.log\n")
    (folder / "kept.log").write_text("tracked though ignored\n")
    commands = (("add", "-A"), ("add", "-f", "kept.log"))
    commit = ("-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "-m", "Ignore")
    for command in (*commands, commit):
        subprocess.run(["git", *command], cwd=folder, check=True)

    async def use(box: Box) -> None:
        assert "kept.log" in await sh(box, "git ls-files")
        await sh(box, "echo x > other.log; echo more >> kept.log")
        patch = await take_patch(box)
        assert "kept.log" in patch
        assert "other.log" not in patch

    in_box(task, tmp_path, use)


def test_repositories_within_the_tree_lose_their_history_not_their_files(tmp_path: Path) -> None:
    inner, folder = tmp_path / "inner", tmp_path / "origin"
    bare_task(inner)
    task = bare_task(folder)
    add = ["git", "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(inner)]
    subprocess.run([*add, "sub"], cwd=folder, check=True)
    commit = ["git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "-m", "Sub"]
    subprocess.run(commit, cwd=folder, check=True)
    # As an image has it: the submodule is there, its repository beside ours or within it.
    init = "git -c protocol.file.allow=always submodule --quiet update --init; git clone -q . clone"

    async def run() -> None:
        async with workspace("local", tmp_path / "boxes").open(task) as box:
            await sh(box, init)
            await prepare(box, task)
            assert await sh(box, ASK["nested"]) == ""
            assert sorted((await sh(box, "git ls-files")).split()) == [
                ".gitmodules", "a.txt", "clone/.gitmodules", "clone/a.txt", "sub/a.txt",
            ]  # fmt: skip
            await sh(box, "echo two > sub/a.txt; mkdir mine; cd mine; git init -q; echo x > y")
            patch = await take_patch(box)
            assert "--- a/sub/a.txt" in patch
            assert "+++ b/mine/y" in patch
            assert "Subproject" not in patch

    asyncio.run(run())


def test_line_ends_that_were_never_normalised_are_no_change(tmp_path: Path) -> None:
    folder = tmp_path / "origin"
    task = bare_task(folder)
    (folder / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    git = ["git", "-c", "core.autocrlf=false", "-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run([*git, "add", "-A"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "With CR"], cwd=folder, check=True)
    (folder / ".gitattributes").write_text("*.txt text\n")
    subprocess.run([*git, "add", ".gitattributes"], cwd=folder, check=True)
    subprocess.run([*git, "commit", "-q", "-m", "Attributes"], cwd=folder, check=True)

    async def run() -> None:
        async with workspace("local", tmp_path / "boxes").open(task) as box:
            assert await box.read("dos.txt") == b"one\r\ntwo\r\n"
            # So that git takes the file for unchanged and does not look into it.
            await sh(box, "touch -d '+1 hour' .git/index")
            await prepare(box, task)
            assert await take_patch(box) == ""
            await sh(box, "git apply -", stdin=b"--- a/a.txt\n+++ b/a.txt\n@@ -1 +1 @@\n-one\n+2\n")
            assert "dos" not in await take_patch(box)

    asyncio.run(run())


def test_git_waits_for_its_turn_and_a_set_up_command_keeps_nobody_waiting(tmp_path: Path) -> None:
    waits = "touch ../begun; until [ -e ../go ]; do sleep 0.01; done"
    quick = bare_task(tmp_path / "origin")
    slow = dataclasses.replace(quick, setup_cmds=(waits,))
    place = workspace("local", tmp_path / "boxes")

    async def run() -> None:
        turn = asyncio.Semaphore(1)
        async with place.open(slow) as first, place.open(quick) as second:
            folder = Path(first.path).parent
            async with turn:
                slowly = asyncio.create_task(prepare(first, slow, turn=turn))
                done, _ = await asyncio.wait([slowly], timeout=0.5)
                assert not done
                assert not (folder / "begun").exists()
            while not (folder / "begun").exists():  # noqa: ASYNC110 - another process makes it
                await asyncio.sleep(0.01)
            await asyncio.wait_for(prepare(second, quick, turn=turn), 60)
            (folder / "go").touch()
            await slowly
            assert not turn.locked()

    asyncio.run(run())


def test_odd_files_and_attributes_do_not_stop_it(tmp_path: Path) -> None:
    async def use(box: Box) -> None:
        await sh(
            box,
            "mkfifo pipe; ln -s /etc/passwd link; mkdir -p .GIT closed; echo x > .GIT/x;"
            " echo y > closed/y; chmod 000 closed; printf 'caf\\351\\n' > latin.txt;"
            " printf '\\0\\1' > binary; echo '*.utf working-tree-encoding=nonsense' >"
            " .gitattributes; echo a > a.utf; printf 'no end' > last.txt; rm a.txt;"
            " printf '#!/bin/sh\\n' > run.sh; chmod 755 run.sh",
        )
        patch = await take_patch(box)
        assert "new file mode 120000" in patch
        assert "new file mode 100755" in patch
        assert "GIT binary patch" in patch
        await sh(box, "git clean -q -d -x -f; git checkout -q .; rm -rf pipe .GIT")
        await sh(box, "git apply -", stdin=patch.encode())
        assert await box.read("latin.txt") == b"caf\xe9\n"
        assert await box.read("closed/y") == b"y\n"
        assert await box.read("last.txt") == b"no end"
        assert await box.read("a.utf") == b"a\n"
        assert await box.read("a.txt") is None

    in_box(bare_task(tmp_path / "origin"), tmp_path, use)


def test_a_huge_patch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repository, "PATCH_BYTES", 1 << 20)

    async def use(box: Box) -> None:
        await sh(box, "head -c 3000000 /dev/zero | tr '\\0' x > big.txt")
        with pytest.raises(UnusablePatch, match="more than 1 MiB"):
            await take_patch(box)

    in_box(bare_task(tmp_path / "origin"), tmp_path, use)
