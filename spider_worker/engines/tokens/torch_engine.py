"""A model under torch in this process, with all its logits: a local teacher."""

from __future__ import annotations

__all__ = ["ENGINE_PARAMETERS", "TorchTokenEngine", "check_parameters"]

import asyncio
import concurrent.futures
import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from spider_sdk.errors import PipelineError
from spider_worker.tokens import Ids, SampledTokens, SampleParams, TokenEngineInfo, TokenScores
from spider_worker.torch_models import parameters as model_parameters

if TYPE_CHECKING:
    from spider_worker.torch_models.causal import CausalModel
    from spider_worker.torch_models.serving import ModelEngine

ENGINE_PARAMETERS: Final = model_parameters.MODEL_PARAMETERS
"""What ``parameters`` may hold, and what each means."""


def check_parameters(parameters: Mapping[str, Any], *, where: str = "teacher.parameters") -> None:
    """Raises NotSupported for an engine argument that is unknown or malformed."""
    model_parameters.check_parameters(
        parameters, ENGINE_PARAMETERS, what="the torch engine", where=where
    )


class TorchTokenEngine:
    """LogitEngine over the model ``model`` (a folder or a Hub name). ``where`` is where
    ``parameters`` stand in the job. Requests that wait while the model is busy are batched."""

    def __init__(
        self,
        model: str,
        *,
        parameters: Mapping[str, Any] | None = None,
        where: str = "teacher.parameters",
    ) -> None:
        self._name, self._where = model, where
        self._parameters = dict(parameters or {})
        check_parameters(self._parameters, where=where)
        self._model: CausalModel | None = None
        self._engine: ModelEngine | None = None
        self._thread: concurrent.futures.ThreadPoolExecutor | None = None

    @property
    def info(self) -> TokenEngineInfo:
        """Before ``start``, without the context and the number of logits."""
        if self._engine is not None:
            return self._engine.info
        return TokenEngineInfo(self._name)

    async def start(self) -> None:
        from spider_worker.torch_models.causal import load_model
        from spider_worker.torch_models.serving import ModelEngine

        self._thread = concurrent.futures.ThreadPoolExecutor(1, "torch-engine")
        model = self._model = await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: load_model(self._name, self._parameters, where=self._where)
        )
        self._engine = ModelEngine(
            self._lease,
            self._thread,
            info=TokenEngineInfo(self._name, model.vocabulary, model.context),
            vocabulary=model.vocabulary,
            parameters=self._parameters,
        )

    async def sample(self, prompt: Ids, n: int, params: SampleParams) -> list[SampledTokens]:
        return await self._started().sample(prompt, n, params)

    async def compute_logprobs(self, tokens: Ids, *, start: int = 1, topk: int = 0) -> TokenScores:
        return await self._started().compute_logprobs(tokens, start=start, topk=topk)

    async def compute_distributions(self, tokens: Ids, positions: Sequence[int]) -> Any:
        return await self._started().compute_distributions(tokens, positions)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        self._engine = None
        if thread is not None:
            # What is queued runs, finds no model and says so; cancelled, it would answer nobody.
            await asyncio.to_thread(thread.shutdown)
            self._model = None
            gc.collect()
            import torch

            torch.cuda.empty_cache()  # nothing on the CPU

    def _started(self) -> ModelEngine:
        if self._engine is None:
            raise PipelineError("The torch engine was used before start or after close.")
        return self._engine

    @contextlib.contextmanager
    def _lease(self) -> Iterator[CausalModel]:
        if self._model is None or self._thread is None:
            raise PipelineError("The torch engine was closed.")
        yield self._model
