"""The log of an instance, for people: what its agents did, attempt by attempt.

It is written while an attempt goes on, from the lines that the agent says. What earlier attempts
left is taken over: their text where it was kept, and where it was lost with a worker, what their
records say of them. What an agent's process prints by itself goes to a file beside it and follows
at the attempt's end, marked.
"""

from __future__ import annotations

__all__ = ["Transcript"]

import datetime
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

#: Characters of one text, of which the middle is left out beyond that.
_CHARACTERS: Final = 2000
#: Bytes of what an agent's process printed, its last ones.
_PRINTED: Final = 64 << 10
_MARK: Final = "    | "


class Transcript:
    """The log at ``path``, which is made. ``printed`` is where an agent's process is to print."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.printed = path.with_suffix(".printed")
        self._turns: set[str] = set()
        path.touch()

    def take_over(self, earlier: Path | None, lost: Iterable[Mapping[str, Any]]) -> None:
        """Begin with an earlier log (None: there is none), and tell records that it lacks."""
        if earlier is not None:
            shutil.copyfile(earlier, self.path)
        for record in lost:
            self.replay(record)

    def replay(self, record: Mapping[str, Any]) -> None:
        """Tell an attempt by its record alone."""
        stamps = [_stamp(event) for event in record["history"]] or ["-"]
        self._begin(record["attempt"], stamps[0])
        for event in record["history"]:
            self._event(event)
        self._end(record, stamps[-1])

    def begin(self, attempt: int) -> None:
        self.printed.unlink(missing_ok=True)
        self._begin(attempt, _now())

    def hear(self, line: Mapping[str, Any]) -> None:
        """A line that the agent said (see ``spider_agent.lines``)."""
        if line["op"] == "event":
            self._event(line["event"])

    def end(self, record: Mapping[str, Any]) -> None:
        self._print()
        self._end(record, _now())

    def verdict(self, report: Mapping[str, Any]) -> None:
        words = {True: "resolved", False: "not resolved", None: "nothing can be said"}
        text = f"judged: {words[report.get('resolved')]}"
        self._write(_now(), f"{text}: {_short(report['error'])}" if report.get("error") else text)

    # -- lines -----------------------------------------------------------------------

    def _begin(self, attempt: int, stamp: str) -> None:
        self._turns.clear()
        self._write(stamp, f"attempt {attempt} begins")

    def _end(self, record: Mapping[str, Any], stamp: str) -> None:
        metrics = record["metrics"]
        cost = metrics.get("accumulated_cost")
        words = [f"attempt {record['attempt']} ends: {record['status']}"]
        words.append(f"{metrics.get('turns', 0)} turns")
        words.append(f"${cost:.4f}" if cost is not None else "nobody knows what it cost")
        self._write(stamp, ", ".join(words), record["error"] or "")

    def _event(self, event: Mapping[str, Any]) -> None:
        stamp = _stamp(event)
        self._turn(event, stamp)
        match event.get("kind"):
            case "ActionEvent":
                if thought := _text(event.get("thought")):
                    self._write(stamp, "says", thought)
                call = event.get("tool_call") or {}
                self._write(stamp, f"calls {event.get('tool_name')} {call.get('arguments', '')}")
            case "ObservationEvent":
                seen = _text((event.get("observation") or {}).get("content"))
                self._write(stamp, f"{event.get('tool_name')} answers", seen)
            case "AgentErrorEvent":
                self._write(stamp, f"{event.get('tool_name')} fails", str(event.get("error")))
            case "MessageEvent":
                said = _text((event.get("llm_message") or {}).get("content"))
                self._write(stamp, "says" if event.get("source") == "agent" else "is told", said)
            case "ConversationErrorEvent":
                self._write(stamp, f"{event.get('code')}", str(event.get("detail")))
            case "Condensation":
                self._write(stamp, "is given a summary", str(event.get("summary") or ""))

    def _turn(self, event: Mapping[str, Any], stamp: str) -> None:
        answer = event.get("llm_response_id")
        if answer and event.get("source") == "agent" and answer not in self._turns:
            self._turns.add(answer)
            self._write(stamp, f"turn {len(self._turns)}")

    def _print(self) -> None:
        try:
            with self.printed.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(max(0, size - _PRINTED))
                printed = file.read().decode("utf-8", "replace").strip()
        except FileNotFoundError:
            return
        self.printed.unlink()
        if printed:
            self._write(_now(), "its process printed")
            with self.path.open("a", encoding="utf-8") as file:
                file.write(textwrap.indent(printed, _MARK, lambda _: True) + "\n")

    def _write(self, stamp: str, line: str, text: str = "") -> None:
        lines = [f"{stamp} {_short(line)}"]
        if text.strip():
            lines.append(textwrap.indent(_short(text.strip()), "    "))
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write("\n".join(lines) + "\n")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _stamp(event: Mapping[str, Any]) -> str:
    return str(event.get("timestamp", "-"))[:19]


def _text(content: Any) -> str:
    """The text of a message's or an observation's content."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, Mapping))


def _short(text: str) -> str:
    left_out = len(text) - _CHARACTERS
    if left_out <= 0:
        return text
    half = _CHARACTERS // 2
    return f"{text[:half]} … {left_out} characters … {text[-half:]}"
