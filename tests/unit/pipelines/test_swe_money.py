"""What the attempts of an instance may spend together, and what is charged for them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config.model import SweConfig
from spider_sdk.errors import FatalJobError
from spider_worker.agents.episode import Heard
from spider_worker.agents.proxy import Ticket
from spider_worker.pipelines.swe_agent import attempts
from spider_worker.pipelines.swe_agent.parts import Endpoint, Parts
from spider_worker.pipelines.swe_agent.pipeline import SweAgentPipeline
from spider_worker.swe_tasks.base import Origin, Task
from spider_worker.testing import LocalContext, LocalStore, run_job_locally

TASK = Task("one__one.1", "one/one", "It is broken.", Origin("image", "ref"))
#: How an episode ends, and what it has cost by then (None: not known). LOST: its worker is.
Played = tuple[str, float | None]
LOST = "lost"


class Place:
    path = "/testbed"

    async def check(self) -> None: ...

    @contextlib.asynccontextmanager
    async def open(self, _: Task) -> AsyncIterator[Place]:
        yield self


class Player:
    """Plays episodes, one after another. ``caps`` are those that their tickets had."""

    def __init__(self, *played: Played) -> None:
        self._played = list(played)
        self.caps: list[float | None] = []

    def ticket(self, *, max_calls: int | None, max_cost: float | None) -> Ticket:
        self.caps.append(max_cost)
        return Ticket("episode", max_calls, max_cost)

    async def run(self, *_: object, ticket: Ticket, **options: Any) -> Heard:
        status, cost = self._played.pop(0)
        heard = Heard(metrics={"accumulated_cost": cost or 0.0}, turns=1)
        ticket.cost, ticket.answers = cost, 1
        options["listener"](
            {"op": "metrics", "turns": heard.turns, "metrics": heard.metrics}, heard
        )
        if status == LOST:
            raise asyncio.CancelledError
        heard.status, heard.error = status, "as played"
        return heard

    async def close(self) -> None: ...


class World:
    """A job of one instance, taken up again as often as a test wants."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def play(self, *played: Played, retry: bool = False, **options: Any) -> Player:
        """Run the job, until its worker is lost where an episode says so."""
        grant = options.pop("grant", None)
        player = Player(*played)
        job = SweConfig(llm_model="m", dataset="d", workspace="local", **options)
        self.store = LocalStore(self._folder)
        self.ctx = LocalContext(self.store, job, grant=grant)
        pipeline = SweAgentPipeline(job, parts(player))
        with contextlib.suppress(asyncio.CancelledError):
            asyncio.run(run_job_locally(pipeline, self.ctx, retry=retry))
        assert not player._played
        return player

    @property
    def records(self) -> list[tuple[str, float | None]]:
        """How the attempts ended and what they cost."""
        return [(one["status"], one["metrics"]["accumulated_cost"]) for one in self.read()]

    def read(self) -> list[dict[str, Any]]:
        text = (self._folder / "artifacts" / "output.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    @property
    def charged(self) -> float | None:
        """What the fleet heard of its cost: None where nothing."""
        told = [counters for counters, _ in self.ctx.reports.values()]
        told += [shard.counters for shard in self.store.shards() if shard.complete]
        (cost,) = {counters.get("cost_usd") for counters in told}
        return cost


def parts(player: Player) -> Parts:
    async def give(value: Any) -> Any:
        return value

    def unused(*_: object) -> Any:
        raise AssertionError("nothing is judged or pushed")

    return Parts(
        tasks=lambda _: give([TASK]),
        endpoint=lambda _: give(Endpoint("m", None, None, True)),
        check=lambda _, endpoint, __: give(endpoint),
        workspace=lambda _, __: Place(),  # type: ignore[arg-type,return-value]
        host=lambda _, __: give(player),
        judge=unused,
        push=unused,
        check_hub=unused,
        slots=1,
    )


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    async def nothing(*_: object, **__: object) -> None:
        return None

    monkeypatch.setattr(attempts, "prepare", nothing)
    monkeypatch.setattr(attempts, "take_patch", nothing)
    return World(tmp_path)


# The cap of an instance.


def test_every_lost_worker_leaves_less_of_the_instances_cap(world: World) -> None:
    world.play((LOST, 3.9), max_budget_per_instance=4)
    world.play((LOST, 0.05), max_budget_per_instance=4)
    player = world.play(("stuck", 0.01), max_budget_per_instance=4)
    assert player.caps == [pytest.approx(0.05)]
    assert [cost for _, cost in world.records] == [3.9, 0.05, 0.01]


def test_what_failed_before_a_worker_was_lost_counts_too(world: World) -> None:
    caps = {"max_budget_per_instance": 4, "max_retries": 2}
    world.play(("llm_error", 2.0), (LOST, 1.0), **caps)
    player = world.play(("stuck", 0.1), **caps)
    assert player.caps == [pytest.approx(1)]


def test_nothing_is_begun_where_lost_workers_used_the_cap_up(world: World) -> None:
    world.play((LOST, 3.0), max_budget_per_instance=4)
    world.play((LOST, 1.0), max_budget_per_instance=4)
    world.play(max_budget_per_instance=4)
    assert [status for status, _ in world.records] == ["agent_error", "max_budget"]


def test_a_job_that_is_retried_has_a_fresh_cap_for_each_instance(world: World) -> None:
    caps = {"max_budget_per_instance": 4, "max_retries": 0}
    world.play(("llm_error", 3.0), **caps)
    player = world.play((LOST, 3.5), retry=True, **caps)
    assert player.caps == [4]
    player = world.play(("stuck", 0.1), **caps)
    assert player.caps == [pytest.approx(0.5)], "a worker that is lost begins no life of the job"


def test_so_it_has_where_the_job_ended_while_the_instance_was_at_work(world: World) -> None:
    caps = {"max_budget_per_instance": 4, "max_retries": 0}
    world.play((LOST, 2.0), **caps)
    world.play((LOST, None), **caps)
    player = world.play((LOST, 1.5), retry=True, **caps)
    assert player.caps == [4]
    player = world.play(("llm_error", 1.0), **caps)
    assert player.caps == [pytest.approx(2.5)]
    assert world.records == [
        ("agent_error", 2.0),
        ("agent_error", None),
        ("agent_error", 1.5),
        ("llm_error", 1.0),
    ]


def test_retries_that_were_used_up_when_the_job_ended_are_there_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end(*_: object) -> None:
        raise FatalJobError("another instance ended the job")

    with monkeypatch.context() as patch:
        patch.setattr(SweAgentPipeline, "_outcome", end)
        with pytest.raises(FatalJobError):
            world.play(("llm_error", 1.0), max_retries=0)
    world.play(("stuck", 0.1), retry=True, max_retries=0)
    assert world.records == [("llm_error", 1.0), ("stuck", 0.1)]


def test_a_grant_is_that_of_its_claim(world: World) -> None:
    """The fleet has counted what earlier claims spent."""
    caps = {"grant": 2, "max_retries": 1}
    world.play(("llm_error", 1.5), (LOST, 0.2), **caps)
    player = world.play(("stuck", 0.1), **caps)
    assert player.caps == [pytest.approx(1.8)]


# A cost that nobody knows.


def test_an_unknown_cost_is_charged_with_all_that_the_instance_was_allowed(world: World) -> None:
    world.play(("timeout", None), grant=2.5, max_budget_per_instance=4)
    assert world.charged == 2.5
    assert world.records == [("timeout", None)]
    (record,) = world.read()
    assert record["metrics"]["max_budget_per_task"] == 2.5


def test_what_earlier_attempts_cost_is_charged_once(world: World) -> None:
    player = world.play(("llm_error", 1.0), ("llm_error", None), grant=3, max_retries=5)
    assert player.caps == [3, 2]
    assert world.charged == pytest.approx(3)
    assert [status for status, _ in world.records] == ["llm_error", "llm_error"]
    # Taken up again, it counts as it did, and what it costs now is added.
    player = world.play(("stuck", 0.5), retry=True, grant=3)
    assert player.caps == [3]
    assert world.charged == pytest.approx(3.5)


def test_a_lost_worker_leaves_what_its_attempt_was_allowed(world: World) -> None:
    world.play((LOST, None), grant=3)
    assert world.charged == 3
    player = world.play(("stuck", 0.5), retry=True, grant=2)
    assert player.caps == [2]
    assert world.charged == pytest.approx(3.5)


def test_without_a_cap_an_unknown_cost_is_unknown(world: World) -> None:
    world.play(("llm_error", None), ("stuck", 0.5), max_retries=1)
    assert world.charged is None
    assert world.records == [("llm_error", None), ("stuck", 0.5)]
