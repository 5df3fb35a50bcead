"""Alignment: a student's completion as its teacher's tokens, against the teacher's `encode`.

    python -m benchmarks.bench_alignment [--rounds 15]

Alignment is everything of a translation but the encoding: tokens cut into segments, their bytes put
together and checked, the teacher's tokens checked against them, the spans between the two. The
teacher's encodings are recorded beforehand and handed over as the library's own objects, so that
reading the ids out of them counts; byte tables are built before. One process on one core, which the
tokenizer library is held to as well; rounds of both alternate, medians of the processor's time
count. Prints a JSON
document: for each pair of tokenizers, tokens aligned a second (the student's) over tokens encoded a
second (the teacher's, of the same text), and the time for the same text twice over that for once.

Text is the language reference that Python's own ``help`` shows: prose, code and tables in English.
``noise`` is the same with a byte that is no text after every fifth token: it is only held to grow
as text does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pydoc_data.topics import topics
from typing import Any

LENGTH = 10_000
#: Byte-level against byte-level, SentencePiece on either side, and a WordPiece teacher, which
#: rewrites what it is given.
PAIRS = (
    ("cl100k", "anthropic"),
    ("cl100k", "mistral-v3"),
    ("mistral-v3", "cl100k"),
    ("anthropic", "bert"),
)


class Recorded:
    """An encoder that has encoded everything before."""

    def __init__(self, encoder: Any) -> None:
        self._encoder = encoder
        self._known: dict[str, Any] = {}

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        if text not in self._known:
            self._known[text] = self._encoder.encode(text, add_special_tokens=add_special_tokens)
        return self._known[text]


def measure(student: str, teacher: str, rounds: int, *, noise: bool = False) -> dict[str, float]:
    from spider_worker.distill.translation import Translator
    from tests.support.tokenizers import vocabulary

    ours, theirs = vocabulary(student), vocabulary(teacher)
    recorded = tuple(Recorded(encoder) for encoder in theirs.encoders)
    translator = Translator(ours, dataclasses.replace(theirs, encoders=recorded))
    tokens = ours.encode("\n\n".join(topics.values()))
    if noise:
        bad = next(n for n, piece in enumerate(ours.pieces) if piece == b"\xff")
        tokens = [one for place in range(0, len(tokens), 5) for one in (*tokens[place:][:5], bad)]
    short = tokens[:LENGTH]
    long = short * 2  # other text might be rewritten where this is not
    text = ours.bytes_of(short).decode(errors="ignore")
    count = len(theirs.encoders[0].encode(text, add_special_tokens=False).ids)
    for part in (short, long):
        covered = translator.translate(part, stopped=False).coverage
        assert covered == 1 or noise, covered
    aligned, twice, encoded = medians(
        [
            lambda: translator.translate(short, stopped=False),
            lambda: translator.translate(long, stopped=False),
            lambda: theirs.encoders[0].encode(text, add_special_tokens=False),
        ],
        rounds,
    )
    return {
        "aligned_tokens_per_second": LENGTH / aligned,
        "encoded_tokens_per_second": count / encoded,
        "ratio": (LENGTH / aligned) / (count / encoded),
        "growth": twice / aligned,
    }


def medians(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Seconds of the processor of each, in turns."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, seconds in zip(runs, found, strict=True):
            started = time.process_time()
            run()
            seconds.append(time.process_time() - started)
    return [statistics.median(seconds) for seconds in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pairs = {f"{one} by {other}": measure(one, other, options.rounds) for one, other in PAIRS}
    noise = measure("anthropic", "mistral-v3", options.rounds, noise=True)
    report = {
        "benchmark": "alignment",
        "tokens": LENGTH,
        "ratio": min(pair["ratio"] for pair in pairs.values()),
        "growth": max(pair["growth"] for pair in [*pairs.values(), noise]),
        "pairs": pairs,
        "noise": noise,
    }
    print("\n" + json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
