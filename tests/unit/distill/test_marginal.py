"""Targets from a teacher's distribution, against the distribution of what both would write."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spider_worker.distill.alignment import Spans
from spider_worker.distill.marginal import PrefixMap
from spider_worker.distill.translation import Translator
from spider_worker.distill.vocabulary import Vocabulary
from tests.support.tokenizers import TRAINED, vocabulary

ALPHABET, LENGTH = b"abc", 5


def of_pieces(
    pieces: Sequence[bytes | None],
    *,
    structural: Mapping[str, int] | None = None,
    special: frozenset[int] = frozenset(),
    fallbacks: frozenset[int] = frozenset(),
    stop: int | None = None,
) -> Vocabulary:
    """A vocabulary without a tokenizer."""
    return Vocabulary(
        name="pieces",
        pieces=pieces,
        structural=structural or {},
        special=special,
        fallbacks=fallbacks,
        stops=frozenset() if stop is None else frozenset({stop}),
        end_of_turn=stop,
        exact=True,
        tidies=False,
        spaced=False,
        tokenizer=None,
        encoders=(None, None),
    )


def images(student: Vocabulary, teacher: Vocabulary) -> dict[bytes | None, bytes | None]:
    """φ by pieces, where there is one."""
    found = PrefixMap(student, teacher).image
    return {
        teacher.pieces[token]: student.pieces[image]
        for token, image in enumerate(found.tolist())
        if image >= 0
    }


def one_row(
    prefixes: PrefixMap, sampled: int, ids: Sequence[int], probs: Sequence[float]
) -> dict[int, float]:
    """The targets of one position, {} where it is left to the advantage."""
    with np.errstate(divide="ignore"):
        logprobs = np.log(np.array([probs], dtype=np.float32))
    positions, found, targets = prefixes.targets(
        Spans.single(0, 1, 0, 1), np.array([sampled]), np.array([ids]), logprobs
    )
    assert found.shape == targets.shape
    if not positions.size:
        return {}
    assert positions.tolist() == [0]
    return {
        token: prob
        for token, prob in zip(found[0].tolist(), targets[0].tolist(), strict=True)
        if token >= 0
    }


# -- by hand ----------------------------------------------------------------------


def test_a_longer_teacher_token_goes_to_its_longest_student_prefix() -> None:
    student = of_pieces([b"a", b"b", b"ab", b"c"])
    teacher = of_pieces([b"a", b"b", b"abc", b"ab", b"ba", b"c"])
    wanted = {b"abc": b"ab", b"ba": b"b"}
    assert images(student, teacher) == {p: wanted.get(p, p) for p in teacher.pieces}


def test_what_the_student_may_write_in_a_longer_token_is_not_told() -> None:
    """The student has 12; the teacher says 1 and then 2. Its mass on 1 is open, and so the mass of
    1a, which would be the student's 1 as well, tells only a part of it; as does 123 of 12."""
    student = of_pieces([b"1", b"2", b"12", b"a"])
    teacher = of_pieces([b"1", b"2", b"1a", b"a", b"123"])
    assert images(student, teacher) == {b"2": b"2", b"a": b"a"}
    assert PrefixMap(student, teacher).told.tolist() == [False, True, False, True]


def test_a_teacher_token_that_the_student_has_too_is_not_open_for_it() -> None:
    student = of_pieces([b"1", b"12"])
    teacher = of_pieces([b"1", b"12"])
    assert images(student, of_pieces([b"1", b"12", b"3"])) == {b"1": b"1", b"12": b"12"}
    assert PrefixMap(student, teacher).image.tolist() == [0, 1]


def test_of_two_tokens_of_one_byte_the_one_that_encoding_uses_is_the_target() -> None:
    for student in (
        of_pieces([b"a", b"A", b"A"], fallbacks=frozenset({1})),  # bytes first, as in Llama
        of_pieces([b"a", b"A", b"A"], fallbacks=frozenset({2})),  # bytes last, as in Gemma
    ):
        teacher = of_pieces([b"A", b"a"])
        (kept,) = {1, 2} - student.fallbacks
        assert PrefixMap(student, teacher).image.tolist() == [kept, 0]


def test_all_teacher_tokens_of_one_piece_count() -> None:
    teacher = of_pieces([b"a", b"a", b"b"], fallbacks=frozenset({0}))
    student = of_pieces([b"a", b"b"])
    assert one_row(PrefixMap(student, teacher), 0, [0, 1, 2], [0.25, 0.5, 0.125]) == {
        0: 0.75,
        1: 0.125,
    }


