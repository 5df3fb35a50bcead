from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own adopts, so that the tests' own process does not become a subreaper.
ADOPTER = """
import os, subprocess, sys, time
from spider_api.embedded.orphans import Orphans, _children

forever = [sys.executable, "-c", "import signal; signal.pause()"]
mine = subprocess.Popen(forever)
orphans = Orphans()
known = subprocess.Popen(forever)
parent = subprocess.Popen(
    [sys.executable, "-c",
     "import subprocess, sys;"
     f"print(subprocess.Popen({sys.argv[1:]!r}, start_new_session=True,"
     " stdout=subprocess.DEVNULL).pid)"],
    stdout=subprocess.PIPE, text=True,
)
orphan = int(parent.communicate()[0])
deadline = time.monotonic() + 20
while orphan not in _children():
    assert time.monotonic() < deadline, "not adopted"
    time.sleep(0.02)
orphans.end({known.pid}, float(os.environ["GRACE"]))
assert not os.path.exists(f"/proc/{orphan}"), "the orphan is still there"
assert mine.poll() is None and known.poll() is None, "ended a process that is not an orphan"
for process in (mine, known):
    process.kill()
    process.wait()
print("done")
"""

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="needs PR_SET_CHILD_SUBREAPER (Linux)"
)


def adopt(tmp_path: Path, grace: str, *orphan: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADOPTER, *orphan],
        env=dict(os.environ) | {"GRACE": grace},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "done\n", done.stderr


def test_an_orphan_that_hangs_is_killed_and_nobody_else(tmp_path: Path) -> None:
    adopt(tmp_path, "0.1", sys.executable, "-c", "import signal; signal.pause()")


def test_an_orphan_is_given_its_time(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    code = f"import time, pathlib; time.sleep(0.5); pathlib.Path({str(ended)!r}).touch()"
    adopt(tmp_path, "30", sys.executable, "-c", code)
    assert ended.exists()
