"""Settings of the fleet and the worker (SPIDER_*). The API reads the same ones."""

from __future__ import annotations

__all__ = ["FleetSettings", "WorkerSettings"]

import dataclasses
from pathlib import Path

from spider_sdk.settings import setting


@dataclasses.dataclass(frozen=True)
class FleetSettings:
    """What API processes and workers must agree on."""

    redis_url: str = setting("redis://127.0.0.1:6379/0", "The fleet's Redis.")
    artifacts: Path = setting(
        Path(".spider/artifacts"), "Folder of artifacts and inputs, shared by API and workers."
    )
    secret_key: str | None = setting(
        None, "Base64 of 32 bytes that encrypt job secrets and hash API keys.", secret=True
    )
    secret_key_file: Path = setting(
        Path(".spider/secret.key"), "Where the secret key lies (mode 600) if not given itself."
    )
    lease: float = setting(60.0, "Seconds a unit's lease lives without a heartbeat.")
    heartbeat: float | None = setting(None, "Seconds between heartbeats (a sixth of the lease).")
    reaper_interval: float = setting(1.0, "Seconds between sweeps for expired leases.")
    hint_after: float = setting(30.0, "Seconds a claimable unit waits before a new hint.")
    max_attempts: int = setting(5, "Attempts of a unit without progress before its job fails.")
    backoff: float = setting(2.0, "Seconds before a unit's second attempt; doubles, up to 60.")
    event_history: int = setting(10_000, "Events kept a job, about.")
    secret_ttl: float = setting(
        30 * 86400.0, "Seconds after which an abandoned job's secrets are deleted."
    )

    @property
    def beat(self) -> float:
        return self.heartbeat or self.lease / 6


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """What one worker may do on its host."""

    devices: str | None = setting(
        None,
        "Accelerators of this worker, comma-separated, or none (default: CUDA_VISIBLE_DEVICES, else"
        " all).",
    )
    state: Path = setting(Path(".spider/worker"), "Folder for device locks and scratch data.")
    runner_idle: float = setting(120.0, "Seconds a runner keeps its engine for the next job.")
    runner_silence: float = setting(
        600.0, "Seconds without a sign of life before a runner is killed."
    )
    python_offline_gen: str | None = setting(None, "Interpreter of the offline-gen runners.")
    python_onpolicy_train: str | None = setting(None, "Interpreter of the onpolicy-train runners.")
    python_swe_agent: str | None = setting(None, "Interpreter of the swe-agent runners.")
    agent_python: str | None = setting(
        None, "Interpreter (3.12 or 3.13) with openhands-ai (default: that of .venv-agent)."
    )
    swe_slots: int = setting(0, "Agents that one swe-agent runner has at work (0: the job's).")
    allow_local_workspace: bool = setting(
        False, "Let SWE jobs take workspace: local, which keeps an agent from nothing."
    )
    sandbox: str = setting(
        "auto", "auto, bwrap, namespaces or process (process: no isolation from the host)."
    )
    sandbox_row_timeout: float = setting(30.0, "Seconds a user function may take for one row.")
    sandbox_memory_mb: int = setting(2048, "Memory of one user function's process, in MiB.")
    allow_remote_code: bool = setting(False, "Let jobs use trust_remote_code.")
    allow_private_urls: bool = setting(
        False, "Let jobs name private addresses: models' base_url, repositories, trackers."
    )
    allow_packages: bool = setting(True, "Let jobs install runtime.packages for their functions.")
    data_roots: str | None = setting(
        None, "Folders, separated by ':', that jobs may name as local data or models."
    )
    env_cache: Path = setting(Path(".spider/envs"), "Cached environments of runtime.packages.")
