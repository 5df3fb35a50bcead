"""The invariants of on-policy distillation, I1 to I12, each by its number.

I12, that a batch is sampled from the weights that the last update left, is every trainer's:
``test_after_a_step_the_next_sampler_samples_from_the_new_weights`` in
``tests/contract/trainers/test_trainer_contract.py``. Here it is the pipeline's part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spider_worker.distill import translation as translation_module
from spider_worker.distill.advantages import FLOOR, span_advantages, span_deltas
from spider_worker.distill.alignment import Spans, align
from spider_worker.distill.losses import policy_loss
from spider_worker.distill.translation import Kind, Translation, Translator
from spider_worker.distill.vocabulary import Vocabulary, build_vocabulary
from tests.support.completions import completions, texts, token_bytes
from tests.support.tokenizers import TRAINED, load, vocabulary

#: Students and teachers of every kind against one of every other kind.
PAIRS = [
    ("byte-level", "metaspace"),
    ("byte-level", "byte-level nfc"),
    ("byte-level", "word-piece"),
    ("metaspace", "byte-level"),
    ("metaspace always", "unigram"),
    ("prepend", "byte-level nfc"),
    ("unigram", "prepend"),
    ("word-piece", "metaspace"),
    ("byte-level nfc", "unigram"),
    ("mistral-v3", "anthropic"),
    ("anthropic", "mistral-v1"),
    ("anthropic", "bert"),
]
#: Those whose encoders keep a text as it is, so that one may be the other's teacher.
FAITHFUL = [
    ("byte-level", "metaspace"),
    ("byte-level", "prepend"),
    ("metaspace", "mistral-v3"),
    ("metaspace always", "byte-level"),
]
DISCOUNTS = st.sampled_from([0.0, 0.5, 0.97, 1.0])
SEEDS = st.integers(0, 2**32 - 1)
each_pair = pytest.mark.parametrize(("student", "teacher"), PAIRS)
thorough = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@functools.cache
def translator(student: str, teacher: str) -> Translator:
    return Translator(vocabulary(student), vocabulary(teacher))


@functools.cache
def sampled(name: str) -> st.SearchStrategy[list[int]]:
    return completions(vocabulary(name))


def ranges(spans: Spans) -> list[tuple[range, range]]:
    pairs = zip(
        itertools.starmap(range, zip(spans.student_begin, spans.student_end, strict=True)),
        itertools.starmap(range, zip(spans.teacher_begin, spans.teacher_end, strict=True)),
        strict=True,
    )
    return list(pairs)


def made_up(seed: int, count: int) -> np.ndarray:
    """Log-probabilities, and what servers give for some."""
    generator = np.random.default_rng(seed)
    odd = generator.choice([-math.inf, math.nan, -1e9], size=count)
    return np.where(generator.random(count) < 0.1, odd, -generator.exponential(3, size=count))


def full(translation: Translation, deltas: np.ndarray, count: int, discount: float) -> np.ndarray:
    return span_advantages(
        translation.spans,
        deltas,
        count,
        coef=1.0,
        discount=discount,
        clip=0.0,
        mask=np.ones(count, bool),
    )


# -- I1, I2 -----------------------------------------------------------------------


@each_pair
@thorough
@given(data=st.data())
def test_i1_spans_are_ordered_disjoint_and_byte_identical(
    student: str, teacher: str, data: st.DataObject
) -> None:
    ids = data.draw(sampled(student))
    found = translator(student, teacher).translate(ids, stopped=data.draw(st.booleans()))
    ours, theirs = vocabulary(student), vocabulary(teacher)
    at = their_place = 0
    for span, (mine, its) in enumerate(ranges(found.spans)):
        assert at <= mine.start < mine.stop <= len(ids)
        assert their_place <= its.start < its.stop <= len(found.teacher_tokens)
        at, their_place = mine.stop, its.stop
        if found.kinds[span] != Kind.TEXT:
            assert len(mine) == len(its) == 1
            continue
        said = token_bytes(ours, ids[mine.start : mine.stop])
        wanted = token_bytes(theirs, found.teacher_tokens[its.start : its.stop])
        assert same(theirs, said, wanted, exactly=bool(found.level[span]), first=mine.start == 0)


def same(teacher: Vocabulary, said: bytes, wanted: bytes, *, exactly: bool, first: bool) -> bool:
    """Byte for byte, but for a space that a tokenizer makes up before a text; where a teacher's
    encoder rewrites what it is given, as that one writes it."""
    if said == wanted or (first and said.lstrip(b" ") == wanted.lstrip(b" ")):
        return True
    if exactly:
        return False
    if said.strip(b" ") == wanted.strip(b" ") or not wanted:
        return True  # a space of the teacher's behind structure; its unknown token
    normalizer = teacher.encoders[0].normalizer
    text, its = said.decode(), wanted.decode()
    text = text if normalizer is None else str(normalizer.normalize_str(text))

    def plain(one: str) -> str:
        return "".join(one.replace("▁", "").split())

    return plain(text) == plain(its) or plain(its) in plain(text)  # a part may be unknown


@each_pair
@thorough
@given(data=st.data())
def test_i2_each_token_is_in_one_span_or_was_dropped_for_a_reason(
    student: str, teacher: str, data: st.DataObject
) -> None:
    ids = data.draw(sampled(student))
    found = translator(student, teacher).translate(ids, stopped=data.draw(st.booleans()))
    times = np.zeros(len(ids), dtype=int)
    for mine, _ in ranges(found.spans):
        times[mine.start : mine.stop] += 1
    assert times.max(initial=0) <= 1
    assert (times == 0).sum() == sum(found.dropped.values())
    assert all(count > 0 for count in found.dropped.values())
    assert found.coverage == (times.mean() if len(ids) else 1.0)


@pytest.mark.parametrize(("student", "teacher"), [*FAITHFUL, *(pair[::-1] for pair in FAITHFUL)])
@thorough
@given(text=texts())
def test_i2_of_valid_text_all_is_covered(student: str, teacher: str, text: str) -> None:
    ids = vocabulary(student).encode(text)
    found = translator(student, teacher).translate(ids, stopped=False)
    assert found.dropped == {}


# -- I3, I4, I5, I6 ---------------------------------------------------------------


@each_pair
@thorough
@given(data=st.data(), seed=SEEDS)
def test_i3_deltas_add_up_to_the_difference_over_what_is_aligned(
    student: str, teacher: str, data: st.DataObject, seed: int
) -> None:
    ids = data.draw(sampled(student))
    found = translator(student, teacher).translate(ids, stopped=data.draw(st.booleans()))
    mine, its = made_up(seed, len(ids)), made_up(seed + 1, len(found.teacher_tokens))
    deltas, raised = span_deltas(found.spans, mine, its)
    ours = [mine[n] for span, _ in ranges(found.spans) for n in span]
    theirs = [its[n] for _, span in ranges(found.spans) for n in span]
    wanted = sum(map(number, ours)) - sum(map(number, theirs))
    assert deltas.sum() == pytest.approx(wanted, abs=1e-7)
    assert raised == sum(not value >= FLOOR for value in theirs)
    assert np.isfinite(deltas).all()


def number(value: float) -> float:
    return value if value >= FLOOR else FLOOR


@functools.cache
def twin(name: str) -> Vocabulary:
    """The same tokenizer with one more name, so that its ids are not taken for the same."""
    import copy

    tokenizer = copy.deepcopy(load(name))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<one more>"]})
    return build_vocabulary(tokenizer)


@pytest.mark.parametrize("aligned", [False, True], ids=["same ids", "by bytes"])
@pytest.mark.parametrize("name", [name for name in TRAINED if name != "word-piece"])
@thorough
@given(data=st.data(), discount=DISCOUNTS)
def test_i4_of_one_tokenizer_it_is_the_plain_kl_of_each_token(
    name: str, aligned: bool, data: st.DataObject, discount: float
) -> None:
    known = vocabulary(name)
    ids = [*known.encode(data.draw(texts())), known.end_of_turn or 0]
    if aligned and not (found := known.encode_ends(known.bytes_of(ids[:-1]).decode())):
        return
    if aligned and found is not None and found.ids.tolist() != ids[:-1]:
        return  # a text that the tokenizer itself does not give back
    teacher = twin(name) if aligned else known
    found = Translator(known, teacher).translate(ids, stopped=True)
    assert found.teacher_tokens.tolist() == ids
    mine, its = -np.random.default_rng(len(ids)).exponential(size=(2, len(ids)))
    deltas, _ = span_deltas(found.spans, mine, its)
    wanted = np.zeros(len(ids))
    for t in range(len(ids)):
        wanted[t] = sum(discount ** (k - t) * (its[k] - mine[k]) for k in range(t, len(ids)))
    np.testing.assert_allclose(full(found, deltas, len(ids), discount), wanted, atol=1e-9)


@each_pair
@thorough
@given(data=st.data(), seed=SEEDS, discount=DISCOUNTS, clip=st.sampled_from([0.0, 5.0]))
def test_i5_no_advantage_where_the_mask_is_0(
    student: str, teacher: str, data: st.DataObject, seed: int, discount: float, clip: float
) -> None:
    ids = data.draw(sampled(student))
    found = translator(student, teacher).translate(ids, stopped=False)
    mine, its = made_up(seed, len(ids)), made_up(seed + 1, len(found.teacher_tokens))
    deltas, _ = span_deltas(found.spans, mine, its)
    mask = np.random.default_rng(seed).random(len(ids)) < 0.5
    advantages = span_advantages(
        found.spans, deltas, len(ids), coef=2.0, discount=discount, clip=clip, mask=mask
    )
    assert (advantages[~mask] == 0).all()
    covered = np.zeros(len(ids), bool)
    for mine, _ in ranges(found.spans):
        covered[mine.start : mine.stop] = True
    assert (advantages[~covered] == 0).all()
    assert np.isfinite(advantages).all()


@pytest.mark.parametrize("aligned", [False, True], ids=["same ids", "by bytes"])
@thorough
@given(text=texts(), seed=SEEDS, discount=DISCOUNTS)
def test_i6_a_teacher_that_is_the_student_gives_no_advantage(
    aligned: bool, text: str, seed: int, discount: float
) -> None:
    known = vocabulary("byte-level")
    ids = [*known.encode(text), known.end_of_turn or 0]
    teacher = twin("byte-level") if aligned else known
    found = Translator(known, teacher).translate(ids, stopped=True)
    logprobs = made_up(seed, len(ids))
    deltas, _ = span_deltas(found.spans, logprobs, logprobs)
    assert (full(found, deltas, len(ids), discount) == 0).all()


# -- I7 ---------------------------------------------------------------------------


def behind(found: Translation, place: int) -> list[tuple[int, int, int, int, int]]:
    """Spans behind a place of the completion, counted from the last of either side."""
    count = len(found.teacher_tokens)
    return [
        (*(n - place for n in (mine.start, mine.stop)), its.start - count, its.stop - count, kind)
        for (mine, its), kind in zip(ranges(found.spans), found.kinds.tolist(), strict=True)
        if mine.start >= place
    ]


@pytest.mark.parametrize(("student", "teacher"), [*PAIRS, ("metaspace", "word-piece")])
@thorough
@given(data=st.data())
def test_i7_a_bad_segment_leaves_later_ones_unchanged(
    student: str, teacher: str, data: st.DataObject
) -> None:
    """Whatever stands between two delimiters, what is behind them is what it would be behind
    nothing but a delimiter, and so is what stands before."""
    ours = vocabulary(student)
    delimiter = lost(student, teacher)
    before, bad = data.draw(sampled(student)), data.draw(sampled(student))
    after = ours.encode("and so it went on, 12 times")
    head = [*before, delimiter]
    whole = translator(student, teacher).translate([*head, *bad, delimiter, *after], stopped=False)
    plain = translator(student, teacher).translate([*head, delimiter, *after], stopped=False)
    assert behind(whole, len(head) + len(bad) + 1) == behind(plain, len(head) + 1)
    kept = [pair for pair in ranges(whole.spans) if pair[0].stop <= len(before)]
    assert kept == [pair for pair in ranges(plain.spans) if pair[0].stop <= len(before)]
    assert (
        len(kept) > 0
        or len(translator(student, teacher).translate(before, stopped=False).spans) == 0
    )


def lost(student: str, teacher: str) -> int:
    """A token of the student's that the teacher has no word for."""
    ours, theirs = vocabulary(student), vocabulary(teacher)
    return next(
        n
        for n in [*sorted(ours.special), len(ours.pieces)]
        if theirs.structure(ours.texts.get(n, "")) is None
    )


