"""Byte tables from descriptions of tokenizers."""

from __future__ import annotations

from typing import Any

import pytest

from spider_worker.distill.pieces import byte_tokens, read_pieces
from tests.support.tokenizers import ALL, TEXTS, vocabulary


def described(**parts: Any) -> dict[str, Any]:
    model = {"type": "BPE", **parts.pop("model", {})}
    return {"decoder": None, "pre_tokenizer": None, "normalizer": None, "model": model, **parts}


def read(
    description: dict[str, Any], *texts: str, added: dict[int, Any] | None = None
) -> list[bytes | None]:
    return read_pieces(description, dict(enumerate(texts)), added or {})


@pytest.mark.parametrize(
    "parts",
    [
        {"decoder": {"type": "ByteLevel"}},
        {"pre_tokenizer": {"type": "ByteLevel"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}]}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}],
            }
        },
    ],
)
def test_byte_level_letters_are_bytes(parts: dict[str, Any]) -> None:
    found = read(described(**parts), "Ġhello", "Ċ", "é", "Ã©", "ł", "中", "a b")
    # What is not in those letters is what it says: such entries stand in some vocabularies.
    wanted = [b" hello", b"\n", b"\xe9", "é".encode(), b"\xa0", "中".encode(), b"a b"]
    assert found == wanted


def test_sentencepiece_marks_spaces_and_falls_back_to_bytes() -> None:
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
        ],
    }
    description = described(decoder=decoder, model={"unk_token": "<unk>"})
    texts = ("<unk>", "<0x0A>", "<0xe2>", "▁▁the", "▁", "<0x0A>x")
    found = read(description, *texts)
    assert found == [None, b"\n", b"\xe2", b"  the", b" ", b"<0x0A>x"]
    assert byte_tokens(description, dict(enumerate(texts))) == {1, 2}


def test_without_byte_fallback_such_a_token_is_text() -> None:
    description = described(pre_tokenizer={"type": "Metaspace"})
    assert read(description, "<0x0A>", "▁a") == [b"<0x0A>", b" a"]
    assert byte_tokens(description, {0: "<0x0A>"}) == frozenset()


def test_without_a_mark_for_spaces_a_lower_block_is_one() -> None:
    assert read(described(), "▁a") == ["▁a".encode()]


def test_a_unigram_models_unknown_is_known_by_its_id() -> None:
    model = {"type": "Unigram", "unk_id": 1, "byte_fallback": True}
    assert read(described(model=model), "a", "??", "<0x41>") == [b"a", None, b"A"]


def test_wordpiece_begins_words_with_a_space() -> None:
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "unk_token": "[UNK]"}
    found = read(described(model=model), "play", "##ing", "[UNK]", "#")
    assert found == [b" play", b"ing", None, b" #"]


def test_added_tokens_are_written_as_they_are_and_special_ones_say_nothing() -> None:
    added = {1: {"special": False}, 2: {"special": True}, 3: {"special": False}}
    byte_level = described(decoder={"type": "ByteLevel"})
    texts = ("Ġ", "<é>", "<|end|>", "▁▁")
    assert read(byte_level, *texts, added=added) == [b" ", "<é>".encode(), None, "▁▁".encode()]
    marked = described(pre_tokenizer={"type": "Metaspace"})
    assert read(marked, *texts, added=added)[3] == b"  "


def test_ids_that_nothing_uses_say_nothing() -> None:
    assert read_pieces(described(), {2: "a"}, {}) == [None, None, b"a"]
    assert read_pieces(described(), {}, {}) == []


@pytest.mark.parametrize("name", ALL)
def test_the_pieces_are_what_the_tokenizers_own_decoder_makes_of_them(name: str) -> None:
    """Token by token behind another one, so that nothing is taken for the start of a text."""
    known = vocabulary(name)
    (anchor,) = known.encode("a")
    decode = known.encoders[0].decode
    for token, piece in enumerate(known.pieces):
        if piece is None or (token % 97 and token > 600):
            continue
        said = (known.pieces[anchor] or b"") + piece
        shown = decode([anchor, token], skip_special_tokens=False)
        assert said.decode(errors="replace").removeprefix(" ") == shown.removeprefix(" "), token


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_an_encoder_keeps_is_given_back(name: str, text: str) -> None:
    known = vocabulary(name)
    found = known.encode_ends(text)
    assert found is not None
    assert (found.ends[1:] >= found.ends[:-1]).all()
    if len(found.ids):
        assert found.ends[-1] == len(text.encode())
    if found.literal:
        assert known.bytes_of(found.ids.tolist()) == b" " * found.spaced + text.encode()
    else:
        assert name in ("anthropic", "bert", "byte-level nfc", "unigram", "word-piece") or (
            "▁" in text
        )
