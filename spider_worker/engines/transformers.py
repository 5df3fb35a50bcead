"""A model under ``transformers``, on the CPU or one GPU, in batches of whatever is waiting.

Whenever the model is free, the oldest waiting request and those nearest to it in prompt
length make the next batch (left-padded). Rows of a batch keep sampling parameters, seeds,
stop texts and limits of their own (``sampling.py``). It is slower than vLLM on a GPU and needs
nothing but torch.
"""

from __future__ import annotations

__all__ = ["ENGINE_PARAMETERS", "TransformersEngine", "check_parameters"]

import dataclasses
import gc
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable, RowError
from spider_worker.engines.base import Completion, EngineInfo, Usage
from spider_worker.engines.chat import render
from spider_worker.engines.options import check_names, refuse
from spider_worker.engines.threaded import Outcome, Request, ThreadedEngine
from spider_worker.torch_models.device import DEVICE, check_device, choose_device

ENGINE_PARAMETERS: Final = {
    "device": DEVICE,
    "dtype": "float32, bfloat16, float16 or auto (default: float32 on the CPU, auto on a GPU)",
    "revision": "commit, tag or branch of the model",
    "max_model_len": "tokens of prompt and completion together (default: the model's)",
    "attn_implementation": "eager, sdpa, flash_attention_2 (default: the model's)",
    "trust_remote_code": "run the model repository's own code (if the worker allows it)",
}
"""What ``model.parameters`` may hold for this engine, and what each means."""

DEFAULT_BATCH: Final = 32
_NEAR: Final = 64  # tokens of prompt by which rows of a batch may always differ


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Raises NotSupported for an engine argument that is unknown or malformed."""
    check_names(parameters, ENGINE_PARAMETERS, where="model.parameters", engine="transformers")
    check_device(parameters, where="model.parameters")
    dtypes = ("float32", "bfloat16", "float16", "auto")
    if parameters.get("dtype", "auto") not in dtypes:
        refuse(f"model.parameters.dtype: expected one of {', '.join(dtypes)}.")
    length = parameters.get("max_model_len", 1)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        refuse(f"model.parameters.max_model_len: expected a whole number, not {length!r}.")


@dataclasses.dataclass(eq=False, slots=True)
class _Row:
    """A request that waits: its prompt's token ids, what it asks for, its own limit."""

    request: Request
    tokens: list[int]
    params: Any  # sampling.RowParams; that module imports torch
    limit: int


