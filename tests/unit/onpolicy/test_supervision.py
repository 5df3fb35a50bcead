"""What teachers make of a rollout, with engines whose scores are known."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from spider_sdk.config.model import TeacherConfig
from spider_sdk.errors import FatalJobError, NotSupported, RowError
from spider_worker.engines.tokens.text import TokenizerText
from spider_worker.pipelines.onpolicy_train.prompts import Cursor, Prompt
from spider_worker.pipelines.onpolicy_train.supervision import (
    KNOWN_MASS,
    TOP_K,
    Judgement,
    Rollout,
    Seat,
    Supervision,
    choose_signal,
    choose_signals,
)
from spider_worker.pipelines.rows.prompts import Prepared
from spider_worker.tokens import Ids, SampledTokens, TokenEngineInfo, TokenScores, TopK
from tests.support.tokenizers import load, vocabulary

STUDENT = "byte-level"
#: What a teacher's output layer has: more than any vocabulary here.
SIZE = 800
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "What is 12 plus 30?"}]


@dataclasses.dataclass
class Scorer:
    """An engine that finds token t likely by −t/1000, and keeps what it was asked. ``rows`` are
    the most probable tokens at every position, with their probabilities; of a teacher that is not
    ``wide`` they are its whole distribution."""

    context: int | None = None
    rows: dict[int, float] | None = None
    wide: bool = True
    odd: dict[int, float] = dataclasses.field(default_factory=dict)
    asked: list[tuple[list[int], int, int]] = dataclasses.field(default_factory=list)

    @property
    def info(self) -> TokenEngineInfo:
        return TokenEngineInfo("scorer", 5000 if self.wide else SIZE, self.context)

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        self.asked.append((list(tokens), start, topk))
        logprobs = np.array([self.odd.get(one, -one / 1000) for one in tokens], np.float32)
        logprobs[: max(start, 1)] = np.nan
        if not topk:
            return TokenScores(logprobs)
        rows = self.rows or {}
        ids = np.tile(np.array([*rows, -1]), (len(tokens), 1))
        return TokenScores(logprobs, TopK(ids, np.tile(log([*rows.values(), 0]), (len(tokens), 1))))

    async def compute_distributions(self, tokens: Ids, positions: Sequence[int]) -> Any:
        import torch

        self.asked.append((list(tokens), positions[0], 0))
        row = np.zeros(SIZE)
        row[list(self.rows or {})] = list((self.rows or {}).values())
        return torch.from_numpy(np.tile(log(row), (len(positions), 1)))


def log(probs: Any) -> np.ndarray:
    with np.errstate(divide="ignore"):
        found: np.ndarray = np.log(np.asarray(probs)).astype(np.float32)
        return found


def seat(
    teacher: str,
    engine: Scorer,
    *,
    signal: str = "sampled",
    system: str | None = None,
    **config: Any,
) -> Seat:
    text = TokenizerText(load(teacher), system_prompt=system)
    options = TeacherConfig(**{"name": teacher, **config})
    return Seat.take(options, engine, text, vocabulary(STUDENT), signal)  # type: ignore[arg-type]


def rollout(said: str | Sequence[int], *, stop: bool = True, **fields: Any) -> Rollout:
    known = vocabulary(STUDENT)
    tokens = known.encode(said) if isinstance(said, str) else list(said)
    tokens += [known.end_of_turn or 0] if stop else []
    logprobs = np.array([-(n + 1) / 8 for n in range(len(tokens))], np.float32)
    prompt = Prompt(0, 0, Prepared(None, MESSAGES, fields), Cursor())
    sample = SampledTokens(tuple(tokens), logprobs, "stop" if stop else "length")
    return Rollout(prompt, (5, 6, 7), sample)


def judge(
    seats: Sequence[Seat],
    one: Rollout,
    *,
    coef: float = 1.0,
    discount: float = 0.0,
    clip: float = 0,
) -> Judgement:
    return asyncio.run(Supervision(seats, coef=coef, discount=discount, clip=clip).judge(one))


def test_a_student_whose_tokens_have_no_known_bytes_needs_a_teacher_of_its_own_tokenizer() -> None:
    student = dataclasses.replace(vocabulary(STUDENT), exact=False)

    def take(teacher: str) -> Seat:
        text: Any = TokenizerText(load(teacher))
        engine: Any = Scorer()
        return Seat.take(TeacherConfig(teacher), engine, text, student, "sampled")

    assert take(STUDENT).signal == "sampled"
    with pytest.raises(
        NotSupported, match=r"which bytes .*teacher metaspace .*student's tokenizer"
    ):
        take("metaspace")


# -- what is asked ----------------------------------------------------------------


def test_the_teacher_sees_its_own_prompt_and_the_completion_in_its_own_tokens() -> None:
    engine = Scorer()
    judge([seat("metaspace", engine)], rollout("42 it is"))
    ((tokens, start, topk),) = engine.asked
    known = vocabulary("metaspace")
    bos, end = known.structural["<s>"], known.structural["</s>"]
    prompt = load("metaspace").decode(tokens[:start])
    assert prompt == "<s>[INST] What is 12 plus 30? [/INST]"
    assert tokens[0] == bos
    assert tokens.count(bos) == 1  # the template's; the tokenizer would add another
    assert known.bytes_of(tokens[start:-1]) == b" 42 it is"
    assert tokens[-1] == end
    assert topk == 0


def test_a_system_prompt_of_the_teachers_is_the_teachers_alone() -> None:
    engine = Scorer()
    judge([seat("unigram", engine, system="Be brief.")], rollout("42"))
    ((tokens, start, _),) = engine.asked
    assert load("unigram").decode(tokens[:start]).startswith("<start_of_turn>system\nBe brief.")


def test_a_cut_completion_is_scored_without_an_end() -> None:
    engine = Scorer()
    found = judge([seat("metaspace", engine)], rollout("42", stop=False))
    assert vocabulary("metaspace").end_of_turn not in engine.asked[0][0]
    assert found.verdicts[0].stop_kl is None


def test_where_nothing_can_be_compared_nothing_is_asked() -> None:
    engine = Scorer()
    bad = next(n for n, p in enumerate(vocabulary(STUDENT).pieces) if p == b"\xff")
    for said in ([], [bad]):
        found = judge([seat("metaspace", engine)], rollout(said, stop=False))
        assert not engine.asked
        assert (found.advantages == 0).all()
        assert found.verdicts[0].covered == 0
    assert found.verdicts[0].dropped == {"no valid UTF-8": 1}


# -- advantages -------------------------------------------------------------------


def by_hand(teacher: str, one: Rollout) -> np.ndarray:
    """−δ of the span that each token is in, from the scorer's rule and the tokens' bytes."""
    ours, theirs = vocabulary(STUDENT), vocabulary(teacher)
    *body, _ = one.sample.tokens
    text = ours.bytes_of(body)
    encoding = theirs.encode_ends(text.decode())
    assert encoding is not None
    ends = np.cumsum([len(ours.pieces[token] or b"") for token in body]).tolist()
    wanted = np.zeros(len(one.sample.tokens))
    cuts = sorted({0, *ends} & {0, *encoding.ends.tolist()})
    for low, high in itertools.pairwise(cuts):
        mine = [n for n, e in enumerate(ends) if low < e <= high]
        its = [
            -token / 1000
            for token, e in zip(encoding.ids.tolist(), encoding.ends.tolist(), strict=True)
            if low < e <= high or (e == 0 and low == 0)
        ]
        wanted[mine] = sum(its) - one.sample.logprobs[mine].astype(float).sum()
    wanted[-1] = -(theirs.end_of_turn or 0) / 1000 - float(one.sample.logprobs[-1])
    return wanted


@pytest.mark.parametrize("teacher", ["metaspace", "unigram", "byte-level nfc", "tekken"])
def test_i9_each_score_lands_on_its_own_token(teacher: str) -> None:
    one = rollout("The answer is 42, and 12345 others.")
    found = judge([seat(teacher, Scorer())], one)
    np.testing.assert_allclose(found.advantages, by_hand(teacher, one), atol=1e-5)
    verdict = found.verdicts[0]
    assert verdict.covered == len(one.sample.tokens)
    assert verdict.stop_kl == pytest.approx(-found.advantages[-1])
    assert verdict.longest_span >= 1
    assert verdict.clipped == 0


def test_i6_a_teacher_that_is_the_student_gives_none() -> None:
    one = rollout("The answer is 42")
    tokens = one.sample.tokens
    same = dict(zip(tokens, one.sample.logprobs.tolist(), strict=True))
    exact = dataclasses.replace(
        one,
        sample=dataclasses.replace(
            one.sample, logprobs=np.array([same[token] for token in tokens], np.float32)
        ),
    )
    found = judge([seat(STUDENT, Scorer(odd=same))], exact, discount=0.9)
    assert (found.advantages == 0).all()
    assert found.verdicts[0].kl == 0


def test_coefficient_discount_and_clip_reach_the_advantages() -> None:
    one = rollout("The answer is 42")
    plain = judge([seat(STUDENT, Scorer())], one).advantages
    summed = judge([seat(STUDENT, Scorer())], one, discount=1.0, clip=0.5, coef=2.0).advantages
    np.testing.assert_allclose(summed, 2 * np.clip(plain[::-1].cumsum()[::-1], -0.5, 0.5))


def test_a_score_that_is_no_number_is_bounded_and_counted() -> None:
    known = vocabulary("metaspace")
    one = rollout("42")
    engine = Scorer(odd={known.end_of_turn or 0: -np.inf})
    found = judge([seat("metaspace", engine)], one)
    assert found.verdicts[0].clipped == 1
    assert found.advantages[-1] == pytest.approx(-100 - one.sample.logprobs[-1])


# -- several teachers -------------------------------------------------------------


def test_teachers_count_by_their_weight() -> None:
    one = rollout("The answer is 42")
    both = judge([seat("metaspace", Scorer(), weight=3), seat("unigram", Scorer())], one)
    alone = [judge([seat(name, Scorer())], one).advantages for name in ("metaspace", "unigram")]
    np.testing.assert_allclose(both.advantages, 0.75 * alone[0] + 0.25 * alone[1])
    assert [verdict.teacher for verdict in both.verdicts] == ["metaspace", "unigram"]


def test_a_row_goes_to_the_teachers_that_it_is_for() -> None:
    maths = seat("metaspace", Scorer(), when={"topic": "maths"})
    rest = seat("unigram", Scorer(), when={"topic": ["code", "prose"]})
    one = rollout("42", topic="maths")
    assert [v.teacher for v in judge([maths, rest], one).verdicts] == ["metaspace"]
    other = judge([maths, rest], rollout("42", topic="code"))
    assert [v.teacher for v in other.verdicts] == ["unigram"]
    nobody = judge([maths, rest], rollout("42"))
    assert not nobody.verdicts
    assert nobody.refused == ["no teacher for this row"]
    assert (nobody.advantages == 0).all()


def test_a_teacher_that_cannot_take_a_rollout_is_left_out_with_its_reason() -> None:
    one = rollout("The answer is 42")
    short, other = seat("metaspace", Scorer(context=10)), seat("unigram", Scorer())
    found = judge([short, other], one)
    assert [verdict.teacher for verdict in found.verdicts] == ["unigram"]
    assert found.refused == ["metaspace: longer than its context of 10 tokens"]
    np.testing.assert_allclose(found.advantages, judge([other], one).advantages)


def test_a_template_that_refuses_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> list[int]:
        raise RowError("no system role", stage="generation", kind="chat_template")

    taken = seat("metaspace", Scorer())
    monkeypatch.setattr(taken.text, "render", refuse)
    assert judge([taken], rollout("42")).refused == ["metaspace: no system role"]


# -- dense signals ----------------------------------------------------------------


wide = pytest.mark.parametrize("wide", [False, True], ids=["all of it", "its best"])


def probable(teacher: str, texts: dict[str, float]) -> dict[int, float]:
    known = vocabulary(teacher)
    return {
        token: prob
        for text, prob in texts.items()
        for token, piece in enumerate(known.pieces)
        if piece == text.encode() and token not in known.texts
    }


@wide
def test_targets_stand_where_the_sampled_token_is_one_and_have_no_advantage_there(
    wide: bool,
) -> None:
    """The twin has the student's letters under other ids."""
    teacher = "byte-level nfc"
    one = rollout("!7!", stop=False)
    rows = probable(teacher, {"!": 0.5, "7": 0.25})
    found = judge([seat(teacher, Scorer(rows=rows, wide=wide), signal="full")], one, coef=0.5)
    targets = found.targets
    assert targets is not None
    assert targets.objective == "jsd"
    known = vocabulary(STUDENT)
    (mark,), (seven,) = known.encode("!"), known.encode("7")
    told = [token for token in (mark, seven) if seat(teacher, Scorer()).prefixes.told[token]]
    where = [n for n, token in enumerate(one.sample.tokens) if token in told]
    assert where
    assert targets.positions.tolist() == where
    assert (found.advantages[where] == 0).all()
    rest = np.setdiff1d(np.arange(len(one.sample.tokens)), where)
    assert (found.advantages[rest] != 0).all()
    assert targets.weights.tolist() == [0.5] * len(where)
    wanted = {mark: 0.5, seven: 0.25}
    for ids, probs in zip(targets.ids, targets.probs, strict=True):
        kept = {int(i): float(p) for i, p in zip(ids, probs, strict=True) if p > 0}
        assert kept == {token: wanted[token] for token in told}


