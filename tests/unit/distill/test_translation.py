"""Completions as a teacher's tokens: text, structure, stops, noise; every student and teacher."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

from spider_worker.distill.translation import Kind, Translation, Translator
from spider_worker.distill.vocabulary import Vocabulary, build_vocabulary
from tests.support.completions import token_bytes
from tests.support.tokenizers import ALL, TEXTS, load, vocabulary

#: Teachers that write some texts otherwise than they are given, and how that looks.
REWRITING = ("anthropic", "bert", "byte-level nfc", "unigram", "word-piece")


def translate(
    student: str,
    teacher: str,
    ids: Sequence[int],
    *,
    stopped: bool = False,
) -> Translation:
    translator = Translator(vocabulary(student), vocabulary(teacher))
    return translator.translate(ids, stopped=stopped)


def token(name: str, text: str) -> int:
    return vocabulary(name).structural[text]


def sides(
    student: Vocabulary, ids: Sequence[int], teacher: Vocabulary, found: Translation
) -> list[tuple[bytes, bytes]]:
    """The bytes of each span, on either side."""
    spans = found.spans
    return [
        (
            token_bytes(student, ids[spans.student_begin[c] : spans.student_end[c]]),
            token_bytes(
                teacher, found.teacher_tokens[spans.teacher_begin[c] : spans.teacher_end[c]]
            ),
        )
        for c in range(len(spans))
    ]


@pytest.mark.parametrize("teacher", ALL)
@pytest.mark.parametrize("student", ALL)
def test_any_student_is_compared_with_any_teacher(student: str, teacher: str) -> None:
    """Valid text is covered whole, and each span says the same on both sides."""
    ours, theirs = vocabulary(student), vocabulary(teacher)
    translator = Translator(ours, theirs)
    for text in TEXTS.values():
        ids = ours.encode(text)
        if any(ours.pieces[one] is None for one in ids):
            continue  # the student has no token for a character
        found = translator.translate(ids, stopped=False)
        if ids and not text.strip() and theirs.tidies and not ours.tidies:
            assert found.coverage == 0  # they have no token for spaces
            continue
        assert found.dropped == {}
        assert found.coverage == 1
        for span, (mine, its) in enumerate(sides(ours, ids, theirs, found)):
            if mine == its or (span == 0 and mine.lstrip(b" ") == its.lstrip(b" ")):
                continue
            assert teacher in REWRITING or ours.tidies or "▁" in text
            assert not found.level[span]
            begin, end = found.spans.teacher_begin[span], found.spans.teacher_end[span]
            if all(theirs.pieces[one] is not None for one in found.teacher_tokens[begin:end]):
                assert_same_but_for_writing(theirs, mine, its)


def assert_same_but_for_writing(teacher: Vocabulary, mine: bytes, its: bytes) -> None:
    """The student's bytes are the teacher's as its own normaliser would have them; WordPiece
    leaves spaces out."""
    normalizer = teacher.encoders[0].normalizer

    def plain(data: bytes) -> str:
        text = data.decode()
        written = text if normalizer is None else normalizer.normalize_str(text)
        return str(written).replace("▁", "").replace(" ", "").replace("\n", "").replace("\t", "")

    assert plain(mine) == plain(its)


# -- stops ------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["metaspace", "unigram", "tekken", "byte-level nfc"])
def test_a_stop_becomes_the_teachers_end_of_turn_and_no_letters(teacher: str) -> None:
    ids = [*vocabulary("byte-level").encode("done"), token("byte-level", "<|im_end|>")]
    found = translate("byte-level", teacher, ids, stopped=True)
    assert found.teacher_tokens[-1] == vocabulary(teacher).end_of_turn
    assert found.kinds[-1] == Kind.STOP
    assert (found.kinds == Kind.STOP).sum() == 1
    assert found.coverage == 1
    text = vocabulary(teacher).bytes_of(found.teacher_tokens[:-1].tolist())
    assert text.strip() == b"done"


def test_a_cut_completion_has_no_stop() -> None:
    found = translate("byte-level", "metaspace", vocabulary("byte-level").encode("done"))
    assert Kind.STOP not in found.kinds
    assert vocabulary("metaspace").end_of_turn not in found.teacher_tokens


def test_a_stop_alone() -> None:
    found = translate("byte-level", "metaspace", [token("byte-level", "<|im_end|>")], stopped=True)
    assert found.teacher_tokens.tolist() == [vocabulary("metaspace").end_of_turn]
    assert found.coverage == 1


@pytest.mark.parametrize("teacher", ["metaspace", "byte-level"])
@pytest.mark.parametrize("stopped", [False, True])
def test_nothing_is_nothing(teacher: str, stopped: bool) -> None:
    found = translate("byte-level", teacher, [], stopped=stopped)
    assert found.teacher_tokens.shape == (0,)
    assert found.teacher_tokens.dtype == np.int64
    assert len(found.spans) == 0
    assert found.coverage == 1
    assert found.longest_span == 0


def test_a_stop_typed_as_letters_stays_letters() -> None:
    ids = vocabulary("metaspace").encode("I say <|im_end|> and go on")
    found = translate("metaspace", "byte-level", ids)
    assert token("byte-level", "<|im_end|>") not in found.teacher_tokens
    assert found.coverage == 1
    assert set(found.kinds.tolist()) == {Kind.TEXT}


def test_a_teacher_that_knows_no_end_of_turn_leaves_the_stop_out() -> None:
    teacher = build_vocabulary(without_end("word-piece"))
    translator = Translator(vocabulary("byte-level"), teacher)
    ids = [*vocabulary("byte-level").encode("done"), token("byte-level", "<|im_end|>")]
    found = translator.translate(ids, stopped=True)
    assert found.dropped == {"the teacher has no end of turn": 1}
    assert found.spans.covered == len(ids) - 1


def without_end(name: str) -> object:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=load(name).backend_tokenizer)


# -- structure --------------------------------------------------------------------


def marked(begin: str, text: str, end: str) -> list[int]:
    ours = vocabulary("byte-level")
    return [token("byte-level", begin), *ours.encode(text), token("byte-level", end)]


def test_a_call_of_a_tool_begins_in_the_teachers_own_way_and_ends_without_a_mark() -> None:
    theirs, call = vocabulary("metaspace"), '{"name": "add"}'
    found = translate("byte-level", "metaspace", marked("<tool_call>", call, "</tool_call>"))
    shown = found.teacher_tokens.tolist()
    assert shown[0] == token("metaspace", "[TOOL_CALLS]")
    assert theirs.bytes_of(shown[1:]).decode().strip() == call
    assert found.dropped == {"no </tool_call> in the teacher": 1}


def test_thinking_is_marked_in_the_teachers_own_way() -> None:
    answer = vocabulary("byte-level").encode("42")
    ids = [*marked("<think>", "12 and 30", "</think>"), *answer]
    found = translate("byte-level", "metaspace", ids)
    theirs = found.teacher_tokens.tolist()
    assert theirs[0] == token("metaspace", "[THINK]")
    assert token("metaspace", "[/THINK]") in theirs
    assert (found.kinds == Kind.STRUCTURE).sum() == 2
    assert found.coverage == 1
    back = translate("metaspace", "byte-level", theirs)
    assert back.teacher_tokens.tolist() == ids


def test_delimiters_of_one_name_are_mapped() -> None:
    ids = marked("<tool_call>", "{}", "</tool_call>")
    same = translate("byte-level", "byte-level nfc", ids)
    assert same.teacher_tokens[0] == token("byte-level nfc", "<tool_call>")
    assert same.teacher_tokens[-1] == token("byte-level nfc", "</tool_call>")
    assert (same.kinds == Kind.STRUCTURE).sum() == 2


def test_a_delimiter_that_the_teacher_lacks_is_text_unless_it_is_special() -> None:
    ids = [token("byte-level", "<tool_call>"), *vocabulary("byte-level").encode(" x")]
    spelt = translate("byte-level", "unigram", ids)
    assert vocabulary("unigram").bytes_of(spelt.teacher_tokens.tolist()) == b"<tool_call> x"
    assert spelt.coverage == 1
    ids = [token("metaspace", "[INST]"), *vocabulary("metaspace").encode("x")]
    left_out = translate("metaspace", "unigram", ids)
    assert left_out.dropped == {"no [INST] in the teacher": 1}
    assert b"INST" not in vocabulary("unigram").bytes_of(left_out.teacher_tokens.tolist())


def test_text_behind_structure_begins_in_the_middle() -> None:
    """A space of the teacher's own before a text is none before what follows a delimiter."""
    ids = [*vocabulary("byte-level").encode("a"), token("byte-level", "</think>")]
    ids += vocabulary("byte-level").encode("b")
    found = translate("byte-level", "metaspace", ids)
    pieces = [vocabulary("metaspace").pieces[one] for one in found.teacher_tokens]
    assert pieces == [b" a", None, b"b"]
    always = translate("byte-level", "metaspace always", ids)
    pieces = [vocabulary("metaspace always").pieces[one] for one in always.teacher_tokens]
    assert pieces == [b" a", None, b" b"]
    assert found.level.tolist() == [False, True, True]
    assert always.level.tolist() == [False, True, False]


