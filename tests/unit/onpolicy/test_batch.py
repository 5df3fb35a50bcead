"""From rollouts to training sequences: what stands where, and what is left out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from spider_sdk.errors import FatalJobError, RowError
from spider_worker.pipelines.onpolicy_train.batch import Batch, BatchMaker, request_seed
from spider_worker.pipelines.onpolicy_train.prompts import Cursor, Prompt
from spider_worker.pipelines.onpolicy_train.record import (
    batch_figures,
    coverage,
    coverages,
    require_coverage,
)
from spider_worker.pipelines.onpolicy_train.supervision import Judgement, Rollout, Verdict
from spider_worker.pipelines.rows.prompts import Prepared
from spider_worker.tokens import Ids, SampledTokens, SampleParams
from spider_worker.trainers.base import DenseTargets

LOGPROBS = (-0.5, -1.0, -1.5, -2.0)


class Student:
    """Prompts of as many tokens as the message says."""

    def render(self, messages: Sequence[dict[str, str]]) -> list[int]:
        count = int(messages[0]["content"])
        if not count:
            raise RowError("empty", stage="generation", kind="empty_prompt")
        return list(range(100, 100 + count))


class Sampler:
    def __init__(self, *answers: tuple[int, ...]) -> None:
        self.answers = answers
        self.asked: list[tuple[list[int], int, SampleParams]] = []

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        self.asked.append((list(prompt), n, params))
        return [
            SampledTokens(answer, np.array(LOGPROBS[: len(answer)], np.float32), "stop")
            for answer in self.answers
        ]


class Judge:
    """Says what it was made with of every rollout, cut to its length."""

    def __init__(
        self,
        advantages: Sequence[float],
        targets: DenseTargets | None = None,
        covered: int | None = None,
        refused: Sequence[str] = (),
    ) -> None:
        self._advantages = advantages
        self._targets = targets
        self._covered = covered
        self._refused = refused

    async def judge(self, rollout: Rollout) -> Judgement:
        count = len(rollout.sample.tokens)
        if self._refused:
            return Judgement(np.zeros(count), None, (), self._refused)
        covered = count if self._covered is None else self._covered
        dropped = {"no valid UTF-8": count - covered} if covered < count else {}
        verdict = Verdict("teacher", 1.0, covered, None, 1, 0, dropped)
        return Judgement(np.array(self._advantages[:count], float), self._targets, [verdict])


def prompt(count: int, index: int = 0) -> Prompt:
    return Prompt(index, 0, Prepared(None, [{"role": "user", "content": str(count)}], {}), Cursor())


def make(sampler: Sampler, judge: Judge, *prompts: Prompt, baseline: str = "none") -> Batch:
    maker = BatchMaker(
        Student(),  # type: ignore[arg-type]
        judge,  # type: ignore[arg-type]
        SampleParams(8),
        group_size=len(sampler.answers),
        seed=3,
        baseline=baseline,
    )
    return asyncio.run(maker.make(sampler, prompts, step=2))  # type: ignore[arg-type]


def test_a_datum_is_the_prompt_and_the_completion_with_all_in_its_place() -> None:
    batch = make(Sampler((7, 8, 9)), Judge([1.0, -2.0, 0.0]), prompt(2))
    (datum,) = batch.data
    assert datum.tokens.tolist() == [100, 101, 7, 8, 9]
    assert datum.tokens.dtype == np.int64
    assert datum.mask.tolist() == [False, False, True, True, True]
    assert datum.logprobs.tolist() == [0, 0, -0.5, -1.0, -1.5]
    assert datum.advantages.tolist() == [0, 0, 1.0, -2.0, 0]
    assert datum.targets is None
    assert batch.tokens == 3


def targets(*positions: int) -> DenseTargets:
    count = len(positions)
    return DenseTargets(
        np.array(positions),
        np.arange(count)[:, None],
        np.ones((count, 1), np.float32),
        np.ones(count, np.float32),
        "jsd",
    )


@pytest.mark.parametrize("baseline", ["none", "position"])
def test_targets_are_counted_from_the_sequences_start_and_take_the_advantages_place(
    baseline: str,
) -> None:
    batch = make(
        Sampler((7, 8, 9), (7, 8, 9)), Judge([0.0, -2.0, 0.0], targets(0, 2)), prompt(4),
        baseline=baseline,
    )  # fmt: skip
    for datum in batch.data:
        assert datum.targets is not None
        assert datum.targets.positions.tolist() == [4, 6]
        assert datum.tokens[datum.targets.positions].tolist() == [7, 9]
        assert (datum.advantages[datum.targets.positions] == 0).all()
        assert datum.advantages[5] == (-2.0 if baseline == "none" else 0.0)


def test_a_baseline_counts_positions_from_the_completions_start() -> None:
    class Two(Judge):
        async def judge(self, rollout: Rollout) -> Judgement:
            found = await super().judge(rollout)
            return Judgement(found.advantages * len(rollout.prompt_tokens), None, found.verdicts)

    batch = make(Sampler((7, 8)), Two([1.0, 2.0]), prompt(1), prompt(3, 1), baseline="position")
    assert batch.data[0].advantages.tolist() == [0, -1.0, -2.0]
    assert batch.data[1].advantages.tolist() == [0, 0, 0, 1.0, 2.0]


def test_rollouts_without_a_verdict_or_a_token_give_no_sequence() -> None:
    class Choosy(Judge):
        async def judge(self, rollout: Rollout) -> Judgement:
            if rollout.sample.tokens == (9,):
                return Judgement(np.zeros(1), None, (), ["too long"])
            return await super().judge(rollout)

    batch = make(Sampler((7, 8), (9,), ()), Choosy([1.0, 1.0]), prompt(1), prompt(0, 5))
    assert [datum.tokens.tolist() for datum in batch.data] == [[100, 7, 8]]
    assert len(batch.rollouts) == len(batch.judgements) == 3
    assert batch.refused == ["row 5: empty"]


def test_a_batch_without_any_sequence_says_why() -> None:
    for batch, why in (
        (make(Sampler((7,)), Judge([], refused=["too long"]), prompt(1)), "too long"),
        (make(Sampler(()), Judge([]), prompt(1)), "every completion is empty"),
    ):
        assert not batch.data
        assert batch.why_empty() == why


def test_each_prompt_is_asked_once_for_its_group_with_a_seed_of_its_own() -> None:
    sampler = Sampler((7,), (8,))
    make(sampler, Judge([1.0]), prompt(1, 4), prompt(2, 5))
    assert [(tokens, n) for tokens, n, _ in sampler.asked] == [([100], 2), ([100, 101], 2)]
    seeds = [params.seed for *_, params in sampler.asked]
    assert seeds == [request_seed(3, 2, 4), request_seed(3, 2, 5)]
    assert len({*seeds, request_seed(3, 3, 4), request_seed(4, 2, 4)}) == 4


# -- the coverage gate ------------------------------------------------------------


def test_coverage_is_the_share_of_sampled_tokens_that_were_compared() -> None:
    batch = make(Sampler((7, 8, 9, 10), (7, 8)), Judge([1.0] * 4, covered=2), prompt(1))
    assert coverage(batch.rollouts, batch.judgements) == pytest.approx(4 / 6)
    assert coverage([], []) == 1


def test_below_the_floor_a_run_ends_with_both_tokenizers_and_the_reasons() -> None:
    batch = make(Sampler((7, 8, 9, 10)), Judge([1.0] * 4, covered=2), prompt(1))
    require_coverage(batch, 0.5, "ours", {"teacher": "theirs"})
    with pytest.raises(FatalJobError) as caught:
        require_coverage(batch, 0.51, "ours", {"teacher": "theirs"})
    message = str(caught.value)
    assert "only 50.0% of the sampled tokens" in message
    assert "(ours)" in message
    assert "(theirs)" in message
    assert "no valid UTF-8 (2 tokens)" in message


def test_one_teacher_below_the_floor_ends_the_run_however_few_its_rows() -> None:
    def verdict(teacher: str, covered: int, **dropped: int) -> Verdict:
        return Verdict(teacher, 0.0, covered, None, 1, 0, dropped)

    class Two(Judge):
        async def judge(self, rollout: Rollout) -> Judgement:
            count = len(rollout.sample.tokens)
            found = [verdict("good", count)]
            if count == 2:
                found.append(verdict("bad", 1, odd=1))
            return Judgement(np.ones(count), None, found)

    batch = make(Sampler((7, 8), (7, 8, 9, 10)), Two([1.0]), prompt(1))
    assert coverages(batch.rollouts, batch.judgements) == {"bad": 0.5, "good": 1.0}
    assert coverage(batch.rollouts, batch.judgements) > 0.9
    teachers = {"good": "one tokenizer", "bad": "another"}
    require_coverage(batch, 0.5, "ours", teachers)
    with pytest.raises(FatalJobError, match=r"only 50\.0% .*\(another\).*odd \(1 tokens\)"):
        require_coverage(batch, 0.6, "ours", teachers)
    figures = batch_figures(batch, {"good": 1.0, "bad": 1.0})
    assert (figures["coverage/good"], figures["coverage/bad"]) == (1.0, 0.5)


def test_a_record_tells_of_stop_tokens_of_the_longest_span_and_of_what_was_dropped() -> None:
    batch = make(Sampler((7, 8, 9), (7, 8), (7,)), Judge([1.0, -2.0, 0.0]), prompt(2))

    def judged(stop_kl: float | None, longest: int, **dropped: int) -> Judgement:
        verdict = Verdict("teacher", 1.0, 1, stop_kl, longest, 0, dropped)
        return Judgement(np.zeros(1), None, [verdict])

    some = [judged(0.5, 2, lost=1), judged(None, 5), judged(1.5, 1, lost=2, unknown=4)]
    figures = batch_figures(dataclasses.replace(batch, judgements=some), {"teacher": 1.0})
    assert (figures["stop_kl"], figures["longest_span"]) == (1.0, 5)
    dropped = {name: value for name, value in figures.items() if name.startswith("dropped/")}
    assert dropped == {"dropped/lost": 3, "dropped/unknown": 4}
    none = [judged(None, 1)] * 3
    figures = batch_figures(dataclasses.replace(batch, judgements=none), {"teacher": 1.0})
    assert "stop_kl" not in figures
    assert not any(name.startswith("dropped/") for name in figures)