@pytest.mark.parametrize("share", [KNOWN_MASS - 0.01, KNOWN_MASS + 0.01])
def test_top_k_is_used_where_nearly_all_of_it_is_told(share: float) -> None:
    engine = Scorer(rows={**dict.fromkeys(range(40, 60), 0.0)})
    student = vocabulary(STUDENT)
    one = rollout("7", stop=False)
    (seven,) = student.encode("7")
    engine.rows = {seven: share * 0.75, student.encode("8")[0]: share * 0.25}
    found = judge([seat(STUDENT, engine, signal="topk")], one)
    assert engine.asked[0][2] == TOP_K
    if share < KNOWN_MASS:
        assert found.targets is None
        assert found.advantages[0] != 0
        return
    assert found.targets is not None
    assert found.targets.objective == "cross_entropy"
    kept = found.targets.probs[found.targets.ids >= 0]
    assert sorted(kept.tolist()) == pytest.approx([0.25, 0.75])
    assert found.advantages[0] == 0


@wide
def test_where_one_has_yet_to_write_a_space_of_its_own_there_is_no_target(wide: bool) -> None:
    """metaspace begins "7" with a space; what it finds likely there is no word of the student's."""
    rows = probable("metaspace", {"7": 0.6, " ": 0.3})
    one = rollout("77", stop=False)
    found = judge([seat("metaspace", Scorer(rows=rows, wide=wide), signal="full")], one)
    positions = [] if found.targets is None else found.targets.positions.tolist()
    assert 0 not in positions
    assert found.advantages[0] != 0


