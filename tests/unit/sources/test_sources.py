"""Sources over the real datasets library, on files that a client uploaded."""

import csv
import gzip
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from spider_sdk.config.model import InputFile, SourceConfig
from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.sources.base import IndexedRow, Source
from spider_worker.sources.build import build_source
from spider_worker.sources.streaming import SHUFFLE_BUFFER

ROWS = [{"x": number, "text": f"row {number}"} for number in range(100)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a file; its suffix names the format."""
    match path.name.removesuffix(".gz").rpartition(".")[2]:
        case "jsonl":
            text = "".join(json.dumps(row) + "\n" for row in rows)
        case "json":
            text = json.dumps(rows)
        case "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
            return path
        case "csv" | "tsv" as kind:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0], delimiter="\t" if kind == "tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
            return path
        case other:
            raise AssertionError(other)
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def source(files: list[Path] | Path, seed: int | None = None, **fields: Any) -> Source:
    """A source over uploaded files, which the worker keeps under other names than their own."""
    files = files if isinstance(files, list) else [files]
    paths = {}
    for number, file in enumerate(files):
        stored = file.parent / f"{number:064x}"
        stored.write_bytes(file.read_bytes())
        paths[file.name] = stored
    inputs = tuple(InputFile(file.name, "0" * 64) for file in files)
    config = SourceConfig(dataset="data", inputs=inputs, **fields)
    return build_source(config, paths, seed, None)


def read(
    source: Source, start: int = 0, stop: int | None = None, size: int = 7
) -> list[IndexedRow]:
    return list(itertools.chain.from_iterable(source.batches(start, stop, size)))


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", ROWS)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz"])
def test_formats(tmp_path: Path, name: str, streaming: bool) -> None:
    made = source(write(tmp_path / name, ROWS), streaming=streaming)
    assert read(made) == list(enumerate(ROWS))
    assert made.count() == (None if streaming else 100)
    if not streaming:
        assert made.columns() == ["x", "text"]
    made.close()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("split", "positions"),
    [
        ("train", range(100)),
        ("train[0:10]", range(10)),
        ("train[90:]", range(90, 100)),
        ("train[95:200]", range(95, 100)),
        ("train[:3]+train[50:52]", [0, 1, 2, 50, 51]),
    ],
)
def test_split_slices(jsonl: Path, split: str, positions: Any, streaming: bool) -> None:
    rows = read(source(jsonl, split=split, streaming=streaming))
    assert rows == list(enumerate(ROWS[position] for position in positions))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_slice_without_rows_fails_the_job(jsonl: Path, streaming: bool) -> None:
    with pytest.raises(FatalJobError, match=r"train\[5:5\].* no (data|rows)"):
        read(source(jsonl, split="train[5:5]", streaming=streaming))


def test_percentages_without_streaming(jsonl: Path) -> None:
    assert [row["x"] for _, row in read(source(jsonl, split="train[-10%:]"))] == [*range(90, 100)]


@pytest.mark.parametrize(
    ("split", "says"),
    [
        ("train[:10%]", "percentage"),
        ("train[-5:]", "from the end"),
        ("train[a:b]", "no row number"),
        ("train[", "not understood"),
    ],
)
def test_what_a_stream_cannot_slice_is_refused(jsonl: Path, split: str, says: str) -> None:
    with pytest.raises(NotSupported, match=says):
        source(jsonl, split=split, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_unknown_split_names_those_that_there_are(jsonl: Path, streaming: bool) -> None:
    with pytest.raises(FatalJobError, match=r"\btest\b.*train"):
        read(source(jsonl, split="test", streaming=streaming))


@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_a_folder_go_to_the_split_in_their_name(tmp_path: Path, streaming: bool) -> None:
    names = ["train-00000.jsonl", "train-00001.jsonl", "my_test.jsonl", "dev.jsonl"]
    files = [write(tmp_path / name, [{"file": name}]) for name in names]

    def found(split: str) -> list[str]:
        return [row["file"] for _, row in read(source(files, split=split, streaming=streaming))]

    assert found("train") == names[:2]
    assert found("test") == ["my_test.jsonl"]
    assert found("validation") == ["dev.jsonl"]


@pytest.mark.parametrize("streaming", [False, True])
def test_any_part_at_any_batch_size(jsonl: Path, streaming: bool) -> None:
    made = source(jsonl, split="train[10:90]", streaming=streaming, max_examples=70)
    whole = list(enumerate(ROWS[10:80]))
    for start, stop, size in [(0, None, 1), (3, 20, 256), (65, 500, 2), (70, 80, 5), (9, 9, 1)]:
        batches = list(made.batches(start, stop, size))
        assert all(0 < len(batch) <= size for batch in batches)
        assert list(itertools.chain.from_iterable(batches)) == whole[start:stop]


@pytest.mark.parametrize("streaming", [False, True])
def test_shuffle_is_a_permutation_of_the_slice_and_the_seed(jsonl: Path, streaming: bool) -> None:
    def order(shuffle: bool | int, seed: int | None = None) -> list[int]:
        made = source(jsonl, seed, split="train[:50]", shuffle=shuffle, streaming=streaming)
        return [row["x"] for _, row in read(made)]

    assert order(False, 3) == [*range(50)]
    assert sorted(order(7)) == [*range(50)] != order(7)
    assert order(7) == order(True, 7) == order(7, 8)
    assert order(True) == order(0) != order(1)


def test_a_streaming_shuffle_continues_where_it_was_and_loses_nothing(tmp_path: Path) -> None:
    rows = [{"x": number} for number in range(SHUFFLE_BUFFER + 2_000)]
    file = write(tmp_path / "a.jsonl", rows)
    made = source(file, shuffle=1, streaming=True)
    parts = read(made, 0, 5_000, 256) + read(made, 5_000, None, 100)
    assert parts == read(source(file, shuffle=1, streaming=True), size=999)
    assert sorted(row["x"] for _, row in parts) == [*range(len(rows))]
    # A row comes forward by no more than the buffer.
    assert all(row["x"] <= index + SHUFFLE_BUFFER for index, row in parts)


def test_a_stream_goes_on_without_reading_again(
    jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from spider_worker.sources import streaming

    opened = 0
    plain: Callable[..., Any] = streaming._TableCursor

    def counting(tables: Any) -> Any:
        nonlocal opened
        opened += 1
        return plain(tables)

    monkeypatch.setattr(streaming, "_TableCursor", counting)
    made = source(jsonl, streaming=True)
    assert read(made, 0, 10) == list(enumerate(ROWS))[:10]
    assert read(made, 10, 20) == list(enumerate(ROWS))[10:20]
    assert read(made, 40, 50) == list(enumerate(ROWS))[40:50]
    assert opened == 1
    first = made.batches(50, 60, 5)
    assert next(first)[0][0] == 50
    assert read(made, 52, 54) == list(enumerate(ROWS))[52:54]  # the one cursor is in use
    assert opened == 2
    first.close()
    assert read(made, 55, 57) == list(enumerate(ROWS))[55:57]
    assert opened == 2


def test_max_examples_counts(jsonl: Path) -> None:
    made = source(jsonl, max_examples=30)
    assert made.count() == 30
    assert len(read(made, 20)) == 10
    assert source(jsonl, max_examples=3_000).count() == 100


@pytest.mark.parametrize("streaming", [False, True])
def test_images_are_not_decoded(tmp_path: Path, streaming: bool) -> None:
    from datasets import Dataset, Features, Image, Value

    features = Features({"image": Image(), "x": Value("int32")})
    data = {"image": [{"bytes": b"no image at all", "path": "a.png"}], "x": [1]}
    path = tmp_path / "a.parquet"
    Dataset.from_dict(data, features=features).to_parquet(path)
    ((_, row),) = read(source(path, streaming=streaming))
    assert row == {"image": {"bytes": "bm8gaW1hZ2UgYXQgYWxs", "path": "a.png"}, "x": 1}


def test_options_reach_the_builder(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"meta": 1, "items": [{"x": 1}]}))
    assert read(source(path, options={"field": "items"})) == [(0, {"x": 1})]
    with pytest.raises(FatalJobError, match="no_such_option"):
        read(source(path, options={"no_such_option": 1}))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_file_fails_the_job(tmp_path: Path, streaming: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n{"x": \n')
    with pytest.raises(FatalJobError, match="data cannot be"):
        read(source(path, streaming=streaming))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_without_a_row_fails_the_job(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("")
    with pytest.raises(FatalJobError, match=r"no rows|cannot be"):
        read(source(path))


@pytest.mark.parametrize("name", ["trust_remote_code", "cache_dir", "num_proc", "token", "split"])
def test_options_that_the_worker_owns_are_refused_by_name(jsonl: Path, name: str) -> None:
    with pytest.raises(NotSupported, match=rf"source\.options\.{name}"):
        source(jsonl, options={name: True})


@pytest.mark.parametrize(
    "value", ["/etc/passwd", "../x", "a/../../x", "https://h/x", "zip://a::b", ["ok", "~/x"],
              {"train": ["/etc/passwd"]}],
)  # fmt: skip
@pytest.mark.parametrize("name", ["data_files", "data_dir"])
def test_options_open_nothing_outside_the_repository(name: str, value: Any) -> None:
    config = SourceConfig(dataset="org/data", options={name: value})
    with pytest.raises(NotSupported, match=f"{name}.*leaves the data set"):
        build_source(config, {}, None, None)


def test_a_worker_opens_no_path_that_a_job_names(
    tmp_path: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "data").mkdir(parents=True)
    for name in (str(jsonl), "data.jsonl", "./data.jsonl", "org/data", "~/x", "a/../b", "json"):
        with pytest.raises(FatalJobError, match="client uploads it"):
            build_source(SourceConfig(dataset=name), {}, None, None)


def test_folders_of_the_operators_may_be_named(tmp_path: Path, jsonl: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    file = write(root / "data.jsonl", ROWS[:2])
    for path in (file, root):
        config = SourceConfig(dataset=str(path))
        assert read(build_source(config, {}, None, None, data_roots=[root])) == [
            (0, ROWS[0]), (1, ROWS[1])
        ]  # fmt: skip
    for option in ({"revision": "main"}, {"config_name": "x"}):
        config = SourceConfig(dataset=str(file), **option)  # type: ignore[arg-type]
        with pytest.raises(NotSupported, match=rf"source\.{next(iter(option))}"):
            build_source(config, {}, None, None, data_roots=[root])
    (root / "link.jsonl").symlink_to(jsonl)
    for name in (str(root / "link.jsonl"), str(root / ".." / "data.jsonl")):
        with pytest.raises(FatalJobError, match="client uploads it"):
            build_source(SourceConfig(dataset=name), {}, None, None, data_roots=[root])


def test_an_id_of_the_hub_is_one_even_where_one_stands_in_a_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # Not loaded yet: that it is not taken for a missing folder is the point.
    build_source(SourceConfig(dataset="org/data"), {}, None, None, data_roots=[tmp_path])
    with pytest.raises(FatalJobError, match="there is no"):
        build_source(SourceConfig(dataset="./org/data"), {}, None, None, data_roots=[tmp_path])


def test_what_cannot_be_read_is_refused_by_name(tmp_path: Path, jsonl: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(NotSupported, match=r"a\.png: \.png suffix"):
        source(tmp_path / "a.png")
    with pytest.raises(NotSupported, match="mixes formats"):
        source([jsonl, write(tmp_path / "a.csv", ROWS)])
    config = SourceConfig(dataset="data", inputs=(InputFile("x.json", "0" * 64),))
    with pytest.raises(FatalJobError, match=r"x\.json was not uploaded"):
        build_source(config, {}, None, None)


READS = """
import json, sys
from pathlib import Path
from spider_sdk.config.model import InputFile, SourceConfig
from spider_worker.sources.build import build_source
path = Path(sys.argv[1])
config = SourceConfig(dataset="d", inputs=(InputFile(path.name, ""),), shuffle=5,
                      streaming=sys.argv[2] == "True")
made = build_source(config, {path.name: path}, None, None)
print(json.dumps([row["x"] for batch in made.batches(0, None) for _, row in batch]))
"""


@pytest.mark.parametrize("streaming", [False, True])
def test_another_process_sees_the_same_order(jsonl: Path, tmp_path: Path, streaming: bool) -> None:
    env = {"HF_HOME": str(tmp_path / "other")}
    command = [sys.executable, "-c", READS, str(jsonl), str(streaming)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    here = [row["x"] for _, row in read(source(jsonl, shuffle=5, streaming=streaming))]
    assert json.loads(run.stdout) == here
    assert run.stderr == ""  # no progress bars
