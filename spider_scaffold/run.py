"""One run of a config in its tree: which job fills it, begun, taken up again or found done."""

from __future__ import annotations

__all__ = ["Run"]

import dataclasses
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import Any, Final

from spider_scaffold.jobfile import JobFile
from spider_scaffold.mirror import run_name
from spider_scaffold.report import counted
from spider_scaffold.selection import SELECTING, done_runs, write_left_out
from spider_scaffold.servers import Place
from spider_sdk.cli.follow import end_of_log, say_forwarded
from spider_sdk.cli.state import Detached, State
from spider_sdk.client import Client, new_idempotency_key
from spider_sdk.config import AppConfig
from spider_sdk.config.model import SweConfig
from spider_sdk.errors import ConfigError, Conflict, NotFound, Problem, UsageError
from spider_sdk.jobs import TERMINAL, JobStatus, StatusDocument
from spider_sdk.submission import Submittable
from spider_sdk.swe_inputs import check_local
from spider_worker.trajectories.commit import spider_commit
from spider_worker.trajectories.layout import Layout
from spider_worker.trajectories.metadata import (
    differing,
    open_run,
    read_metadata,
    run_metadata,
)
from spider_worker.trajectories.output_file import Index, read_index
from spider_worker.trajectories.record import Key

_BUDGET: Final = "max_budget_total"
#: Keys that a job which is taken up again need not have as the config has them now.
_INDIFFERENT: Final = frozenset({"eval_output_dir", _BUDGET, "inputs"})
_PUBLISHING: Final = (
    "hf_repo_id", "hf_private", "hf_config_name", "push_filter", "messages_format"
)  # fmt: skip
#: What a job that runs the rest alone does not do: this machine publishes the whole.
_UNPUBLISHED: Final = {
    "hf_repo_id": None,
    "hf_private": False,
    "hf_config_name": None,
    "push_filter": SweConfig.push_filter,
}


