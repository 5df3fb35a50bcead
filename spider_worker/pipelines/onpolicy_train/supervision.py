"""What the teachers make of a rollout: an advantage for each sampled token, and where a teacher
gives distributions, targets for the positions at which both models stand at the same byte."""

from __future__ import annotations

__all__ = [
    "Judgement",
    "Rollout",
    "Seat",
    "Supervision",
    "Verdict",
    "choose_signal",
    "choose_signals",
]

import asyncio
import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from spider_sdk.config.model import TeacherConfig
from spider_sdk.errors import FatalJobError, NotSupported, RowError
from spider_worker.distill.advantages import span_advantages, span_deltas
from spider_worker.distill.marginal import PrefixMap
from spider_worker.distill.translation import Kind, Translation, Translator
from spider_worker.distill.vocabulary import Vocabulary
from spider_worker.distill.whole import WholeMap
from spider_worker.pipelines.onpolicy_train.parts import ModelText
from spider_worker.pipelines.onpolicy_train.prompts import Prompt
from spider_worker.tokens import LogitEngine, SampledTokens, TokenEngine, TopK
from spider_worker.trainers.base import DenseTargets

#: Entries a position that are asked of a teacher with whole distributions: those that hold nearly
#: all mass (the rest is one more event).
FULL_K: Final = 1024
#: A vocabulary up to this is taken as it is: that is less work than to find the best of it.
WHOLE: Final = 2 * FULL_K
#: Entries a position where a server returns its most probable tokens.
TOP_K: Final = 20
#: The share of a teacher's mass that must lie on targets for the rest to be left out of account.
#: A cross-entropy knows no rest, and drives the student's own rest to 0, however much of the
#: teacher's it stands for.
KNOWN_MASS: Final = 0.9


def choose_signal(teacher: TeacherConfig, offered: frozenset[str], dense: frozenset[str]) -> str:
    """The signal that ``teacher.signal`` comes to: ``auto`` is the most that the teacher's engine
    (``offered``) and the trainer's objectives (``dense``) have in common. Raises NotSupported."""
    usable = {"sampled"} & offered
    if "cross_entropy" in dense:
        usable |= {"topk"} & offered
    if "jsd" in dense:
        usable |= {"full"} & offered
    if teacher.signal == "auto":
        best = next((signal for signal in ("full", "topk", "sampled") if signal in usable), None)
        if best is not None:
            return best
    elif teacher.signal in usable:
        return teacher.signal
    raise NotSupported(
        f"teacher {teacher.name!r}: signal {teacher.signal!r} is not to be had: its engine gives"
        f" {', '.join(sorted(offered)) or 'none'}, and the trainer takes"
        f" {', '.join(sorted(dense | {'sampled'}))}"
    )


def choose_signals(
    teachers: Sequence[TeacherConfig], offered: Sequence[frozenset[str]], dense: frozenset[str]
) -> list[str]:
    """``choose_signal`` for each. Targets of two kinds do not add up, so teachers that may share a
    row have one kind: a ``full`` that ``auto`` came to gives way to a neighbour's ``topk``. Raises
    NotSupported where it cannot."""
    signals = [choose_signal(*pair, dense) for pair in zip(teachers, offered, strict=True)]
    agreed = False
    while not agreed:
        agreed = True
        for (one, other), (first, second) in zip(
            itertools.permutations(range(len(teachers)), 2),
            itertools.permutations(teachers, 2),
            strict=True,
        ):
            if (signals[one], signals[other]) == ("full", "topk") and _may_meet(first, second):
                if first.signal != "auto" or "topk" not in offered[one]:
                    raise NotSupported(
                        f"teachers {first.name!r} (signal full) and {second.name!r} (topk) cannot"
                        " share a row: give them one signal, or rows of their own with `when`"
                    )
                signals[one], agreed = "topk", False
    return signals


