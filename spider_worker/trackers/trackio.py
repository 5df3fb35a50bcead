"""trackio, Hugging Face's tracker: to a Space, to a server of one's own, or into a database file.

A Space and a server keep a step as often as it is logged, so a step that they hold is never logged
again: where an attempt goes on from before the last one, the steps that were lost stay as they
were first logged. A database is made anew by each attempt and holds the whole run.
"""

from __future__ import annotations

__all__ = ["TrackioBackend"]

import importlib.util
import os
import time
from collections.abc import Mapping
from typing import Any

from spider_sdk.errors import AuthError, EngineUnavailable, FatalJobError, PipelineError
from spider_worker.trackers.base import Closing, Opened, RunSpec


class TrackioBackend:
    """A ``Backend``. The service's address, its token and the folder of databases are in the
    environment, where trackio reads them when it is imported."""

    def __init__(self, spec: RunSpec) -> None:
        if importlib.util.find_spec("trackio") is None:
            raise EngineUnavailable(
                "generation.on_policy_options.tracker is trackio, but this worker lacks its"
                " package; its operator can install spider-distill[trackio]"
            )
        self._spec = spec
        self._run: Any = None

    def check(self) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        try:
            SQLiteStorage.validate_project_name(self._spec.project)
        except ValueError as error:
            raise FatalJobError(f"wandb_project: {error}") from error
        if self._server:
            self._probe()
        elif self._spec.url:
            self._check_token()

    def start(self) -> Opened:
        import trackio

        spec = self._spec
        if self._server or (spec.url and spec.resume is not None):
            self._probe()  # without an answer now, trackio would begin a second run
        self._run = trackio.init(
            project=spec.project,
            name=spec.name,
            config=dict(spec.config),
            resume="allow",
            private=True,  # a Space that is made for this; one that is there stays as it is
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        last = int(self._run._next_step) - 1
        return Opened(last if last >= 0 else None, self._where)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, status: str) -> Closing:  # noqa: ARG002 - trackio's runs have no status
        from trackio.sqlite_storage import SQLiteStorage

        spec = self._spec
        deadline = time.monotonic() + spec.patience
        # trackio connects in the background, and gives up soon on a run that ends before that.
        while spec.url and self._run._client is None and time.monotonic() < deadline:
            time.sleep(0.05)
        self._run.finish()
        unsent = None
        if spec.url:
            if not SQLiteStorage.has_pending_data(spec.project):
                return Closing()
            unsent = f"{self._where} did not take everything"
        path = SQLiteStorage.get_project_db_path(spec.project)
        if not path.exists():  # nothing was logged
            return Closing(unsent=unsent)
        hint = f"put it into trackio's folder and run: trackio show --project {spec.project!r}"
        return Closing({f"trackio/{path.name}": str(path)}, hint, unsent)

    # -- the service ---------------------------------------------------------------

    @property
    def _server(self) -> bool:
        return bool(self._spec.url) and "://" in str(self._spec.url)

    @property
    def _where(self) -> str:
        if self._server:
            return f"trackio at {self._spec.url}"
        return f"the trackio Space {self._spec.url}" if self._spec.url else "a trackio database"

    def _probe(self) -> None:
        """Writes nothing, the way that a step is written. Raises PipelineError without an answer,
        AuthError where the server takes no writes."""
        import httpx
        import trackio

        token = os.environ.get("HF_TOKEN") if not self._server else None
        address = os.environ.get("TRACKIO_SERVER_URL") if self._server else self._spec.url
        write = os.environ.get("TRACKIO_WRITE_TOKEN") if self._server else None
        try:
            client = trackio.RemoteClient(address, hf_token=token, write_token=write)
            client.predict(api_name="/bulk_log", logs=[], hf_token=token)
        except httpx.HTTPStatusError as error:
            raise AuthError(
                f"{self._where} takes no metrics from this job: HTTP"
                f" {error.response.status_code}. Export the token that it was started with in"
                " TRACKIO_WRITE_TOKEN (or in TRACKIO_SERVER_URL) where you submit the job"
            ) from error
        except (httpx.HTTPError, OSError, RuntimeError) as error:
            raise PipelineError(f"{self._where} cannot be reached: {error}") from error

    def _check_token(self) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            HfApi(token=os.environ.get("HF_TOKEN")).whoami()
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else 0
            if status in (401, 403):
                raise AuthError(
                    f"the Hub does not accept HF_TOKEN, which {self._where} needs: {error}"
                ) from error
            raise PipelineError(f"the Hub gave no answer about HF_TOKEN: {error}") from error
        except OSError as error:
            raise PipelineError(f"the Hub cannot be reached: {error}") from error