# -- made-up spaces ---------------------------------------------------------------


@pytest.mark.parametrize("student", ["metaspace", "metaspace always", "prepend", "mistral-v3"])
@pytest.mark.parametrize("teacher", ["byte-level", "unigram", "tekken"])
def test_a_space_that_the_students_tokenizer_made_up_is_not_scored(
    student: str, teacher: str
) -> None:
    ids = vocabulary(student).encode("How are you?")
    assert vocabulary(student).bytes_of(ids) == b" How are you?"
    found = translate(student, teacher, ids)
    assert vocabulary(teacher).bytes_of(found.teacher_tokens.tolist()) == b"How are you?"
    assert found.coverage == 1
    assert found.level[0] == (found.spans.student_begin[0] != 0)
    assert found.level[1:].all()


def test_two_tokenizers_with_a_space_of_their_own_stand_level() -> None:
    ids = vocabulary("metaspace").encode("How are you?")
    found = translate("metaspace", "mistral-v3", ids)
    assert vocabulary("mistral-v3").bytes_of(found.teacher_tokens.tolist()) == b" How are you?"
    assert found.level.all()


def test_a_completion_of_one_space_is_a_space() -> None:
    ids = vocabulary("prepend").encode("")
    ids = ids or [vocabulary("prepend").encode("a b")[1]]
    (space,) = [n for n, p in enumerate(vocabulary("metaspace").pieces) if p == b" "][-1:]
    found = translate("metaspace", "byte-level", [space])
    assert vocabulary("byte-level").bytes_of(found.teacher_tokens.tolist()) == b" "
    assert found.coverage == 1


