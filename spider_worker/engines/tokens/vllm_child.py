"""``python -m spider_worker.engines.tokens.vllm_child``: one vLLM, started by ``vllm_process.py``.

Requests come as pickles on standard input, a socket, and answers go out there. One thread owns
the engine (on the CPU its OpenMP pool belongs to the thread that made it); before each step it
takes in whatever has come. Another only reads, and ends the process when the socket does.
"""

from __future__ import annotations

__all__ = ["main"]

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import typing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, Final

import numpy as np

from spider_sdk.errors import EngineUnavailable, PipelineError, SpiderError
from spider_worker.engines import vllm_options
from spider_worker.engines.tokens import vllm_arguments
from spider_worker.engines.tokens.vllm_process import Adapter, Facts, Fault, Sample, Score, Setup
from spider_worker.tokens import SampledTokens, TokenScores, TopK

log = logging.getLogger(__name__)

#: vLLM warms up with adapters of its own, which it numbers from 1 and removes.
_NUMBERS_FROM: Final = 1000


class _Host:
    """``_open`` holds the requests that are under way, by number, with the outputs that have
    come of the ``parts`` that each was cut into."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._open: dict[int, tuple[Sample | Score, dict[int, Any]]] = {}
        self._engine: Any = None
        self._adapter: Any = None
        self._version: int | None = None

    def run(self) -> None:
        threading.Thread(target=self._read, daemon=True).start()
        number, setup = self._inbox.get()
        try:
            facts = self._load(setup)
        except SpiderError as error:
            self._say(number, Fault(type(error).__name__, error.message))
            return
        except Exception as error:
            # The boundary to the library: whatever it raises, the model cannot be served here, and
            # its own words are the best there are.
            log.exception("vllm could not start")
            said = f"The vllm engine could not start: {type(error).__name__}: {error}"
            self._say(number, Fault(EngineUnavailable.__name__, said))
            return
        self._say(number, facts)
        try:
            while self._take():
                if self._open:
                    self._step()
        except Exception as error:
            log.exception("vllm failed")
            self._say(None, _last_words(error))

    def _load(self, setup: Setup) -> Facts:
        vllm_options.check_engine_arguments(setup.arguments, where=setup.where)
        vllm_options.check_platform()
        from vllm.config.lora import MaxLoRARanks
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        slot = None
        if setup.lora_rank is not None:
            slot = vllm_arguments.lora_slot(setup.lora_rank, typing.get_args(MaxLoRARanks))
        arguments = vllm_arguments.engine_arguments(
            setup.arguments, slot=slot, memory=_memory(), environment=os.environ
        )
        self._engine = LLMEngine.from_engine_args(EngineArgs(model=setup.model, **arguments))
        config = self._engine.vllm_config.model_config
        vocabulary = config.get_vocab_size()
        topk = vocabulary if config.max_logprobs < 0 else min(config.max_logprobs, vocabulary)
        return Facts(config.max_model_len, vocabulary, topk)

    def _read(self) -> None:
        try:
            while True:
                self._inbox.put(self._pipe.recv())
        except (EOFError, OSError):
            # Whoever asked is gone. A step may take long, and nobody waits for it.
            os._exit(1)

    def _take(self) -> bool:
        """Take in what has come, waiting only if there is nothing to do. False: end."""
        while True:
            try:
                item = self._inbox.get(block=not self._open)
            except queue.Empty:
                return True
            if item is None:
                return False
            number, work = item
            if work is None:
                self._drop(number)
            elif isinstance(work, Adapter):
                self._say(number, self._adapt(work))
            elif (fault := self._admit(number, work)) is not None:
                self._drop(number)
                self._say(number, fault)

    def _admit(self, number: int, work: Sample | Score) -> Fault | None:
        if isinstance(work, Sample) and work.version != self._version:
            return _stale()
        tokens = list(work.prompt if isinstance(work, Sample) else work.tokens)
        self._open[number] = (work, {})
        try:
            for part, params in enumerate(_sampling(work)):
                self._engine.add_request(
                    f"{number}/{part}",
                    {"type": "token", "prompt_token_ids": tokens},
                    params,
                    lora_request=self._adapter if isinstance(work, Sample) else None,
                )
        except Exception as error:  # noqa: BLE001
            # The boundary to vLLM's own checks of one request; what they raise differs between
            # versions. An engine that is broken says so at its next step.
            return Fault("RowError", f"vLLM refuses it: {error}", type(error).__name__)
        return None

    def _drop(self, number: int) -> None:
        work, outputs = self._open.pop(number, (None, {}))
        if work is not None:
            parts = range(len(work.seeds) if isinstance(work, Sample) else 1)
            self._engine.abort_request([f"{number}/{p}" for p in parts if p not in outputs])

    def _adapt(self, work: Adapter) -> Fault | bool:
        from vllm.lora.request import LoRARequest

        for request in list(self._open):
            self._drop(request)
            self._say(request, _stale())
        old, self._adapter, self._version = self._adapter, None, None
        # Name, number and folder are new each time, for blocks of keys and values are found by
        # them. Those under the old adapter will not be asked for again.
        number = _NUMBERS_FROM + work.version
        new = LoRARequest(f"policy-{work.version}", number, work.folder)
        try:
            if old is not None:
                self._engine.remove_lora(old.lora_int_id)
                self._engine.reset_prefix_cache()
            # It reads the whole folder now, and holds the one adapter that it has room for.
            loaded = self._engine.add_lora(new) and self._engine.list_loras() == {number}
        except Exception as error:
            # The boundary to vLLM's own checks of an adapter.
            log.exception("vllm refuses the adapter")
            said = f"vLLM cannot serve the adapter: {type(error).__name__}: {error}"
            return Fault("FatalJobError", said)
        if not loaded:
            return Fault("FatalJobError", "vLLM did not take the adapter alone; its log says why.")
        self._adapter, self._version = new, work.version
        return True

    def _step(self) -> None:
        answers: list[tuple[int | None, Any]] = []
        for output in self._engine.step():
            name, _, part = output.request_id.partition("/")
            if not output.finished or int(name) not in self._open:
                continue
            work, outputs = self._open[int(name)]
            outputs[int(part)] = output
            if isinstance(work, Score):
                answers.append((int(name), _scores(work, output)))
            elif len(outputs) == len(work.seeds):
                answers.append((int(name), [_sample(work, outputs[p]) for p in sorted(outputs)]))
        for number, _ in answers:
            if number is not None:
                del self._open[number]
        if answers:
            self._pipe.send(answers)

    def _say(self, number: int | None, answer: Any) -> None:
        self._pipe.send([(number, answer)])

    def close(self) -> None:
        if self._engine is not None:
            self._engine.engine_core.shutdown()


def _sampling(work: Sample | Score) -> list[Any]:
    """vLLM's SamplingParams, one for each part of the request."""
    shared: Mapping[str, Any] = {"detokenize": False, "flat_logprobs": True, "ignore_eos": True}
    if isinstance(work, Score):
        values: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": work.topk}
        return [vllm_options.sampling_params({**shared, **values})]
    params = work.params
    values = {
        "max_tokens": work.limit,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "stop_token_ids": list(params.stop),
        "logprobs": 0,
    }
    return [
        vllm_options.sampling_params(
            {**shared, **values, "seed": seed if params.temperature else None}
        )
        for seed in work.seeds
    ]


