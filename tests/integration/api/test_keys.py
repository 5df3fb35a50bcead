"""API keys on a real Redis."""

from __future__ import annotations

import pytest

from spider_sdk.errors import UsageError
from spider_worker.fleet import Fleet
from spider_worker.fleet.keys import ApiKeys
from spider_worker.fleet.secret_box import SecretBox


@pytest.fixture
def keys(fleet: Fleet) -> ApiKeys:
    return ApiKeys(fleet.redis, fleet.secret_box)


def test_a_key_names_its_owner(keys: ApiKeys) -> None:
    key_id, token = keys.create("ada", "laptop")
    assert token.startswith(f"sk_{key_id}_")
    assert keys.authenticate(token) == "ada"
    (listed,) = keys.list()
    assert (listed.key_id, listed.owner, listed.label) == (key_id, "ada", "laptop")


def test_what_is_no_key_lets_nobody_in(keys: ApiKeys) -> None:
    key_id, token = keys.create("ada")
    other_id, other = keys.create("bob")
    mixed = f"sk_{other_id}_{token.split('_', 2)[2]}"
    for wrong in ("", "sk_", token[:-1], token + "x", token.upper(), mixed, f"sk_{key_id}_", "é"):
        assert keys.authenticate(wrong) is None, wrong
    assert keys.authenticate(other) == "bob"


def test_a_revoked_key_lets_nobody_in(keys: ApiKeys) -> None:
    key_id, token = keys.create("ada")
    assert keys.revoke(key_id) is True
    assert keys.revoke(key_id) is False
    assert keys.authenticate(token) is None
    assert keys.list() == []


def test_the_secret_is_not_in_redis(keys: ApiKeys, fleet: Fleet) -> None:
    _, token = keys.create("ada")
    secret = token.split("_", 2)[2].encode()
    for name in fleet.redis.scan_iter("*"):
        kind = fleet.redis.type(name)
        value = fleet.redis.hgetall(name) if kind == b"hash" else fleet.redis.smembers(name)
        assert secret not in repr(value).encode()


def test_another_deployments_key_does_not_check(keys: ApiKeys, fleet: Fleet) -> None:
    _, token = keys.create("ada")
    assert ApiKeys(fleet.redis, SecretBox(b"x" * 32)).authenticate(token) is None


@pytest.mark.parametrize("owner", ["", "a:b", " ada", "a" * 65, "a\nb", "é"])
def test_an_owner_that_could_not_be_a_key_part_is_refused(keys: ApiKeys, owner: str) -> None:
    with pytest.raises(UsageError, match="no name for an owner"):
        keys.create(owner)
