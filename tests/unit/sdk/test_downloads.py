"""A result arrives whole, or the folder stays as it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spider_sdk.downloads import download, download_artifact, resolve_destination
from spider_sdk.errors import NotFound, ServerUnreachable, UsageError
from spider_sdk.transport import Transport
from tests.support.scripted_server import ScriptedServer, answer_bytes, cut_body, problem

RESULT = "/v1/jobs/j1/result"
Connect = Callable[..., Transport]


@pytest.mark.parametrize(
    ("destination", "format", "expected"),
    [
        ("a/r.json", None, ("a/r.json", "json")),
        ("r.JSONL", None, ("r.JSONL", "jsonl")),
        ("r.parquet", None, ("r.parquet", "parquet")),
        ("r.txt", "jsonl", ("r.txt", "jsonl")),
        ("out/", None, ("out/j1.jsonl", "jsonl")),
        (".", "parquet", ("j1.parquet", "parquet")),
    ],
)
def test_destinations(destination: str, format: str | None, expected: tuple[str, str]) -> None:
    path, chosen = resolve_destination(destination, format, "j1")
    assert (path, chosen) == (Path(expected[0]), expected[1])


@pytest.mark.parametrize(("destination", "format"), [("r.txt", None), ("r", None), ("r", "xml")])
def test_no_format(destination: str, format: str | None) -> None:
    with pytest.raises(UsageError, match=r"jsonl, parquet|\.jsonl or \.parquet"):
        resolve_destination(destination, format, "j1")


@pytest.mark.parametrize(
    ("format", "query"), [("json", ""), ("jsonl", "format=jsonl"), ("parquet", "format=parquet")]
)
def test_a_result_takes_its_name_at_the_end(
    tmp_path: Path, server: ScriptedServer, connect: Connect, format: str, query: str
) -> None:
    server.on("GET", RESULT, answer_bytes(b"rows" * 100_000))
    path = tmp_path / "new" / "r.out"
    assert download(connect(), "j1", path, format) == path
    assert path.read_bytes() == b"rows" * 100_000
    assert server.seen[0].query == query
    assert os.listdir(path.parent) == ["r.out"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_cut_download_leaves_no_half_file(
    tmp_path: Path, server: ScriptedServer, connect: Connect
) -> None:
    server.on("GET", RESULT, cut_body(b"half", promised=1000))
    path = tmp_path / "r.jsonl"
    path.write_text("from before")
    with pytest.raises(ServerUnreachable):
        download(connect(), "j1", path, "jsonl")
    assert os.listdir(tmp_path) == ["r.jsonl"]
    assert path.read_text() == "from before"
    assert len(server.seen) == 3


def test_a_cut_download_starts_again(
    tmp_path: Path, server: ScriptedServer, connect: Connect, waits: list[float]
) -> None:
    server.on("GET", RESULT, cut_body(b"half", promised=1000), answer_bytes(b"whole"))
    path = download(connect(), "j1", tmp_path / "r.jsonl", "jsonl")
    assert path.read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["r.jsonl"]
    assert len(waits) == 1


def test_nothing_yet(tmp_path: Path, server: ScriptedServer, connect: Connect) -> None:
    server.on("GET", RESULT, problem(404, "job j1 has no results yet"))
    with pytest.raises(NotFound, match="no results yet"):
        download(connect(), "j1", tmp_path / "r.jsonl", "jsonl")
    assert os.listdir(tmp_path) == []


def test_an_artifact_keeps_its_name_under_the_folder(
    tmp_path: Path, server: ScriptedServer, connect: Connect
) -> None:
    server.on("GET", "/v1/jobs/j1/artifacts/checkpoints/step%201/a.bin", answer_bytes(b"weights"))
    path = download_artifact(connect(), "j1", "checkpoints/step 1/a.bin", tmp_path)
    assert path == tmp_path / "checkpoints" / "step 1" / "a.bin"
    assert path.read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/../../x", "."])
def test_an_artifact_does_not_climb_out(
    tmp_path: Path, server: ScriptedServer, connect: Connect, name: str
) -> None:
    with pytest.raises(UsageError, match="no name"):
        download_artifact(connect(), "j1", name, tmp_path)
    assert server.seen == []
