"""What vLLM's two engines add: an adapter that is replaced, and a process that may end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import FatalJobError, NotSupported, PipelineError, RowError
from spider_worker.engines.tokens.vllm import VllmAdapterServer, VllmTokenEngine
from spider_worker.tokens import SampleParams
from tests.contract.token_engines.conftest import ARGUMENTS, VLLM_MARKS, Run, one_thread
from tests.support.reference import check_sample, greedy, load_reference, make_adapter

pytestmark = VLLM_MARKS

#: Longer than two blocks of keys and values, so that there is something to be found again.
PROMPT = tuple(range(3, 83))
PARAMS = SampleParams(8, seed=1)


def test_samples_are_those_of_the_adapter_that_was_served_last(
    adapter_server: VllmAdapterServer,
    adapters: list[Path],
    tiny_model: Path,
    tmp_path: Path,
    run: Run[Any],
) -> None:
    """I12. The same prompt and the same folder for each: keys and values of the one before must
    not be used."""
    found = []
    for adapter in (*adapters, adapters[0]):
        reference = load_reference(tiny_model, adapter)
        folder = shutil.copytree(adapter, tmp_path / "adapter", dirs_exist_ok=True)
        engine = run(adapter_server.serve(folder))
        samples = run(engine.sample(PROMPT, 2, PARAMS))
        for sample in samples:
            check_sample(reference, PROMPT, sample, 1e-4)
        (best,) = run(engine.sample(PROMPT, 1, SampleParams(8, temperature=0.0)))
        assert list(best.tokens) == greedy(reference, PROMPT, 8)
        found.append([sample.tokens for sample in samples])
    assert found[0] == found[3]
    assert len({*map(str, found)}) == 3


def test_the_folder_may_be_deleted(
    adapter_server: VllmAdapterServer,
    adapters: list[Path],
    tiny_model: Path,
    tmp_path: Path,
    run: Run[Any],
) -> None:
    copy = shutil.copytree(adapters[1], tmp_path / "adapter")
    engine = run(adapter_server.serve(copy))
    shutil.rmtree(copy)
    reference = load_reference(tiny_model, adapters[1])
    for sample in run(engine.sample(PROMPT, 2, PARAMS)):
        check_sample(reference, PROMPT, sample, 1e-4)


def test_an_engine_is_stale_once_another_adapter_is_served(
    adapter_server: VllmAdapterServer, adapters: list[Path], run: Run[Any]
) -> None:
    async def story() -> Any:
        old = await adapter_server.serve(adapters[0])
        under_way = asyncio.ensure_future(old.sample(PROMPT[:4], 8, SampleParams(90)))
        await old.sample(PROMPT[:4], 1, SampleParams(1))  # by now the other is being sampled
        new = await adapter_server.serve(adapters[1])
        results = await asyncio.gather(under_way, return_exceptions=True)
        with pytest.raises(PipelineError, match="stale"):
            await old.sample(PROMPT, 1, PARAMS)
        return results[0], await new.sample(PROMPT, 1, PARAMS)

    lost, samples = run(story())
    assert isinstance(lost, PipelineError)
    assert "stale" in lost.message
    assert len(samples) == 1


def test_an_adapter_that_cannot_be_served_says_why_and_harms_no_other(
    adapter_server: VllmAdapterServer,
    adapters: list[Path],
    tiny_model: Path,
    tmp_path: Path,
    run: Run[Any],
) -> None:
    too_large = make_adapter(tiny_model, tmp_path / "rank", seed=5, rank=16)
    for folder in (tmp_path / "nothing", too_large):
        with pytest.raises(FatalJobError, match="cannot serve the adapter"):
            run(adapter_server.serve(folder))
    engine = run(adapter_server.serve(adapters[2]))
    (sample,) = run(engine.sample(PROMPT, 1, PARAMS))
    check_sample(load_reference(tiny_model, adapters[2]), PROMPT, sample, 1e-4)


def test_under_an_adapter_nothing_is_scored(
    adapter_server: VllmAdapterServer, adapters: list[Path], run: Run[Any]
) -> None:
    engine = run(adapter_server.serve(adapters[0]))
    assert engine.info.topk == 0
    with pytest.raises(NotSupported, match="forward"):
        run(engine.compute_logprobs(PROMPT))


def test_a_server_that_has_not_started_says_so(adapters: list[Path], run: Run[Any]) -> None:
    server = VllmAdapterServer("tiny", lora_rank=4)
    with pytest.raises(PipelineError, match="before start"):
        run(server.serve(adapters[0]))
    run(server.close())


def test_logprobs_are_of_what_was_drawn_from(vllm_kind: Any, run: Run[Any]) -> None:
    """Tempered and cut, they are not the model's own."""
    prompt = PROMPT[:9]
    table = vllm_kind.reference
    (tempered,) = run(vllm_kind.engine.sample(prompt, 1, SampleParams(6, temperature=2.0, seed=3)))
    import torch

    with torch.inference_mode():
        logits = table(torch.tensor([[*prompt, *tempered.tokens]])).logits[0, len(prompt) - 1 : -1]
    halved = (logits / 2).log_softmax(-1)
    want = halved.gather(1, torch.tensor(tempered.tokens)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(tempered.logprobs, want, atol=1e-4)
    for option in ({"top_k": 2}, {"top_p": 0.3}):
        (cut,) = run(vllm_kind.engine.sample(prompt, 1, SampleParams(6, seed=3, **option)))
        with torch.inference_mode():
            logits = table(torch.tensor([[*prompt, *cut.tokens]])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(cut.tokens)[:, None])[:, 0].numpy()
        assert (cut.logprobs > own + 0.01).any()
        assert (cut.logprobs <= 1e-6).all()


def test_more_per_position_than_vllm_returns_is_refused(vllm_kind: Any, run: Run[Any]) -> None:
    assert vllm_kind.engine.info.topk == 20
    with pytest.raises(NotSupported, match=r"teacher\.parameters\.max_logprobs"):
        run(vllm_kind.engine.compute_logprobs(PROMPT[:4], topk=21))


def test_a_name_that_vllm_does_not_know_is_refused_at_the_start(
    tiny_model: Path, run: Run[Any]
) -> None:
    engine = VllmTokenEngine(str(tiny_model), arguments={"max_model_length": 64})
    with pytest.raises(NotSupported, match=r"teacher\.parameters\.max_model_length.*max_model_len"):
        run(engine.start())
    run(engine.close())


def test_a_process_that_is_killed_answers_everyone_and_closes(
    tiny_model: Path, run: Run[Any]
) -> None:
    arguments = {**ARGUMENTS, "max_model_len": 512}
    engine = VllmTokenEngine(str(tiny_model), arguments=arguments)

    async def story() -> list[Any]:
        with one_thread():
            await engine.start()
        process = engine._process._process
        assert process is not None
        calls = [
            asyncio.ensure_future(engine.sample(PROMPT, 1, SampleParams(400))) for _ in range(3)
        ]
        await engine.compute_logprobs(PROMPT)
        process.send_signal(signal.SIGKILL)
        results = await asyncio.gather(*calls, return_exceptions=True)
        with pytest.raises(PipelineError, match="signal 9"):
            await engine.compute_logprobs(PROMPT)
        await engine.close()
        await engine.close()
        with pytest.raises(PipelineError, match="after close"):
            await engine.compute_logprobs(PROMPT)
        return results

    for result in run(story()):
        assert isinstance(result, PipelineError)
        assert not isinstance(result, RowError)
        assert "signal 9" in result.message


_RUNNER = """
import asyncio, sys
from spider_worker.engines.tokens.vllm import VllmTokenEngine

async def main():
    engine = VllmTokenEngine(sys.argv[1])
    starting = asyncio.ensure_future(engine.start())
    while engine._process._process is None:
        await asyncio.sleep(0.01)
    print(engine._process._process.pid, flush=True)
    await starting

asyncio.run(main())
"""


def test_a_process_outlives_no_runner(tiny_model: Path) -> None:
    """Not even one that was killed: the device must be free again."""
    with subprocess.Popen(
        [sys.executable, "-c", _RUNNER, str(tiny_model)], stdout=subprocess.PIPE, text=True
    ) as runner:
        assert runner.stdout is not None
        child = int(runner.stdout.readline())
        assert alive(child)
        runner.kill()
    until(lambda: not alive(child), seconds=120)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (ProcessLookupError, FileNotFoundError):
        return False
    return state != "Z"


def until(condition: Callable[[], bool], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)
