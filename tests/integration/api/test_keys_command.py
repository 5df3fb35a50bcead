"""``spider keys`` against a real Redis."""

from __future__ import annotations

import json

import pytest

from spider_sdk.cli.main import run
from spider_worker.fleet import Fleet
from spider_worker.fleet.keys import ApiKeys
from spider_worker.settings import FleetSettings


@pytest.fixture
def spider(
    fleet: Fleet,
    fleet_settings: FleetSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> object:
    monkeypatch.setenv("SPIDER_REDIS_URL", fleet_settings.redis_url)
    monkeypatch.setenv("SPIDER_SECRET_KEY_FILE", str(fleet_settings.secret_key_file))
    monkeypatch.setenv("SPIDER_CONFIG", str(fleet_settings.artifacts / "none.toml"))

    def command(*args: str) -> tuple[int, str, str]:
        code = run(["keys", *args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def test_a_key_is_made_listed_and_revoked(spider: object, fleet: Fleet) -> None:
    assert callable(spider)
    code, out, err = spider("create", "--owner", "ada", "--label", "laptop")
    assert code == 0
    token = out.strip()
    assert "cannot be shown again" in err
    keys = ApiKeys(fleet.redis, fleet.secret_box)
    assert keys.authenticate(token) == "ada"
    key_id = token.split("_")[1]
    code, out, _ = spider("list")
    assert code == 0
    assert key_id in out
    assert "laptop" in out
    assert token.split("_", 2)[2] not in out
    assert spider("revoke", key_id)[0] == 0
    assert keys.authenticate(token) is None
    code, _, err = spider("revoke", key_id)
    assert code == 2
    assert "there is no key" in err


def test_json_alone_on_stdout(spider: object, fleet: Fleet) -> None:
    assert callable(spider)
    made = json.loads(spider("create", "--owner", "ada", "--json")[1])
    assert made.keys() == {"id", "owner", "label", "key"}
    listed = json.loads(spider("list", "--json")[1])
    assert listed["id"] == made["id"]
    assert "key" not in listed
    assert json.loads(spider("revoke", made["id"], "--json")[1]) == {
        "id": made["id"],
        "revoked": True,
    }


def test_a_whole_key_is_not_taken_for_its_id(spider: object) -> None:
    assert callable(spider)
    code, _, err = spider("revoke", "sk_0000000000000000_secret")
    assert code == 2
    assert "secret" not in err.replace("not the key", "")


def test_a_secret_key_that_it_made_is_told(
    spider: object, fleet_settings: FleetSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(spider)
    other = fleet_settings.artifacts / "elsewhere" / "secret.key"
    monkeypatch.setenv("SPIDER_SECRET_KEY_FILE", str(other))
    assert str(other) in spider("list")[2]
    assert other.is_file()
    assert str(other) not in spider("list")[2]


def test_a_redis_that_is_away_is_3(spider: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert callable(spider)
    monkeypatch.setenv("SPIDER_REDIS_URL", "redis://127.0.0.1:1/0")
    code, _, err = spider("list")
    assert code == 3
    assert "Redis does not answer" in err
