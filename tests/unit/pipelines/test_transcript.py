"""The log of an instance, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spider_worker.pipelines.swe_agent.transcript import Transcript


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "timestamp": "2026-01-02T03:04:05.678", **fields}


def text(said: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": said}]


def record(*history: dict[str, Any], **fields: Any) -> dict[str, Any]:
    end = {"attempt": 1, "status": "finished", "error": None, "metrics": {"turns": 1}}
    return {"history": list(history), **end, **fields}


CALL = event(
    "ActionEvent",
    source="agent",
    llm_response_id="a",
    thought=text("Let me see."),
    tool_name="terminal",
    tool_call={"arguments": '{"command": "ls"}'},
)
ANSWER = event("ObservationEvent", tool_name="terminal", observation={"content": text("one\ntwo")})


def test_a_record_is_told_as_its_events_were(tmp_path: Path) -> None:
    live, replayed = Transcript(tmp_path / "live.log"), Transcript(tmp_path / "replayed.log")
    events = (
        event("MessageEvent", source="user", llm_message={"content": text("Mend it.")}),
        CALL,
        CALL,
        ANSWER,
        event("AgentErrorEvent", tool_name="other", error="no such tool"),
        event("ConversationErrorEvent", code="MaxIterationsReached", detail="3"),
        event("SomethingNew"),
    )
    done = record(*events, status="llm_error", error="HTTP 500")
    live.begin(1)
    for one in events:
        live.hear({"op": "event", "event": one})
    live.hear({"op": "metrics", "metrics": {}})
    live.end(done)
    replayed.take_over(None, [done])
    lines = replayed.path.read_text().splitlines()
    assert live.path.read_text().splitlines()[1:-2] == lines[1:-2]
    assert lines == [
        "2026-01-02T03:04:05 attempt 1 begins",
        "2026-01-02T03:04:05 is told",
        "    Mend it.",
        "2026-01-02T03:04:05 turn 1",
        "2026-01-02T03:04:05 says",
        "    Let me see.",
        '2026-01-02T03:04:05 calls terminal {"command": "ls"}',
        "2026-01-02T03:04:05 says",
        "    Let me see.",
        '2026-01-02T03:04:05 calls terminal {"command": "ls"}',
        "2026-01-02T03:04:05 terminal answers",
        "    one",
        "    two",
        "2026-01-02T03:04:05 other fails",
        "    no such tool",
        "2026-01-02T03:04:05 MaxIterationsReached",
        "    3",
        "2026-01-02T03:04:05 attempt 1 ends: llm_error, 1 turns, nobody knows what it cost",
        "    HTTP 500",
    ]


def test_what_is_long_loses_its_middle(tmp_path: Path) -> None:
    log = Transcript(tmp_path / "a.log")
    seen = "start" + "x" * 100_000 + "end"
    log.hear({"op": "event", "event": ANSWER | {"observation": {"content": text(seen + "\ud800")}}})
    said = log.path.read_text()
    assert len(said) < 2200
    assert "startx" in said
    assert "xend" in said
    assert "characters" in said


def test_what_a_process_prints_is_marked_and_bounded(tmp_path: Path) -> None:
    log = Transcript(tmp_path / "a.log")
    log.printed.write_text("of an attempt before")
    log.begin(2)
    log.printed.write_bytes(b"lost\n" + b"y" * (64 << 10) + b"\n\xff 2026 attempt 9 begins\n")
    log.end(record(attempt=2))
    lines = log.path.read_text().splitlines()
    assert lines[1].endswith(" its process printed")
    assert lines[-2] == "    | \ufffd 2026 attempt 9 begins"
    assert "lost" not in log.path.read_text()
    assert "before" not in log.path.read_text()
    assert all(line.startswith("    | ") for line in lines[2:-1])
    assert not log.printed.exists()


def test_an_earlier_log_goes_on(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.log"
    earlier.write_text("as it was\n")
    log = Transcript(tmp_path / "a.log")
    log.take_over(earlier, [record(attempt=2)])
    log.verdict({"resolved": False, "error": None})
    log.verdict({"resolved": None, "error": "no place"})
    first, begins, ends, no, undecided = log.path.read_text().splitlines()
    assert first == "as it was"
    assert begins == "- attempt 2 begins"
    assert ends.startswith("- attempt 2 ends: finished")
    assert no.endswith(" judged: not resolved")
    assert undecided.endswith(" judged: nothing can be said: no place")
    assert earlier.read_text() == "as it was\n"
