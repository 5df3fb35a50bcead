"""A step's metrics as one record: a line of ``metrics.jsonl``, the data of an event, a point in a
tracker. Names and units are the same everywhere; KL is the sampled reverse KL KL(student‖teacher)
in nats."""

from __future__ import annotations

__all__ = ["batch_figures", "kl_figures", "numbers", "record_id", "require_coverage"]

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spider_sdk.errors import FatalJobError
from spider_worker.pipelines.onpolicy_train.batch import Batch
from spider_worker.pipelines.onpolicy_train.supervision import Judgement, Rollout


def record_id(step: int) -> str:
    return f"step-{step:06d}"


def kl_figures(judgements: Sequence[Judgement], weights: Mapping[str, float]) -> dict[str, float]:
    """``kl/<teacher>`` for each token that the teacher was compared on, ``kl`` their mean by
    weight, and ``kl_per_sample``."""
    sums: dict[str, float] = collections.defaultdict(float)
    tokens: dict[str, int] = collections.defaultdict(int)
    samples: collections.Counter[str] = collections.Counter()
    for judgement in judgements:
        for verdict in judgement.verdicts:
            sums[verdict.teacher] += verdict.kl
            tokens[verdict.teacher] += verdict.covered
            samples[verdict.teacher] += 1
    each = {name: sums[name] / tokens[name] for name in sums if tokens[name]}
    total = sum(weights[name] for name in each)
    figures = {f"kl/{name}": value for name, value in sorted(each.items())}
    if total:
        figures["kl"] = sum(weights[name] * value for name, value in each.items()) / total
        figures["kl_per_sample"] = (
            sum(weights[name] * sums[name] / samples[name] for name in each) / total
        )
    return figures


def batch_figures(batch: Batch, weights: Mapping[str, float]) -> dict[str, float]:
    """Everything that sampling and scoring told."""
    lengths = [len(rollout.sample.tokens) for rollout in batch.rollouts]
    cut = sum(rollout.sample.stop_reason == "length" for rollout in batch.rollouts)
    logprobs = np.concatenate([rollout.sample.logprobs for rollout in batch.rollouts])
    trained = np.concatenate([datum.advantages[datum.mask] for datum in batch.data])
    figures = {
        **kl_figures(batch.judgements, weights),
        "advantage_mean": float(trained.mean()),
        "advantage_std": float(trained.std()),
        # −log p of what was sampled: an unbiased estimate of the entropy, a token.
        "entropy": float(-logprobs.mean()),
        "length_mean": float(np.mean(lengths)),
        "length_max": float(max(lengths)),
        "truncated": cut / len(lengths),
        "coverage": coverage(batch.rollouts, batch.judgements),
        "samples": float(len(lengths)),
        "samples_unscored": float(sum(not one.verdicts for one in batch.judgements)),
        "prompts_refused": float(len(batch.refused)),
        "tokens": float(batch.tokens),
    }
    each = coverages(batch.rollouts, batch.judgements)
    if len(weights) > 1:
        figures |= {f"coverage/{name}": share for name, share in each.items()}
    verdicts = [verdict for one in batch.judgements for verdict in one.verdicts]
    stops = [verdict.stop_kl for verdict in verdicts if verdict.stop_kl is not None]
    if stops:
        figures["stop_kl"] = float(np.mean(stops))
    figures["longest_span"] = float(max((one.longest_span for one in verdicts), default=0))
    figures["teacher_logprobs_clipped"] = float(sum(one.clipped for one in verdicts))
    dropped: collections.Counter[str] = collections.Counter()
    for verdict in verdicts:
        dropped.update(verdict.dropped)
    figures |= {f"dropped/{reason}": float(count) for reason, count in sorted(dropped.items())}
    return figures


def coverage(rollouts: Sequence[Rollout], judgements: Sequence[Judgement]) -> float:
    """The share of sampled tokens that a teacher was compared on; of several teachers, their mean.
    1 where nothing was sampled."""
    covered = total = 0.0
    for rollout, judgement in zip(rollouts, judgements, strict=True):
        total += len(rollout.sample.tokens)
        if judgement.verdicts:
            covered += float(np.mean([verdict.covered for verdict in judgement.verdicts]))
    return covered / total if total else 1.0


def coverages(rollouts: Sequence[Rollout], judgements: Sequence[Judgement]) -> Mapping[str, float]:
    """By teacher, the share of the tokens of the rollouts that it scored on which it was
    compared."""
    covered: collections.Counter[str] = collections.Counter()
    total: collections.Counter[str] = collections.Counter()
    for rollout, judgement in zip(rollouts, judgements, strict=True):
        for verdict in judgement.verdicts:
            covered[verdict.teacher] += verdict.covered
            total[verdict.teacher] += len(rollout.sample.tokens)
    return {name: covered[name] / count for name, count in sorted(total.items()) if count}


def require_coverage(batch: Batch, floor: float, student: str, teachers: Mapping[str, str]) -> None:
    """Raises FatalJobError where too little of the batch could be compared, with all teachers or
    with one of them. ``teachers`` maps names to tokenizers."""
    share, meant = coverage(batch.rollouts, batch.judgements), set(teachers)
    each = coverages(batch.rollouts, batch.judgements)
    least = min(each, key=lambda name: each[name], default=None)
    if least is not None and each[least] < share:
        share, meant = each[least], {least}
    if share >= floor:
        return
    verdicts = [one for found in batch.judgements for one in found.verdicts if one.teacher in meant]
    dropped: collections.Counter[str] = collections.Counter()
    for verdict in verdicts:
        dropped.update(verdict.dropped)
    refused = collections.Counter(why for one in batch.judgements for why in one.refused)
    reasons = [f"{reason} ({count} tokens)" for reason, count in dropped.most_common(3)]
    reasons += [f"{why} ({count} rollouts)" for why, count in refused.most_common(3)]
    theirs = ", ".join(sorted({teachers[name] for name in meant}))
    raise FatalJobError(
        f"only {share:.1%} of the sampled tokens could be compared between the student's tokenizer"
        f" ({student}) and the teacher's ({theirs}); the floor"
        f" is {floor:.1%} (generation.on_policy_options.min_coverage). Lost to:"
        f" {'; '.join(reasons) or 'unknown reasons'}"
    )


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The record's figures alone, for trackers."""
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
