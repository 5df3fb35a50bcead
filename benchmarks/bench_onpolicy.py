"""On-policy distillation against TRL's own trainer (GOLD), in one run.

``python -m benchmarks.bench_onpolicy [speed] [quality] [sweep]`` prints one JSON document. Both
sides are given one specification and run as processes of their own, GOLD in ``.venv-trl``; neither
knows of the other.

- **speed**: a random student and teacher, 16 completions of 64 tokens a step; rounds alternate,
  and a round's figure is tokens over the time of its steps, the first few left out.
- **quality**: the demo's student learns the demo's sums from the demo's teacher; the score is the
  share of held-out sums that it answers, after the same number of sampled tokens.
- **sweep**: settings of both sides for that, of which each has its best in ``quality``.
"""

from __future__ import annotations

__all__ = ["main", "quality", "speed", "sweep"]

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.onpolicy_models import accuracy, make_demo, make_pair, make_prompts

ROOT = Path(__file__).parent.parent
TRL = ROOT / ".venv-trl" / "bin" / "python"
#: Of a round, so many steps are not counted: allocators fill, caches are made.
WARM = 3

#: What both sides are told in ``speed``.
SPEED: Mapping[str, Any] = {
    "signal": "auto",
    "learning_rate": 1e-4,
    "schedule": "constant",
    "prompts_a_step": 4,
    "samples": 4,
    "max_tokens": 64,
    "lora_rank": 16,
    "lora_alpha": 32,
    "baseline": "none",
    "num_substeps": 1,
    "token_budget": None,
    "epochs": 1,
    "threads": 1,
    "gold": {},
}

#: What each side has of its own in ``quality``: to forget one there is no default.
_OWN = ("learning_rate", "prompts_a_step", "gold")

#: What both sides are told in ``quality``: the demo's models, data and lengths.
QUALITY: Mapping[str, Any] = {
    **{name: value for name, value in SPEED.items() if name not in _OWN},
    "max_tokens": 8,
    "baseline": "position",
    "token_budget": 25_000,
    "epochs": 20,
}

#: And each besides: the best settings that ``sweep`` found for it, with seeds that do not count.
LOSS: Mapping[str, Any] = {"uld_use_hybrid_loss": True, "uld_token_merge_strategy": "bayesian"}
GOLD: Mapping[str, Any] = {
    "learning_rate": 3e-3,
    "prompts_a_step": 16,
    "schedule": "linear",
    "gold": LOSS,
}
OURS: Mapping[str, Any] = {
    "learning_rate": 2e-3,
    "prompts_a_step": 16,
    "schedule": "linear",
    "num_substeps": 2,
}
OURS_SAMPLED: Mapping[str, Any] = {
    "learning_rate": 1e-3,
    "prompts_a_step": 16,
    "schedule": "linear",
    "signal": "sampled",
}


def _every(**values: Sequence[Any]) -> list[dict[str, Any]]:
    return [
        dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())
    ]


_LOSSES = _every(
    uld_use_hybrid_loss=(False, True), uld_token_merge_strategy=("observed", "bayesian")
)
_RATES = (1e-3, 2e-3, 3e-3, 5e-3)
_BATCHES = (8, 16, 32, 64)
_SCHEDULES = ("constant", "linear")
#: What ``sweep`` tries: GOLD's losses first, then what both sides have, and the steps that ours can
#: cut a batch into.
SWEEP: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "losses": _every(gold=_LOSSES, learning_rate=(1e-3, 3e-3, 1e-2), prompts_a_step=(64,)),
    "gold": _every(
        gold=(LOSS,), learning_rate=_RATES, prompts_a_step=_BATCHES, schedule=_SCHEDULES
    ),
    "ours": _every(
        num_substeps=(1, 2), learning_rate=_RATES, prompts_a_step=_BATCHES, schedule=_SCHEDULES
    ),
    "ours_sampled": _every(
        signal=("sampled",), learning_rate=_RATES, prompts_a_step=_BATCHES, schedule=_SCHEDULES
    ),
}
#: Seeds of ``sweep``, none of which counts in ``quality``.
SWEEP_SEEDS = (11, 12)