def _may_meet(one: TeacherConfig, other: TeacherConfig) -> bool:
    """Whether a row could be for both."""
    return all(
        any(value in _alternatives(other.when[column]) for value in _alternatives(wanted))
        for column, wanted in one.when.items()
        if column in other.when
    )


def _alternatives(wanted: Any) -> Sequence[Any]:
    return wanted if isinstance(wanted, list | tuple) else (wanted,)


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """``prompt_tokens`` are the student's; ``sample`` what it said."""

    prompt: Prompt
    prompt_tokens: tuple[int, ...]
    sample: SampledTokens


@dataclasses.dataclass(frozen=True)
class Verdict:
    """One teacher's figures on one rollout. ``kl`` is the sampled reverse KL in nats, summed over
    the ``covered`` tokens; ``stop_kl`` that of the stop token, None where none was compared;
    ``clipped`` counts teacher log-probabilities that were no finite number."""

    teacher: str
    kl: float
    covered: int
    stop_kl: float | None
    longest_span: int
    clipped: int
    dropped: Mapping[str, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Judgement:
    """``advantages`` (N,) float64 over the completion's tokens, 0 where ``targets`` (positions
    counted from the completion's start) speaks. ``verdicts`` is empty where no teacher could
    score the rollout; ``refused`` says why."""

    advantages: NDArray[np.float64]
    targets: DenseTargets | None
    verdicts: Sequence[Verdict]
    refused: Sequence[str] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Seat:
    """A teacher at work. ``signal`` is what is asked of it."""

    config: TeacherConfig
    engine: TokenEngine
    text: ModelText
    translator: Translator
    prefixes: PrefixMap
    signal: str

    @classmethod
    def take(
        cls, config: TeacherConfig, engine: TokenEngine, text: ModelText, student: Vocabulary,
        signal: str,
    ) -> Seat:  # fmt: skip
        """Raises NotSupported for a student whose tokens cannot be told apart in a text."""
        if not (student.exact or student.same_ids(text.vocabulary)):
            raise NotSupported(
                f"the student's tokenizer ({student.name}) does not say which bytes its tokens"
                " stand for, so that what it samples cannot be laid beside the tokens of teacher"
                f" {config.name} ({text.vocabulary.name}). Take a teacher that has the student's"
                " tokenizer, or another student"
            )
        translator = Translator(student, text.vocabulary)
        return cls(config, engine, text, translator, PrefixMap(student, text.vocabulary), signal)

    @property
    def whole(self) -> bool:
        """Whether distributions are taken as they are, and not the best entries of them."""
        return self.signal == "full" and self.engine.info.topk <= WHOLE

    def concerns(self, row: Mapping[str, Any]) -> bool:
        """Whether ``when`` holds for the row's columns; a list there names alternatives."""
        for column, wanted in self.config.when.items():
            if column not in row or row[column] not in _alternatives(wanted):
                return False
        return True


@dataclasses.dataclass(frozen=True, eq=False)
class _Opinion:
    """One teacher's advantages and targets, before they are put together with the others'."""

    advantages: NDArray[np.float64]
    targets: DenseTargets | None
    verdict: Verdict


class _Chair:
    """A seat among those that a row is for. ``told`` (V_student,) is what all of them can tell."""

    def __init__(self, seat: Seat, told: NDArray[np.bool_]) -> None:
        self.seat = seat
        self.told = told
        self._rendered: tuple[Prompt, list[int]] | None = None

    @functools.cached_property
    def whole(self) -> WholeMap:
        return WholeMap(self.seat.prefixes.image, self.told, self.seat.engine.info.topk)

    def prefix(self, prompt: Prompt) -> list[int]:
        """The prompt in the teacher's words. The last one is kept, since a prompt's rollouts come
        one after the other. Raises RowError."""
        if self._rendered is None or self._rendered[0] is not prompt:
            self._rendered = prompt, self.seat.text.render(prompt.prepared.messages)
        return self._rendered[1]


class Supervision:
    """Scores rollouts. ``coef``, ``discount`` and ``clip`` as in ``distill.advantages``."""

    def __init__(self, seats: Sequence[Seat], *, coef: float, discount: float, clip: float) -> None:
        self._seats = seats
        self._coef = coef
        self._discount = discount
        self._clip = clip
        self._panels: dict[tuple[int, ...], list[_Chair]] = {}

    def _panel(self, row: Mapping[str, Any]) -> list[_Chair]:
        """The teachers that the row is for."""
        numbers = tuple(n for n, seat in enumerate(self._seats) if seat.concerns(row))
        if numbers not in self._panels:
            seats = [self._seats[number] for number in numbers]
            # Mass that one teacher cannot tell is in its rest, whatever the other's targets are.
            told = np.logical_and.reduce([seat.prefixes.told for seat in seats])
            self._panels[numbers] = [_Chair(seat, told) for seat in seats]
        return self._panels[numbers]

    async def judge(self, rollout: Rollout) -> Judgement:
        """Ask every teacher that the row is for. A rollout that a teacher cannot take (its template
        refuses, its context is too short) goes without that teacher."""
        panel = self._panel(rollout.prompt.prepared.fields)
        found = await asyncio.gather(*(self._opinion(chair, rollout) for chair in panel))
        opinions = [
            (chair.seat.config.weight, opinion)
            for chair, opinion in zip(panel, found, strict=True)
            if isinstance(opinion, _Opinion)
        ]
        refused = [opinion for opinion in found if isinstance(opinion, str)]
        length = len(rollout.sample.tokens)
        if not opinions:
            return Judgement(np.zeros(length), None, (), refused or ["no teacher for this row"])
        total = sum(weight for weight, _ in opinions)
        shares = [(weight / total, opinion) for weight, opinion in opinions]
        advantages = sum((share * one.advantages for share, one in shares), np.zeros(length))
        targets = _mixed([(share, one.targets) for share, one in shares])
        if targets is not None:
            advantages[targets.positions] = 0.0
        verdicts = [opinion.verdict for _, opinion in opinions]
        return Judgement(advantages, targets, verdicts, refused)

    async def _opinion(self, chair: _Chair, rollout: Rollout) -> _Opinion | str:
        tokens, seat = rollout.sample.tokens, chair.seat
        try:
            prefix = chair.prefix(rollout.prompt)
            translation = seat.translator.translate(
                tokens, stopped=rollout.sample.stop_reason == "stop"
            )
            ids = [*prefix, *translation.teacher_tokens.tolist()]
            context = seat.engine.info.context
            if context is not None and len(ids) > context:
                return f"{seat.config.name}: longer than its context of {context} tokens"
            if not len(translation.spans):
                nothing = np.zeros(len(ids) - len(prefix), dtype=np.float32)
                return self._weigh(seat, rollout, translation, nothing)
            own, top = await _scores(seat, ids, len(prefix))
        except RowError as error:
            return f"{seat.config.name}: {error.message}"
        opinion = self._weigh(seat, rollout, translation, own)
        if top is None:
            return opinion
        targets = self._targets(chair, rollout.sample, translation, top)
        return dataclasses.replace(opinion, targets=targets)

    def _weigh(
        self,
        seat: Seat,
        rollout: Rollout,
        translation: Translation,
        teacher: NDArray[np.float32],
    ) -> _Opinion:
        sample, spans = rollout.sample, translation.spans
        deltas, clipped = span_deltas(spans, sample.logprobs, teacher)
        count = len(sample.tokens)
        advantages = span_advantages(
            spans, deltas, count, coef=self._coef, discount=self._discount, clip=self._clip,
            mask=np.ones(count, dtype=bool),
        )  # fmt: skip
        stop = deltas[translation.kinds == Kind.STOP]
        verdict = Verdict(
            teacher=seat.config.name,
            kl=float(deltas.sum()),
            covered=int((spans.student_end - spans.student_begin).sum()),
            stop_kl=float(stop[0]) if stop.size else None,
            longest_span=translation.longest_span,
            clipped=clipped,
            dropped=translation.dropped,
        )
        return _Opinion(advantages, None, verdict)

    def _targets(
        self,
        chair: _Chair,
        sample: SampledTokens,
        translation: Translation,
        top: TopK | NDArray[np.float32],
    ) -> DenseTargets | None:
        spans = translation.spans.taken(translation.level)
        sampled, seat = np.asarray(sample.tokens), chair.seat
        if isinstance(top, TopK):
            positions, ids, probs = seat.prefixes.targets(
                spans, sampled, top.ids, top.logprobs, told=chair.told
            )
        else:
            positions, ids, probs = chair.whole.targets(spans, sampled, top)
        if seat.signal != "full":
            sums = probs.sum(axis=1)
            enough = sums >= KNOWN_MASS
            positions, ids = positions[enough], ids[enough]
            probs = probs[enough] / sums[enough, None]
        if not positions.size:
            return None
        weights = np.full(positions.size, self._coef, dtype=np.float32)
        return DenseTargets(
            positions, ids, probs, weights, "jsd" if seat.signal == "full" else "cross_entropy"
        )


async def _scores(
    seat: Seat, ids: Sequence[int], start: int
) -> tuple[NDArray[np.float32], TopK | NDArray[np.float32] | None]:
    """Of ``ids[start:]``: log-probabilities (M,), and what the teacher's signal has beside them:
    the best entries at each position, or all of them (M, V)."""
    if seat.whole:
        engine = cast(LogitEngine, seat.engine)
        table = (await engine.compute_distributions(ids, range(start, len(ids)))).numpy()
        return table[np.arange(len(table)), np.asarray(ids[start:])], table
    topk = {"sampled": 0, "topk": TOP_K, "full": FULL_K}[seat.signal]
    scores = await seat.engine.compute_logprobs(
        ids, start=start, topk=min(topk, seat.engine.info.topk)
    )
    top = scores.topk
    return scores.logprobs[start:], None if top is None else TopK(
        top.ids[start:], top.logprobs[start:]
    )


def _mixed(shares: Sequence[tuple[float, DenseTargets | None]]) -> DenseTargets | None:
    """The mixture of the teachers' targets at the positions where all have one of one kind."""
    if any(targets is None for _, targets in shares):
        return None
    present = [(share, targets) for share, targets in shares if targets is not None]
    if len(present) == 1:
        return present[0][1]
    if len({targets.objective for _, targets in present}) > 1:
        raise FatalJobError(
            "teachers with signals full and topk cannot share a row: give them one signal each,"
            " or rows of their own with `when`"
        )
    common = present[0][1].positions
    for _, targets in present[1:]:
        common = np.intersect1d(common, targets.positions)
    if not common.size:
        return None
    rows = [np.searchsorted(targets.positions, common) for _, targets in present]
    ids = np.concatenate([t.ids[r] for (_, t), r in zip(present, rows, strict=True)], axis=1)
    probs = np.concatenate(
        [share * t.probs[r] for (share, t), r in zip(present, rows, strict=True)], axis=1
    )
    first = present[0][1]
    merged_ids, merged_probs = _merge_equal(ids, probs.astype(np.float32))
    return DenseTargets(common, merged_ids, merged_probs, first.weights[rows[0]], first.objective)


def _merge_equal(
    ids: NDArray[np.int64], probs: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows in which each id stands once, with the sum of its probabilities; -1 fills up."""
    merged_ids = np.full_like(ids, -1)
    merged = np.zeros_like(probs)
    for row in range(len(ids)):
        used = ids[row] >= 0
        unique, place = np.unique(ids[row][used], return_inverse=True)
        merged_ids[row, : unique.size] = unique
        merged[row, : unique.size] = np.bincount(place, weights=probs[row][used])
    return merged_ids, merged
