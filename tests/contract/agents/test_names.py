"""What the SDK makes of a model's name when it reaches the model by the proxy."""

from __future__ import annotations

import pytest

from spider_worker.agents.episode import run_episode
from spider_worker.agents.proxy import LlmProxy
from tests.contract.agents.conftest import Stage
from tests.support.agent_model import Turn, running_model


@pytest.mark.parametrize(
    ("model", "sent"),
    [
        ("openai/your-org/your-model", "your-org/your-model"),
        ("openai/openai/gpt-oss-20b", "openai/gpt-oss-20b"),
        ("openai/anthropic/claude-sonnet-4.5", "anthropic/claude-sonnet-4.5"),
        ("deepseek/deepseek-chat", "deepseek-chat"),
        ("openrouter/anthropic/claude-sonnet-4.5", "anthropic/claude-sonnet-4.5"),
        ("together_ai/org/m", "org/m"),
        ("mistral/mistral-large-latest", "mistral-large-latest"),
    ],
)
def test_a_providers_name_goes_to_the_proxy_in_openais_protocol(
    stage: Stage, model: str, sent: str
) -> None:
    if stage.pool.confined:
        pytest.skip("the same in each")
    turns: list[Turn] = [{"call": "terminal", "args": {"command": "true"}}, {"text": "Done."}]
    socket = stage.pool.sockets / f"model-{stage.tree.parent.name}"

    async def main(base_url: str) -> tuple[str | None, str | None]:
        async with LlmProxy(base_url, "the-real-key", socket=socket) as proxy:
            request = {
                "instruction": "Mend it.",
                "path": stage.path,
                "state": str(stage.tmp_path / "state"),
                "max_iterations": 5,
                "llm": {"model": model, "api_key": proxy.issue().key, "num_retries": 0},
            }
            heard = await run_episode(
                lambda descriptors: stage.pool.fork(
                    None, descriptors, proxy=stage.pool.socket_path(socket.name)
                ),
                request,
                log=stage.log,
                timeout=120,
            )
            return heard.status, heard.error

    with running_model({"talk": turns}) as served:
        assert stage._run(main(served.base_url)) == ("finished", None)
    assert {request["model"] for request in served.requests} == {sent}
    assert len(served.requests) == 2
    assert set(served.keys) == {"Bearer the-real-key"}