# -- noise ------------------------------------------------------------------------


def byte_token(name: str, value: int) -> int:
    known = vocabulary(name)
    return next(
        n for n, p in enumerate(known.pieces) if p == bytes([value]) and n not in known.texts
    )


def test_bytes_that_are_no_utf8_are_left_out_with_the_tokens_that_touch_them() -> None:
    ours = vocabulary("byte-level")
    start, end = ours.encode("before"), ours.encode(" behind it")
    bad = [byte_token("byte-level", 0xFF), byte_token("byte-level", 0x80)]
    found = translate("byte-level", "metaspace", [*start, *bad, *end])
    assert found.dropped == {"no valid UTF-8": 2}
    kept = [n for n in range(len(start) + 2 + len(end)) if not len(start) <= n < len(start) + 2]
    covered = [
        n
        for b, e in zip(found.spans.student_begin, found.spans.student_end, strict=True)
        for n in range(b, e)
    ]
    assert covered == kept
    said = vocabulary("metaspace").bytes_of(found.teacher_tokens.tolist()).decode()
    assert said == " before\ufffd behind it"  # one sign for one gap


@pytest.mark.parametrize("teacher", ["metaspace", "unigram", "byte-level nfc"])
def test_a_character_cut_at_the_end_costs_its_own_tokens_alone(teacher: str) -> None:
    ours = vocabulary("byte-level")
    whole = ours.encode("ok \U0001f642")
    cut = whole[:-1]
    assert b"\xf0" in ours.bytes_of(cut)
    found = translate("byte-level", teacher, cut)
    assert found.spans.covered == len(ours.encode("ok"))
    assert found.coverage < 1
    assert set(found.dropped) == {"no valid UTF-8"}


