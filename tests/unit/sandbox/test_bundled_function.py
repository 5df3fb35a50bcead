"""A function from a user's file to the sandbox and back."""

from pathlib import Path

from spider_sdk.bundle import bundle_reference
from tests.unit.sandbox.test_process_sandbox import MODES, run, sandbox

JOB = """from __future__ import annotations
from dataclasses import dataclass
from helpers import share

unrelated = 1

@dataclass
class Part:
    share: float

def f(row, total=1):
    return vars(Part(share(row["x"], total)))
"""


def test_a_bundle_runs_in_the_sandbox_and_its_errors_name_the_users_lines(tmp_path: Path) -> None:
    (tmp_path / "helpers.py").write_text("\n\ndef share(x, total):\n    return total / x\n")
    (tmp_path / "job.py").write_text(JOB)
    bundle = bundle_reference(f"{tmp_path / 'job.py'}:f", {"total": 3})
    assert bundle["name"] == "f"
    box = sandbox(bundle["source"], MODES[-1], kwargs=bundle["kwargs"])
    good, bad = run(box, [{"x": 2}, {"x": 0}])
    assert good.value == {"share": 1.5}
    assert bad.error is not None
    assert bad.error.trace is not None
    marks = set(" ^~")  # under the text, and drawn otherwise by each version of Python
    assert [line for line in bad.error.trace.splitlines()[1:] if not set(line) <= marks] == [
        '  File "<pre_processor>", line 12, in f',
        '    return vars(Part(share(row["x"], total)))',
        '  File "helpers.py", line 4, in share',
        "    return total / x",
        "ZeroDivisionError: division by zero",
    ]
