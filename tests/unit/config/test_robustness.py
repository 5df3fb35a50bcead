"""No document crashes the loader: whatever comes, it loads or is a ConfigError."""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spider_sdk.config import AppConfig, lift_secrets, parse_job, parse_override, strip_secrets
from spider_sdk.config.positions import read_yaml
from spider_sdk.errors import ConfigError, Problem
from tests.unit.config.documents import complete_job

SEED = Path(__file__).parent / "seed"
SEEDS = [path.read_text(encoding="utf-8") for path in sorted(SEED.glob("*.yaml"))]
BUDGET = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["${HOME}", "$${x}", "${", "upload_hf", "train[:1%]", "owner/name", b"x"])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = document.items() if isinstance(document, dict) else enumerate(document)
    found = [path]
    for key, value in items:
        here = (*path, key)
        found += places(value, here) if isinstance(value, dict | list) else [here]
    return found


PLACES = [
    place for place in places({"server": {"headers": {"a": "b"}}, "job": complete_job()}) if place
]


@BUDGET
@given(value=values)
def test_any_value_as_a_document(value: Any) -> None:
    with contextlib.suppress(ConfigError):
        parse_job(value)
    with contextlib.suppress(ConfigError):
        AppConfig.from_dict(value)
    with contextlib.suppress(ConfigError):
        strip_secrets(value)


@BUDGET
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), values), min_size=1, max_size=3))
def test_any_value_in_any_place(changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    document: Any = {"server": {"headers": {"a": "b"}}, "job": complete_job()}
    for place, value in changes:
        section: Any = document
        with contextlib.suppress(TypeError, KeyError, IndexError):  # an earlier change took it
            for step in place[:-1]:
                section = section[step]
            section[place[-1]] = copy.deepcopy(value)
    with contextlib.suppress(ConfigError):
        AppConfig.from_dict(document, environ={"HOME": "/"})
    with contextlib.suppress(ConfigError):
        lift_secrets(document["job"], {"MY_KEY": "k", "HF_TOKEN": "t"})


@BUDGET
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.text(alphabet="ab: -\n[]{},&*!|>'\"#%@`?<~$1.e\t", max_size=40),
    )
)
def test_any_text(tmp_path: Path, text: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(ConfigError):
        AppConfig.load(path, environ={})
    with contextlib.suppress(ConfigError):
        parse_override(text)


@BUDGET
@given(
    seed=st.sampled_from(SEEDS),
    at=st.integers(0, 2000),
    cut=st.integers(0, 5),
    put=st.text(max_size=4),
)
def test_a_file_with_a_slip(tmp_path: Path, seed: str, at: int, cut: int, put: str) -> None:
    at %= len(seed)
    text = seed[:at] + put + seed[at + cut :]
    path = tmp_path / "job.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    config: AppConfig | None = None
    problems: tuple[Problem, ...] = ()
    try:
        config = AppConfig.load(path, environ={})
    except ConfigError as error:
        problems = error.problems
    assert (config is None) != (not problems)
    assert {problem.file for problem in problems} <= {str(path)}


@BUDGET
@given(overrides=st.dictionaries(st.text(max_size=8) | st.sampled_from(
    ["job", "job.source", "job.source.inputs.0.name", "job.tools.0", "server", "job.model.name.x"]
), values, max_size=3))  # fmt: skip
def test_any_overrides(overrides: dict[str, Any]) -> None:
    base = AppConfig.from_dict({"job": complete_job()})
    with contextlib.suppress(ConfigError):
        AppConfig.from_dict({"job": complete_job()}, overrides, environ={})
    with contextlib.suppress(ConfigError):
        base.with_overrides(overrides, environ={})


def test_depth_is_bounded() -> None:
    deep: Any = {}
    for _ in range(3000):
        deep = {"x": deep}
    loop: dict[str, Any] = {}
    loop["x"] = loop
    for metadata in (deep, loop):
        document = complete_job()
        document["metadata"] = metadata
        with pytest.raises(ConfigError, match="levels deep"):
            parse_job(document)


def test_the_reader_agrees_with_pyyaml_where_both_versions_of_yaml_do() -> None:
    for seed in SEEDS[:1] + SEEDS[2:]:  # the other has 5e-5, which PyYAML takes for text
        assert read_yaml(seed).data == yaml.safe_load(seed)
