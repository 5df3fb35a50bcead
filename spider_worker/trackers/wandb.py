"""Weights & Biases.

A step is taken once there: whatever is logged for one at or below the run's last is dropped. An
attempt that goes on from an earlier step than the lost one had come to is therefore *rewound*:
W&B cuts the run's history back to the resumed step and keeps the old one beside it. Not every
server can (the feature is a preview on the hosted one and missing on many others); where it
cannot, the steps that were lost stay as they were first logged, and the run goes on after them.

Offline, a run is a file for ``wandb sync``. Nothing is known there of an earlier attempt's file,
so each one holds the whole run.
"""

from __future__ import annotations

__all__ = ["WandbBackend"]

import importlib.util
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError, PipelineError
from spider_worker.trackers.base import Closing, Opened, RunSpec

BASE_URL: Final = "https://api.wandb.ai"
#: Seconds: for the service to answer at all, and for a run to be made.
_ANSWER: Final = 20.0
_INIT: Final = 60.0


class WandbBackend:
    """A ``Backend``. The key is in WANDB_API_KEY."""

    def __init__(self, spec: RunSpec) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise EngineUnavailable(
                "generation.on_policy_options.tracker is wandb, but this worker lacks its package;"
                " its operator can install spider-distill[wandb]"
            )
        self._spec = spec
        self._run: Any = None
        self._logged = -1  # the newest step

    def check(self) -> None:
        if self._spec.offline:
            return
        self._reach()
        import wandb

        try:
            wandb.login(verify=True, prompt=False)
        except wandb.errors.AuthenticationError as error:
            raise AuthError(
                f"{self._where} does not accept WANDB_API_KEY: {error}. Export the key of an"
                " account there (and WANDB_BASE_URL, where the server is your own) and submit the"
                " job again"
            ) from error

    def start(self) -> Opened:
        spec = self._spec
        if spec.offline:
            self._init(mode="offline")
            return Opened(None, "a file for wandb sync")
        self._reach()
        self._init(resume="allow")
        last = self._last()
        if spec.resume is not None and last is not None and last > spec.resume:
            last = self._rewind(spec.resume, last)
        self._logged = -1 if last is None else last
        return Opened(last, str(self._run.url))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._logged:
            # The curve takes no more of that step; the run's last figures do.
            self._run.summary.update(dict(metrics))
            return
        self._logged = step
        # With a step the SDK keeps a point back for more figures of it, unless told otherwise.
        self._run.log(dict(metrics), step=step, commit=True)

    def finish(self, status: str) -> Closing:
        run, spec = self._run, self._spec
        run.summary["ended"] = status
        folder = Path(run.dir).parent
        unsent = None
        try:
            run.finish(exit_code=int(status == "failed"))
        except TimeoutError:
            unsent = f"{self._where} did not take everything within {spec.patience:.0f} s"
        if not spec.offline and unsent is None:
            return Closing()
        files = {f"wandb/{path.name}": str(path) for path in folder.glob("*.wandb")}
        hint = f"send it to Weights & Biases with: wandb sync {', '.join(files)}"
        return Closing(files, hint, unsent)

    # -- a run ---------------------------------------------------------------------

    def _init(self, **how: Any) -> None:
        """Raises FatalJobError where the service refuses the run, PipelineError without an
        answer."""
        import wandb

        spec = self._spec
        try:
            self._run = wandb.init(
                project=spec.project,
                entity=spec.entity,
                id=spec.run_id,
                name=spec.name,
                dir=spec.folder,
                config=dict(spec.config),
                settings=_settings(wandb.Settings, spec),
                **how,
            )
        except wandb.errors.AuthenticationError as error:
            raise AuthError(f"{self._where} does not accept WANDB_API_KEY: {error}") from error
        except wandb.errors.UsageError as error:
            raise FatalJobError(f"{self._where} refuses the run: {error}") from error
        except wandb.errors.CommError as error:
            said = str(error)
            # The one way in which it tells a project or a team that is not this account's.
            if "permission denied" in said.lower() or "403" in said or "404" in said:
                raise FatalJobError(
                    f"{self._where} refuses project {spec.project!r}: {said}. Name one that this"
                    " account may write to in wandb_project (team/project for a team's)"
                ) from error
            raise PipelineError(f"{self._where} made no run: {said}") from error

    def _last(self) -> int | None:
        step = int(self._run.starting_step) - 1
        return step if self._run.resumed and step >= 0 else None

    def _rewind(self, step: int, last: int) -> int:
        """Cut the run back to ``step``; returns its last step, which is ``last`` where the server
        does not rewind."""
        import wandb

        self._run.finish()
        try:
            self._init(resume_from=f"{self._spec.run_id}?_step={step}")
            return step
        except (FatalJobError, PipelineError) as error:
            print(f"not rewound: {error.message}", flush=True)  # noqa: T201 - into the process's log
        wandb.teardown()  # its service holds on to a run that failed to begin
        self._init(resume="allow")
        return last

    # -- the service ---------------------------------------------------------------

    @property
    def _where(self) -> str:
        return f"Weights & Biases at {self._spec.url or BASE_URL}"

    def _reach(self) -> None:
        """Raises PipelineError unless something answers there. The SDK tells a server that is
        down and a key that is wrong in one and the same way, and the first after minutes."""
        url = self._spec.url or BASE_URL
        try:
            with urllib.request.urlopen(url, timeout=_ANSWER):  # noqa: S310 - checked in build.py
                pass
        except urllib.error.HTTPError:
            pass  # an answer
        except OSError as error:
            raise PipelineError(f"{self._where} cannot be reached: {error}") from error


def _settings(settings: Any, spec: RunSpec) -> Any:
    """Metrics alone: no console, code, commit, command line, packages or machine figures."""
    os.makedirs(spec.folder, exist_ok=True)
    return settings(
        console="off",
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        finish_timeout=spec.patience,
        finish_timeout_raises=True,
        host="spider",
        init_timeout=_INIT,
        label_disable=True,
        program="spider",
        quiet=True,
        sagemaker_disable=True,
        save_code=False,
        silent=True,
        symlink=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