@wide
def test_a_mixture_has_targets_where_all_teachers_have_them(wide: bool) -> None:
    student = vocabulary(STUDENT)
    (seven,), (eight,) = student.encode("7"), student.encode("8")
    one = rollout("78", stop=False)
    first = Scorer(rows={seven: 0.5, eight: 0.25}, wide=wide)
    second = Scorer(rows={seven: 0.75, 0: 0.25})
    found = judge(
        [
            seat(STUDENT, first, signal="full", weight=3),
            seat(STUDENT, second, signal="full", name="other"),
        ],
        one,
    )
    assert found.targets is not None
    assert found.targets.positions.tolist() == [0]  # the second does not name 8
    ids, probs = found.targets.ids[0], found.targets.probs[0]
    kept = {int(i): float(p) for i, p in zip(ids, probs, strict=True) if p > 0}
    assert kept == pytest.approx({seven: 0.5625, eight: 0.1875, 0: 0.0625})
    assert found.advantages[0] == 0 != found.advantages[1]


@wide
def test_what_one_teacher_cannot_tell_is_no_target_of_the_mixture(wide: bool) -> None:
    """ "The" is open to a teacher of short tokens: its mass on it is in its rest, and to add none
    for it would be to say that it finds it unlikely."""
    taken = seat("unigram", Scorer(), signal="full")
    student = vocabulary(STUDENT)
    untold = np.flatnonzero(~taken.prefixes.told)
    told = np.flatnonzero(taken.prefixes.told)
    hidden = next(n for n in untold.tolist() if student.pieces[n] and n not in student.texts)
    shown = next(n for n in told.tolist() if student.pieces[n] == b"!")
    same = seat(STUDENT, Scorer(rows={hidden: 0.5, shown: 0.25}, wide=wide), signal="full")
    (mark,) = vocabulary("unigram").encode("!")
    taken.engine.rows = {mark: 0.5}  # type: ignore[attr-defined]
    found = judge([same, taken], rollout([hidden, shown], stop=False))
    assert found.targets is not None
    assert found.targets.positions.tolist() == [1]
    assert hidden not in found.targets.ids
    assert found.targets.probs.sum() == pytest.approx(0.375)


