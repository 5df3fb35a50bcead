"""Patches go in, by the real git and patch, and edits to the judge do not count."""

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from spider_worker.evaluation.patches import METHODS, apply_patch, apply_test_patch
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.workspaces.local import LocalWorkspace

CODE = "".join(f"line {number}\n" for number in range(1, 21))
FILES = {
    "code.py": CODE,
    "conftest.py": "fixture = 1\n",
    "setup.cfg": "[metadata]\nname = x\n[tool:pytest]\naddopts = -q\n",
    "tests/test_it.py": "def test_it():\n    pass\n",
    ".gitignore": "*.log\nbuild/\n",
}


def git(folder, *arguments):
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"} | {
        f"GIT_{who}_{what}": "x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=env, check=True, capture_output=True, text=True
    ).stdout


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        if content is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)


@pytest.fixture
def origin(tmp_path):
    folder = tmp_path / "origin"
    folder.mkdir()
    git(folder, "init", "-q")
    write(folder, FILES)
    git(folder, "add", "-A", "-f")
    git(folder, "commit", "-q", "-m", "x")
    return folder


@pytest.fixture
def task(origin):
    return Task("i", "r", "p", Origin("dir", str(origin)), fail_to_pass=("tests/test_it.py::t",))


def diff(folder, files):
    """The patch that makes these edits (content None: the file goes)."""
    write(folder, files)
    git(folder, "add", "-A", "-f")
    patch = git(folder, "diff", "--cached", "--binary", "HEAD")
    git(folder, "reset", "-q", "--hard")
    return patch


def content(tree):
    """The files of a tree, links by where they lead."""
    return {
        str(path.relative_to(tree)): str(path.readlink()) if path.is_symlink() else path.read_text()
        for path in tree.rglob("*")
        if ".git" not in path.relative_to(tree).parts and (path.is_symlink() or path.is_file())
    }


def apply(tmp_path, task, patch, *, reverse=False, before=()):
    """What apply_patch says, and the files of the tree after it."""

    async def go():
        async with LocalWorkspace(tmp_path / "boxes", allowed=True).open(task) as box:
            for command in before:
                assert (await box.run(("sh", "-c", command), timeout=60)).ok
            applied = await apply_patch(box, task, patch, reverse=reverse)
            return applied, content(Path(box.path))

    return asyncio.run(go())


def test_a_clean_patch_goes_in_by_git(tmp_path, origin, task):
    wanted = {"code.py": "new\n", "more/ü b.py": "x\n", "build/out.log": "ignored\n"}
    applied, files = apply(tmp_path, task, diff(origin, wanted))
    assert (applied.method, applied.restored) == (METHODS[0], ())
    assert files == FILES | wanted


def test_a_patch_without_its_last_newline_goes_in(tmp_path, origin, task):
    applied, files = apply(tmp_path, task, diff(origin, {"code.py": CODE + "end\n"}).rstrip("\n"))
    assert applied.method == METHODS[0]
    assert files["code.py"].endswith("end\n")


def test_a_patch_is_taken_back(tmp_path, origin, task):
    patch = diff(origin, {"code.py": "new\n"})
    back = diff(origin, {"code.py": "new\n"})
    write(origin, {"code.py": "new\n"})
    git(origin, "commit", "-qam", "y")
    applied, files = apply(tmp_path, task, back, reverse=True)
    assert (applied.method, files["code.py"]) == (METHODS[0], CODE)
    assert patch == back


FUZZY = """\
--- a/code.py
+++ b/code.py
@@ -8,7 +8,7 @@
 line 8
 line 9 is another
 line 10
-line 11
+line eleven
 line 12
 line 13
 line 14
"""


def test_a_patch_that_fits_only_roughly_goes_in_by_patch(tmp_path, task):
    applied, files = apply(tmp_path, task, FUZZY)
    assert applied.method == METHODS[2]
    assert files == FILES | {"code.py": CODE.replace("line 11\n", "line eleven\n")}


def test_what_does_not_fit_leaves_the_tree_as_it_was(tmp_path, origin, task):
    good = diff(origin, {"extra.py": "x\n", "sub/other.log": "x\n"})
    bad = FUZZY.replace("line 10\n", "line X\n").replace("-line 11", "-line Y")
    before = ("mkdir build; echo kept > build/kept.log; echo kept > odd.txt",)
    applied, files = apply(tmp_path, task, good + bad, before=before)
    assert (applied.method, applied.restored) == (None, ())
    assert "code.py" in applied.said
    assert files == FILES | {"build/kept.log": "kept\n", "odd.txt": "kept\n"}


def test_a_patch_that_is_in_already_is_not_taken_out_again(tmp_path, origin, task):
    patch = diff(origin, {"code.py": CODE.replace("line 11\n", "")})
    write(origin, {"code.py": CODE.replace("line 11\n", "")})
    git(origin, "commit", "-qam", "y")
    applied, files = apply(tmp_path, task, patch)
    assert applied.method is None
    assert files["code.py"] == CODE.replace("line 11\n", "")