class Run:
    """Raises ConfigError for a config that cannot be submitted, UsageError for a tree that holds
    another experiment."""

    def __init__(self, state: State, config: AppConfig) -> None:
        if config.swe is None:
            raise UsageError(f"{config.path} is no SWE job; submit it with: spider submit")
        self.swe: SweConfig = config.swe
        self._state = state
        self._config = config
        self.ready = Submittable.build(config)
        self._asked: dict[str, Any] = dict(self.ready.job["swe"])
        self.layout = Layout.of(
            self.swe.eval_output_dir,
            dataset=self.swe.dataset,
            split=self.swe.split,
            agent_class=self.swe.agent_class,
            model=self.swe.llm_model,
            max_iterations=self.swe.max_iterations,
        )
        versions = {"spider": importlib.metadata.version("spider-distill")}
        self._metadata = run_metadata(self.swe, agent_config=versions, git_commit=spider_commit())
        self.job = JobFile.load(self.layout.root)
        before = read_metadata(self.layout.metadata)
        differs = before is not None and bool(differing(before, self._metadata))
        #: What was begun with other settings and has made nothing, a mistake in them as a rule.
        self._void = differs and not self.index.attempts
        if differs and not self._void:
            self._open()  # which says what differs
        made_by = (before or {}).get("agent_config")
        if made_by and made_by != versions:
            said = f"was made by {_named(made_by)}; this is {_named(versions)}"
            state.note(f"{self.layout.root} {said}")
        check_local(self._asked)

    @property
    def index(self) -> Index:
        return read_index(self.layout.output)

    @property
    def nothing_left(self) -> bool:
        """Whether the tree is known to be whole, without asking a server."""
        if self.job is None or not self.job.complete:
            return False
        if SELECTING & set(self.job.differing(self._asked, frozenset())):
            return False
        index = self.index
        return bool(index.latest) and index.latest.keys() == index.done

    def begin(self, place: Place) -> int:
        """Have a job for what is left: ``job`` is that one afterwards. Returns the offset of the
        first event to follow it from."""
        document = self._known(place)
        if document is not None and document["status"] not in TERMINAL:
            return self._join(place.client, document)
        if document is not None and not self._changed():
            return self._retry(place.client, document)
        return self._submit(place)

    def close(self, document: StatusDocument) -> bool:
        """Note how the job ended; whether nothing of it is left to do."""
        assert self.job is not None
        metrics = document["metrics"]
        left = metrics.get("rows_error") or metrics.get("units_skipped")
        self.job.complete = document["status"] == JobStatus.COMPLETED and not left
        # As the job was submitted: the config may have changed while it ran.
        self.job.published = _publishing(self.job.asked) if document["remote_artifact"] else None
        self.job.save(self.layout.root)
        return self.job.complete

    @property
    def unpublished(self) -> bool:
        """Whether what the tree has is to be published, and nobody did it as the config says."""
        wanted = _publishing(self._asked)
        return bool(wanted["hf_repo_id"]) and (self.job is None or self.job.published != wanted)

    def note_published(self) -> None:
        assert self.job is not None
        self.job.published = _publishing(self._asked)
        self.job.save(self.layout.root)

    # -- the job that the tree knows ------------------------------------------------------

    def _known(self, place: Place) -> StatusDocument | None:
        job = self.job
        if job is None or job.server != place.server:
            if job is not None and not job.complete and job.job_id is not None:
                where = job.server or "a fleet in the tree"
                self._state.note(f"job {job.job_id} on {where} filled this tree before; left alone")
            return None
        if job.job_id is None:
            return None
        try:
            return place.client.get_job_status(job.job_id)
        except NotFound:
            return None

    def _changed(self) -> list[str]:
        assert self.job is not None
        return self.job.differing(self._asked, _INDIFFERENT)

    def _join(self, client: Client, document: StatusDocument) -> int:
        job_id = document["job_id"]
        self._state.say(f"job {job_id} {document['status']}: going on with it")
        if changed := self._changed():
            self._state.note(
                f"it keeps what it was submitted with, which differs in {', '.join(changed)}; "
                f"cancel it (spider cancel {job_id}) and start again to change that"
            )
        self._open()
        return end_of_log(client, job_id)

    def _retry(self, client: Client, document: StatusDocument) -> int:
        """Run what is missing or went wrong of a job that has ended."""
        assert self.job is not None
        job_id = document["job_id"]
        budget = self._budget(self.job.spent)
        raised = budget if self.swe.max_budget_total != self.job.asked.get(_BUDGET) else None
        since = end_of_log(client, job_id)
        self._open()
        try:
            answer = client.retry_job(job_id, max_budget_total=raised)
        except Conflict as error:
            if document["status"] != JobStatus.COMPLETED:
                raise
            self._state.note(error.message)
            return since
        self.job.asked = self._asked
        self.job.complete = False
        self.job.save(self.layout.root)
        say_forwarded(self._state, client.forwarded)
        if self._state.json:
            self._state.emit({"job_id": job_id, "status": answer["status"]})
        self._state.say(f"job {job_id} {answer['status']}: what is not done is run again")
        return since

    # -- a new one ------------------------------------------------------------------------

    def _submit(self, place: Place) -> int:
        index = self.index
        done = done_runs(self.swe, index)
        earlier = self.job
        again = (
            earlier is not None
            and earlier.job_id is None
            and earlier.server == place.server
            and not earlier.differing(self._asked, frozenset())
        )
        if not again:
            self.job = _fresh(place.server, self._asked, index)
        assert self.job is not None
        budget = self._budget(self.job.spent)
        if self._void:
            self.layout.metadata.unlink(missing_ok=True)
        self._open()
        changes = self._changes(done, budget)
        # Before the server knows of it: whatever cuts this off, the same key is sent again.
        self.job.save(self.layout.root)
        client = place.client
        say_forwarded(self._state, client.forwarded)
        try:
            submission = client.submit_job(changes, idempotency_key=self.job.key)
        except KeyboardInterrupt:
            raise Detached(
                "interrupted while submitting: the job may have been accepted. Run the same "
                "command again to go on with it"
            ) from None
        self.job.job_id = submission["job_id"]
        self.job.save(self.layout.root)
        if self._state.json:
            self._state.emit(submission)
        word = f"; {counted(len(done), 'run')} done before are left out" if done else ""
        self._state.say(f"job {submission['job_id']} {submission['status']}{word}")
        return 0

    def _changes(self, done: Sequence[Key], budget: float | None) -> Mapping[str, Any]:
        assert self.job is not None
        changes: dict[str, Any] = {}
        if done:
            try:
                left_out = write_left_out(self.layout.root, done, self.swe.leave_out)
            except OSError as error:
                said = f"{self.swe.leave_out} cannot be read: {error.strerror}"
                raise ConfigError([Problem("leave_out", said)]) from error
            changes["leave_out"] = str(left_out)
        if self.job.carried and self.swe.hf_repo_id is not None:
            changes |= _UNPUBLISHED
        if budget != self.swe.max_budget_total:
            changes[_BUDGET] = budget
        return changes

    def _budget(self, spent: float) -> float | None:
        """Dollars that are left of ``max_budget_total``; None: no cap."""
        total = self.swe.max_budget_total
        if total is None or not spent:
            return total
        if spent >= total:
            said = f"${spent:.2f} of ${total:.2f} were spent in this tree; raise it to go on"
            raise ConfigError([Problem(_BUDGET, said)])
        return total - spent

    def _open(self) -> None:
        open_run(self.layout.metadata, self._metadata)


def _named(versions: object) -> str:
    if not isinstance(versions, Mapping):
        return str(versions)
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _publishing(asked: Mapping[str, Any]) -> dict[str, Any]:
    """What of a job decides what then stands on the Hub."""
    return {key: asked.get(key, getattr(SweConfig, key)) for key in _PUBLISHING}


def _fresh(server: str | None, asked: dict[str, Any], index: Index) -> JobFile:
    job = JobFile(server, new_idempotency_key(), asked, carried=bool(index.latest))
    job.bases = {run_name(key): max(numbers) for key, numbers in index.attempts.items()}
    return dataclasses.replace(job, spent=index.charged)
