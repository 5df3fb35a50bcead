"""From ``job.source`` to a source: what it names, and what it may not name."""

from __future__ import annotations

__all__ = ["build_source"]

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spider_sdk.config.model import SourceConfig
from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.sources.base import Source
from spider_worker.sources.loading import DatasetSpec
from spider_worker.sources.splits import parse_streaming_split
from spider_worker.sources.streaming import StreamingSource
from spider_worker.sources.table import DatasetsSource

_BUILDERS = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv",
    ".parquet": "parquet", ".txt": "text", ".arrow": "arrow",
}  # fmt: skip
_COMPRESSED = frozenset({".gz", ".bz2", ".xz", ".zst", ".lz4"})
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")
_SPLIT_WORDS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation",
    "val": "validation", "dev": "validation", "test": "test", "testing": "test",
}  # fmt: skip

# load_dataset takes more than a job may decide: each with the word on why it is refused.
_REFUSED = {
    "trust_remote_code": "data sets with code of their own are not run",
    "cache_dir": "the worker's HF_HOME decides",
    "keep_in_memory": "rows are read from disk",
    "storage_options": "only the Hub and uploaded files are read",
    "download_config": "the worker decides",
    "num_proc": "the worker decides",
    "save_infos": "nothing reads them",
    "token": "forward HF_TOKEN instead",
    "use_auth_token": "forward HF_TOKEN instead",
    "path": "that is source.dataset",
    "name": "that is source.config_name",
    "split": "that is source.split",
    "revision": "that is source.revision",
    "streaming": "that is source.streaming",
    "features": "it cannot be written in YAML",
}


def build_source(
    source: SourceConfig,
    input_paths: Mapping[str, Path],
    seed: int | None,
    token: str | None,
    *,
    data_roots: Sequence[Path] = (),
) -> Source:
    """A source, not loaded yet.

    ``input_paths`` are the uploaded files by the names in ``source.inputs``; ``seed`` is the
    job's, for ``shuffle: true`` (None: 0, since every worker must shuffle alike); ``token``
    is the job's HF_TOKEN. A local path in ``source.dataset`` is opened only under one of
    ``data_roots``, the folders that the worker's operator named. Raises FatalJobError,
    NotSupported.
    """
    options = _checked_options(source)
    if source.inputs:
        spec = _uploaded(source, input_paths, options)
    else:
        spec = _named(source, token, options, data_roots)
    shuffle_seed = _shuffle_seed(source.shuffle, seed)
    if source.streaming:
        parts = parse_streaming_split(source.split)
        return StreamingSource(
            spec, parts, shuffle_seed=shuffle_seed, max_examples=source.max_examples
        )
    return DatasetsSource(
        spec, split=source.split, shuffle_seed=shuffle_seed, max_examples=source.max_examples
    )


def _shuffle_seed(shuffle: bool | int, seed: int | None) -> int | None:
    if isinstance(shuffle, bool):
        return (seed or 0) if shuffle else None
    return shuffle


def _checked_options(source: SourceConfig) -> dict[str, Any]:
    for name in source.options:
        if name in _REFUSED:
            raise NotSupported(f"source.options.{name}: refused, {_REFUSED[name]}")
    for name in ("data_files", "data_dir"):
        if name not in source.options:
            continue
        if source.inputs:
            raise NotSupported(f"source.options.{name}: refused, the uploaded files are the data")
        for text in _texts(source.options[name]):
            if ":" in text or text.startswith(("/", "~", "\\")) or ".." in text.split("/"):
                raise NotSupported(
                    f"source.options.{name}: {text!r} leaves the data set's repository; "
                    "give a path inside it"
                )
    return dict(source.options)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
    elif value is not None:
        yield str(value)


def _uploaded(
    source: SourceConfig, input_paths: Mapping[str, Path], options: dict[str, Any]
) -> DatasetSpec:
    """Files that the client uploaded, told apart by their names."""
    files: dict[str, list[str]] = {}
    builders = {}
    for item in source.inputs:
        if item.name not in input_paths:
            raise FatalJobError(f"source.dataset: the input {item.name} was not uploaded")
        builders[item.name] = _builder(item.name)
        split = _split_of(item.name) if len(source.inputs) > 1 else "train"
        files.setdefault(split, []).append(str(input_paths[item.name]))
    if len(set(builders.values())) > 1:
        raise NotSupported(
            f"source.dataset: {source.dataset} mixes formats ({', '.join(sorted(builders))}); "
            "give files of one format"
        )
    builder = next(iter(builders.values()))
    if builder == "csv" and all(_stem_and_suffix(name)[1] == ".tsv" for name in builders):
        options.setdefault("sep", "\t")
    return DatasetSpec(
        path=builder, shown=source.dataset, config_name=source.config_name,
        data_files=files, options=options,
    )  # fmt: skip


def _named(
    source: SourceConfig,
    token: str | None,
    options: dict[str, Any],
    data_roots: Sequence[Path],
) -> DatasetSpec:
    """A data set that the job names: on the Hub, or under one of the operator's folders."""
    name = source.dataset
    path = Path(name)
    is_hub_id = _HUB_ID.fullmatch(name) is not None and ".." not in name
    # A relative name that no folder bears is an id on the Hub, even where one stands in a root.
    if (path.exists() or not is_hub_id) and any(
        path.resolve().is_relative_to(root.resolve()) for root in data_roots
    ):
        return _under_a_root(source, path.resolve(), options)
    # load_dataset would open a folder of that name before it asks the Hub.
    if path.exists() or not is_hub_id:
        raise FatalJobError(
            f"source.dataset: {name} is no id of a data set on the Hub, and a worker opens no "
            "path that a job names: submit it from where the file is, and the client uploads it"
        )
    if name in {*_BUILDERS.values(), "imagefolder", "audiofolder", "videofolder", "webdataset"}:
        raise FatalJobError(
            f"source.dataset: {name} is a format; name the file or folder itself, "
            "and the client uploads it"
        )
    return DatasetSpec(
        path=name, shown=name, config_name=source.config_name, revision=source.revision,
        token=token, options=options,
    )  # fmt: skip


def _under_a_root(source: SourceConfig, path: Path, options: dict[str, Any]) -> DatasetSpec:
    if not path.exists():
        raise FatalJobError(f"source.dataset: there is no {path} on this worker")
    if source.revision is not None:
        raise NotSupported(f"source.revision: {path} is on this worker and has none; remove it")
    if source.config_name is not None and path.is_file():
        raise NotSupported(f"source.config_name: {path} is one file and has none; remove it")
    files = {"train": [str(path)]} if path.is_file() else None
    return DatasetSpec(
        path=_builder(path.name) if files else str(path), shown=source.dataset,
        config_name=source.config_name, data_files=files, options=options,
    )  # fmt: skip


def _stem_and_suffix(name: str) -> tuple[str, str]:
    path = Path(name.lower())
    if path.suffix in _COMPRESSED:
        path = Path(path.stem)
    return path.stem, path.suffix


def _builder(name: str) -> str:
    suffix = _stem_and_suffix(name)[1]
    if suffix not in _BUILDERS:
        known = ", ".join(_BUILDERS)
        raise NotSupported(f"source.dataset: {name}: {suffix or 'no'} suffix; readable are {known}")
    return _BUILDERS[suffix]


def _split_of(name: str) -> str:
    """``test-00001.parquet`` belongs to ``test``; a file that names no split to ``train``."""
    words = re.split(r"[^a-z]+", _stem_and_suffix(name)[0])
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")
