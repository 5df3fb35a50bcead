"""Publishing a run's trajectories as one configuration of a data set on the Hub.

Everything goes in one commit: files, card and what is no longer there. The repository is looked at
first, and what stands there already is left out, so a push that is repeated changes nothing. Other
configurations in the repository, and what its user wrote on the card, stay.
"""

from __future__ import annotations

__all__ = ["Pushed", "push"]

import dataclasses
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from spider_sdk.errors import AuthError, UsageError
from spider_worker.sinks.card import data_folder
from spider_worker.sinks.hub_repo import HubRepo, Operation
from spider_worker.trajectories.card import SPLIT, Tally, check_card, recipe, render_card
from spider_worker.trajectories.filters import accepts
from spider_worker.trajectories.layout import METADATA, config_name
from spider_worker.trajectories.messages import FORMATS, has_agent_turn
from spider_worker.trajectories.metadata import read_metadata
from spider_worker.trajectories.output_file import Entry, Index, read_index
from spider_worker.trajectories.record import Record
from spider_worker.trajectories.rows import row, schema
from spider_worker.trajectories.scan import Scanner
from spider_worker.trajectories.shards import write_shards

CARD: Final = "README.md"


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What then stands on the Hub. ``committed`` is False where it stood there before;
    ``left_out`` is the number of runs that pass the filter and have no turn of the agent.

    ``redacted`` says for each instance (``metadata.json`` for the recipe) which kinds of secrets
    were taken out and how often.
    """

    url: str
    config: str
    rows: int
    committed: bool
    redacted: Mapping[str, Mapping[str, int]]
    left_out: int = 0


def push(
    output_jsonl: Path,
    repo_id: str,
    *,
    token: str | None,
    private: bool = False,
    config_name: str | None = None,
    push_filter: str = "all",
    messages_format: str = "text",
    secrets: Iterable[str] = (),
    endpoint: str | None = None,
    work_dir: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Make configuration ``config_name`` of the data set hold the runs of ``output_jsonl``.

    ``config_name`` None: made of model, data set and iterations. ``secrets`` are values to be
    taken out beside ``token`` itself and whatever looks like a key. ``endpoint`` None: HF_ENDPOINT
    or the public Hub. ``work_dir`` None: the system's folder for temporary files, which must
    hold the Parquet files. ``sleep`` (seconds) is called before a retry.

    Raises UsageError for arguments that cannot be followed, for a file that is not there or not
    whole, and where no run passes the filter; AuthError for a token that is missing or may not
    write; FatalJobError for a repository that cannot be used as asked; PipelineError where the Hub
    does not answer.
    """
    _check(repo_id, config_name, messages_format)
    if not token:
        raise AuthError(
            f"Nothing can be pushed to {repo_id} without a token: set HF_TOKEN to one with write "
            "access"
        )
    index = read_index(output_jsonl)
    chosen = _chosen(index, push_filter)
    metadata = _metadata(output_jsonl, index)
    config = config_name or _config(metadata)
    scanner = Scanner([*secrets, token])
    repo = HubRepo(repo_id, token=token, endpoint=endpoint, sleep=sleep, options="hf_")
    repo.ensure(private=private)
    repo.prove_write()
    check_card(repo.read_text(CARD, repo.head()))
    with tempfile.TemporaryDirectory(prefix="spider-push-", dir=work_dir) as folder:
        files, rows = write_shards(
            _rows(index, chosen, messages_format, scanner),
            schema(messages_format),
            Path(folder),
            split=SPLIT,
        )
        if not rows:
            raise UsageError(
                f"{output_jsonl}: of {len(chosen)} runs that pass push_filter: {push_filter} none "
                "has a turn of the agent, so there is nothing to push"
            )
        left_out = len(chosen) - rows
        metadata = scanner.redact(metadata, METADATA)
        tally = Tally.of(index)

        def wanted(head: str) -> list[Operation]:
            existing = repo.read_text(CARD, head)
            card = render_card(
                existing,
                metadata,
                tally,
                repo_id=repo_id,
                config=config,
                rows=rows,
                left_out=left_out,
                push_filter=push_filter,
                messages_format=messages_format,
                redacted=scanner.counts,
            )
            operations = _data(repo, head, config, files)
            if card != existing:
                operations.append(CommitOperationAdd(CARD, card.encode()))
            return operations

        noun = "trajectory" if rows == 1 else "trajectories"
        committed = repo.settle(wanted, f"Publish {config}: {rows:,} {noun}")
    return Pushed(repo.url, config, rows, committed, scanner.found, left_out)


def _check(repo_id: str, config: str | None, messages_format: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise UsageError(
            f"hf_repo_id must be namespace/name, for instance my-org/my-data, not {repo_id!r}"
        )
    if config is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config):
        raise UsageError(
            "hf_config_name begins with a letter or digit and may hold '.', '_' and '-' as well, "
            f"not {config!r}"
        )
    if messages_format not in FORMATS:
        raise UsageError(f"messages_format is text or openai, not {messages_format!r}")


def _chosen(index: Index, push_filter: str) -> list[Entry]:
    """The runs that take part, in an order that does not depend on which ended first."""
    if not index.latest:
        raise UsageError(f"{index.path}: there is no such file, or it has no records")
    chosen = [entry for entry in index.latest.values() if accepts(push_filter, entry)]
    if not chosen:
        judged = sum(entry.resolved is not None for entry in index.latest.values())
        hint = ""
        if push_filter == "resolved" and not judged:
            hint = "; none has been judged: evaluate them first"
        raise UsageError(
            f"{index.path}: none of {len(index.latest)} runs passes push_filter: {push_filter}"
            f"{hint}"
        )
    return sorted(chosen, key=lambda entry: entry.key)


def _metadata(output: Path, index: Index) -> dict[str, Any]:
    """The run's ``metadata.json``; where that is missing, what a record says."""
    metadata = read_metadata(output.with_name(METADATA))
    if metadata is None:
        metadata = dict(index.load(next(iter(index.latest.values()))).metadata)
    return metadata


def _config(metadata: Mapping[str, Any]) -> str:
    made = recipe(metadata)
    model, dataset, iterations = made["model"], made["dataset"], made["max_iterations"]
    if not model or not dataset or not isinstance(iterations, int):
        raise UsageError(
            "The run's metadata names no model, data set or max_iterations to make a name of: give "
            "hf_config_name"
        )
    return config_name(model, dataset, iterations)


def _rows(
    index: Index, chosen: Sequence[Entry], messages_format: str, scanner: Scanner
) -> Iterator[dict[str, Any]]:
    for entry in chosen:
        record = index.load(entry)
        if not has_agent_turn(record.messages):
            continue
        cost, unpriced = index.cost(entry.key)
        # Before JSON is made of parts of it, so that no marker can break that.
        clean = Record(scanner.redact(record.data, record.instance_id))
        yield row(clean, messages_format, cost=None if unpriced else cost)


def _data(repo: HubRepo, head: str, config: str, files: Sequence[Path]) -> list[Operation]:
    folder = data_folder(config)
    there = repo.files(folder, head)
    wanted = {f"{folder}/{file.name}": file for file in files}
    operations: list[Operation] = [
        CommitOperationAdd(path, file)
        for path, file in wanted.items()
        if path not in there or not there[path].holds(file)
    ]
    ours = re.compile(rf"{re.escape(folder)}/{SPLIT}-\d{{5,}}\.parquet")
    operations += [
        CommitOperationDelete(path)
        for path in sorted(there)
        if ours.fullmatch(path) and path not in wanted
    ]
    return operations