@pytest.mark.parametrize("teacher", ["metaspace", "unigram", "mistral-v3"])
@pytest.mark.parametrize("bad", [b"\xff", b"\xe2\x82", b"\x80\x80\x80"])
def test_i7_noise_in_a_text_moves_nothing_behind_it(teacher: str, bad: bytes) -> None:
    ours = vocabulary("byte-level")
    noise = [next(n for n, p in enumerate(ours.pieces) if p == bytes([byte])) for byte in bad]
    before, after = ours.encode("some words"), ours.encode(" and 12 others.")
    found = translator("byte-level", teacher).translate([*before, *noise, *after], stopped=False)
    twice = translator("byte-level", teacher).translate(
        [*before, *noise, *noise, *after], stopped=False
    )
    place = len(before) + len(noise)
    assert behind(found, place) == behind(twice, place + len(noise))
    assert found.dropped == {"no valid UTF-8": len(noise)}


# -- I8 ---------------------------------------------------------------------------


def work(run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Function calls, and entries that are aligned: neither depends on the machine."""
    calls, entries = 0, 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    def counted(student: np.ndarray, teacher: np.ndarray, **starts: int) -> Spans:
        nonlocal entries
        entries += len(student) + len(teacher)
        return align(student, teacher, **starts)

    monkeypatch.setattr(translation_module, "align", counted)
    profiler = sys.getprofile()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(profiler)
        monkeypatch.undo()
    return calls, entries


@pytest.mark.parametrize("kind", ["text", "noise", "structure", "rewritten"])
@pytest.mark.parametrize("teacher", ["metaspace", "byte-level nfc", "word-piece"])
def test_i8_twice_the_length_is_at_most_about_twice_the_work(
    teacher: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = vocabulary("byte-level")
    bad = next(n for n, piece in enumerate(ours.pieces) if piece == b"\xff")
    unit = {
        "text": ours.encode("It was the best of times, 12 of them. "),
        "noise": [*ours.encode("best of"), bad, *ours.encode(" times"), bad],
        "structure": [*ours.encode("think"), ours.structural["<think>"]],
        "rewritten": ours.encode("cafe\u0301, ﬁne. "),
    }[kind]
    made = translator("byte-level", teacher)
    made.translate(unit, stopped=False)  # what is made once
    small, large = (
        work(lambda times=times: made.translate(unit * times, stopped=False), monkeypatch)
        for times in (100, 200)
    )
    assert large[0] <= 2.2 * small[0] + 50
    assert large[1] <= 2.2 * small[1]


# -- I9 ---------------------------------------------------------------------------


@each_pair
@thorough
@given(data=st.data())
def test_i9_each_value_lands_on_its_own_token(
    student: str, teacher: str, data: st.DataObject
) -> None:
    """log p = −id/1000 on both sides: δ and the advantages tell which tokens they are of."""
    ids = np.array(data.draw(sampled(student)), dtype=np.int64)
    found = translator(student, teacher).translate(ids.tolist(), stopped=False)
    deltas, _ = span_deltas(found.spans, -ids / 1000, -found.teacher_tokens / 1000)
    advantages = full(found, deltas, len(ids), 0.0)
    for span, (mine, its) in enumerate(ranges(found.spans)):
        wanted = found.teacher_tokens[list(its)].sum() - ids[list(mine)].sum()
        assert deltas[span] * 1000 == pytest.approx(wanted, abs=1e-6)
        assert advantages[list(mine)] == pytest.approx(-deltas[span])


# -- I10 --------------------------------------------------------------------------

STUDENT_PIECES = ("a", "b", "ab")
TEACHER_PIECES = ("a", "b", "aa", "ab", "ba", "bb")
LENGTH = 3


@functools.cache
def toy() -> Translator:
    """A student that writes a, b and ab, and a teacher that takes letters two by two."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def made(pieces: Sequence[str]) -> Any:
        merges = [(piece[0], piece[1]) for piece in pieces if len(piece) == 2]
        backend = Tokenizer(models.BPE({text: n for n, text in enumerate(pieces)}, merges))
        backend.decoder = decoders.Fuse()
        return backend

    student, teacher = made(STUDENT_PIECES), made(TEACHER_PIECES)
    teacher.pre_tokenizer = pre_tokenizers.Split(Regex("[ab]{2}"), "isolated")
    both = (PreTrainedTokenizerFast(tokenizer_object=one) for one in (student, teacher))
    return Translator(*map(build_vocabulary, both))


@dataclasses.dataclass(frozen=True)
class Case:
    """A completion of the toy, and its spans."""

    tokens: tuple[int, ...]
    translation: Translation


@functools.cache
def cases() -> list[Case]:
    found = [
        Case(tokens, toy().translate(tokens, stopped=False))
        for tokens in itertools.product(range(len(STUDENT_PIECES)), repeat=LENGTH)
    ]
    assert all(case.translation.coverage == 1 for case in found)
    return found


def chain(weights: torch.Tensor, tokens: Iterable[int]) -> torch.Tensor:
    """Log-probabilities under a model that looks at the token before; its last row begins."""
    table, before = torch.log_softmax(weights, dim=1), -1
    found = []
    for token in tokens:
        found.append(table[before, token])
        before = token
    return torch.stack(found)


def toy_weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    student = torch.randn((4, 3), generator=generator, dtype=torch.float64)
    teacher = torch.randn((7, 6), generator=generator, dtype=torch.float64)
    return student, teacher


def finite_differences(value: Callable[[torch.Tensor], float], at: torch.Tensor) -> torch.Tensor:
    slope, step = torch.zeros_like(at), 1e-5
    for place in np.ndindex(*at.shape):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved[place] += sign * step
            ends.append(value(moved))
        slope[place] = (ends[0] - ends[1]) / (2 * step)
    return slope


def deltas_of(case: Case, student: torch.Tensor, teacher: torch.Tensor) -> np.ndarray:
    mine = chain(student, case.tokens).detach().numpy()
    its = chain(teacher, case.translation.teacher_tokens.tolist()).numpy()
    deltas, _ = span_deltas(case.translation.spans, mine, its)
    return deltas


def expected_gradient(
    student: torch.Tensor, teacher: torch.Tensor, discount: float, credit: str = "full"
) -> torch.Tensor:
    """Of the policy gradient's loss, over all completions by their probability."""
    weights = student.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for case in cases():
        logprobs = chain(weights, case.tokens)
        old = logprobs.detach()
        deltas = deltas_of(case, student, teacher)
        advantages = full(case.translation, deltas, LENGTH, discount)
        if credit == "uniform":
            for mine, _ in ranges(case.translation.spans):
                advantages[list(mine)] /= len(mine)
        mask = torch.ones(LENGTH, dtype=torch.bool)
        loss = policy_loss("importance_sampling", logprobs, old, torch.from_numpy(advantages), mask)
        total = total + old.sum().exp() * loss
    (slope,) = torch.autograd.grad(total, weights)
    return slope


def test_i10_full_credit_is_the_gradient_of_the_kl() -> None:
    """Undiscounted: of the whole completion's KL."""
    student, teacher = toy_weights()

    def kl(weights: torch.Tensor) -> float:
        return sum(
            float(chain(weights, case.tokens).sum().exp())
            * float(deltas_of(case, weights, teacher).sum())
            for case in cases()
        )

    wanted = finite_differences(kl, student)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(
        expected_gradient(student, teacher, 1.0), wanted, atol=1e-8, rtol=1e-6
    )


def test_i10_full_credit_is_the_gradient_of_each_spans_kl() -> None:
    """Discount 0: of the KL of each span, given what the student wrote before it. Spans of two
    tokens are among them, so that sharing the credit out does not pass."""
    student, teacher = toy_weights()
    assert any(
        width > 1
        for case in cases()
        for width in (case.translation.spans.student_end - case.translation.spans.student_begin)
    )

    def kl(weights: torch.Tensor) -> float:
        total = 0.0
        for case in cases():
            now, old = chain(weights, case.tokens), chain(student, case.tokens)
            deltas = deltas_of(case, weights, teacher)
            for (mine, _), delta in zip(ranges(case.translation.spans), deltas, strict=True):
                moved = (now - old)[list(mine)].sum().exp()
                total += float(old.sum().exp() * moved * delta)
        return total

    wanted = finite_differences(kl, student)
    torch.testing.assert_close(
        expected_gradient(student, teacher, 0.0), wanted, atol=1e-8, rtol=1e-6
    )
    shared = expected_gradient(student, teacher, 0.0, credit="uniform")
    assert (shared - wanted).abs().max() > 0.05


# -- I11 --------------------------------------------------------------------------


@pytest.mark.parametrize(("one", "other"), FAITHFUL)
@thorough
@given(text=texts())
def test_i11_the_other_way_round_each_delta_is_negated(one: str, other: str, text: str) -> None:
    first, second = vocabulary(one), vocabulary(other)
    found = [known.encode_ends(text) for known in (first, second)]
    if not all(encoding is not None and encoding.literal for encoding in found):
        return  # one of them does not keep the text
    mine, its = (encoding.ids.tolist() for encoding in found if encoding is not None)
    there = translator(one, other).translate(mine, stopped=False)
    back = translator(other, one).translate(its, stopped=False)
    if there.teacher_tokens.tolist() != its or back.teacher_tokens.tolist() != mine:
        return  # a space that both texts begin with, and one of them alone makes up
    p, q = -np.arange(1, len(mine) + 1) / 7, -np.arange(1, len(its) + 1) / 11
    deltas, _ = span_deltas(there.spans, p, q)
    negated, _ = span_deltas(back.spans, q, p)
    assert ranges(back.spans) == [(its, mine) for mine, its in ranges(there.spans)]
    np.testing.assert_allclose(deltas, -negated)


# -- I12 --------------------------------------------------------------------------


def test_i12_every_trainer_is_held_to_fresh_weights() -> None:
    """So that the contract's test does not go unnoticed."""
    from tests.contract.trainers import test_trainer_contract as contract

    assert hasattr(contract, "test_after_a_step_the_next_sampler_samples_from_the_new_weights")
