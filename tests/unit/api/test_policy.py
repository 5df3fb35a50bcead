"""What a deployment lets jobs name: addresses, code, paths."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from spider_api.policy import Policy


def resolving(*addresses: str) -> Any:
    def resolve(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolve


def endpoint(url: str) -> dict[str, Any]:
    return {"model": {"provider": "openai", "name": "m", "base_url": url}}


def refused(policy: Policy, job: Mapping[str, Any]) -> list[str]:
    return [problem.path for problem in policy.problems(job)]


METADATA = [
    "169.254.169.254",
    "169.254.0.7",
    "fe80::1%eth0",
    "fd00:ec2::254",
    "::ffff:169.254.169.254",
    "::ffff:a9fe:a9fe",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "::169.254.169.254",
    "100.100.100.200",
    "224.0.0.1",
]
PRIVATE = ["127.0.0.1", "10.1.2.3", "192.168.0.1", "::1", "fd12::1", "0.0.0.0", "::ffff:127.0.0.1"]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("address", METADATA)
def test_metadata_addresses_are_always_refused(address: str, private: bool) -> None:
    policy = Policy(allow_private_urls=private, resolve=resolving("93.184.216.34", address))
    assert refused(policy, endpoint("https://models.example/v1")) == ["job.model.base_url"]


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_the_operators_choice(address: str) -> None:
    job = endpoint("http://models.example:8000/v1")
    assert refused(Policy(resolve=resolving(address)), job) == ["job.model.base_url"]
    assert refused(Policy(allow_private_urls=True, resolve=resolving(address)), job) == []


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://2852039166/",  # the same as one number
        "http://0xa9fea9fe/",
        "http://[::ffff:169.254.169.254]/",
        "http://metadata.google.internal/",
        "http://METADATA.google.internal./",
        "http://user:pass@models.example/",
        "ftp://models.example/",
        "file:///etc/passwd",
        "http://",
        "http://[::1",
        "http://models.example:99999/",
    ],
)
def test_addresses_that_no_deployment_takes(url: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        flags = socket.AI_NUMERICHOST  # what an operating system makes of the host by itself
        return [str(e[4][0]) for e in socket.getaddrinfo(host, port, flags=flags)]

    policy = Policy(allow_private_urls=True, resolve=resolve)
    assert refused(policy, endpoint(url)) == ["job.model.base_url"], url


def test_an_address_anywhere_in_a_job_is_looked_at() -> None:
    job = {
        "generation": {"on_policy_options": {"teacher": [{"base_url": "http://169.254.1.1"}]}},
        "metadata": {"base_url": "http://169.254.1.1"},  # the user's own words
    }
    policy = Policy(resolve=resolving("169.254.1.1"))
    assert refused(policy, job) == ["job.generation.on_policy_options.teacher.0.base_url"]


def test_a_name_that_does_not_resolve_here_is_left_to_the_worker() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror("unknown")

    assert refused(Policy(resolve=resolve), endpoint("https://models.internal/v1")) == []


def test_remote_code_is_the_operators_choice() -> None:
    job = {
        "model": {"name": "a/b", "parameters": {"trust_remote_code": True}},
        "source": {"dataset": "a/b", "options": {"trust_remote_code": False}},
    }
    assert refused(Policy(), job) == ["job.model.parameters.trust_remote_code"]
    assert refused(Policy(allow_remote_code=True), job) == []


def test_packages_are_the_operators_choice() -> None:
    job = {"runtime": {"packages": ["numpy"]}}
    assert refused(Policy(allow_packages=False), job) == ["job.runtime.packages"]
    assert refused(Policy(), job) == []


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../data", "~/data", "~root/x", "a/../../etc", "..", "file:///x", "C:\\data",
     ".\\data"],
)  # fmt: skip
def test_paths_are_refused(name: str, tmp_path: Path) -> None:
    policy = Policy(data_roots=(tmp_path,))
    assert refused(policy, {"model": {"provider": "vllm", "name": name}}) == ["job.model.name"]
    assert refused(policy, {"source": {"dataset": name}}) == ["job.source.dataset"]


@pytest.mark.parametrize("name", ["./data", "models/own/7b"])
def test_relative_paths_need_a_root(name: str, tmp_path: Path) -> None:
    job = {"model": {"provider": "vllm", "name": name}}
    assert refused(Policy(), job) == ["job.model.name"]
    assert refused(Policy(data_roots=(tmp_path,)), job) == []


def test_names_on_the_hub_and_at_an_endpoint_are_no_paths() -> None:
    job = {
        "model": {"provider": "openai", "name": "accounts/fireworks/models/llama-v3p1-70b"},
        "source": {"dataset": "org/data.v2", "options": {"data_files": "train/*.parquet"}},
    }
    assert refused(Policy(), job) == []


def test_paths_under_a_root_are_allowed_and_links_out_of_it_are_not(tmp_path: Path) -> None:
    root = tmp_path / "models"
    (root / "own").mkdir(parents=True)
    (root / "link").symlink_to("/etc")
    policy = Policy(data_roots=(root,))
    assert refused(policy, {"model": {"provider": "vllm", "name": str(root / "own")}}) == []
    for outside in (root / "link", root / ".." / "other", Path(f"{root}2")):
        job = {"model": {"provider": "vllm", "name": str(outside)}}
        assert refused(policy, job) == ["job.model.name"], outside


def test_data_files_are_looked_at(tmp_path: Path) -> None:
    options = {
        "data_files": {"train": ["ok.jsonl", "/etc/passwd", "http://169.254.169.254/x.json"]},
        "data_dir": "../up",
    }
    policy = Policy(resolve=resolving("169.254.169.254"))
    assert refused(policy, {"source": {"dataset": "json", "options": options}}) == [
        "job.source.options.data_files.train.1",
        "job.source.options.data_files.train.2",
        "job.source.options.data_dir",
    ]


def test_with_inputs_the_data_sets_name_is_no_path() -> None:
    source = {"dataset": "rows.jsonl", "inputs": [{"name": "rows.jsonl", "sha256": "0" * 64}]}
    assert refused(Policy(), {"source": source}) == []


def test_an_uploaded_file_excuses_no_other_name_of_a_swe_job() -> None:
    uploaded = {"inputs": [{"name": "tasks.jsonl"}, {"name": "done.jsonl"}]}
    assert refused(Policy(), {"swe": {"dataset": "tasks.jsonl", **uploaded}}) == []
    assert refused(Policy(), {"swe": {"dataset": "/etc/x.jsonl", **uploaded}}) == ["dataset"]
