"""Publishing a run's adapter to a model repository on the Hub.

Everything goes in one commit, so that no reader ever finds an adapter beside another's card. The
repository is looked at before each commit: what stands there with the same content is left out,
and a push that was repeated after a crash, or whose answer was lost, changes nothing.
"""

from __future__ import annotations

__all__ = ["AdapterPublisher"]

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from spider_sdk.config.model import JobConfig
from spider_sdk.errors import AuthError, FatalJobError, NotSupported
from spider_worker.sinks import front_matter
from spider_worker.sinks.adapter_card import keep_card
from spider_worker.sinks.hub_repo import HubRepo, Operation

CARD: Final = "README.md"
#: What a run writes. Such a file of an earlier run or push that is not in this one goes, or the
#: repository would offer checkpoints of two runs as those of one. It stays in the history.
_OURS: Final = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|metrics\.jsonl|curves\.png"
    r"|checkpoints/step-\d{6,}/[^/]+"
)


class AdapterPublisher:
    """The model repository of a job whose ``output.mode`` is ``upload_hf``.

    ``work_dir`` holds the card until it is committed. ``endpoint`` None: HF_ENDPOINT or the public
    Hub. ``sleep`` (seconds) is called before a retry. Raises AuthError without a token,
    FatalJobError or NotSupported for an output section that cannot be honoured.
    """

    def __init__(
        self,
        job: JobConfig,
        *,
        token: str | None,
        work_dir: Path,
        endpoint: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        hub = job.output.hf
        if hub is None:
            raise FatalJobError("output.mode is upload_hf, but output.hf (with repo_id) is missing")
        if hub.repo_type != "model":
            raise NotSupported(
                f"output.hf.repo_type: {hub.repo_type!r} is not supported for an adapter; it is "
                "published as a model (repo_type: model)"
            )
        if hub.config_name is not None:
            raise NotSupported(
                "output.hf.config_name: a model repository has no configurations; remove it"
            )
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub.repo_id):
            raise FatalJobError(
                f"output.hf.repo_id must be namespace/name, for instance my-org/my-adapter, "
                f"not {hub.repo_id!r}"
            )
        if not token:
            raise AuthError(
                f"The adapter goes to the model {hub.repo_id} on the Hub, but the job carries no "
                "HF_TOKEN. Export HF_TOKEN, a token with write access, where you submit the job; "
                "it is forwarded by itself for outputs to the Hub"
            )
        self._private = hub.private
        self._work_dir = work_dir
        self._repo = HubRepo(
            hub.repo_id, token=token, repo_type="model", endpoint=endpoint, sleep=sleep
        )

    def check_access(self) -> None:
        """Create the repository if need be and prove the right to write to it. Raises AuthError
        with what to do about it, FatalJobError for a public repository where a private one is asked
        for, and for a README whose front matter could not be kept."""
        self._repo.ensure(private=self._private)
        self._repo.prove_write()
        front_matter.split(self._repo.read_text(CARD, self._repo.head()) or "", "model")

    def push(self, files: Mapping[str, Path], message: str) -> str:
        """Make the repository hold exactly ``files`` (by path there), besides what is not ours,
        in one commit or none. Returns its URL."""
        self._work_dir.mkdir(parents=True, exist_ok=True)
        self._repo.settle(lambda head: self._operations(head, files), message)
        return self._repo.url

    def _operations(self, head: str, files: Mapping[str, Path]) -> list[Operation]:
        there = self._repo.files(None, head, recursive=True)
        wanted = dict(files)
        if CARD in wanted:
            card = self._work_dir / f"kept-{CARD}"
            text = keep_card(self._repo.read_text(CARD, head), wanted[CARD].read_text("utf-8"))
            card.write_text(text, encoding="utf-8")
            wanted[CARD] = card
        additions: list[Operation] = [
            CommitOperationAdd(path, local)
            for path, local in sorted(wanted.items())
            if path not in there or not there[path].holds(local)
        ]
        stale = sorted(path for path in there if _OURS.fullmatch(path) and path not in wanted)
        return [*additions, *map(CommitOperationDelete, stale)]
