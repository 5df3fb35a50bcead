"""Sampling a batch whose rows each have parameters of their own, for ``transformers``.

``generate`` takes one set of parameters a call. Here each row of the batch has its own:
``RowSampler`` turns the model's logits into scores whose argmax *is* the sample (the Gumbel
trick: the argmax of ``log p + g``, g standard Gumbel noise, is distributed as p), so that
``generate`` runs greedily and rows never wait for others with the same parameters.

A row with a seed draws its noise from a generator of its own, so its sample does not depend
on which rows share the batch (up to the rounding of the model itself, which may differ
between batch shapes). Rows without one share a generator seeded from the system.
"""

from __future__ import annotations

__all__ = ["RowParams", "RowSampler", "RowStopper", "check_sampling", "row_params"]

import dataclasses
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import torch

from spider_sdk.errors import NotSupported
from spider_worker.engines.options import check_names

_KNOWN: Final = {
    "temperature": (float, 0.0, None),
    "top_p": (float, 0.0, 1.0),
    "top_k": (int, -1, None),
    "min_p": (float, 0.0, 1.0),
    "max_tokens": (int, 1, None),
    "max_completion_tokens": (int, 1, None),
    "max_new_tokens": (int, 1, None),
    "repetition_penalty": (float, 1e-6, None),
    "presence_penalty": (float, -2.0, 2.0),
    "frequency_penalty": (float, -2.0, 2.0),
    "seed": (int, None, None),
}
_OTHERS: Final = ("stop", "chat_template_kwargs")
_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_new_tokens")


