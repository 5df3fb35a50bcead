"""A tokenizer's backend made over to encode running text, and nothing but text.

What a backend does for prompts is wrong for a completion that is scored: it cuts and pads, puts
special tokens around a text, takes a special token that was typed for the real one, and trims the
offsets of tokens that end in space.
"""

from __future__ import annotations

__all__ = ["text_encoders"]

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

#: Before the name of a token that no text shall spell; no character is assigned there.
_UNSPELLABLE = "\U000fffff"


def text_encoders(
    backend: Any, description: Mapping[str, Any], hidden: frozenset[int], fallbacks: frozenset[int]
) -> tuple[Any, Any]:
    """Two copies of a ``tokenizers`` backend: for a text's start, and for what stands behind
    something (where a tokenizer that begins a whole text with a space of its own has none).
    ``description`` is the backend's. No text gives one of the ``hidden`` ids, nor, by its
    spelling, one of ``fallbacks``; the unknown token, which models need, apart."""
    described = {
        name: part if name == "model" else copy.deepcopy(part) for name, part in description.items()
    }
    described["truncation"] = described["padding"] = described["post_processor"] = None
    if (described.get("decoder") or {}).get("cleanup"):
        described["decoder"]["cleanup"] = False
    hidden = _hide(described, hidden, fallbacks)
    for one in described.get("added_tokens") or ():
        one["special"] = one["special"] or int(one["id"]) in hidden
    first = [part for part in _pre_tokenizers(described) if part.get("prepend_scheme") == "first"]
    start = _made(backend, described)
    if not first:
        return start, start
    for part in first:
        part["prepend_scheme"] = "never"
    return start, _made(backend, described)


def _made(backend: Any, described: Mapping[str, Any]) -> Any:
    encoder = type(backend).from_str(json.dumps(described))
    encoder.encode_special_tokens = True  # as so many letters
    return encoder


def _hide(
    described: dict[str, Any], hidden: frozenset[int], fallbacks: frozenset[int]
) -> frozenset[int]:
    """Rename tokens in the model, which may know how to spell them itself (a Unigram model does).
    Returns those of ``hidden`` that are left to the list of added tokens."""
    model = described["model"] = dict(described["model"])
    vocab = model["vocab"]
    unknown = (model.get("unk_token"), model.get("unk_id"))
    if isinstance(vocab, Mapping):
        gone = {id_ for text, id_ in vocab.items() if id_ in hidden and text not in unknown}
        model["vocab"] = {_UNSPELLABLE + t if i in gone else t: i for t, i in vocab.items()}
    else:
        gone = {id_ for id_ in range(len(vocab)) if id_ in hidden and id_ not in unknown}
        lowest = min((score for _, score in vocab), default=0.0)
        model["vocab"] = [
            [_UNSPELLABLE + text, score]
            if id_ in gone
            # The model falls back to it by its name, which must stay, and be of no use otherwise.
            else [text, lowest - 100 if id_ in fallbacks else score]
            for id_, (text, score) in enumerate(vocab)
        ]
    # A name that the model does not have would get another id, and move those that follow.
    added = described.get("added_tokens") or ()
    described["added_tokens"] = [one for one in added if int(one["id"]) not in gone]
    return hidden - gone


def _pre_tokenizers(description: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    part = description.get("pre_tokenizer") or {}
    yield from part.get("pretokenizers") or [part]
