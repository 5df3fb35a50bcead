"""The picture of a run: which figures are drawn, and that every length of run can be."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from PIL import Image  # comes with matplotlib

from spider_worker.trackers.curves import MOST_POINTS, _mean, _panels, _ranges, draw_curves


def record(step: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"step-{step:06d}",
        "step": step,
        "epoch": 0,
        "kl": 1 / step,
        "kl/org/teacher": 1 / step,
        "loss_per_token": -1 / step,
        "advantage_mean": -1.0,
        "advantage_std": 2.0,
        "entropy": 1.0,
        "length_mean": 20.0,
        "length_max": 64.0,
        "truncated": 0.25,
        "coverage": 1.0,
        "seconds": 0.4,
        "seconds/sample": 0.2,
        "seconds/score": 0.0,
        "seconds/train": 0.1,
        **more,
    }


def draw(folder: Path, records: Iterable[dict[str, Any]], title: str = "a ← b") -> Image.Image:
    metrics = folder / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    draw_curves(metrics, folder / "curves.png", title=title)
    with Image.open(folder / "curves.png") as image:
        image.load()
        return image.convert("RGB")


def titles(records: list[dict[str, Any]]) -> dict[str, list[str]]:
    panels = _panels(records)
    return {panel.title: [line.label for line in panel.lines] for panel in panels if panel.lines}


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    found = image.getcolors(1 << 24)
    assert found is not None
    return {colour for _, colour in found if isinstance(colour, tuple)}


BLUE = (0x25, 0x63, 0xEB)


@pytest.mark.parametrize("steps", [1, 2, 12, 13, 60, 10_000])
def test_every_length_of_run_is_drawn(tmp_path: Path, steps: int) -> None:
    image = draw(tmp_path, (record(step) for step in range(1, steps + 1)))
    assert image.width > 1000
    assert BLUE in colours(image)


def test_a_run_that_ended_before_its_first_step_shows_what_was_evaluated(tmp_path: Path) -> None:
    image = draw(tmp_path, [{"id": "step-000000", "step": 0, "eval/kl": 0.5, "seconds/eval": 1.0}])
    assert BLUE in colours(image)


def test_gaps_and_nulls_and_names_that_look_like_formulas(tmp_path: Path) -> None:
    records = [
        record(step, **({"kl": None} if step % 3 == 0 else {}), **{"kl/b$^{$c": 1.0, "kl/d_e": 2.0})
        for step in range(1, 30)
    ]
    records[4]["loss_per_token"] = float("nan")
    assert BLUE in colours(draw(tmp_path, records, title="x$_{ ← y$"))


def test_nothing_to_draw_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no record"):
        draw(tmp_path, [])


def test_what_is_drawn_follows_what_was_measured() -> None:
    found = titles([record(1), record(2)])
    assert found["Reverse KL to the teacher"] == ["KL"]
    assert found["Advantage"] == ["mean", "standard deviation"]
    assert found["Time in each phase of a step"] == ["sample", "score", "train"]
    assert not {"Reverse KL, held-out prompts", "KL at the stop token"} & set(found)


def test_several_teachers_and_the_users_own_scores() -> None:
    evaluated = {
        "kl/org/second": 1.0,
        "eval/kl": 0.5,
        "eval/kl/org/teacher": 0.5,
        "eval/kl_per_sample": 3.0,
        "eval/coverage": 1.0,
        "eval/score": 0.4,
        "eval/length": 3.0,
        "seconds/eval": 1.0,
        "stop_kl": None,
    }
    found = titles([record(1), record(2, **evaluated)])
    assert found["Reverse KL to the teacher"] == ["mean of the teachers", "second", "teacher"]
    assert found["Reverse KL, held-out prompts"] == ["KL"]
    assert found["Evaluator's score, held-out prompts"] == ["length", "score"]
    assert found["Time in each phase of a step"][-1] == "eval"
    assert "KL at the stop token" not in found  # null all along


def test_a_mean_leaves_out_what_is_missing() -> None:
    values = np.array([1.0, 2.0, math.nan, 4.0, math.nan, math.nan, math.nan])
    expected = [1.5, 1.5, 3.0, 4.0, math.nan, math.nan, math.nan]
    np.testing.assert_allclose(_mean(values, 3), expected)
    np.testing.assert_array_equal(_mean(values, 1), values)


def test_a_long_line_is_thinned_to_ranges_that_hold_every_value() -> None:
    count = 10 * MOST_POINTS + 7
    values = np.sin(np.arange(count, dtype=np.float64))
    values[:30] = math.nan
    middle, low, high = _ranges(np.arange(count, dtype=np.float64), values)
    assert len(middle) == len(low) == len(high) == MOST_POINTS
    assert np.isnan(low[:3]).all()
    assert np.nanmin(low) == np.nanmin(values)
    assert np.nanmax(high) == np.nanmax(values)
    assert (np.diff(middle) > 0).all()


def test_nothing_of_the_process_is_set(tmp_path: Path) -> None:
    """Neither pyplot, whose figures pile up, nor a style that others would draw with."""
    program = """
import json, sys
from pathlib import Path
import matplotlib
before = matplotlib.rcParams.copy()
from spider_worker.trackers.curves import draw_curves
folder = Path(sys.argv[1])
(folder / "m.jsonl").write_text(json.dumps({"step": 1, "kl": 0.5}))
draw_curves(folder / "m.jsonl", folder / "c.png", title="t")
assert "matplotlib.pyplot" not in sys.modules
assert matplotlib.rcParams.copy() == before
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
