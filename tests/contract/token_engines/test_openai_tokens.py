"""The engine over HTTP against servers of other habits, and against ones that fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from spider_sdk.errors import (
    AuthError,
    EngineUnavailable,
    FatalJobError,
    NotSupported,
    RowError,
)
from spider_worker.engines import retry
from spider_worker.engines.tokens.openai import OpenAITokenEngine
from spider_worker.tokens import SampleParams
from tests.support.scripted_server import (
    Answer,
    Handler,
    ScriptedServer,
    answer_json,
    cut_before_answer,
)

TOKENS = (5, 9, 30, 41)
PATH = "/v1/completions"


def logprob(token: int) -> float:
    return -token / 8


class Server:
    """A server whose model gives token ``t`` the log-probability −t/8, whatever came before."""

    def __init__(self, scripted: ScriptedServer) -> None:
        self.scripted = scripted
        self.base_url = f"{scripted.url}/v1"
        scripted.on("GET", "/v1/models", answer_json({"data": [{"id": "m", "max_model_len": 9}]}))

    def speak(self, *speakers: Callable[[dict[str, Any]], Any]) -> None:
        """Answer requests by these functions of their bodies, the last one for ever. An Answer is
        sent as it is."""

        def saying(speak: Callable[[dict[str, Any]], Any]) -> Answer:
            def answer(handler: Handler) -> None:
                said = speak(json.loads(handler.body))
                (said if callable(said) else answer_json(said))(handler)

            return answer

        self.scripted.on("POST", PATH, *map(saying, speakers))

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [seen.json for seen in self.scripted.requests("POST", PATH)]


def refusing(status: int, message: str = "refused", **headers: str) -> Callable[[Any], Any]:
    return lambda body: answer_json({"error": {"message": message}}, status, **headers)


def choice(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": "", **fields}]}


def row(token: int, others: tuple[int, ...]) -> dict[str, Any]:
    return {str(t): {"logprob": logprob(t), "rank": 1} for t in (token, *others)}


def with_prompt_logprobs(body: dict[str, Any]) -> Any:
    prompt, count = body["prompt"], body["prompt_logprobs"]
    best = tuple(range(count))
    return choice(prompt_logprobs=[None, *(row(token, best) for token in prompt[1:])])


def with_echo(body: dict[str, Any]) -> Any:
    """It knows of no prompt_logprobs, and says nothing of the first token."""
    if not body.get("echo"):
        return choice(logprobs=None)
    values = [None, *map(logprob, body["prompt"][1:])]
    return choice(logprobs={"token_logprobs": values + [-9.0] * body["max_tokens"]})


@pytest.fixture
def server() -> Iterator[Server]:
    with ScriptedServer() as scripted:
        yield Server(scripted)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "_FIRST", 0.002)
    monkeypatch.setattr(retry, "_LONGEST", 0.02)


def using(server: Server, *calls: Callable[[OpenAITokenEngine], Any], **options: Any) -> Any:
    """What the last of ``calls`` comes to on an engine that has started."""

    async def story() -> Any:
        engine = OpenAITokenEngine("m", base_url=server.base_url, **options)
        try:
            await engine.start()
            found = None
            for call in calls:
                found = call(engine)
                if asyncio.iscoroutine(found):
                    found = await found
            return found
        finally:
            await engine.close()

    return asyncio.run(story())


def check_scores(scores: Any) -> None:
    assert np.isnan(scores.logprobs[0])
    np.testing.assert_allclose(scores.logprobs[1:], [logprob(t) for t in TOKENS[1:]])


def score(**options: Any) -> Callable[[OpenAITokenEngine], Any]:
    return lambda engine: engine.compute_logprobs(TOKENS, **options)


def test_prompt_logprobs_with_the_most_probable(server: Server) -> None:
    server.speak(with_prompt_logprobs)
    scores = using(server, score(topk=3))
    check_scores(scores)
    assert scores.topk.ids[1:].tolist() == [[0, 1, 2]] * 3  # the token itself is one too many
    np.testing.assert_allclose(scores.topk.logprobs[1], [0, -0.125, -0.25])
    assert server.bodies[-1] == {
        "model": "m",
        "prompt": list(TOKENS),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 3,
    }


def test_what_the_server_says_of_its_context_is_taken(server: Server) -> None:
    server.speak(with_prompt_logprobs)
    assert using(server, lambda engine: engine.info.context) == 8
    assert using(server, lambda engine: engine.info.topk) == 20
    with pytest.raises(RowError, match="context of 8 tokens"):
        using(server, lambda engine: engine.compute_logprobs((7,) * 9))
    options = {"parameters": {"context": 20, "topk": 5}}
    asked = len(server.scripted.requests("GET", "/v1/models"))
    assert using(server, lambda engine: engine.info.context, **options) == 20
    assert using(server, lambda engine: engine.info.topk, **options) == 5
    assert len(server.scripted.requests("GET", "/v1/models")) == asked


@pytest.mark.parametrize(
    "answer", [{"data": []}, {"data": [{"id": "m"}]}, {"data": [{"id": "other", "x": 1}]}, {}]
)
def test_a_server_that_does_not_tell_has_an_unknown_context(server: Server, answer: Any) -> None:
    server.speak(with_prompt_logprobs)
    server.scripted.on("GET", "/v1/models", answer_json(answer))
    assert using(server, lambda engine: engine.info.context) is None
    server.scripted.on("GET", "/v1/models", answer_json({"detail": "no such route"}, 404))
    assert using(server, lambda engine: engine.info.context) is None


def test_a_server_that_only_echoes(server: Server) -> None:
    server.speak(with_echo)
    check_scores(using(server, score()))
    assert server.bodies[-1]["max_tokens"] == 0
    assert using(server, lambda engine: engine.info.topk) == 0
    with pytest.raises(NotSupported, match="3 tokens per position"):
        using(server, score(topk=3))


def test_a_server_that_leaves_the_first_token_out(server: Server) -> None:
    def shorter(body: dict[str, Any]) -> Any:
        said = with_echo(body)
        if body.get("echo"):
            said["choices"][0]["logprobs"]["token_logprobs"].pop(0)
        return said

    server.speak(shorter)
    check_scores(using(server, score()))

    def shorter_rows(body: dict[str, Any]) -> Any:
        said = with_prompt_logprobs(body)
        said["choices"][0]["prompt_logprobs"].pop(0)
        return said

    server.speak(shorter_rows)
    check_scores(using(server, score(topk=1)))


@pytest.mark.parametrize("generated", [0, 1])
def test_an_echo_that_must_generate(server: Server, generated: int) -> None:
    """What comes after the prompt is no score of it; a server may stop before it."""

    def speak(body: dict[str, Any]) -> Any:
        if body["max_tokens"] == 0:
            return refusing(400, "max_tokens must be at least 1")(body)
        if not body.get("echo"):
            return choice(logprobs=None)
        values = [None, *map(logprob, body["prompt"][1:]), *[-9.0] * generated]
        said = choice(logprobs={"token_logprobs": values})
        return {**said, "usage": {"completion_tokens": generated}}

    server.speak(speak)
    check_scores(using(server, score()))


def test_a_server_that_scores_nothing_is_refused_at_the_start(server: Server) -> None:
    server.speak(lambda body: choice(logprobs=None))
    with pytest.raises(NotSupported, match="gives no log-probabilities of given tokens"):
        using(server)
    server.speak(refusing(400, "no such thing"))
    with pytest.raises(NotSupported, match="no such thing"):
        using(server)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda rows: [None, *rows[2:], rows[1]], "are not those of token"),
        (lambda rows: [*rows, rows[-1]], "5 scores for 4 tokens"),
        (lambda rows: rows[:-2], "2 scores for 4 tokens"),
        (lambda rows: [*rows[:-1], None], "left some of them empty"),
    ],
    ids=["of-the-next", "too-many", "too-few", "empty"],
)
def test_scores_of_other_tokens_end_the_job(server: Server, spoil: Any, said: str) -> None:
    def speak(body: dict[str, Any]) -> Any:
        answer = with_prompt_logprobs(body)
        rows = answer["choices"][0]["prompt_logprobs"]
        if len(body["prompt"]) == len(TOKENS):
            answer["choices"][0]["prompt_logprobs"] = spoil(rows)
        return answer

    server.speak(speak)
    with pytest.raises(FatalJobError, match=said):
        using(server, score())


def test_what_json_cannot_hold_is_minus_infinity(server: Server) -> None:
    def speak(body: dict[str, Any]) -> Any:
        answer = with_prompt_logprobs(body)
        for one in answer["choices"][0]["prompt_logprobs"][1:]:
            for entry in one.values():
                entry["logprob"] = -9999.0
        return answer

    server.speak(speak)
    scores = using(server, score(topk=2))
    assert np.isneginf(scores.logprobs[1:]).all()
    assert np.isneginf(scores.topk.logprobs).all()


def test_a_wrong_key_is_an_auth_error(server: Server) -> None:
    server.speak(refusing(401, "no such key"))
    with pytest.raises(AuthError, match=r"no such key.*teacher\.api_key_env"):
        using(server, api_key="wrong")
    assert len(server.bodies) == 1
    sent = server.scripted.requests("POST", PATH)[0].headers
    assert sent["authorization"] == "Bearer wrong"


def test_nothing_listening_is_engine_unavailable() -> None:
    async def story() -> None:
        engine = OpenAITokenEngine(
            "m", base_url="http://127.0.0.1:1/v1", parameters={"max_retries": 1}
        )
        try:
            await engine.start()
        finally:
            await engine.close()

    with pytest.raises(EngineUnavailable, match=r"Nothing answers at http://127\.0\.0\.1:1/v1"):
        asyncio.run(story())


@pytest.mark.parametrize(
    "fault",
    [refusing(500), refusing(503), lambda body: cut_before_answer, lambda body: {"choices": []}],
    ids=["500", "503", "cut", "empty"],
)
def test_a_fault_is_repeated_and_a_lasting_one_ends_the_engine(server: Server, fault: Any) -> None:
    server.speak(with_prompt_logprobs, fault, fault, with_prompt_logprobs)
    check_scores(using(server, score()))
    server.speak(with_prompt_logprobs, fault)
    before = len(server.bodies)
    with pytest.raises(EngineUnavailable, match="3 tries"):
        using(server, score(), parameters={"max_retries": 2})
    assert len(server.bodies) - before == 4


def test_a_server_that_goes_away_is_waited_for_and_then_given_up(server: Server) -> None:
    server.speak(with_prompt_logprobs)
    moved: dict[str, Any] = {}

    def leave(engine: OpenAITokenEngine) -> None:
        moved["url"] = engine._endpoint.base_url
        engine._endpoint.base_url = "http://127.0.0.1:1/v1"

    with pytest.raises(EngineUnavailable, match="No request has succeeded"):
        using(server, leave, score(), parameters={"patience": 0.1, "max_retries": 0})


def test_a_refused_request_is_a_rows_error(server: Server) -> None:
    server.speak(with_prompt_logprobs, refusing(400, "Token id 600 is out of vocabulary"))
    with pytest.raises(RowError, match="out of vocabulary"):
        using(server, score())


def test_throttling_is_waited_out(server: Server) -> None:
    server.speak(with_prompt_logprobs, *[refusing(429)] * 4, with_prompt_logprobs)
    check_scores(using(server, score(), parameters={"max_retries": 0}))


def test_private_addresses_are_refused_unless_allowed(server: Server) -> None:
    with pytest.raises(FatalJobError, match=r"teacher\.base_url leads to"):
        using(server, allow_private=False)
    assert not server.bodies


def test_headers_and_further_fields_are_sent(server: Server) -> None:
    server.speak(with_prompt_logprobs)
    parameters = {"headers": {"X-Team": "spider"}, "extra_body": {"priority": 3}}
    using(server, score(), parameters=parameters)
    assert server.bodies[-1]["priority"] == 3
    assert server.scripted.requests("POST", PATH)[-1].headers["x-team"] == "spider"


# -- samples -----------------------------------------------------------------------


def sampled(*tokens: int, **fields: Any) -> Callable[[dict[str, Any]], Any]:
    values = [logprob(token) for token in tokens]

    def speak(body: dict[str, Any]) -> Any:
        if "prompt_logprobs" in body:
            return with_prompt_logprobs(body)
        names = [f"token_id:{token}" for token in tokens]
        one = {"text": "", "logprobs": {"token_logprobs": values, "tokens": names}, **fields}
        return {"choices": [{**one, "index": at} for at in reversed(range(body["n"]))]}

    return speak


def sample(params: SampleParams, n: int = 1) -> Callable[[OpenAITokenEngine], Any]:
    return lambda engine: engine.sample(TOKENS, n, params)


def test_samples_switch_off_what_a_model_would_switch_on(server: Server) -> None:
    server.speak(sampled(4, 8))
    first, second = using(server, sample(SampleParams(3, stop=(8,)), n=2))
    assert first.tokens == second.tokens == (4, 8)
    assert first.stop_reason == "stop"
    np.testing.assert_allclose(first.logprobs, [-0.5, -1.0])
    assert server.bodies[-1] == {
        "model": "m",
        "prompt": list(TOKENS),
        "n": 2,
        "max_tokens": 3,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "logprobs": 0,
        "stop_token_ids": [8],
        "ignore_eos": True,
        "return_tokens_as_token_ids": True,
    }


def test_a_seed_makes_a_request_of_each_sample(server: Server) -> None:
    server.speak(sampled(4))
    using(server, sample(SampleParams(3, seed=7), n=3))
    bodies = [body for body in server.bodies if "prompt_logprobs" not in body]
    assert [body["n"] for body in bodies] == [1, 1, 1]
    seeds = {body["seed"] for body in bodies}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_greedy_is_asked_for_once(server: Server) -> None:
    server.speak(sampled(4))
    assert len(using(server, sample(SampleParams(3, temperature=0.0, seed=7), n=3))) == 3
    assert [body.get("n") for body in server.bodies if "prompt_logprobs" not in body] == [1]
    assert "seed" not in server.bodies[-1]


def test_a_sample_keeps_to_the_context(server: Server) -> None:
    server.speak(sampled(4))
    using(server, sample(SampleParams(30)))
    assert server.bodies[-1]["max_tokens"] == 4


def test_what_comes_behind_a_stop_token_is_cut_off(server: Server) -> None:
    server.speak(sampled(4, 8, 6))
    (found,) = using(server, sample(SampleParams(3, stop=(8,))))
    assert found.tokens == (4, 8)
    assert found.logprobs.shape == (2,)
    assert found.stop_reason == "stop"


@pytest.mark.parametrize("where", ["token_ids", "logprobs"])
def test_token_ids_may_stand_in_other_places(server: Server, where: str) -> None:
    logprobs: dict[str, Any] = {"token_logprobs": [-0.5, -1.0], "tokens": ["a", "b"]}
    fields: dict[str, Any] = {"logprobs": logprobs}
    if where == "token_ids":
        fields["token_ids"] = [4, 8]
    else:
        logprobs["token_ids"] = [4, 8]
    server.speak(sampled(0, 0, **fields))
    (found,) = using(server, sample(SampleParams(3)))
    assert found.tokens == (4, 8)


def test_a_server_that_names_no_ids_cannot_be_sampled(server: Server) -> None:
    server.speak(sampled(0, logprobs={"token_logprobs": [-0.5], "tokens": ["a"]}))
    with pytest.raises(NotSupported, match="does not name the tokens"):
        using(server, sample(SampleParams(3)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"logprobs": {"token_logprobs": [-1.0], "token_ids": [1, 2]}}, "2 tokens and 1"),
        ({"logprobs": {"token_logprobs": [-1.0] * 5, "token_ids": [1] * 5}}, "5 tokens"),
    ],
)
def test_samples_that_do_not_fit_end_the_job(server: Server, fields: Any, said: str) -> None:
    server.speak(sampled(0, **fields))
    with pytest.raises(FatalJobError, match=said):
        using(server, sample(SampleParams(3)))


@pytest.mark.parametrize("option", [{"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 5}])
def test_what_has_no_logprobs_is_not_sampled(server: Server, option: dict[str, Any]) -> None:
    server.speak(sampled(4))
    with pytest.raises(NotSupported, match="temperature 1 or 0"):
        using(server, sample(SampleParams(3, **option)))
