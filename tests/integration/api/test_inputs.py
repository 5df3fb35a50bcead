"""Uploads by content."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import pytest

from spider_worker.fleet import Fleet

DATA = b'{"question": "?"}\n' * 100
SHA = hashlib.sha256(DATA).hexdigest()


def put(user: Any, data: bytes, sha: str = SHA, **options: Any) -> Any:
    return user.open("PUT", f"/v1/inputs/{sha}", input_stream=io.BytesIO(data), **options)


def test_an_input_is_stored_once(ada: Any, fleet: Fleet) -> None:
    assert ada.open("HEAD", f"/v1/inputs/{SHA}").status_code == 404
    first = put(ada, DATA, content_length=len(DATA))
    assert first.status_code == 201
    assert first.json == {"sha256": SHA, "size": len(DATA)}
    assert fleet.inputs.path(SHA).read_bytes() == DATA
    assert ada.open("HEAD", f"/v1/inputs/{SHA}").status_code == 200
    again = put(ada, b"not even read", content_length=13)
    assert (again.status_code, again.json) == (200, first.json)


def left_over(fleet: Fleet) -> list[Any]:
    return [path for path in fleet.inputs.path(SHA).parent.glob("*") if path.is_file()]


def test_content_of_another_hash_is_refused(ada: Any, fleet: Fleet) -> None:
    answer = put(ada, DATA + b"x", content_length=len(DATA) + 1)
    assert answer.status_code == 422
    assert SHA in answer.json["detail"]
    assert left_over(fleet) == []


@pytest.mark.parametrize("chunked", [False, True])
def test_too_large_an_input_is_refused(ada: Any, fleet: Fleet, chunked: bool) -> None:
    data = b"x" * 1_000_001  # the settings of these tests take a million
    if chunked:
        options: dict[str, Any] = {"environ_overrides": {"wsgi.input_terminated": True}}
    else:
        options = {"content_length": len(data)}
    answer = put(ada, data, hashlib.sha256(data).hexdigest(), **options)
    assert answer.status_code == 413
    assert answer.content_type == "application/problem+json"
    assert left_over(fleet) == []


def test_an_input_may_be_larger_than_other_bodies(ada: Any) -> None:
    data = b"y" * 500_000  # other bodies: 100,000
    answer = put(ada, data, hashlib.sha256(data).hexdigest(), content_length=len(data))
    assert answer.status_code == 201


def test_an_upload_that_was_cut_leaves_nothing(ada: Any, fleet: Fleet) -> None:
    answer = put(ada, DATA[:50], content_length=len(DATA))
    assert answer.status_code in (400, 422)
    assert left_over(fleet) == []


@pytest.mark.parametrize("name", ["x", "A" * 64, "0" * 63, "..%2f..%2fetc"])
def test_what_is_no_hash_is_refused(ada: Any, name: str) -> None:
    assert put(ada, DATA, name, content_length=len(DATA)).status_code in (404, 422)


def test_a_full_disk_is_a_503(ada: Any, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fleet.inputs, "put", full)
    answer = put(ada, DATA, content_length=len(DATA))
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert "disk is full" in answer.json["detail"]