def test_a_character_that_the_student_spells_in_bytes_goes_to_its_first() -> None:
    student = of_pieces([b"\xe2", b"\x82", b"\xac", b"a"])
    teacher = of_pieces(["€".encode(), b"a"])
    assert images(student, teacher) == {"€".encode(): b"\xe2", b"a": b"a"}


def test_structure_goes_to_structure_and_a_stop_to_the_students_end_of_turn() -> None:
    student = of_pieces(
        [b"a", b"<think>", None, b"<"],
        structural={"<think>": 1, "<|im_end|>": 2},
        special=frozenset({2}),
        stop=2,
    )
    teacher = of_pieces(
        [b"a", None, None, None, b"<"],
        structural={"[THINK]": 1, "</s>": 2, "<pad>": 3},
        special=frozenset({1, 2, 3}),
        stop=2,
    )
    assert PrefixMap(student, teacher).image.tolist() == [0, 1, 2, -1, 3]


def test_an_added_token_that_the_other_lacks_is_text() -> None:
    lacking = of_pieces([b"<", b"t", b">"])
    having = of_pieces([b"<", b"t", b">", b"<t>"], structural={"<t>": 3})
    # The teacher's <t> begins with the student's <; the student's <t> leaves the teacher's < open.
    assert PrefixMap(lacking, having).image.tolist() == [0, 1, 2, 0]
    assert PrefixMap(having, lacking).image.tolist() == [-1, 1, 2]


def test_the_half_of_a_pair_that_the_other_lacks_is_no_text() -> None:
    student = of_pieces([b"<", None], structural={"[TOOL_CALLS]": 1}, special=frozenset({1}))
    teacher = of_pieces(
        [b"<", b"<tool_call>", b"</tool_call>"],
        structural={"<tool_call>": 1, "</tool_call>": 2},
    )
    assert PrefixMap(student, teacher).image.tolist() == [0, 1, -1]
    assert PrefixMap(teacher, student).image.tolist() == [0, 1]


def test_where_ids_mean_the_same_each_is_its_own_image() -> None:
    known = vocabulary("byte-level")
    assert PrefixMap(known, known).image.tolist() == list(range(len(known.pieces)))


def test_positions_are_where_spans_begin_and_the_sampled_token_is_a_target() -> None:
    student = of_pieces([b"a", b"b", b"c"])
    teacher = of_pieces([b"a", b"b", b"c", b"aa"])
    spans = Spans.joined([Spans.single(0, 2, 0, 1), Spans.single(3, 4, 2, 4)])
    sampled = np.array([0, 1, 1, 2])
    ids = np.array([[3, 0], [1, 1], [2, 1], [0, 0]])
    logprobs = np.log(np.array([[0.5, 0.25], [1, 1], [0.75, 0.125], [1, 1]], dtype=np.float32))
    positions, found, probs = PrefixMap(student, teacher).targets(spans, sampled, ids, logprobs)
    assert positions.tolist() == [0, 3]
    assert [sorted(zip(i, p, strict=True)) for i, p in zip(found, probs, strict=True)] == [
        [(-1, 0.0), (0, 0.75)],
        [(1, 0.125), (2, 0.75)],
    ]
    sampled[3] = 0  # the teacher does not think of it here
    positions, *_ = PrefixMap(student, teacher).targets(spans, sampled, ids, logprobs)
    assert positions.tolist() == [0]


def test_what_is_not_told_elsewhere_is_no_target() -> None:
    student, teacher = of_pieces([b"a", b"b"]), of_pieces([b"a", b"b", b"c"])
    spans, ids = Spans.single(0, 1, 0, 1), np.array([[0, 1]])
    logprobs = np.log(np.array([[0.5, 0.25]], dtype=np.float32))
    prefixes = PrefixMap(student, teacher)
    told = np.array([True, False])
    _, found, probs = prefixes.targets(spans, np.array([0]), ids, logprobs, told=told)
    assert dict(zip(found[0].tolist(), probs[0].tolist(), strict=True)) == {0: 0.5, -1: 0.0}
    positions, *_ = prefixes.targets(spans, np.array([1]), ids, logprobs, told=told)
    assert not positions.size