class TransformersEngine(ThreadedEngine):
    """See the module. ``max_batch`` bounds the rows of one ``generate`` call."""

    name = "transformers"
    linger = 0.005

    def __init__(
        self,
        model: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        max_batch: int = DEFAULT_BATCH,
    ) -> None:
        super().__init__()
        self._parameters = dict(parameters or {})
        check_parameters(self._parameters)
        self._name = model
        self._max_batch = max_batch
        self._device = ""  # of the loaded model
        self._model: Any = None
        self._tokenizer: Any = None
        self._context = 0
        self._defaults: dict[str, Any] = {}
        self._end_tokens: frozenset[int] = frozenset()
        self._pad = 0
        self._waiting: dict[str, _Row] = {}

    @property
    def info(self) -> EngineInfo:
        return EngineInfo("transformers", capacity=4 * self._max_batch)

    def _load(self) -> None:

        transformers: Any = importlib.import_module("transformers")
        self._device = choose_device(self._parameters, where="model.parameters")
        common: dict[str, Any] = {
            name: self._parameters[name]
            for name in ("revision", "trust_remote_code")
            if name in self._parameters
        }
        tokenizer = transformers.AutoTokenizer.from_pretrained(self._name, **common)
        if getattr(tokenizer, "chat_template", None) is None:
            raise EngineUnavailable(
                f"{self._name!r} has no chat template: it is a base model, not one that chats."
            )
        dtype = self._parameters.get("dtype", "float32" if self._device == "cpu" else "auto")
        if "attn_implementation" in self._parameters:
            common["attn_implementation"] = self._parameters["attn_implementation"]
        model = transformers.AutoModelForCausalLM.from_pretrained(self._name, dtype=dtype, **common)
        self._model = model.to(self._device).eval()
        self._tokenizer = tokenizer
        self._read_config()

    def _read_config(self) -> None:
        config = self._model.generation_config
        self._defaults = dict(config.to_diff_dict())
        ends = config.eos_token_id
        if ends is None:
            ends = self._tokenizer.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        self._end_tokens = frozenset(ends)
        pad = self._tokenizer.pad_token_id
        self._pad = pad if pad is not None else (ends[0] if ends else 0)
        text_config = self._model.config.get_text_config()
        longest = getattr(text_config, "max_position_embeddings", None) or 2048
        self._context = min(longest, self._parameters.get("max_model_len", longest))

    def _admit(self, request: Request) -> None:
        from spider_worker.engines import sampling

        template = request.params.get("chat_template_kwargs") or {}
        tokens = render(self._tokenizer, request.messages, template)
        room = self._context - len(tokens)
        if room < 1:
            raise RowError(
                f"the prompt has {len(tokens)} tokens, the model's context {self._context}",
                stage="generation",
                kind="prompt_too_long",
            )
        sampling.check_sampling(request.params)
        params = sampling.row_params(request.params, self._defaults)
        # Without a limit of the user's a completion may fill the context, as on a server.
        limit = min(params.max_tokens or room, room)
        self._waiting[request.id] = _Row(request, tokens, params, limit)

    def _drop(self, request: Request) -> None:
        self._waiting.pop(request.id, None)

    def _advance(self) -> list[Outcome]:
        rows = self._next_batch()
        for row in rows:
            del self._waiting[row.request.id]
        return self._generate(rows)

    def _next_batch(self) -> list[_Row]:
        """The oldest row and those nearest to it in length, so that no row starves and
        little is spent on padding."""
        waiting = list(self._waiting.values())
        length = len(waiting[0].tokens)
        near = [
            row
            for row in waiting
            if len(row.tokens) <= 2 * length + _NEAR and length <= 2 * len(row.tokens) + _NEAR
        ]
        near.sort(key=lambda row: abs(len(row.tokens) - length))
        batch = near[: self._max_batch]
        if waiting[0] not in batch:  # as near to itself as others are, and sorting is stable
            batch[-1] = waiting[0]
        return batch

    def _generate(self, rows: Sequence[_Row]) -> list[Outcome]:
        """Generate for these rows, in halves where the device's memory is too small."""
        import torch

        try:
            return self._batch(rows)
        except torch.OutOfMemoryError as error:
            failure = str(error)
        torch.cuda.empty_cache()
        if len(rows) == 1:
            refusal = RowError(failure, stage="generation", kind="out_of_memory")
            return [(rows[0].request, refusal)]
        middle = len(rows) // 2
        return [*self._generate(rows[:middle]), *self._generate(rows[middle:])]

    def _batch(self, rows: Sequence[_Row]) -> list[Outcome]:
        import torch

        from spider_worker.engines.sampling import RowSampler, RowStopper

        width = max(len(row.tokens) for row in rows)
        padded = [[self._pad] * (width - len(row.tokens)) + row.tokens for row in rows]
        mask = [[0] * (width - len(row.tokens)) + [1] * len(row.tokens) for row in rows]
        device = torch.device(self._device)
        stopper = RowStopper(
            [row.limit for row in rows],
            [row.params.stop for row in rows],
            prompt_length=width,
            end_tokens=self._end_tokens,
            decode=self._decode,
            gone=lambda number: self._closing or rows[number].request.cancelled,
        )
        prompts = torch.tensor(padded, device=device)
        present = torch.tensor(mask, device=device)
        sampler = RowSampler([row.params for row in rows], prompts, present)
        transformers: Any = importlib.import_module("transformers")
        config = transformers.GenerationConfig(
            max_new_tokens=max(row.limit for row in rows),
            do_sample=False,
            pad_token_id=self._pad,
            eos_token_id=None,
        )
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=prompts,
                attention_mask=present,
                generation_config=config,
                logits_processor=transformers.LogitsProcessorList([sampler]),
                stopping_criteria=transformers.StoppingCriteriaList([stopper]),
            )
        return [
            (row.request, self._completion(row, generated, stopper.reasons[number]))
            for number, row in enumerate(rows)
            for generated in [output[number, width : width + stopper.ends[number]].tolist()]
        ]

    def _completion(self, row: _Row, tokens: list[int], reason: str | None) -> Completion:
        text = self._decode(tokens)
        cuts = [at for stop in row.params.stop if (at := text.find(stop)) >= 0]
        if cuts:
            text = text[: min(cuts)]
        usage = Usage(len(row.tokens), len(tokens))
        return Completion(text, reason or "length", usage)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _unload(self) -> None:
        self._model = self._tokenizer = None
        self._waiting.clear()
        gc.collect()
        import torch

        torch.cuda.empty_cache()  # nothing on the CPU
