"""The curves of a run as a picture, from its ``metrics.jsonl``."""

from __future__ import annotations

__all__ = ["draw_curves"]

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values = NDArray[np.float64]

#: More points than this become the range of each of so many stretches.
MOST_POINTS: Final = 400
#: From so many steps on, a line is drawn pale under the mean of a fortieth of them.
SMOOTHED: Final = 40

_COLUMNS: Final = 3
_CELL: Final = (4.6, 2.75)  # inches
_DPI: Final = 130
_COLORS: Final = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#65a30d")
_INK: Final = "#1f2937"
_PALE: Final = "#6b7280"
_LINE: Final = "#d1d5db"
_GRID: Final = "#eef0f3"
_LONGEST_NAME: Final = 34  # characters of a teacher's name in a legend
_LONGEST_TITLE: Final = 110


@dataclasses.dataclass(frozen=True)
class Line:
    """``values`` (N,): a figure at each record; NaN where the record has none."""

    label: str
    values: Values


@dataclasses.dataclass(frozen=True)
class Panel:
    """``bounds`` are those that the figure has by nature, None where there is none."""

    title: str
    unit: str
    lines: Sequence[Line]
    bounds: tuple[float | None, float | None] = (None, None)
    logarithmic: bool = False


def draw_curves(metrics: Path, png: Path, *, title: str) -> None:
    """Draw what ``metrics`` has (a record a line, as ``record.py`` of the pipeline makes them)
    into ``png``. Figures that are null or missing leave gaps. Raises ValueError for a file without
    a record."""
    records = [json.loads(line) for line in metrics.read_bytes().splitlines()]
    if not records:
        raise ValueError(f"{metrics} has no record to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    steps = np.array([record["step"] for record in records], np.float64)
    panels = [panel for panel in _panels(records) if panel.lines]
    rows = max(1, math.ceil(len(panels) / _COLUMNS))
    size = (_CELL[0] * _COLUMNS, _CELL[1] * rows + 0.7)
    # Neither pyplot nor a style sheet: what they set is the whole process's, and this is drawn in
    # a thread beside whatever else the process does.
    layout = ConstrainedLayoutEngine(rect=(0.0, 0.0, 1.0, 0.99), h_pad=0.09, w_pad=0.08)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white", layout=layout)
    canvas = FigureCanvasAgg(figure)
    heading = figure.suptitle(_shortened(title, _LONGEST_TITLE), x=0.008, ha="left", fontsize=13)
    heading.set(color=_INK, fontweight="bold", parse_math=False)
    for number, panel in enumerate(panels, 1):
        _draw(figure.add_subplot(rows, _COLUMNS, number), panel, steps)
    window = _window(len(records))
    if window > 1:
        said = f"pale: as measured · strong: mean of {window} steps"
        figure.text(0.992, 0.99, said, ha="right", va="top", fontsize=8, color=_PALE)
    canvas.print_png(str(png))


# What is drawn ------------------------------------------------------------------------


def _panels(records: Sequence[Mapping[str, Any]]) -> Iterator[Panel]:
    names = sorted({name for record in records for name in record})

    def line(name: str, label: str) -> list[Line]:
        values = np.array([_figure(record, name) for record in records])
        return [Line(label, values)] if np.isfinite(values).any() else []

    def kl(name: str) -> list[Line]:
        """The KL, and that to each teacher where there are several."""
        found = [one for one in names if one.startswith(f"{name}/")]
        each = [one for other in found for one in line(other, _short_name(other[len(name) + 1 :]))]
        each = each if len(each) > 1 else []
        return [*line(name, "mean of the teachers" if each else "KL"), *each]

    yield Panel("Reverse KL to the teacher", "nats a token", kl("kl"))
    yield Panel("Reverse KL, held-out prompts", "nats a token", kl("eval/kl"))
    scores = [name for name in names if name.startswith("eval/") and not _is_ours(name)]
    yield Panel(
        "Evaluator's score, held-out prompts",
        "score",
        [one for name in scores for one in line(name, name.removeprefix("eval/"))],
    )
    yield Panel("Loss", "mean of trained tokens", line("loss_per_token", "loss"))
    yield Panel(
        "Advantage",
        "nats",
        [*line("advantage_mean", "mean"), *line("advantage_std", "standard deviation")],
    )
    yield Panel("Entropy of the student", "nats a token", line("entropy", "entropy"))
    yield Panel(
        "Length of a sample",
        "tokens",
        [*line("length_mean", "mean"), *line("length_max", "longest")],
        (0, None),
    )
    truncated = line("truncated", "samples cut at max_tokens")
    covered = line("coverage", "tokens that could be compared")
    yield Panel("Truncated and covered", "share", [*truncated, *covered], (0, 1))
    yield Panel("KL at the stop token", "nats", line("stop_kl", "stop token"))
    yield Panel("KL of an update, KL(old‖new)", "nats a token", line("post_kl", "update"))
    yield Panel("Norm of the gradient", "L2", line("grad_norm", "gradient"), (0, None))
    phases = [
        one
        for name in ("sample", "score", "train", "eval", "save")
        for one in line(f"seconds/{name}", name)
    ]
    yield Panel("Time in each phase of a step", "seconds", phases, logarithmic=True)


def _figure(record: Mapping[str, Any], name: str) -> float:
    """NaN for what is null, missing or no number."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def _is_ours(name: str) -> bool:
    """A held-out figure of the pipeline's own; all others are what the user's evaluator gave."""
    known = ("eval/kl", "eval/kl_per_sample", "eval/coverage", "eval/prompts_refused")
    return name in known or name.startswith("eval/kl/")


def _short_name(name: str) -> str:
    """A model's name without its owner or its folder."""
    return _shortened(name.rstrip("/").rpartition("/")[2] or name, _LONGEST_NAME)


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


# How it is drawn ----------------------------------------------------------------------


def _draw(axes: Axes, panel: Panel, steps: Values) -> None:
    from matplotlib.ticker import (
        EngFormatter,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullLocator,
    )

    axes.set_title(panel.title, loc="left", pad=8, fontsize=10, fontweight="bold", color=_INK)
    axes.set_ylabel(panel.unit, fontsize=8.5, color=_PALE)
    axes.set_xlabel("step", fontsize=8.5, color=_PALE)
    axes.grid(visible=True, color=_GRID)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, labelcolor=_PALE, color=_LINE)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_LINE)
    for line, color in zip(panel.lines, itertools.cycle(_COLORS), strict=False):
        _line(axes, steps, line, color)
    # Every panel has the same steps, so that one can be read against the other.
    length = steps[-1] - steps[0]
    room = max(0.02 * length, 0.5) if length else 1.0
    axes.set_xlim(steps[0] - room, steps[-1] + room)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    if panel.unit == "tokens":
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if panel.logarithmic:
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    low, high = panel.bounds
    if high is not None:
        axes.set_ylim(top=high + 0.03)
    if low is not None:
        axes.set_ylim(bottom=low if high is None else low - 0.03)
    if len(panel.lines) > 1:
        legend = axes.legend(loc="best", fontsize=7.5, labelcolor=_INK, framealpha=0.8)
        legend.get_frame().set_edgecolor("none")
        for text in legend.get_texts():
            text.set_parse_math(False)