def test_teachers_of_two_kinds_of_signal_cannot_share_a_row() -> None:
    (seven,) = vocabulary(STUDENT).encode("7")
    seats = [seat(STUDENT, Scorer(rows={seven: 1.0}), signal=signal) for signal in ("full", "topk")]
    with pytest.raises(FatalJobError, match="full and topk cannot share a row"):
        judge(seats, rollout("7", stop=False))


def test_a_teacher_without_distributions_leaves_all_to_advantages() -> None:
    (seven,) = vocabulary(STUDENT).encode("7")
    seats = [seat(STUDENT, Scorer(rows={seven: 1.0}), signal="full"), seat("unigram", Scorer())]
    found = judge(seats, rollout("7", stop=False))
    assert found.targets is None
    assert (found.advantages != 0).all()


@pytest.mark.parametrize(
    ("wanted", "offered", "dense", "best"),
    [
        ("auto", {"sampled", "topk", "full"}, {"cross_entropy", "jsd"}, "full"),
        ("auto", {"sampled", "topk", "full"}, {"cross_entropy"}, "topk"),
        ("auto", {"sampled", "topk"}, {"jsd"}, "sampled"),
        ("auto", {"sampled"}, {"cross_entropy", "jsd"}, "sampled"),
        ("sampled", {"sampled", "full"}, {"jsd"}, "sampled"),
        ("topk", {"sampled", "topk", "full"}, {"cross_entropy", "jsd"}, "topk"),
    ],
)
def test_the_signal_is_the_most_that_both_sides_have(
    wanted: str, offered: set[str], dense: set[str], best: str
) -> None:
    config = TeacherConfig("t", signal=wanted)
    assert choose_signal(config, frozenset(offered), frozenset(dense)) == best


