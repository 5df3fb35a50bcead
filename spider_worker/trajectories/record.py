"""A record: what is known of one attempt of one instance, and one line of ``output.jsonl``.

The names are those that readers of OpenHands' own files look for; ``status``, ``attempt``, ``n``,
``messages``, ``tools``, ``resolved`` and ``report`` are added. Every attempt has a line. Of several
lines for the same run of an instance, ``(instance_id, n)``, the last one counts; the earlier ones
stay for what they cost.
"""

from __future__ import annotations

__all__ = [
    "DONE",
    "STATUSES",
    "Key",
    "Record",
    "build",
    "charge_of",
    "cost_of",
    "is_done",
    "judged",
]

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

Key = tuple[str, int]

#: Every status, and why an attempt ends with it.
STATUSES: Final[Mapping[str, str]] = {
    "finished": "the agent said that it was done, and the tree had changed",
    "empty_patch": "the agent said that it was done, and the tree was as before",
    "unusable_patch": "the agent said that it was done, and had changed more than a patch holds",
    "stuck": "the agent went round in circles",
    "max_iterations": "its iterations were used up",
    "max_budget": "its money was used up",
    "context_window": "the conversation became too long for the model",
    "timeout": "its time was used up",
    "llm_refused": "the model's endpoint took what was sent for a wrong request",
    "llm_error": "the model's endpoint failed, or refused the call",
    "workspace_error": "the place to work in could not be had or broke",
    "agent_error": "the agent's own process failed",
    "cancelled": "the job was cancelled",
}

#: What a resumed run leaves alone: another attempt would end the same way. The other statuses
#: say that something was in the agent's way, and are tried again.
DONE: Final = frozenset(
    {
        "finished",
        "empty_patch",
        "unusable_patch",
        "stuck",
        "max_iterations",
        "max_budget",
        "context_window",
    }
)


def is_done(status: str) -> bool:
    """Whether a resume leaves a run with this status as it is."""
    return status in DONE


def build(
    *,
    instance_id: str,
    status: str,
    instance: Mapping[str, Any],
    metadata: Mapping[str, Any],
    git_patch: str | None = None,
    instruction: str = "",
    history: Sequence[Mapping[str, Any]] = (),
    metrics: Mapping[str, Any] | None = None,
    error: str | None = None,
    attempt: int = 1,
    n: int = 0,
    messages: Sequence[Mapping[str, Any]] = (),
    tools: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A record with all its keys, not judged yet. ``attempt`` counts from 1, ``n`` from 0.

    ``metrics`` None: nothing is known of the cost, which is then null and not 0. Raises ValueError
    for a status that is none.
    """
    if status not in STATUSES:
        raise ValueError(f"{status!r} is no status of a record")
    return {
        "instance_id": instance_id,
        "test_result": {"git_patch": git_patch},
        "instruction": instruction,
        "metadata": dict(metadata),
        "history": list(history),
        "metrics": dict(metrics) if metrics is not None else {"accumulated_cost": None},
        "error": error,
        "instance": dict(instance),
        "attempt": attempt,
        "n": n,
        "status": status,
        "messages": list(messages),
        "tools": list(tools),
        "resolved": None,
        "report": None,
    }


def judged(
    record: Mapping[str, Any], resolved: bool | None, report: Mapping[str, Any]
) -> dict[str, Any]:
    """A record with a judge's verdict (None: the judge could not tell) in the place of an earlier
    one. The report has it too, and stands in ``test_result`` as well: readers of OpenHands' files
    look for them there."""
    result = record.get("test_result")
    result = dict(result) if isinstance(result, Mapping) else {}
    said = {**report, "resolved": resolved}
    return {
        **record,
        "resolved": resolved,
        "report": said,
        "test_result": {**result, "report": said},
    }


def cost_of(metrics: Mapping[str, Any] | None) -> float | None:
    """US dollars, None where unknown."""
    return _dollars(metrics, "accumulated_cost")


def charge_of(metrics: Mapping[str, Any] | None) -> float:
    """US dollars that an attempt counts with against a cap on money: its cost, and where that is
    unknown all that it was allowed."""
    cost = cost_of(metrics)
    return (_dollars(metrics, "max_budget_per_task") or 0.0) if cost is None else cost


def _dollars(metrics: Mapping[str, Any] | None, name: str) -> float | None:
    value = (metrics or {}).get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


@dataclasses.dataclass(frozen=True)
class Record:
    """A typed view of a line. Reading is lenient: what older writers leave out has its default."""

    data: Mapping[str, Any]

    @property
    def instance_id(self) -> str:
        return str(self.data["instance_id"])

    @property
    def n(self) -> int:
        """Which of the independent runs of the instance, from 0."""
        return int(self.data.get("n") or 0)

    @property
    def key(self) -> Key:
        return self.instance_id, self.n

    @property
    def attempt(self) -> int:
        return int(self.data.get("attempt") or 1)

    @property
    def status(self) -> str:
        """One of ``STATUSES``; where the line has none, what its error and patch say."""
        status = self.data.get("status")
        if status is not None:
            return str(status)
        if self.error is not None:
            return "agent_error"
        return "finished" if self.git_patch else "empty_patch"

    @property
    def done(self) -> bool:
        return is_done(self.status)

    @property
    def error(self) -> str | None:
        error = self.data.get("error")
        return None if error is None else str(error)

    @property
    def git_patch(self) -> str | None:
        patch = self._mapping("test_result").get("git_patch")
        return None if patch is None else str(patch)

    @property
    def report(self) -> Mapping[str, Any] | None:
        """The judge's report; None where nobody has judged."""
        report = self.data.get("report") or self._mapping("test_result").get("report")
        return report if isinstance(report, Mapping) else None

    @property
    def resolved(self) -> bool | None:
        """None: not judged, or the judge could not tell."""
        resolved = self.data.get("resolved")
        if resolved is None:
            resolved = (self.report or {}).get("resolved")
        return resolved if isinstance(resolved, bool) else None

    @property
    def cost(self) -> float | None:
        """US dollars of this attempt alone; None where unknown."""
        return cost_of(self.metrics)

    @property
    def instruction(self) -> str | None:
        instruction = self.data.get("instruction")
        return None if instruction is None else str(instruction)

    @property
    def instance(self) -> Mapping[str, Any]:
        return self._mapping("instance")

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._mapping("metadata")

    @property
    def metrics(self) -> Mapping[str, Any]:
        return self._mapping("metrics")

    @property
    def model(self) -> str | None:
        config = self.metadata.get("llm_config")
        model = config.get("model") if isinstance(config, Mapping) else None
        return None if model is None else str(model)

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        return [one for one in self.data.get("messages") or () if isinstance(one, Mapping)]

    @property
    def tools(self) -> list[Any]:
        return list(self.data.get("tools") or ())

    @property
    def history(self) -> list[Any]:
        return list(self.data.get("history") or ())

    def _mapping(self, name: str) -> Mapping[str, Any]:
        value = self.data.get(name)
        return value if isinstance(value, Mapping) else {}
