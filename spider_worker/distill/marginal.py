"""A teacher's distribution over its own tokens, read as one over the student's.

Byte-prefix marginalisation (arXiv 2607.22334): φ(t) is the longest student token whose bytes are a
prefix of teacher token t's, and the student's target for u is Σ_{φ(t)=u} q(t). It means something
where both models are about to write the same byte: where a span begins.

The definition knows of teacher tokens that are longer than the student's, and not of the reverse.
Where the student may write "12" in one token and the teacher writes "1", then "2", q says "1" and
nothing of what follows: "12" would get no mass, and a student trained on that unlearns a token for
being long. Such a t is *open*: some student token begins with it for want of a longer teacher
token. How an open t's mass is shared between that one and φ(t) cannot be told, so neither is a
target, whatever else maps to them. Mass of the teacher without a target, and the student's own on
everything that is none, is one lump, the residual; comparing two distributions with some events
lumped together is still sound. A position whose sampled token lies in the lump is left to the
span's advantage.
"""

from __future__ import annotations

__all__ = ["PrefixMap"]

import functools
from collections.abc import Container

import numpy as np
from numpy.typing import NDArray

from spider_worker.distill.alignment import Indices, Spans
from spider_worker.distill.vocabulary import Vocabulary

Floats = NDArray[np.float32]


class PrefixMap:
    """φ between two vocabularies: ``image`` (V_teacher,) int64 is the student's id, −1 where there
    is none or where it is no target. Structure maps to structure of the same text, a stop to a
    stop."""

    def __init__(self, student: Vocabulary, teacher: Vocabulary) -> None:
        self._size = len(student.pieces)
        self.image: Indices = np.full(len(teacher.pieces), -1, dtype=np.int64)
        if student.same_ids(teacher):
            self.image[:] = np.arange(len(self.image))
        else:
            self._map_pieces(_ordinary(student, teacher), _ordinary(teacher, student))
            self._map_structure(student, teacher)

    @functools.cached_property
    def told(self) -> NDArray[np.bool_]:
        """(V_student,): what is a target of anything."""
        found = np.zeros(self._size, dtype=bool)
        found[self.image[self.image >= 0]] = True
        return found

    def targets(
        self,
        spans: Spans,
        sampled: Indices,
        ids: Indices,
        logprobs: Floats,
        *,
        told: NDArray[np.bool_] | None = None,
    ) -> tuple[Indices, Indices, Floats]:
        """Targets where a span begins and the sampled token is one of them.

        ``spans`` are those that begin level (see ``Translation``), ``sampled`` (N,) the student's
        tokens, ``ids`` and ``logprobs`` (M, K) the teacher's most probable tokens at each of its
        positions (−1, −inf where there are fewer). ``told`` (V_student,): what may be a target,
        where another teacher's are to be added (None: whatever is one). Returns ``positions`` (P,),
        ``ids`` (P, K) with −1 unused, ``probs`` (P, K): see DenseTargets.
        """
        positions, rows = spans.student_begin, spans.teacher_begin
        chosen = ids[rows]
        known = (chosen >= 0) & (chosen < len(self.image))
        mapped = np.where(known, self.image[np.where(known, chosen, 0)], -1)
        if told is not None:
            mapped = np.where((mapped >= 0) & told[mapped], mapped, -1)
        usable = (mapped == sampled[positions][:, None]).any(axis=1)
        mapped = mapped[usable]
        probs = np.exp(logprobs[rows[usable]].astype(np.float64))
        return positions[usable], *_merged(mapped, np.where(mapped >= 0, probs, 0.0))

    def _map_pieces(self, student: dict[bytes, list[int]], teacher: dict[bytes, list[int]]) -> None:
        images = {piece: _longest_prefix(piece, student) for piece in teacher}
        untold: set[bytes | None] = set()
        for piece in student:
            begin = None if piece in teacher else _longest_prefix(piece, teacher)
            if begin is not None:  # is open
                untold |= {piece, images[begin]}
        for piece, image in images.items():
            if image is not None and image not in untold:
                self.image[teacher[piece]] = student[image][0]

    def _map_structure(self, student: Vocabulary, teacher: Vocabulary) -> None:
        for text, token in teacher.structural.items():
            mapped = student.structure(text)
            if mapped is not None:
                self.image[token] = mapped
        if student.end_of_turn is not None:
            for token in teacher.stops:
                self.image[token] = student.end_of_turn


def _ordinary(one: Vocabulary, other: Vocabulary) -> dict[bytes, list[int]]:
    """Tokens of text by their bytes; of several with the same bytes, the one that encoding
    uses comes first. An added token that the other model lacks is text."""
    found: dict[bytes, list[int]] = {}
    for token, piece in enumerate(one.pieces):
        name = one.texts.get(token)
        if not piece or (name is not None and other.marks(name)):
            continue
        same = found.setdefault(piece, [])
        if same and same[0] in one.fallbacks:
            same.insert(0, token)
        else:
            same.append(token)
    return found


def _longest_prefix(piece: bytes, table: Container[bytes]) -> bytes | None:
    for length in range(len(piece), 0, -1):
        if piece[:length] in table:
            return piece[:length]
    return None


def _merged(ids: Indices, probs: NDArray[np.float64]) -> tuple[Indices, Floats]:
    """Rows in which each id stands once, with the sum of its probabilities; elsewhere −1 and 0."""
    if not ids.size:
        return ids, probs.astype(np.float32)
    order = np.argsort(ids, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    probs = np.take_along_axis(probs, order, axis=1)
    first = np.ones(ids.shape, dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    sums = np.zeros(ids.shape)
    # Each entry's run of equal ids, counted through the whole table, is where its mass goes.
    runs = np.cumsum(first.ravel()) - 1
    totals = np.bincount(runs, weights=probs.ravel())
    sums[first] = totals
    keep = first & (ids >= 0)
    return np.where(keep, ids, -1), np.where(keep, sums, 0.0).astype(np.float32)