def _sample(work: Sample, output: Any) -> SampledTokens:
    best = output.outputs[0]
    tokens = tuple(map(int, best.token_ids))
    logprobs = np.array(best.logprobs.logprobs, np.float32)
    if logprobs.shape != (len(tokens),):
        raise PipelineError(f"vLLM gave {logprobs.size} log-probabilities for {len(tokens)} tokens")
    return SampledTokens(tokens, logprobs, "stop" if tokens[-1] in work.params.stop else "length")


def _scores(work: Score, output: Any) -> TokenScores:
    """vLLM's first position is empty; each other one begins with the token itself, and the most
    probable follow in order."""
    count, width = len(work.tokens), work.topk + 1
    found = output.prompt_logprobs
    ids = np.array(found.token_ids, np.int64)
    if ids.size != (count - 1) * width:
        raise PipelineError(f"vLLM gave {ids.size} scores for {count} tokens and {work.topk} more")
    ids = ids.reshape(count - 1, width)
    values = np.array(found.logprobs, np.float32).reshape(ids.shape)
    if (ids[:, 0] != work.tokens[1:]).any():
        raise PipelineError("vLLM's scores are those of other tokens")
    start = max(1, work.start)
    logprobs = np.full(count, np.nan, np.float32)
    logprobs[start:] = values[start - 1 :, 0]
    if not work.topk:
        return TokenScores(logprobs)
    top = TopK(
        np.full((count, work.topk), -1, np.int64),
        np.full((count, work.topk), -np.inf, np.float32),
    )
    top.ids[start:], top.logprobs[start:] = ids[start - 1 :, 1:], values[start - 1 :, 1:]
    return TokenScores(logprobs, top)


def _memory() -> vllm_arguments.Memory | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return vllm_arguments.Memory(*torch.cuda.mem_get_info(0))


def _stale() -> Fault:
    return Fault(
        "PipelineError",
        "This sampler is stale: the adapter has changed since. Ask the trainer for its sampler"
        " after each step.",
    )


def _last_words(error: Exception) -> Fault:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return Fault("EngineUnavailable", f"The device's memory is too small for vLLM: {error}")
    return Fault("PipelineError", f"The vllm engine failed: {type(error).__name__}: {error}")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner's, which then closes the socket
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    pipe = Connection(os.dup(0))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    host = _Host(pipe)
    with contextlib.suppress(BrokenPipeError):  # nobody is there to be told
        host.run()
    try:
        host.close()
    finally:
        sys.stdout.flush()
        os._exit(0)  # threads of vLLM's may wait for ever


if __name__ == "__main__":
    main()