@dataclasses.dataclass(frozen=True)
class RowParams:
    """``max_tokens`` None: until the context is full. ``top_k`` 0: all. ``temperature`` 0:
    greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None


def check_sampling(params: Mapping[str, Any]) -> None:
    """Raises NotSupported for a generation parameter that is unknown or out of range."""
    where = "generation.parameters"
    check_names(params, (*_KNOWN, *_OTHERS), where=where, engine="transformers")
    for name, (kind, least, most) in _KNOWN.items():
        value = params.get(name)
        if value is None:
            continue
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is int:
            good = good and float(value).is_integer()
        if good and least is not None:
            good = value >= least
        if good and most is not None:
            good = value <= most
        if not good:
            bounds = f" from {least} to {most}" if most is not None else ""
            noun = "a whole number" if kind is int else "a number"
            raise NotSupported(f"{where}.{name}: expected {noun}{bounds}, not {value!r}.")
    stop = params.get("stop")
    if not (stop is None or isinstance(stop, str) or all(isinstance(s, str) and s for s in stop)):
        raise NotSupported(f"{where}.stop: expected a text or a list of texts, not {stop!r}.")
    if len([name for name in _LIMITS if params.get(name) is not None]) > 1:
        raise NotSupported(f"{where}: give one of {', '.join(_LIMITS)}.")
    if not isinstance(params.get("chat_template_kwargs") or {}, Mapping):
        raise NotSupported(f"{where}.chat_template_kwargs: expected a mapping.")


def row_params(params: Mapping[str, Any], defaults: Mapping[str, Any]) -> RowParams:
    """What a row's checked parameters mean. ``defaults`` are the model's own
    (``generation_config.json``)."""
    values = {name: value for name, value in params.items() if value is not None}
    fields: dict[str, Any] = {}
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if name in values or defaults.get(name) is not None:
            fields[name] = values.get(name, defaults.get(name))
    for name in ("presence_penalty", "frequency_penalty", "seed"):
        if name in values:
            fields[name] = values[name]
    limit = next((values[name] for name in _LIMITS if name in values), None)
    stop = values.get("stop") or ()
    return RowParams(
        **{**fields, "top_k": max(0, int(fields.get("top_k", 0)))},
        max_tokens=None if limit is None else int(limit),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )


class RowSampler:
    """A logits processor for one ``generate`` call over ``rows`` (greedy on its outside).

    ``prompts`` and ``present`` (1 for a token, 0 for padding on the left) are [rows, width];
    the scores of a call are [rows, vocabulary].
    """

    def __init__(
        self, rows: Sequence[RowParams], prompts: torch.Tensor, present: torch.Tensor
    ) -> None:
        device = prompts.device

        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device, dtype=torch.float32).unsqueeze(1)

        self._prompt_length = prompts.shape[1]
        self._device = device
        # Padding is no part of what a row has said: its last token stands in for it.
        self._prompts = torch.where(present.bool(), prompts, prompts[:, -1:])
        temperature = [row.temperature for row in rows]
        self._temperature = column([max(t, 1e-5) if t > 0 else 1.0 for t in temperature])
        self._greedy = column([float(t == 0) for t in temperature]).bool()
        self._all_greedy = all(t == 0 for t in temperature)
        self._top_p = column([row.top_p for row in rows])
        self._top_k = column([row.top_k or float("inf") for row in rows])
        self._min_p = column([row.min_p for row in rows])
        self._filters = any(r.top_p < 1 or r.top_k or r.min_p > 0 for r in rows)
        self._repetition = column([row.repetition_penalty for row in rows])
        self._presence = column([row.presence_penalty for row in rows])
        self._frequency = column([row.frequency_penalty for row in rows])
        self._repeats = any(row.repetition_penalty != 1 for row in rows)
        self._counts = any(row.presence_penalty or row.frequency_penalty for row in rows)
        self._shared = torch.Generator(device).manual_seed(secrets.randbits(62))
        self._own = {
            number: torch.Generator(device).manual_seed(row.seed % 2**63)
            for number, row in enumerate(rows)
            if row.seed is not None and row.temperature > 0
        }

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = self._penalised(input_ids, scores.float())
        if self._all_greedy:
            return scores
        sampled = scores / self._temperature
        if self._filters:
            sampled = self._filtered(sampled)
        return torch.where(self._greedy, scores, sampled + self._noise(sampled))

    def _penalised(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._repeats:
            said = torch.cat([self._prompts, input_ids[:, self._prompt_length :]], dim=1)
            seen = scores.gather(1, said)
            seen = torch.where(seen < 0, seen * self._repetition, seen / self._repetition)
            scores = scores.scatter(1, said, seen)
        if self._counts:
            new = input_ids[:, self._prompt_length :]
            counts = torch.zeros_like(scores).scatter_add(
                1, new, torch.ones_like(new, dtype=scores.dtype)
            )
            scores = scores - self._frequency * counts - self._presence * (counts > 0)
        return scores

    def _filtered(self, scores: torch.Tensor) -> torch.Tensor:
        """Minus infinity for what top_k, top_p and min_p cut off; the best always stays."""
        ordered, order = scores.sort(dim=1, descending=True)
        probabilities = ordered.softmax(dim=1)
        before = probabilities.cumsum(dim=1) - probabilities
        rank = torch.arange(scores.shape[1], device=self._device)
        keep = (before < self._top_p) & (rank < self._top_k)
        keep &= probabilities >= self._min_p * probabilities[:, :1]
        keep[:, 0] = True
        ordered = ordered.masked_fill(~keep, float("-inf"))
        return torch.empty_like(scores).scatter(1, order, ordered)

    def _noise(self, scores: torch.Tensor) -> torch.Tensor:
        exponential = torch.empty_like(scores).exponential_(generator=self._shared)
        for row, generator in self._own.items():
            exponential[row].exponential_(generator=generator)
        return -exponential.log()


class RowStopper:
    """A stopping criterion of one ``generate`` call that ends each row by its own rules.

    Afterwards ``ends[row]`` is the number of tokens the row generated and
    ``reasons[row]`` ``stop`` or ``length`` (None: ``generate`` ended first). ``gone(row)`` says
    that nobody waits for the row any more.
    """

    def __init__(
        self,
        limits: Sequence[int],
        stops: Sequence[tuple[str, ...]],
        *,
        prompt_length: int,
        end_tokens: frozenset[int],
        decode: Callable[[list[int]], str],
        gone: Callable[[int], bool],
    ) -> None:
        self._limits = limits
        self._stops = stops
        self._prompt_length = prompt_length
        self._end_tokens = end_tokens
        self._decode = decode
        self._gone = gone
        self.ends = [0] * len(limits)
        self.reasons: list[str | None] = [None] * len(limits)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:  # noqa: ARG002
        length = input_ids.shape[1] - self._prompt_length
        last = input_ids[:, -1].tolist()
        for row, token in enumerate(last):
            if self.reasons[row] is None:
                self.ends[row] = length
                self.reasons[row] = self._reason(row, token, length, input_ids)
        done = [reason is not None for reason in self.reasons]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)

    def _reason(self, row: int, token: int, length: int, input_ids: torch.Tensor) -> str | None:
        if token in self._end_tokens:
            return "stop"
        if self._stops[row]:
            # As many tokens as the longest stop text has characters must hold it, and a few
            # more, since a character may be cut in two.
            window = min(length, max(map(len, self._stops[row])) + 8)
            text = self._decode(input_ids[row, -window:].tolist())
            if any(stop in text for stop in self._stops[row]):
                return "stop"
        if length >= self._limits[row]:
            return "length"
        return "abort" if self._gone(row) else None
