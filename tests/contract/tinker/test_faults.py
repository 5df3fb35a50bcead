"""What goes wrong between a run and a Tinker service, and what is said of it."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    PipelineError,
)
from spider_worker.engines.tokens.tinker import TinkerTokenEngine
from spider_worker.tokens import SampleParams
from spider_worker.trainers.base import AdamParams, Loss
from spider_worker.trainers.tinker import TinkerTrainer
from tests.contract.tinker.conftest import Run
from tests.support.tinker_exchanges import TinkerExchanges, load_exchanges
from tests.support.tinker_server import SERVER, ServerProcess, TinkerServer, make_served_model
from tests.support.training import PROMPTS, datum

DATA = [datum(PROMPTS[0], (8, 17, 44), (-5.0, -6.0, -7.0), (1.0, -0.5, 0.25))]
ADAM = AdamParams(1e-2)


def trainer_of(server: TinkerServer, **options: Any) -> TinkerTrainer:
    return TinkerTrainer(
        server.name, **{"lora_rank": 4, "seed": 3, "base_url": server.url, **options}
    )


async def start_and_close(one: Any) -> None:
    try:
        await one.start()
    finally:
        await one.close()


def test_a_rank_that_the_server_refuses_is_named(
    tinker_server: TinkerServer, run: Run[Any]
) -> None:
    with pytest.raises(FatalJobError, match=r"rank 64.*between 1 and 16.*lora_rank"):
        run(start_and_close(trainer_of(tinker_server, lora_rank=64)))


def test_a_model_that_the_server_has_not_is_named(
    tinker_server: TinkerServer, run: Run[Any]
) -> None:
    other = f"{tinker_server.name}x"
    with pytest.raises(FatalJobError, match=r"model\.name: .* does not serve .*did you mean"):
        run(start_and_close(TinkerTrainer(other, lora_rank=4, base_url=tinker_server.url)))
    with pytest.raises(FatalJobError, match=r"teacher\.name: .* does not serve"):
        run(start_and_close(TinkerTokenEngine(other, base_url=tinker_server.url)))


@pytest.mark.parametrize(
    ("logprobs", "advantages"),
    [
        ((-5.0, -6.0, -7.0), (1.0, np.nan, 0.25)),  # cannot be sent
        pytest.param(  # the server cannot say what came of it
            (-5.0, -200.0, -7.0),
            (1.0, 0.5, 0.25),
            marks=pytest.mark.skipif(
                SERVER == "0.25", reason="that server gives the next adapter the spoilt gradient"
            ),
        ),
    ],
)
def test_a_loss_that_is_no_number_stops_the_step_and_leaves_the_weights(
    tinker_server: TinkerServer, run: Run[Any], logprobs: Any, advantages: Any
) -> None:
    async def scenario() -> None:
        trainer = trainer_of(tinker_server)
        await trainer.start()
        try:
            await trainer.forward_backward(DATA, Loss())
            await trainer.optim_step(ADAM)
            before = await trainer.forward(DATA)
            spoilt = datum(PROMPTS[0], (8, 17, 44), logprobs, advantages)
            output = await trainer.forward_backward([spoilt], Loss())
            assert not np.isfinite(output.loss)
            for _ in range(2):
                with pytest.raises(FatalJobError, match=r"step 2 is (nan|-inf)"):
                    await trainer.optim_step(ADAM)
            np.testing.assert_array_equal((await trainer.forward(DATA))[0], before[0])
        finally:
            await trainer.close()

    async def next_in_its_place() -> None:
        trainer = trainer_of(tinker_server)
        await trainer.start()
        try:
            before = await trainer.forward(DATA)
            await trainer.forward_backward(DATA, Loss())
            await trainer.optim_step(ADAM)
            after = await trainer.forward(DATA)
            assert np.isfinite(after[0]).all()
            assert (after[0] != before[0]).any()
        finally:
            await trainer.close()

    run(scenario())
    run(next_in_its_place())


def test_a_sampler_of_older_weights_samples_no_more(
    tinker_server: TinkerServer, run: Run[Any]
) -> None:
    async def scenario() -> None:
        trainer = trainer_of(tinker_server)
        await trainer.start()
        try:
            stale = await trainer.sampler()
            assert await trainer.sampler() is stale
            await trainer.forward_backward(DATA, Loss())
            await trainer.optim_step(ADAM)
            with pytest.raises(PipelineError, match="stale"):
                await stale.sample(PROMPTS[0], 1, SampleParams(2))
            assert await trainer.sampler() is not stale
        finally:
            await trainer.close()

    run(scenario())


def test_an_adapter_that_the_server_has_lost_is_no_reason_to_give_the_job_up(
    tinker_server: TinkerServer, run: Run[Any]
) -> None:
    """As after a restart, or at the end of a session: another session may go on."""

    async def train(trainer: TinkerTrainer) -> None:
        for _ in range(50):  # it is unloaded a while after
            await trainer.forward_backward(DATA, Loss())
            await asyncio.sleep(0.2)

    async def scenario() -> None:
        trainer = trainer_of(tinker_server)
        await trainer.start()
        try:
            body = {"model_id": trainer._client.model_id, "type": "unload_model"}
            assert await trainer._service.post("/api/v1/unload_model", body) == 200
            with pytest.raises(EngineUnavailable, match="does not know"):
                await train(trainer)
        finally:
            await trainer.close()

    run(scenario())


def test_what_the_server_ignores_is_refused(tinker_server: TinkerServer, run: Run[Any]) -> None:
    async def scenario() -> None:
        trainer = trainer_of(tinker_server)
        await trainer.start()
        try:
            await trainer.forward_backward(DATA, Loss())
            with pytest.raises(NotSupported, match="grad_clip_norm"):
                await trainer.optim_step(AdamParams(1e-3, grad_clip_norm=1.0))
        finally:
            await trainer.close()

    run(scenario())


def test_training_goes_on_from_a_checkpoint_of_another_run(
    tinker_server: TinkerServer, run: Run[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        first, second = trainer_of(tinker_server), trainer_of(tinker_server, seed=4)
        await first.start()
        try:
            await second.start()
            await first.forward_backward(DATA, Loss())
            await first.optim_step(ADAM)
            path = (await first.save_state(tmp_path))["path"]
            await second.load_weights(path)
            np.testing.assert_allclose(
                (await second.forward(DATA))[0], (await first.forward(DATA))[0], atol=1e-5
            )
            with pytest.raises(FatalJobError, match="no training weights"):
                await second.load_weights(f"{path}-not")
        finally:
            await first.close()
            await second.close()

    run(scenario())
    assert "moments" in caplog.text


def test_a_wrong_key_is_said_to_be_one(run: Run[Any]) -> None:
    with TinkerExchanges([], key="tml-right") as server:
        options: dict[str, Any] = {"base_url": server.url, "api_key": "tml-wrong"}
        with pytest.raises(AuthError, match=r"refuses the key.*TINKER_API_KEY"):
            run(start_and_close(TinkerTrainer("m", lora_rank=4, **options)))
        with pytest.raises(AuthError, match="refuses the key"):
            run(start_and_close(TinkerTokenEngine("m", **options)))


def test_a_key_that_is_none_is_said_to_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    with pytest.raises(AuthError, match="TINKER_API_KEY"):
        TinkerTrainer("m", lora_rank=4)
    with pytest.raises(AuthError, match=r"model\.api_key: .* begins with tml-"):
        TinkerTrainer("m", lora_rank=4, api_key="sk-something")


def test_the_workers_own_key_is_not_the_jobs_to_spend(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TINKER_API_KEY", "tml-the-workers")
    for key, sent in (("tml-the-jobs", "tml-the-jobs"), (None, "tml-none")):
        with TinkerExchanges(load_exchanges("scoring")[:4]) as server:
            run(
                start_and_close(
                    TinkerTokenEngine("Qwen/Qwen3-32B", base_url=server.url, api_key=key)
                )
            )
            assert server.keys == {sent}


def test_an_address_of_the_environment_is_used(
    run: Run[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TinkerExchanges(load_exchanges("scoring")[:4]) as server:
        monkeypatch.setenv("TINKER_BASE_URL", server.url + "/")
        run(start_and_close(TinkerTokenEngine("Qwen/Qwen3-32B")))
        assert server.problems == []


def test_a_private_address_is_refused_where_the_worker_says_so(run: Run[Any]) -> None:
    with TinkerExchanges([]) as server:
        trainer = TinkerTrainer("m", lora_rank=4, base_url=server.url, allow_private=False)
        with pytest.raises(FatalJobError, match=r"model\.base_url leads to 127\.0\.0\.1"):
            run(start_and_close(trainer))
        assert server.keys == set()


def test_where_nothing_listens_a_start_fails_soon(run: Run[Any]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        engine = TinkerTokenEngine("m", base_url=url, patience=1.0)
        with pytest.raises(EngineUnavailable, match=f"{url} cannot be reached"):
            run(start_and_close(engine))


def test_a_server_that_is_killed_ends_the_wait_for_it(
    run: Run[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The SDK would wait for ever."""
    if said := ServerProcess.missing():
        pytest.skip(said)
    model = make_served_model(tmp_path_factory.mktemp("served"))
    server = ServerProcess(model, tmp_path_factory.mktemp("tinker"))

    async def scenario() -> None:
        trainer = trainer_of(server, parameters={"patience": 2})
        await trainer.start()
        try:
            sampler = await trainer.sampler()
            server.stop(signal.SIGKILL)
            began = time.monotonic()
            calls = (
                trainer.forward_backward(DATA, Loss()),
                sampler.sample(PROMPTS[0], 1, SampleParams(2)),
            )
            for found in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(found, EngineUnavailable)
                assert "has not answered for 2 seconds" in found.message
            assert time.monotonic() - began < 60
        finally:
            await trainer.close()

    with server:
        run(scenario())
