"""On-policy distillation against TRL's own trainer (GOLD), in one run.

``python -m benchmarks.bench_onpolicy [speed] [quality] [sweep]`` prints one JSON document. Both
sides are given one specification and run as processes of their own, GOLD in ``.venv-trl``; neither
knows of the other.

- **speed**: a random student and teacher, 16 completions of 64 tokens a step; rounds alternate,
  and a round's figure is tokens over the time of its steps, the first few left out.
- **quality**: the demo's student learns the demo's sums from the demo's teacher; the score is the
  share of held-out sums that it answers, after the same number of sampled tokens.
- **sweep**: GOLD's own settings for that, of which the best are GOLD's in ``quality``.
"""

from __future__ import annotations

__all__ = ["main", "quality", "speed", "sweep"]

import argparse
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
}

#: What both sides are told in ``quality``: the demo's own job. What each side can be tuned by is
#: its own: the best settings that were found for it with other seeds than those that count.
QUALITY: Mapping[str, Any] = {
    **SPEED,
    "learning_rate": 3e-3,
    "prompts_a_step": 64,
    "max_tokens": 8,
    "baseline": "position",
    "token_budget": 25_000,
    "epochs": 20,
}

#: The best of GOLD's settings that ``sweep`` found, for ``quality``.
GOLD: Mapping[str, Any] = {
    "uld_use_hybrid_loss": True,
    "uld_token_merge_strategy": "bayesian",
    "learning_rate": 1e-3,
}

#: Ours, of learning rates 5e-4 to 5e-3, one to four substeps, with and without the baseline.
OURS: Mapping[str, Any] = {"learning_rate": 1e-3, "num_substeps": 4}
OURS_SAMPLED: Mapping[str, Any] = {"learning_rate": 2e-3, "signal": "sampled"}

SWEEP = [
    {"uld_use_hybrid_loss": hybrid, "uld_token_merge_strategy": strategy, "learning_rate": rate}
    for hybrid, strategy, rate in itertools.product(
        (False, True), ("observed", "bayesian"), (1e-3, 3e-3, 1e-2)
    )
]


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
            "gold": run_gold({**spec, "gold": dict(GOLD)}, folder / f"gold-{seed}"),
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


def sweep(folder: Path, *, threads: int = 1) -> dict[str, Any]:
    """GOLD's score with each of its settings, one seed."""
    demo = make_demo(folder / "demo")
    found = []
    for number, settings in enumerate(SWEEP):
        spec = {**QUALITY, **demo.spec, "seed": 11, "threads": threads, "gold": settings}
        run = run_gold(spec, folder / f"sweep-{number}")
        score = accuracy(demo, Path(run["adapter"]))
        found.append({"settings": settings, "score": score})
        print(f"{score:.3f}  {settings}", file=sys.stderr, flush=True)
    return {"before": accuracy(demo, None), "runs": found}


def main() -> None:
    parts: dict[str, Callable[..., dict[str, Any]]] = {
        "speed": speed, "quality": quality, "sweep": sweep,
    }  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(parts))
    parser.add_argument("--threads", type=int, default=1, help="torch threads, of both sides")
    options = parser.parse_args()
    result = {}
    for name in options.names or ("speed", "quality"):
        with tempfile.TemporaryDirectory(prefix=f"bench-onpolicy-{name}-") as folder:
            result[name] = parts[name](Path(folder), threads=options.threads)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
