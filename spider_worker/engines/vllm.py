"""vLLM in this process: continuous batching over everything that is handed in.

The engine's thread owns the LLMEngine (on the CPU its OpenMP pool belongs to the thread
that made it). Before each step it renders and adds whatever has come; after it, all that has
finished goes back at once. The engine core runs in this process too
(VLLM_ENABLE_V1_MULTIPROCESSING=0): a killed runner leaves no process that holds a device.
"""

from __future__ import annotations

__all__ = ["VllmEngine"]

import gc
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable, RowError, SpiderError
from spider_worker.engines import vllm_options
from spider_worker.engines.base import Completion, EngineInfo, Usage
from spider_worker.engines.chat import render
from spider_worker.engines.threaded import Outcome, Request, ThreadedEngine

_QUEUE_FACTOR: Final = 4  # requests wanted in flight over sequences in a batch
_DEFAULT_SEQS: Final = 256  # until the engine has said


class VllmEngine(ThreadedEngine):
    """See the module. ``arguments`` are EngineArgs by name, without ``model``."""

    name = "vllm"

    def __init__(self, model: str, *, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._model = model
        self._arguments = dict(arguments or {})
        vllm_options.check_engine_arguments(self._arguments)
        self._seqs = int(self._arguments.get("max_num_seqs") or _DEFAULT_SEQS)
        self._engine: Any = None
        self._tokenizer: Any = None
        self._defaults: dict[str, Any] = {}
        self._context = 0
        self._reasoning: Callable[[str], tuple[str | None, str | None]] | None = None

    @property
    def info(self) -> EngineInfo:
        """The capacity is known for certain once the engine has started."""
        return EngineInfo("vllm", capacity=_QUEUE_FACTOR * self._seqs)

    def _load(self) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        vllm_options.check_platform()
        self._engine = self._make_engine()
        config = self._engine.vllm_config
        self._seqs = config.scheduler_config.max_num_seqs
        self._context = config.model_config.max_model_len
        self._defaults = dict(config.model_config.get_diff_sampling_param())
        self._tokenizer = self._engine.get_tokenizer()
        if getattr(self._tokenizer, "chat_template", "") is None:
            raise EngineUnavailable(
                f"{self._model!r} has no chat template: it is a base model, not one that chats."
            )
        self._reasoning = self._reasoning_parser()

    def _make_engine(self) -> Any:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        # vLLM's default seed is 0: every runner would draw the same numbers.
        arguments = {"disable_log_stats": True, "seed": secrets.randbits(31), **self._arguments}
        return LLMEngine.from_engine_args(EngineArgs(model=self._model, **arguments))

    def _reasoning_parser(self) -> Callable[[str], tuple[str | None, str | None]] | None:
        name = self._arguments.get("reasoning_parser")
        if not name:
            return None
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.reasoning import ReasoningParserManager

        parser = ReasoningParserManager.get_reasoning_parser(name)(self._tokenizer)
        request = ChatCompletionRequest(messages=[], model=self._model)
        return lambda text: parser.extract_reasoning(text, request)

    def _admit(self, request: Request) -> None:
        sampling, template = vllm_options.split_template_arguments(request.params)
        tokens = render(self._tokenizer, request.messages, template)
        room = self._context - len(tokens)
        if room < 1:
            raise RowError(
                f"the prompt has {len(tokens)} tokens, the model's context {self._context}",
                stage="generation",
                kind="prompt_too_long",
            )
        values = {**self._defaults, **sampling}
        # Without a limit of the user's a completion may fill the context, as on a server.
        values["max_tokens"] = min(values.get("max_tokens") or room, room)
        try:
            params = vllm_options.sampling_params(values)
            prompt = {"type": "token", "prompt_token_ids": tokens}
            self._engine.add_request(request.id, prompt, params)
        except Exception as error:
            # The boundary to vLLM's own checks of one request; what they raise differs between
            # versions. An engine that is broken says so at its next step.
            kind = type(error).__name__
            raise RowError(str(error), stage="generation", kind=kind) from error

    def _drop(self, request: Request) -> None:
        self._engine.abort_request([request.id])

    def _advance(self) -> list[Outcome]:
        return [
            (request, self._completion(output))
            for output in self._engine.step()
            if output.finished and (request := self._pending.get(output.request_id))
        ]

    def _completion(self, output: Any) -> Completion | SpiderError:
        best = output.outputs[0]
        if best.finish_reason in ("abort", "error"):
            return RowError(f"vLLM gave up: {best.finish_reason}", stage="generation", kind="abort")
        usage = Usage(len(output.prompt_token_ids or ()), len(best.token_ids))
        text, reasoning = best.text, None
        if self._reasoning is not None:
            reasoning, content = self._reasoning(text)
            text = content or ""
        return Completion(text, best.finish_reason, usage, reasoning)

    def _unload(self) -> None:
        engine, self._engine = self._engine, None
        self._tokenizer = self._reasoning = None
        if engine is None:
            return
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        engine.engine_core.shutdown()
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
