"""``Client``: submit jobs, follow them, fetch what they made."""

from __future__ import annotations

__all__ = ["Client", "SpiderClient", "new_idempotency_key"]

import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import httpx2

from spider_sdk import settings
from spider_sdk.config import AppConfig, check_submittable, parse_job
from spider_sdk.config.model import ServerConfig
from spider_sdk.downloads import (
    KEPT_BY_THE_FLEET,
    download,
    download_artifact,
    resolve_destination,
)
from spider_sdk.errors import ApiError, NotFound, UsageError
from spider_sdk.events import Event
from spider_sdk.inputs import localise, upload
from spider_sdk.jobs import JobStatus, StatusDocument, Submission
from spider_sdk.live import Follower, JobView, Update
from spider_sdk.submission import Processor, Processors, Submittable, needed_for
from spider_sdk.transport import Transport, job_path

OnUpdate = Callable[[StatusDocument], object]

PAGE = 200


def new_idempotency_key() -> str:
    """A key that no other submission has."""
    return uuid.uuid4().hex


class Client:
    """A connection to one Spider API, and the config of a job to submit to it.

    ``config`` is an AppConfig, the path of one, or None for a client that submits nothing.
    ``env`` are names of variables to forward from ``os.environ`` beside those that the config
    needs (which go without being asked for), or a mapping of names to values. A processor is a
    function, or ``"file.py:function"`` (which is not imported); it travels as source text and
    its kwargs must be JSON. ``evaluator`` scores the student of an on-policy job: a function of a
    held-out row with its ``completion`` that returns a number, or an object of numbers.
    ``base_url`` and ``api_key`` go before the config's, which go before SPIDER_BASE_URL and
    SPIDER_API_KEY, then the user config, then the default. ``transport`` replaces the network,
    e.g. by ``httpx2.WSGITransport(app)``.

    Raises ConfigError for a config that is not valid and UsageError for what cannot be sent.
    Every method raises ServerUnreachable or an ApiError where the server cannot be reached or
    refuses.
    """

    def __init__(
        self,
        config: AppConfig | str | os.PathLike[str] | None = None,
        *,
        env: Sequence[str] | Mapping[str, str] = (),
        pre_processor: Processor | None = None,
        post_processor: Processor | None = None,
        pre_processor_kwargs: Mapping[str, Any] | None = None,
        post_processor_kwargs: Mapping[str, Any] | None = None,
        evaluator: Processor | None = None,
        evaluator_kwargs: Mapping[str, Any] | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        if isinstance(config, (str, os.PathLike)):
            config = AppConfig.load(Path(config))
        self.config = config
        if isinstance(env, str):  # ("HF_TOKEN") is a frequent slip for ("HF_TOKEN",)
            env = (env,)
        self._env = env
        self._processors = Processors.bundle(
            pre_processor,
            post_processor,
            pre_processor_kwargs,
            post_processor_kwargs,
            evaluator,
            evaluator_kwargs,
        )
        self._forwarded: tuple[str, ...] | None = None
        server = config.server if config is not None else ServerConfig()
        defaults = settings.load(settings.ClientSettings)
        self._transport = Transport(
            base_url=base_url or server.base_url or defaults.base_url,
            api_key=api_key or server.api_key or defaults.api_key,
            timeout=server.request_timeout,
            verify_tls=server.verify_tls,
            headers=server.headers,
            transport=transport,
        )

    @classmethod
    def from_config(cls, path: str | os.PathLike[str], **options: Any) -> Self:
        """A client for the config at ``path``; ``options`` as for ``Client``."""
        return cls(AppConfig.load(Path(path)), **options)

    @property
    def base_url(self) -> str:
        return self._transport.base_url

    @property
    def forwarded(self) -> tuple[str, ...]:
        """Names of the variables that go with the job, sorted: those that the last submission
        or retry sent, before it those that one would send."""
        if self._forwarded is None:
            if self.config is None:
                return ()
            self._forwarded = self._submittable(None).forwarded
        return self._forwarded

    # Jobs.

    def submit_job(
        self,
        job_overrides: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Submission:
        """Submit the config's job; ``{"job_id", "status"}``.

        ``job_overrides`` is merged into the ``job`` section (of a SWE job: into its root keys),
        mapping by mapping, and what comes out is checked anew. Local data is uploaded first. The
        request carries an Idempotency-Key, so that it is safe to repeat after a 503 or a cut
        connection (``transport`` does) and still makes one job; give ``idempotency_key`` to get the
        same safety across calls, within 24 hours. Raises ConfigError, UsageError, Conflict.
        """
        key = idempotency_key or new_idempotency_key()
        if not (key.isascii() and key.isprintable() and len(key) <= 255):
            raise UsageError("an idempotency key is up to 255 printable ASCII characters")
        ready = self._submittable(job_overrides)
        with tempfile.TemporaryDirectory(prefix="spider-") as made:
            local = localise(ready.job, Path(made))
            if local.files:  # what files cannot have is said before they are sent
                check_submittable(parse_job(local.job))
            upload(self._transport, local.files)
        self._forwarded = ready.forwarded
        answer = self._transport.json(
            "POST",
            "/v1/jobs",
            json={"job": local.job, "env": ready.env},
            headers={"Idempotency-Key": key},
            safe=True,
        )
        return cast(Submission, answer)

    def get_job_status(self, job_id: str, since: int = 0) -> StatusDocument:
        """The job as it stands, with its events from offset ``since`` on."""
        document = self._transport.json("GET", job_path(job_id), params={"since": since})
        return cast(StatusDocument, document)

    def list_jobs(self, status: str | None = None, limit: int | None = 50) -> list[StatusDocument]:
        """Your jobs, newest first, at most ``limit`` (None: all), as the API lists them."""
        if status is not None and status not in list(JobStatus):
            raise UsageError(f"status must be one of {', '.join(JobStatus)}, not {status!r}")
        found: list[StatusDocument] = []
        cursor: str | None = None
        while limit is None or len(found) < limit:
            left = PAGE if limit is None else min(PAGE, limit - len(found))
            params: dict[str, str | int] = {"limit": left}
            if status is not None:
                params["status"] = status
            if cursor is not None:
                params["cursor"] = cursor
            page = self._transport.json("GET", "/v1/jobs", params=params)
            found += page["jobs"]
            cursor = page.get("next_cursor")
            if not cursor:
                break
        return found

    def cancel_job(self, job_id: str) -> StatusDocument:
        """Ask the job to stop; rows so far are kept. Repeating it changes nothing."""
        answer = self._transport.json("POST", job_path(job_id, "cancel"), safe=True)
        return cast(StatusDocument, answer)

    def retry_job(
        self,
        job_id: str,
        env: Mapping[str, str] | None = None,
        *,
        max_budget_total: float | None = None,
    ) -> StatusDocument:
        """Run the missing and errored rows of an ended job, or those instances of a SWE job.

        Its secrets were deleted when it ended: with ``env`` None, those that the job needs are
        forwarded again by name, as at submission. ``max_budget_total`` (US dollars; None: as it
        is) takes the place of a SWE job's, and what was spent counts towards it. Raises Conflict
        where the job still runs or nothing is left to do.
        """
        if env is None:
            env = needed_for(self.get_job_status(job_id)["job"], self.config, self._env)
        self._forwarded = tuple(sorted(env))
        body: dict[str, Any] = {"env": dict(env)}
        if max_budget_total is not None:
            body["max_budget_total"] = max_budget_total
        answer = self._transport.json("POST", job_path(job_id, "retry"), json=body)
        return cast(StatusDocument, answer)

    # Following.

    def poll_job(
        self,
        job_id: str,
        interval: float = 5.0,
        timeout: float | None = None,
        on_update: OnUpdate | None = None,
        wait_for_completion: bool = True,
        stream_events: bool = True,
    ) -> StatusDocument:
        """Follow a job to its end and return its final status document, whatever that is.

        ``on_update`` is called with the status document after each change; its ``events`` holds
        the events that came with the change. With ``stream_events`` changes come over SSE as
        they happen (over polling where the server offers none); without, or while there is no
        stream, the server is asked every ``interval`` seconds. ``wait_for_completion`` False
        looks once. Raises PollTimeout after ``timeout`` seconds (None: never); the job goes on.
        """
        first = self.get_job_status(job_id)
        view = JobView(first)
        if on_update is not None:
            on_update(first)
        if not wait_for_completion:
            return first
        since = first["events_next_offset"]
        updates = self.follow(
            job_id, since=since, interval=interval, timeout=timeout, stream=stream_events
        )
        for update in updates:
            before = view.document
            document = view.apply(update)
            # A poll that brought nothing new is no change.
            if on_update is not None and document != before:
                on_update(document)
        return view.document

    def follow(
        self,
        job_id: str,
        *,
        since: int = 0,
        interval: float = 5.0,
        timeout: float | None = None,
        stream: bool = True,
        beats: bool = False,
    ) -> Iterator[Update]:
        """The job's updates (events, and snapshots in between) until it ends; the last one
        holds the final status document. With ``beats`` also quiet ones, which hold neither, while
        there is nothing to tell. Raises PollTimeout after ``timeout`` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        updates = Follower(
            self._transport,
            job_id,
            since=since,
            interval=interval,
            deadline=deadline,
            stream=stream,
        )
        return (update for update in updates if beats or not update.quiet)

    def events(self, job_id: str, since: int = 0) -> Iterator[Event]:
        """The job's events from offset ``since`` on, each once and in order, until it ends.

        Live over SSE; a broken connection is resumed after the last event seen. Where the
        server has already dropped old events, what is left of them comes.
        """
        for update in self.follow(job_id, since=since):
            if update.event is not None:
                yield update.event

    # What a job made.

    def download_result(
        self,
        job_id: str,
        destination: str | os.PathLike[str] | None = None,
        format: str | None = None,
    ) -> Path:
        """Write the job's result to ``destination`` (None: the config's ``output.local_path``)
        and return its path.

        The suffix tells the format unless ``format`` does: ``json`` (one document: the job's
        fields and ``artifact``, the list of records), ``jsonl`` or ``parquet`` (the records
        alone). A folder gets ``{job_id}.jsonl``. The file appears whole or not at all. Raises
        NotFound while there is no result and UsageError where nothing says where to write.
        """
        if destination is None:
            if format is None and (saved := self.save_local(job_id)) is not None:
                return saved
            raise UsageError(
                "nothing says where to write: give a destination, or output.local_path in the "
                "config (whose suffix then tells the format)"
            )
        path, chosen = resolve_destination(destination, format, job_id)
        return download(self._transport, job_id, path, chosen)

    def download_artifacts(
        self, job_id: str, destination: str | os.PathLike[str], prefix: str = ""
    ) -> list[Path]:
        """Write the job's artifacts whose names begin with ``prefix`` into the folder
        ``destination``, by their names there, and return their paths.

        Those of a training run are the adapter (``adapter/``), ``checkpoints/``, ``curves.png``,
        ``metrics.jsonl`` and ``summary.json``. What a job goes on from, its ``state/`` and its
        ``shards/``, is left out unless ``prefix`` begins with one of these words. Each file appears
        whole or not at all. Raises NotFound where there is none.
        """
        every = [str(one["name"]) for one in self.artifacts(job_id)]
        names = [name for name in every if name.startswith(prefix)]
        if not prefix.startswith(tuple(name.rstrip("/") for name in KEPT_BY_THE_FLEET)):
            names = [name for name in names if not name.startswith(KEPT_BY_THE_FLEET)]
        if not names:
            said = f" that begins with {prefix!r}" if prefix else ""
            raise NotFound(f"job {job_id} has no artifact{said} yet")
        folder = Path(destination).expanduser()
        return [download_artifact(self._transport, job_id, name, folder) for name in names]

    def download_artifact(
        self, job_id: str, name: str, destination: str | os.PathLike[str]
    ) -> Path:
        """Write the artifact of that name, whichever it is, into the folder ``destination``, by
        its name there, and return its path. The file appears whole or not at all."""
        return download_artifact(self._transport, job_id, name, Path(destination).expanduser())

    def save_local(self, job_id: str) -> Path | None:
        """Download to the config's ``output.local_path``, the artifacts of a training run into that
        folder; None where the config has none."""
        job = None if self.config is None else self.config.job
        if job is None or not job.output.local_path:
            return None
        if job.generation.on_policy:
            self.download_artifacts(job_id, job.output.local_path)
            return Path(job.output.local_path).expanduser()
        target, default = job.output.local_path, job.output.format
        try:
            path, chosen = resolve_destination(target, None, job_id, default)
        except UsageError:
            path, chosen = resolve_destination(target, default, job_id, default)
        return download(self._transport, job_id, path, chosen)

    def logs(self, job_id: str) -> str:
        """What the job's runners logged, as text."""
        return self._transport.request(
            "GET", job_path(job_id, "logs"), headers={"Accept": "text/plain, */*"}
        ).text

    def artifacts(self, job_id: str) -> list[dict[str, Any]]:
        """The job's artifacts, as the API lists them."""
        listed = self._transport.json("GET", job_path(job_id, "artifacts"))
        if not isinstance(listed, dict) or not isinstance(listed.get("artifacts"), list):
            raise ApiError("the server sent a list of artifacts of another shape")
        return cast(list[dict[str, Any]], listed["artifacts"])

    # Life.

    def close(self) -> None:
        """Close the connections. The client cannot be used after that."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _submittable(self, overrides: Mapping[str, Any] | None) -> Submittable:
        if self.config is None:
            raise UsageError("this client has no config: give Client one to submit a job")
        return Submittable.build(self.config, overrides, self._processors, self._env)


SpiderClient = Client
