"""Secrets leave a document before it leaves the client, and are stripped again by the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from spider_sdk.config import (
    AppConfig,
    check_env_names,
    lift_secrets,
    optional_secrets,
    parse_job,
    required_secrets,
    strip_secrets,
)
from spider_sdk.errors import ConfigError
from tests.unit.config.documents import job

OPENAI = {"provider": "openai"}


def lift(config: AppConfig, environ: dict[str, str]) -> tuple[dict[str, Any], dict[str, str], Any]:
    return lift_secrets(config.document, environ, config.interpolated)


def test_an_inline_key_gets_a_name_of_its_own() -> None:
    document = job(model={**OPENAI, "api_key": "sk-inline"})
    clean, env, names = lift_secrets(document, {})
    assert clean["model"]["api_key_env"] == "SPIDER_SECRET_MODEL_API_KEY"
    assert env == {"SPIDER_SECRET_MODEL_API_KEY": "sk-inline"}
    assert names == ("SPIDER_SECRET_MODEL_API_KEY",)
    assert "sk-inline" not in json.dumps(clean)
    assert document["model"]["api_key"] == "sk-inline"  # the caller's is left alone
    check_env_names(names)
    assert required_secrets(parse_job(clean)) == names


def test_an_interpolated_key_keeps_its_variables_name() -> None:
    environ = {"MY_KEY": "sk-1"}
    config = AppConfig.from_dict(
        {"job": job(model={**OPENAI, "api_key": "${MY_KEY}"})}, environ=environ
    )
    clean, env, _ = lift(config, environ)
    assert clean["model"] == {"provider": "openai", "name": "owner/model", "api_key_env": "MY_KEY"}
    assert env == {"MY_KEY": "sk-1"}


def test_a_key_that_only_holds_a_variable_gets_a_made_up_name() -> None:
    environ = {"MY_KEY": "1"}
    config = AppConfig.from_dict(
        {"job": job(model={**OPENAI, "api_key": "sk-${MY_KEY}"})}, environ=environ
    )
    _, env, _ = lift(config, environ)
    assert env == {"SPIDER_SECRET_MODEL_API_KEY": "sk-1"}


def test_a_variable_that_a_job_may_not_set_does_not_lend_its_name() -> None:
    environ = {"SPIDER_API_KEY": "sk-1"}
    config = AppConfig.from_dict(
        {"job": job(model={**OPENAI, "api_key": "${SPIDER_API_KEY}"})}, environ=environ
    )
    _, env, _ = lift(config, environ)
    assert env == {"SPIDER_SECRET_MODEL_API_KEY": "sk-1"}


def test_the_given_name_is_used_and_the_document_goes_first() -> None:
    document = job(model={**OPENAI, "api_key": "sk-file", "api_key_env": "MY_KEY"})
    clean, env, _ = lift_secrets(document, {"MY_KEY": "sk-environ"})
    assert env == {"MY_KEY": "sk-file"}
    assert clean["model"]["api_key_env"] == "MY_KEY"


def test_every_place_of_a_key() -> None:
    options = {
        "api_key": "k1",
        "teacher": [{"name": "a/b", "api_key": "k2"}, "c/d", {"name": "e", "api_key": "k3"}],
    }
    document = job(
        model={"provider": "tinker", "api_key": "k0"},
        generation={"on_policy": True, "on_policy_options": options},
        source={"options": {"token": "hf_x"}},
    )
    clean, env = strip_secrets(document)
    assert env == {
        "SPIDER_SECRET_MODEL_API_KEY": "k0",
        "SPIDER_SECRET_ON_POLICY_OPTIONS_API_KEY": "k1",
        "SPIDER_SECRET_ON_POLICY_OPTIONS_TEACHER_0_API_KEY": "k2",
        "SPIDER_SECRET_ON_POLICY_OPTIONS_TEACHER_2_API_KEY": "k3",
        "HF_TOKEN": "hf_x",
    }
    assert clean["source"]["options"] == {}
    assert set(required_secrets(parse_job(clean))) == set(env) - {"HF_TOKEN"}
    assert strip_secrets(clean) == (clean, {})  # nothing is left to find


def on_policy(model: dict[str, Any], **options: Any) -> dict[str, Any]:
    options = {"teacher": "a/b", **options}
    return job(
        model={"provider": "tinker", **model},
        generation={"on_policy": True, "on_policy_options": options},
    )


@pytest.mark.parametrize("place", ["model", "options"])
def test_a_key_in_the_file_is_all_that_student_and_teacher_need(place: str) -> None:
    given = {"api_key": "tml-1"}
    document = on_policy(given) if place == "model" else on_policy({}, **given)
    _, env, _ = lift_secrets(document, {})
    assert list(env.values()) == ["tml-1"]


HOSTED = "https://tinker.thinkingmachines.dev/services/tinker-prod"


@pytest.mark.parametrize(
    ("model", "teacher", "needed"),
    [
        # One's own server: no key was named for it, whoever is there.
        ({"base_url": "http://my-server"}, "a/b", set()),
        ({"base_url": "http://my-server"}, {"provider": "tinker"}, set()),
        ({"base_url": "http://my-server"}, {"base_url": "http://my-server"}, set()),
        ({"base_url": "http://my-server"}, {"base_url": HOSTED}, {"TINKER_API_KEY"}),
        ({"base_url": "http://my-server"}, {"provider": "openai"}, {"OPENAI_API_KEY"}),
        # A key of its own, and one that goes to no other server than the student's.
        ({"api_key_env": "K"}, {"api_key_env": "T"}, {"K", "T"}),
        ({"api_key_env": "K"}, {"base_url": "http://other"}, {"K"}),
        ({"api_key_env": "K"}, {"provider": "tinker"}, {"K"}),
    ],
)
def test_a_teacher_at_the_students_service(
    model: dict[str, Any], teacher: Any, needed: set[str]
) -> None:
    teacher = {"name": "a/b", **teacher} if isinstance(teacher, dict) else teacher
    assert set(required_secrets(parse_job(on_policy(model, teacher=teacher)))) == needed


@pytest.mark.parametrize("provider", ["openai", "tinker"])
def test_the_address_that_only_a_teacher_needs_goes_along(provider: str) -> None:
    variable = f"{provider.upper()}_BASE_URL"
    environ = {variable: "http://127.0.0.1:8000/v1"}
    document = on_policy({"provider": "local"}, teacher={"name": "a/b", "provider": provider})
    assert lift_secrets(document, environ)[1] == environ
    own = {"name": "a/b", "provider": provider, "base_url": "http://other"}
    document = on_policy({"provider": "local"}, teacher=own)
    assert lift_secrets(document, environ)[1] == {}


def test_swe_keys() -> None:
    config = AppConfig.from_dict(
        {"llm_model": "m", "llm_api_key": "sk", "hf_repo_id": "me/x"}, environ={}
    )
    clean, env, names = lift(config, {"HF_TOKEN": "t"})
    assert clean["swe"]["llm_api_key_env"] == "SPIDER_SECRET_LLM_API_KEY"
    assert env == {"SPIDER_SECRET_LLM_API_KEY": "sk", "HF_TOKEN": "t"}
    assert names == ("HF_TOKEN", "SPIDER_SECRET_LLM_API_KEY")


def test_two_secrets_of_one_name() -> None:
    options = {"teacher": {"name": "a", "api_key": "k2", "api_key_env": "K"}}
    document = job(
        model={"provider": "tinker", "api_key": "k1", "api_key_env": "K"},
        generation={"on_policy": True, "on_policy_options": options},
    )
    with pytest.raises(ConfigError, match="two different secrets would both be named K"):
        strip_secrets(document)


@pytest.mark.parametrize(
    ("sections", "path"),
    [
        ({"metadata": {"db_password": "x"}}, "job.metadata.db_password"),
        ({"metadata": {"deep": [{"apiKey": "x"}]}}, "job.metadata.deep.0.apiKey"),
        ({"model": {"parameters": {"hf_token": "x"}}}, "job.model.parameters.hf_token"),
        (
            {"model": {"parameters": {"headers": {"Authorization": "Basic x"}}}},
            "job.model.parameters.headers.Authorization",
        ),
        (
            {"model": {"parameters": {"headers": {"cookie": "x"}}}},
            "job.model.parameters.headers.cookie",
        ),
        ({"runtime": {"env": {"MY_API_KEY": "x"}}}, "job.runtime.env.MY_API_KEY"),
        (
            {"pre_processor": {"name": "f", "source": "s", "kwargs": {"api_key": "x"}}},
            "job.pre_processor.kwargs.api_key",
        ),
        ({"api_key": "misplaced"}, "job.api_key"),
        ({"model": {"api_keys": ["x"]}}, "job.model.api_keys.0"),
    ],
)
def test_a_secret_that_no_reference_can_stand_for_is_refused(
    sections: dict[str, Any], path: str
) -> None:
    for part in (strip_secrets, lambda document: lift_secrets(document, {})):
        with pytest.raises(ConfigError) as caught:
            part(job(**sections))
        assert [problem.path for problem in caught.value.problems] == [path]


def test_what_only_sounds_like_a_secret() -> None:
    document = job(
        generation={"parameters": {"max_tokens": 5, "stop_token": "</s>", "eos_token": "<e>"}},
        tools=[
            {
                "name": "login",
                "source": "s",
                "json_schema": {"properties": {"password": {"type": "string"}}},
            }
        ],
    )
    assert strip_secrets(document) == (document, {})


def test_a_value_from_a_secret_variable_is_refused_wherever_it_stands() -> None:
    environ = {"AWS_SECRET_ACCESS_KEY": "x", "SITE_TOKEN": "y", "PLAIN": "z"}
    config = AppConfig.from_dict(
        {
            "job": job(
                source={"options": {"key": "${AWS_SECRET_ACCESS_KEY}"}},
                metadata={"note": "by ${SITE_TOKEN}", "other": "${PLAIN}", "x_token": "${PLAIN}"},
            )
        },
        environ=environ,
    )
    with pytest.raises(ConfigError) as caught:
        lift(config, environ)
    assert {problem.path for problem in caught.value.problems} == {
        "job.source.options.key",
        "job.metadata.note",
        "job.metadata.x_token",
    }


@pytest.mark.parametrize(
    ("sections", "required"),
    [
        ({}, ()),
        ({"model": OPENAI}, ("OPENAI_API_KEY",)),
        ({"model": {**OPENAI, "base_url": "http://h/v1"}}, ()),
        ({"model": {**OPENAI, "base_url": "http://h/v1", "api_key_env": "K"}}, ("K",)),
        ({"model": {**OPENAI, "base_url": "https://openrouter.ai/v1"}}, ("OPENROUTER_API_KEY",)),
        ({"output": {"mode": "upload_hf", "hf": {"repo_id": "a/b"}}}, ("HF_TOKEN",)),
    ],
)
def test_required(sections: dict[str, Any], required: tuple[str, ...]) -> None:
    built = parse_job(job(**sections))
    assert required_secrets(built) == required
    assert ("HF_TOKEN" in optional_secrets(built)) != ("HF_TOKEN" in required)


def test_a_missing_variable_is_named_before_anything_leaves() -> None:
    document = job(model=OPENAI, output={"mode": "upload_hf", "hf": {"repo_id": "a/b"}})
    with pytest.raises(ConfigError) as caught:
        lift_secrets(document, {"HF_TOKEN": ""})
    assert {problem.path for problem in caught.value.problems} == {
        "env.HF_TOKEN",
        "env.OPENAI_API_KEY",
    }


def test_only_what_the_job_can_use_is_forwarded() -> None:
    environ = {"HF_TOKEN": "t", "OPENAI_API_KEY": "k", "HOME": "/"}
    own_server = job(model={**OPENAI, "base_url": "http://h/v1"})
    assert lift_secrets(own_server, environ)[1] == {"HF_TOKEN": "t"}
    assert lift_secrets(job(model=OPENAI), environ)[2] == ("HF_TOKEN", "OPENAI_API_KEY")


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({}, set()),
        ({"wandb_project": "p"}, {"WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE"}),
        (
            {"wandb_project": "p", "tracker": "trackio"},
            {"TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "TRACKIO_WRITE_TOKEN"},
        ),
    ],
)
def test_a_trackers_key_goes_with_where_it_is_meant_for(
    options: dict[str, Any], sent: set[str]
) -> None:
    names = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_ENTITY", "WANDB_MODE", "WANDB_DIR")
    trackio = ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID", "TRACKIO_WRITE_TOKEN", "TRACKIO_DIR")
    environ = {"TINKER_API_KEY": "k", **dict.fromkeys((*names, *trackio), "x")}
    generation = {"on_policy": True, "on_policy_options": {"teacher": "a/b", **options}}
    document = job(model={"provider": "tinker"}, generation=generation)
    assert set(lift_secrets(document, environ)[1]) == {"TINKER_API_KEY", *sent}
    check_env_names(sent)
    # A run may be recorded offline, so none of them is required.
    assert required_secrets(parse_job(document)) == ("TINKER_API_KEY",)


def test_a_server_that_the_environment_names_may_need_no_key() -> None:
    environ = {"OPENAI_BASE_URL": "http://127.0.0.1:8000/v1"}
    assert lift_secrets(job(model=OPENAI), environ)[1] == environ
    with pytest.raises(ConfigError, match="KEY"):
        lift_secrets(job(model={**OPENAI, "api_key_env": "KEY"}), environ)


@pytest.mark.parametrize(
    "name",
    [
        "LD_PRELOAD", "ld_preload", "PYTHONPATH", "PATH", "HOME", "DYLD_INSERT_LIBRARIES",
        "GLIBC_TUNABLES", "IFS", "SHELL", "BASH_ENV", "SPIDER_REDIS_URL", "CUDA_VISIBLE_DEVICES",
        "CELERY_BROKER_URL", "SPIDER_SECRET_KEY", "SPIDER_SECRET_KEY_FILE", "HF_HOME",
        "XDG_CACHE_HOME", "SPIDER_SECRET_", "OPENSSL_CONF", "CC", "HUGGINGFACE_HUB_CACHE",
        "", "A B", "A=B", "sk-123", "1A", "A" * 200, "É",
    ],
)  # fmt: skip
def test_names_that_a_job_may_not_set(name: str) -> None:
    with pytest.raises(ConfigError):
        check_env_names(["MY_KEY", name])


def test_names_that_a_job_may_set() -> None:
    check_env_names(["HF_TOKEN", "OPENAI_API_KEY", "WANDB_API_KEY", "SPIDER_SECRET_MODEL_API_KEY"])