def test_a_character_that_is_cut_on_both_sides_does_not_match_itself() -> None:
    """Both would decode to the replacement character; their bytes are not those of a text."""
    lone = byte_token("byte-level", 0x9F)
    found = translate("byte-level", "metaspace", [lone])
    assert len(found.spans) == 0
    assert found.dropped == {"no valid UTF-8": 1}


def test_a_replacement_character_that_the_student_wrote_is_text() -> None:
    ids = vocabulary("byte-level").encode("a \ufffd b")
    found = translate("byte-level", "metaspace", ids)
    assert found.coverage == 1


def test_a_token_across_valid_and_bad_bytes_is_left_out_alone() -> None:
    """The student's token "lo" + half a character: what it shares with the text is not scored."""
    known = vocabulary("byte-level")
    odd = build_vocabulary(with_token("byte-level", "loð"))  # l, o, 0xF0
    (both,) = [n for n, piece in enumerate(odd.pieces) if piece == b"lo\xf0"]
    ids = [*known.encode("he"), *known.encode("l"), both, *known.encode(" a")]
    found = Translator(odd, vocabulary("metaspace")).translate(ids, stopped=False)
    assert token_bytes(vocabulary("metaspace"), found.teacher_tokens).decode() == " hello\ufffd a"
    pairs = sides(odd, ids, vocabulary("metaspace"), found)
    assert pairs[-1] == (b" a", b" a")
    assert all(mine.strip() == its.strip() for mine, its in pairs)
    assert found.dropped["no valid UTF-8"] >= 1


def with_token(name: str, text: str) -> object:
    """The tokenizer with one more entry in its model, which its encoder never uses."""
    import json

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    description = json.loads(load(name).backend_tokenizer.to_str())
    vocab = description["model"]["vocab"]
    taken = max(vocab.values())
    description["added_tokens"] = description["added_tokens"][:3]
    vocab[text] = taken + 1
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)))


@pytest.mark.parametrize("teacher", ["metaspace", "byte-level"])
def test_ids_beyond_the_vocabulary_are_left_out(teacher: str) -> None:
    """An output layer is often wider than the tokenizer."""
    ours = vocabulary("byte-level")
    text = ours.encode("some text")
    ids = [*text, len(ours.pieces), *text, len(ours.pieces) + 100]
    found = translate("byte-level", teacher, ids)
    assert found.dropped == {"unknown token": 2}
    assert found.spans.covered == 2 * len(text)
    assert found.teacher_tokens.max() < len(vocabulary(teacher).pieces)


def test_text_that_the_teacher_cannot_say_is_left_out_and_counted() -> None:
    ids = [*vocabulary("byte-level").encode("   "), token("byte-level", "<|endoftext|>")]
    found = translate("byte-level", "word-piece", [*ids, *vocabulary("byte-level").encode("a")])
    assert found.dropped == {
        "text that the teacher's tokenizer changes": len(ids) - 1,
        "no <|endoftext|> in the teacher": 1,
    }
    assert found.coverage == pytest.approx(1 / (len(ids) + 1))


