"""Training at the service and training here are the same training."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.tinker.conftest import Run
from tests.support.tinker_parity import STEPS, compare
from tests.support.tinker_server import TinkerServer


@pytest.mark.parametrize("loss", ["importance_sampling", "ppo", "cispo"])
def test_losses_and_logprobs_are_the_local_trainers(
    tinker_server: TinkerServer, run: Run[Any], loss: str
) -> None:
    (found,) = run(compare(tinker_server.model, tinker_server.url, [loss])).values()
    assert found.steps == STEPS
    assert found.tokens > 50
    assert found.loss < 1e-3
    assert found.logprobs < 1e-3
