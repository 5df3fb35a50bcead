"""A scripted server with one SWE job, and the records of its runs."""

from __future__ import annotations

__all__ = ["CONFIG", "JOB", "TREE", "Jobs", "attempt"]

import json
from pathlib import Path
from typing import Any

from tests.support.scripted_server import (
    Answer,
    ScriptedServer,
    Seen,
    answer_bytes,
    answer_json,
    event,
    event_stream,
    frame,
    job_status,
    named_frame,
    problem,
    status_document,
)
from tests.support.trajectories import record

CONFIG = """\
dataset: SWE-bench/SWE-smith
llm_model: openai/m
llm_api_key_env: MODEL_KEY
eval_output_dir: out
"""
TREE = Path("out/SWE-bench__SWE-smith-train/CodeActAgent/m_maxiter_30")
"""Where CONFIG's tree is, from the working folder."""


JOB = {"swe": {"llm_model": "openai/m", "llm_api_key_env": "MODEL_KEY"}}


class Jobs:
    """A server with one job, ``j1``, whose runs end as the test says."""

    def __init__(self, server: ScriptedServer) -> None:
        self.server = server
        self.names: dict[str, tuple[bytes, str]] = {}
        server.on("POST", "/v1/jobs", answer_json({"job_id": "j1", "status": "queued"}, 201))
        server.on("POST", "/v1/jobs/j1/retry", answer_json(status_document("queued")))
        server.otherwise = self._otherwise
        self.shows()

    def _otherwise(self, seen: Seen) -> Answer:
        if (seen.method, seen.path[:11]) == ("PUT", "/v1/inputs/"):
            return answer_json({"sha256": seen.path[11:], "size": len(seen.body)}, 201)
        return problem(404, f"no route {seen.method} {seen.path}")

    def run(self, instance: str, *records: dict[str, Any], at: str = "2026-01-01") -> None:
        """An instance's shard and log, as its unit committed them."""
        number = len([name for name in self.names if name.startswith("shards/")])
        known = [n for n, (data, _) in self.names.items() if f'"{instance}"'.encode() in data]
        name = known[0] if known else f"shards/instance-{number:06d}.jsonl"
        lines = "".join(json.dumps(one) + "\n" for one in records)
        self.names[name] = (lines.encode(), at)
        self.names[f"infer_logs/instance_{instance}.log"] = (f"log of {instance}\n".encode(), at)
        self.shows()

    def shows(self) -> None:
        listed = [
            {"name": name, "size": len(data), "created_at": at, "media_type": "x", "sha256": None,
             "complete": True, "path": f"/v1/jobs/j1/artifacts/{name}"}
            for name, (data, at) in self.names.items()
        ]  # fmt: skip
        self.server.on("GET", "/v1/jobs/j1/artifacts", answer_json({"artifacts": listed}))
        for name, (data, _) in self.names.items():
            self.server.on("GET", f"/v1/jobs/j1/artifacts/{name}", answer_bytes(data))

    def ends(self, status: str, *, before: str = "queued", **changes: Any) -> None:
        """Followed, it goes through its events to ``status``; looked at, it is ``before``."""
        log = [event(0, "job.queued"), event(1, "job.running")]
        for name in (n for n in self.names if n.startswith("shards/")):
            unit = name.removeprefix("shards/").removesuffix(".jsonl")
            last = json.loads(self.names[name][0].splitlines()[-1])
            told = {"instance": last["instance_id"], "n": last["n"]}
            log.append(event(len(log), "instance.started", last["instance_id"], **told))
            said = f"{last['instance_id']}: {last['status']}"
            log.append(event(len(log), "instance.ended", said, status=last["status"], **told))
            log.append(event(len(log), "unit.committed", unit, unit=unit))
        log.append(event(len(log), f"job.{status}", status))
        final = status_document(status, log, job=JOB, **changes)
        looks = [job_status(before, log, job=JOB, **changes)]
        self.server.on("GET", "/v1/jobs/j1", *looks)
        frames = [*map(frame, log), named_frame("end", final)]
        self.server.on("GET", "/v1/jobs/j1/events", event_stream(frames))

    @property
    def submitted(self) -> list[dict[str, Any]]:
        return [one.json["job"]["swe"] for one in self.server.requests("POST", "/v1/jobs")]

    def uploaded(self, name: str) -> str:
        """What the last job was sent in the file of this name."""
        (digest,) = [one["sha256"] for one in self.submitted[-1]["inputs"] if one["name"] == name]
        return self.server.requests("PUT", f"/v1/inputs/{digest}")[-1].body.decode()

    def fetched(self) -> list[str]:
        start = "/v1/jobs/j1/artifacts/"
        return [one.path.removeprefix(start) for one in self.server.seen if start in one.path]


def attempt(instance: str, status: str = "finished", **more: Any) -> dict[str, Any]:
    return record(instance, status=status, **more)
