"""The pipeline over the vllm engine against one ``LLM.chat`` call on the same engine, in one run.

``python -m benchmarks.bench_vllm [--model PATH] [--prompts 1024] [--rounds 5]`` prints one JSON
document with the median of the rounds' ratios. Prompts are 64 tokens each and come in four
shards, as a job's units would hand them over. Without ``--model`` a small random Qwen3 is made.
"""

from __future__ import annotations

__all__ = ["main", "measure", "prompts_of"]

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from spider_sdk.config.model import GenerationConfig, JobConfig, ModelConfig, SourceConfig
from spider_worker.engines.chat import render
from spider_worker.engines.vllm import VllmEngine
from spider_worker.pipelines.offline_gen.pipeline import OfflineGenPipeline
from spider_worker.testing import (
    InMemorySource,
    LocalContext,
    LocalStore,
    fake_parts,
    run_job_locally,
)

Messages = list[dict[str, str]]

SHARDS = 4


class _BenchEngine(VllmEngine):
    """The engine around an ``LLM``'s own LLMEngine, so that both run the same one."""

    llm: Any = None

    def _make_engine(self) -> Any:
        from vllm import LLM

        self.llm = LLM(self._model, **self._arguments)
        return self.llm.llm_engine


def prompts_of(tokenizer: Any, count: int, tokens: int = 64, seed: int = 0) -> list[Messages]:
    """``count`` different conversations that render to exactly ``tokens`` tokens."""
    draw = random.Random(seed)
    words = [" the", " of", " and", " to", " in", " is", " you", " that", " was", " for"]
    prompts: list[Messages] = []
    while len(prompts) < count:
        text = "".join(draw.choices(words, k=3))
        while True:
            messages = [{"role": "user", "content": text}]
            length = len(render(tokenizer, messages, {}))
            if length >= tokens:
                break
            text += draw.choice(words)
        if length == tokens:
            prompts.append(messages)
    return prompts


class _Kept:
    """The engine, started once for all rounds: the pipeline's start and close do nothing."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def start(self) -> None:
        return None

    async def close(self) -> None:
        return None


async def _ours(engine: VllmEngine, prompts: list[Messages], params: dict[str, Any]) -> int:
    """The whole off-policy pipeline over four shards: source, journal and shards included."""
    job = JobConfig(
        model=ModelConfig(provider="vllm", name="tiny"),
        source=SourceConfig(dataset="prompts", field="messages"),
        generation=GenerationConfig(parameters=params),
        shard_size=len(prompts) // SHARDS,
    )
    source = InMemorySource(lambda index: {"messages": prompts[index]}, len(prompts))
    pipeline = OfflineGenPipeline(job, fake_parts(source, _Kept(engine)))
    with tempfile.TemporaryDirectory() as folder:
        done = await run_job_locally(pipeline, LocalContext(LocalStore(Path(folder)), job))
    assert done.counters()["rows_ok"] == len(prompts), done.counters()
    return int(done.counters()["completion_tokens"])


async def measure(
    model: str, count: int, rounds: int, max_tokens: int, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Alternating rounds of ours and ``LLM.chat``; prefix caching must be off in
    ``arguments``, or the second of a pair would find the first one's work."""
    from vllm import SamplingParams

    engine = _BenchEngine(model, arguments=arguments)
    await engine.start()
    params = {"temperature": 0.7, "max_tokens": max_tokens, "ignore_eos": True}
    sampling = SamplingParams(**params)
    try:
        prompts = prompts_of(engine.llm.get_tokenizer(), count)

        def chat() -> int:
            outputs = engine.llm.chat(prompts, sampling, use_tqdm=False)
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        await engine.call(lambda: engine.llm.chat(prompts[:64], sampling, use_tqdm=False))
        ours: list[float] = []
        theirs: list[float] = []
        for number in range(rounds):
            for mine in (True, False) if number % 2 else (False, True):
                began = time.perf_counter()
                tokens = await (_ours(engine, prompts, params) if mine else engine.call(chat))
                (ours if mine else theirs).append(tokens / (time.perf_counter() - began))
    finally:
        await engine.close()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "prompts": count,
        "max_tokens": max_tokens,
        "engine_tokens_per_second": ours,
        "llm_chat_tokens_per_second": theirs,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--prompts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=32)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    arguments = {"enforce_eager": True, "enable_prefix_caching": False, "max_model_len": 512}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model is None:
            from tests.support.tiny_model import make_tiny_model

            model = str(make_tiny_model(Path(folder), vocabulary=4096, hidden=256, layers=4))
        result = asyncio.run(
            measure(model, options.prompts, options.rounds, options.max_tokens, arguments)
        )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