def test_a_student_whose_decoder_says_something_else_is_not_compared() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Replace("a", "x")
    odd = build_vocabulary(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not odd.exact
    found = Translator(odd, vocabulary("metaspace")).translate([0, 1], stopped=False)
    assert found.dropped == {"tokens of the student without known bytes": 2}


# -- tokens that no encoder would have chosen, and the fast path ------------------------


@pytest.mark.parametrize("student", ["byte-level", "byte-level nfc", "anthropic", "metaspace"])
def test_a_text_cut_in_another_way_is_still_the_text(student: str) -> None:
    ours = vocabulary(student)
    letters = [one for char in "hello there, you" for one in ours.encode(char)]
    spelt = [one for one in letters if not (ours.spaced and ours.pieces[one] == b" ")]
    found = translate(student, "unigram", spelt)
    assert found.coverage == 1
    assert found.spans.covered == len(spelt)


@pytest.mark.parametrize("student", ["bert", "word-piece"])
def test_word_piece_is_read_as_it_is_shown(student: str) -> None:
    ours = vocabulary(student)
    ids = ours.encode("stop, it is over.")
    assert ours.bytes_of(ids) == b" stop , it is over ."
    found = translate(student, "byte-level", ids)
    said = vocabulary("byte-level").bytes_of(found.teacher_tokens.tolist())
    assert said == b"stop, it is over."
    assert found.coverage == 1
    assert not found.level.any()


def test_word_piece_that_is_shown_in_other_letters_is_read_by_its_pieces() -> None:
    class Shortening:
        """A decoder that writes "do not" as "don't"."""

        backend_tokenizer: Shortening

        def decode(self, ids: Sequence[int], **_: bool) -> str:
            return "we don't stop."

    tokenizer = Shortening()
    tokenizer.backend_tokenizer = tokenizer
    ours = dataclasses.replace(vocabulary("bert"), tokenizer=tokenizer)
    translator = Translator(ours, vocabulary("byte-level"))
    found = translator.translate(ours.encode("we do not stop."), stopped=False)
    said = vocabulary("byte-level").bytes_of(found.teacher_tokens.tolist())
    assert said == b"we do not stop ."
    assert found.coverage == 1


def test_where_ids_mean_the_same_they_are_kept() -> None:
    ours = vocabulary("byte-level")
    odd = [one for char in "hello" for one in ours.encode(char)]
    ids = [*odd, byte_token("byte-level", 0xFF), 0, token("byte-level", "<think>")]
    end = token("byte-level", "<|im_end|>")
    found = translate("byte-level", "byte-level", [*ids, end], stopped=True)
    assert found.teacher_tokens.tolist() == [*ids, end]
    assert found.spans.covered == len(ids) + 1
    assert found.level.all()
    assert found.kinds.tolist() == [Kind.TEXT] * len(ids) + [Kind.STOP]


def test_of_several_stops_that_both_know_the_sampled_one_is_kept() -> None:
    both = build_vocabulary(load("byte-level"), stops=[0])
    one = vocabulary("byte-level")
    found = Translator(both, both).translate([0], stopped=True)
    assert found.teacher_tokens.tolist() == [0]
    mapped = Translator(both, one).translate([0], stopped=True)
    assert mapped.teacher_tokens.tolist() == [one.end_of_turn]


def test_the_longest_span_is_in_tokens_of_the_side_that_has_more() -> None:
    ids = vocabulary("cl100k").encode(" incomprehensibilities")
    found = translate("cl100k", "byte-level", ids)
    widths = found.spans.teacher_end - found.spans.teacher_begin
    assert found.longest_span == widths.max() > 1
    assert collections.Counter(found.kinds.tolist()) == {Kind.TEXT: len(found.spans)}