def run_ours(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    return _run([sys.executable, "-m", "benchmarks.peers.spider_run"], spec, folder)


def run_gold(spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    if not TRL.exists():
        raise SystemExit("benchmarks: GOLD needs an environment of its own: make trl")
    return _run([str(TRL), str(ROOT / "benchmarks/peers/gold.py")], spec, folder)


def _run(command: Sequence[str], spec: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One side's run of ``spec`` in the new ``folder``; what it found."""
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    threads = str(spec["threads"])
    done = subprocess.run(
        [*command, str(folder / "spec.json"), str(folder / "out.json")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads,
             "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"benchmarks: {command[-1]} failed:\n{done.stdout[-4000:]}")
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def speed(folder: Path, *, rounds: int = 3, steps: int = 20, threads: int = 1) -> dict[str, Any]:
    """Rounds of GOLD, ours with the teacher's whole distributions (what ``auto`` comes to), and
    ours with log-probabilities of the sampled tokens alone."""
    student, teacher = make_pair(folder / "models")
    spec = {
        **SPEED,
        "student": str(student),
        "teacher": str(teacher),
        "prompts": str(make_prompts(folder / "prompts.jsonl", 4 * steps)),
        "steps": steps,
        "threads": threads,
        "seed": 1,
    }
    sides: dict[str, Callable[[Path], dict[str, Any]]] = {
        "gold": lambda at: run_gold(spec, at),
        "ours": lambda at: run_ours(spec, at),
        "ours_sampled": lambda at: run_ours({**spec, "signal": "sampled"}, at),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for number in range(rounds):
        # Every other round the other way round: a load that comes and goes hits both alike.
        for name in sides if number % 2 == 0 else reversed(sides):
            found[name].append(sides[name](folder / f"{name}-{number}"))
    rates = {name: [_rate(one) for one in runs] for name, runs in found.items()}
    ratios = [a / b for a, b in zip(rates["ours"], rates["gold"], strict=True)]
    sampled = [a / b for a, b in zip(rates["ours_sampled"], rates["gold"], strict=True)]
    overheads = [_overhead(one) for one in (*found["ours"], *found["ours_sampled"])]
    return {
        "versions": {name: found["gold"][0][name] for name in ("trl", "transformers", "torch")},
        "threads": threads,
        "tokens_per_second": rates,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "median_ratio_sampled": statistics.median(sampled),
        "overheads": overheads,
        "median_overhead": statistics.median(overheads),
    }


def _rate(run: Mapping[str, Any]) -> float:
    """Tokens trained a second: the median over the steps that count."""
    pairs = zip(run["tokens"][WARM:], run["seconds"][WARM:], strict=True)
    return statistics.median(tokens / seconds for tokens, seconds in pairs)


def _overhead(run: Mapping[str, Any]) -> float:
    """Whole steps over the calls in them."""
    pairs = zip(run["seconds"][WARM:], run["busy"][WARM:], strict=True)
    return statistics.median(seconds / busy for seconds, busy in pairs)


def quality(folder: Path, *, seeds: int = 5, threads: int = 1) -> dict[str, Any]:
    """Held-out accuracy of both after as many sampled tokens, with each of ``seeds`` seeds."""
    demo = make_demo(folder / "demo")
    scores: dict[str, list[float]] = {"gold": [], "ours": [], "ours_sampled": []}
    tokens: dict[str, list[int]] = {name: [] for name in scores}
    for seed in range(1, seeds + 1):
        spec = {**QUALITY, **demo.spec, "seed": seed, "threads": threads}
        runs = {
            "gold": run_gold({**spec, **GOLD}, folder / f"gold-{seed}"),
            "ours": run_ours({**spec, **OURS}, folder / f"ours-{seed}"),
            "ours_sampled": run_ours({**spec, **OURS_SAMPLED}, folder / f"sampled-{seed}"),
        }
        for name, run in runs.items():
            scores[name].append(accuracy(demo, Path(run["adapter"])))
            tokens[name].append(int(run["tokens_total"]))
        print(f"seed {seed}: " + ", ".join(f"{n} {s[-1]:.3f}" for n, s in scores.items()),
              file=sys.stderr, flush=True)  # fmt: skip
    gaps = {
        name: statistics.mean(scores[name]) - statistics.mean(scores["gold"])
        for name in ("ours", "ours_sampled")
    }
    errors = [statistics.stdev(values) / math.sqrt(seeds) for values in scores.values()]
    return {
        "before": accuracy(demo, None),
        "scores": scores,
        "tokens": tokens,
        "means": {name: statistics.mean(values) for name, values in scores.items()},
        "standard_errors": dict(zip(scores, errors, strict=True)),
        "gaps": gaps,
        "gaps_in_standard_errors": {
            name: gap / max(math.hypot(errors[0], error), 1e-9)
            for (name, gap), error in zip(gaps.items(), errors[1:], strict=True)
        },
        "settings": {"gold": dict(GOLD), "ours": dict(OURS), "ours_sampled": dict(OURS_SAMPLED)},
    }


def sweep(folder: Path, *, sides: Sequence[str] = tuple(SWEEP), threads: int = 1) -> dict[str, Any]:
    """The scores of each of the settings, the best first, with each of ``SWEEP_SEEDS``."""
    demo = make_demo(folder / "demo")
    found: dict[str, list[dict[str, Any]]] = {}
    for side in sides:
        run = run_ours if side.startswith("ours") else run_gold
        found[side] = []
        for number, settings in enumerate(SWEEP[side]):
            scores = []
            for seed in SWEEP_SEEDS:
                spec = {**QUALITY, **demo.spec, **settings, "seed": seed, "threads": threads}
                made = run(spec, folder / f"{side}-{number}-{seed}")
                scores.append(accuracy(demo, Path(made["adapter"])))
            found[side].append({"settings": settings, "scores": scores})
            print(f"{side} {statistics.mean(scores):.3f} {scores} {json.dumps(settings)}",
                  file=sys.stderr, flush=True)  # fmt: skip
        found[side].sort(key=lambda one: -statistics.mean(one["scores"]))
    return {"before": accuracy(demo, None), **found}


def main() -> None:
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "speed": speed, "quality": quality, "sweep": sweep,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(parts))
    parser.add_argument("--side", action="append", choices=SWEEP, help="of sweep; all without it")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, of both sides")
    options = parser.parse_args()
    if options.side:
        if "sweep" not in options.names:
            parser.error("--side is of sweep")
        parts["sweep"] = functools.partial(sweep, sides=options.side)
    result = {}
    for name in options.names or ("speed", "quality"):
        with tempfile.TemporaryDirectory(prefix=f"bench-onpolicy-{name}-") as folder:
            result[name] = parts[name](Path(folder), threads=options.threads)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