@pytest.mark.parametrize(
    "edit",
    [
        {"conftest.py": "raise SystemExit\n"},
        {"conftest.py": None},
        {"tests/conftest.py": "x\n"},
        {"tests/test_it.py": "def test_it():\n    'weak'\n"},
        {"tests/test_it.py": None},
        {"pytest.ini": "[pytest]\n"},
        {"test_repro.py": "x\n"},
        {"setup.cfg": "[metadata]\nname = x\n[tool:pytest]\naddopts = -k nothing\n"},
        {"setup.cfg": None},
        {"pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-k nothing'\n"},
        {"pyproject.toml": "not toml"},
        {"build/evil.dist-info/entry_points.txt": "[pytest11]\n"},
        {"unittest.py": "x\n"},
    ],
)
def test_edits_to_the_judge_are_taken_back(tmp_path, origin, task, edit):
    applied, files = apply(tmp_path, task, diff(origin, {"code.py": "fixed\n", **edit}))
    assert applied.method == METHODS[0]
    assert applied.restored == tuple(edit)
    assert files == FILES | {"code.py": "fixed\n"}


@pytest.mark.parametrize(
    "edit",
    [
        {"setup.cfg": "[metadata]\nname = y\n[tool:pytest]\naddopts = -q\n"},
        {"pyproject.toml": "[project]\nname = 'x'\n"},
        {"tests/helper.py": "x\n"},
    ],
)
def test_other_edits_count(tmp_path, origin, task, edit):
    applied, files = apply(tmp_path, task, diff(origin, edit))
    assert applied.restored == ()
    assert files == FILES | edit


def test_a_renamed_test_is_there_again_under_its_name(tmp_path, origin, task):
    text = FILES["tests/test_it.py"]
    patch = diff(origin, {"tests/test_it.py": None, "tests/gone.py": text})
    applied, files = apply(tmp_path, task, patch)
    assert applied.restored == ("tests/test_it.py",)
    assert files == FILES | {"tests/gone.py": text}


@pytest.mark.parametrize("link", [True, False])
def test_what_is_in_place_of_the_folder_of_tests_goes(tmp_path, origin, task, link):
    (origin / "tests" / "test_it.py").unlink()
    (origin / "tests").rmdir()
    if link:
        (origin / "tests").symlink_to("elsewhere")
    else:
        (origin / "tests").write_text("a file\n")
    git(origin, "add", "-A")
    patch = git(origin, "diff", "--cached", "HEAD")
    git(origin, "reset", "-q", "--hard")
    applied, files = apply(tmp_path, task, patch)
    assert applied.restored == ("tests/test_it.py",)
    assert files == FILES


@pytest.mark.parametrize(
    "header",
    [
        "--- /dev/null\n+++ b/.git/hooks/post-checkout\n",
        "--- /dev/null\n+++ b/sub/.git/config\n",
        "--- a/.git/config\n+++ b/.git/config\n",
        "--- /dev/null\n+++ b/../outside.txt\n",
    ],
)
def test_nothing_is_written_into_git_or_out_of_the_tree(tmp_path, task, header):
    applied, files = apply(tmp_path, task, header + "@@ -0,0 +1 @@\n+evil\n")
    assert applied.method is None
    assert files == FILES
    assert not list((tmp_path / "boxes").rglob("outside.txt"))


def test_nothing_is_written_through_a_link(tmp_path, origin, task):
    target = tmp_path / "target"
    target.mkdir()
    link = (
        f"diff --git a/link b/link\nnew file mode 120000\n--- /dev/null\n+++ b/link\n"
        f"@@ -0,0 +1 @@\n+{target}\n\\ No newline at end of file\n"
    )
    through = "--- /dev/null\n+++ b/link/evil.txt\n@@ -0,0 +1 @@\n+evil\n"
    apply(tmp_path, task, link + through)
    assert list(target.iterdir()) == []


def test_the_tasks_own_tests_go_over_the_agents(tmp_path, origin):
    tests = {"tests/test_it.py": "hidden\n", "tests/test_new.py": "hidden\n"}
    task = Task(
        "i", "r", "p", Origin("dir", str(origin)),
        test_patch=diff(origin, tests), fail_to_pass=("tests/test_new.py::t",),
    )  # fmt: skip
    agents = {"tests/test_it.py": "mine\n", "tests/test_new.py": "mine\n", "code.py": "fixed\n"}
    applied, files = apply(tmp_path, task, diff(origin, agents))
    assert applied.restored == ("tests/test_it.py", "tests/test_new.py")
    assert files == FILES | {"code.py": "fixed\n"}

    async def go():
        async with LocalWorkspace(tmp_path / "boxes", allowed=True).open(task) as box:
            await apply_patch(box, task, diff(origin, agents))
            assert await apply_test_patch(box, task) is None
            return await box.read("tests/test_new.py"), await box.read("code.py")

    assert asyncio.run(go()) == (b"hidden\n", b"fixed\n")


def test_a_test_patch_that_does_not_fit_is_said(tmp_path, origin):
    task = Task("i", "r", "p", Origin("dir", str(origin)), test_patch=FUZZY)

    async def go():
        async with LocalWorkspace(tmp_path / "boxes", allowed=True).open(task) as box:
            return await apply_test_patch(box, task)

    assert "code.py" in asyncio.run(go())