@pytest.mark.parametrize(
    ("wanted", "offered", "dense"), [("full", {"sampled"}, {"jsd"}), ("topk", {"topk"}, {"jsd"})]
)
def test_a_signal_that_is_not_to_be_had_is_refused(
    wanted: str, offered: set[str], dense: set[str]
) -> None:
    with pytest.raises(NotSupported, match=f"'t': signal '{wanted}' is not to be had"):
        choose_signal(TeacherConfig("t", signal=wanted), frozenset(offered), frozenset(dense))


ALL = frozenset({"sampled", "topk", "full"})
SERVED = frozenset({"sampled", "topk"})
DENSE = frozenset({"cross_entropy", "jsd"})


@pytest.mark.parametrize(
    ("teachers", "offered", "found"),
    [
        ([{}, {}], [ALL, SERVED], ["topk", "topk"]),
        ([{}, {}, {}], [ALL, SERVED, ALL], ["topk", "topk", "topk"]),
        ([{}, {"signal": "sampled"}], [ALL, SERVED], ["full", "sampled"]),
        ([{"when": {"k": "a"}}, {"when": {"k": ["b", "c"]}}], [ALL, SERVED], ["full", "topk"]),
        ([{"when": {"k": "a"}}, {"when": {"k": ["a", "b"]}}], [ALL, SERVED], ["topk", "topk"]),
        ([{"when": {"k": "a"}}, {"when": {"other": 1}}], [ALL, SERVED], ["topk", "topk"]),
    ],
)
def test_teachers_that_may_share_a_row_agree_on_a_signal(
    teachers: list[dict[str, Any]], offered: list[frozenset[str]], found: list[str]
) -> None:
    configs = [TeacherConfig(f"t{number}", **one) for number, one in enumerate(teachers)]
    assert choose_signals(configs, offered, DENSE) == found


def test_teachers_that_are_told_two_kinds_of_signal_are_refused_before_the_first_step() -> None:
    teachers = [TeacherConfig("a", signal="full"), TeacherConfig("b")]
    with pytest.raises(NotSupported, match=r"'a' .signal full. and 'b' .* cannot share a row"):
        choose_signals(teachers, [ALL, SERVED], DENSE)