def test_rows_that_are_not_full_and_ids_beyond_the_vocabulary_are_left_out() -> None:
    prefixes = PrefixMap(of_pieces([b"a", b"b"]), of_pieces([b"a", b"b", b"c"]))
    assert one_row(prefixes, 0, [0, 99, -1], [0.5, 0.25, 0.0]) == {0: 0.5}


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_nothing_to_compare(shape: tuple[int, int]) -> None:
    prefixes = PrefixMap(of_pieces([b"a"]), of_pieces([b"a", b"b"]))
    count = shape[0]
    spans = Spans(*(np.arange(count) + n for n in (0, 1, 0, 1)))
    positions, ids, probs = prefixes.targets(
        spans, np.zeros(count, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    )
    assert positions.size == ids.size == probs.size == 0


# -- against brute force ----------------------------------------------------------


def first_token(pieces: Sequence[bytes], text: bytes) -> int:
    """Of a tokenizer that takes the longest that fits."""
    return max(
        (n for n, p in enumerate(pieces) if text.startswith(p)), key=lambda n: len(pieces[n])
    )


PIECES = st.sets(
    st.binary(min_size=2, max_size=4).map(lambda data: bytes(97 + byte % 3 for byte in data)),
    max_size=8,
).map(lambda found: [bytes([letter]) for letter in ALPHABET] + sorted(found))


@given(student=PIECES, teacher=PIECES, seed=st.integers(0, 2**32 - 1))
def test_a_target_is_what_the_student_would_write_if_it_meant_the_same(
    student: list[bytes], teacher: list[bytes], seed: int
) -> None:
    """A distribution over texts, and two tokenizers that take the longest token: whatever the
    first tokens' probabilities are, a target must have the student's, exactly."""
    texts = [bytes(letters) for letters in itertools.product(ALPHABET, repeat=LENGTH)]
    weights = np.random.default_rng(seed).dirichlet(np.full(len(texts), 0.05))
    ours, theirs = np.zeros(len(student)), np.zeros(len(teacher))
    for text, weight in zip(texts, weights, strict=True):
        ours[first_token(student, text)] += weight
        theirs[first_token(teacher, text)] += weight
    prefixes = PrefixMap(of_pieces(student), of_pieces([*teacher, b"zz"]))  # not the same ids
    found: dict[int, float] = {}
    for sampled in range(len(student)):
        found |= one_row(prefixes, sampled, range(len(teacher)), theirs.tolist())
    for token, prob in found.items():
        assert prob == pytest.approx(ours[token], abs=1e-6)
    # What both have, and what is no part of a longer token of the student's alone, is told.
    longer = [piece for piece in student if piece not in teacher]
    for token, piece in enumerate(student):
        if piece in teacher and not any(one.startswith(piece) for one in longer):
            assert token in found


@given(teacher=PIECES, student=PIECES)
def test_without_longer_student_tokens_it_is_the_definition(
    student: list[bytes], teacher: list[bytes]
) -> None:
    """φ(t) the longest student token that t begins with, target[u] = Σ q(t) over φ(t) = u."""
    student = [piece for piece in student if piece in teacher]
    q = np.random.default_rng(0).dirichlet(np.ones(len(teacher)))
    wanted = np.zeros(len(student))
    for t, piece in enumerate(teacher):
        phi = max((u for u in student if piece.startswith(u)), key=len)
        wanted[student.index(phi)] += q[t]
    prefixes = PrefixMap(of_pieces(student), of_pieces([*teacher, b"zz"]))
    found = one_row(prefixes, 0, range(len(teacher)), q.tolist())
    assert found == pytest.approx(dict(enumerate(wanted)), abs=1e-6)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("teacher", TRAINED)
@pytest.mark.parametrize("student", TRAINED)
def test_between_tokenizers_images_begin_what_they_stand_for(student: str, teacher: str) -> None:
    ours, theirs = vocabulary(student), vocabulary(teacher)
    prefixes = PrefixMap(ours, theirs)
    mapped = np.flatnonzero(prefixes.image >= 0)
    assert len(mapped) > 20
    if ours.same_ids(theirs):
        assert (prefixes.image == np.arange(len(ours.pieces))).all()
        return
    for token in mapped.tolist():
        image = int(prefixes.image[token])
        if token in theirs.stops:
            assert image == ours.end_of_turn
        elif theirs.pieces[token] is not None and token not in theirs.texts:
            assert (theirs.pieces[token] or b"").startswith(ours.pieces[image] or b"?")
            assert image not in ours.fallbacks or ours.pieces.count(ours.pieces[image]) == 1
    ids = np.array(ours.encode("What is 12 plus 30?"))
    translation = Translator(ours, theirs).translate(ids.tolist(), stopped=False)
    rows = np.tile(np.arange(len(theirs.pieces)), (len(translation.teacher_tokens), 1))
    flat = np.full(rows.shape, -np.log(rows.shape[1]), np.float32)
    positions, found, probs = prefixes.targets(
        translation.spans.taken(translation.level), ids, rows, flat
    )
    assert set(positions) <= set(translation.spans.student_begin)
    assert ((found == ids[positions][:, None]).sum(axis=1) == 1).all()
    assert (probs.sum(axis=1) <= 1 + 1e-5).all()