def _line(axes: Axes, steps: Values, line: Line, color: str) -> None:
    there = np.isfinite(line.values)
    count = len(line.values)
    if 2 * there.sum() <= count or count <= 12:
        # Measured now and then, or few: the points, and what leads from one to the next.
        steps, values = steps[there], line.values[there]
        axes.plot(steps, values, color=color, label=line.label, lw=1.4, marker="o", ms=3.2)
        return
    window = _window(count)
    if count > MOST_POINTS:
        middle, low, high = _ranges(steps, line.values)
        axes.fill_between(middle, low, high, color=color, alpha=0.2, lw=0)
    elif window > 1:
        axes.plot(steps, line.values, color=color, alpha=0.3, lw=0.9)
    else:
        # A line has no room for a figure between two gaps.
        alone = there & ~np.r_[False, there[:-1]] & ~np.r_[there[1:], False]
        axes.plot(steps[alone], line.values[alone], color=color, ls="none", marker="o", ms=3.2)
    axes.plot(steps, _mean(line.values, window), color=color, label=line.label, lw=1.7)


def _window(count: int) -> int:
    """Steps that a mean goes over; an odd number, so that it has a middle."""
    return 1 if count < SMOOTHED else max(3, count // 40 | 1)


def _mean(values: Values, window: int) -> Values:
    """The mean of those of the ``window`` values around each that are there; NaN for none, and
    before the first and behind the last of all, where nothing was measured."""
    there = np.isfinite(values)
    kernel = np.ones(window)
    total = np.convolve(np.where(there, values, 0.0), kernel, "same")
    count = np.convolve(there, kernel, "same")
    within = np.logical_or.accumulate(there) & np.logical_or.accumulate(there[::-1])[::-1]
    return np.where(within & (count > 0), total / np.maximum(count, 1), np.nan)


def _ranges(steps: Values, values: Values) -> tuple[Values, Values, Values]:
    """Middle, least and greatest of each of MOST_POINTS stretches; NaN where one is empty."""
    edges = np.linspace(0, len(values), MOST_POINTS + 1).astype(int)[:-1]
    there = np.isfinite(values)
    low = np.minimum.reduceat(np.where(there, values, np.inf), edges)
    high = np.maximum.reduceat(np.where(there, values, -np.inf), edges)
    empty = ~np.isfinite(low)
    sizes = np.diff(np.r_[edges, len(values)])
    middle = np.add.reduceat(steps, edges) / sizes
    return middle, np.where(empty, np.nan, low), np.where(empty, np.nan, high)
