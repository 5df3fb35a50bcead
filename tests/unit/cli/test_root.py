"""The root of ``spider``: quick help, lazy plugins, exit codes, completion."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from spider_sdk import errors
from spider_sdk.cli import main as root
from spider_sdk.cli.main import COMMANDS, PLUGINS, run
from spider_sdk.cli.state import Detached, exit_code

HEAVY = {"torch", "celery", "datasets", "flask", "redis", "transformers", "huggingface_hub", "vllm"}
LATER = {"httpx2", "marshmallow", "yaml", "rich.live"}
"""Light enough to install, but nothing that the help has to wait for."""

Capture = pytest.CaptureFixture[str]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


def imported_by(args: list[str]) -> set[str]:
    code = (
        "import sys\n"
        "from spider_sdk.cli.main import run\n"
        f"assert run({args!r}) == 0\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines())


def test_help_imports_nothing_heavy_and_no_command() -> None:
    modules = imported_by(["--help"])
    assert not modules & (HEAVY | LATER)
    assert not {name for name in modules if name.startswith(("spider_api", "spider_worker"))}


@pytest.mark.parametrize("name", ["submit", "validate", "watch", "download"])
def test_client_commands_need_nothing_of_the_server(name: str) -> None:
    modules = imported_by([name, "--help"])
    assert not modules & HEAVY
    assert not {name for name in modules if name.startswith(("spider_api", "spider_worker"))}


def test_help_lists_every_command(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    for name in [*COMMANDS, *PLUGINS]:
        assert f"\n  {name} " in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_table_says(name: str, capsys: Capture) -> None:
    assert run([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith("Usage: spider " + name)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "config"])
def test_every_command_speaks_json(name: str) -> None:
    command = root.cli.get_command(click.Context(root.cli), name)
    assert command is not None
    assert "--json" in [flag for param in command.params for flag in param.opts]


def entry(name: str, value: str) -> importlib.metadata.EntryPoint:
    return importlib.metadata.EntryPoint(name, value, root.GROUP)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def use(**values: str) -> None:
        found = {name: entry(name, value) for name, value in values.items()}
        monkeypatch.setattr(root, "_plugins", lambda: found)

    return use


def test_a_plugin_runs(
    plugins: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    code = "import click\n@click.command()\ndef hello():\n    click.echo('hello')\n"
    (tmp_path / "some_plugin.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    plugins(hello="some_plugin:hello")
    assert run(["--help"]) == 0
    assert "(from some_plugin)" in capsys.readouterr().out
    assert "some_plugin" not in sys.modules
    assert run(["hello"]) == 0
    assert capsys.readouterr().out == "hello\n"


@pytest.mark.parametrize(
    "code",
    [
        "import package_that_is_not_there\n",
        "import click\n@click.command()\ndef demo():\n    import package_that_is_not_there\n",
    ],
    ids=["at import", "when it runs"],
)
def test_a_plugin_whose_packages_are_missing_says_what_to_install(
    plugins: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    code: str,
) -> None:
    name = f"needy_plugin_{len(code)}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    plugins(demo=f"{name}:demo")
    assert run(["demo"]) == 2
    told = capsys.readouterr().err
    assert "package_that_is_not_there" in told
    assert "pip install 'spider-distill[server]'" in told


def test_a_plugin_that_is_broken_itself_is_not_blamed_on_packages(
    plugins: Callable[..., None],
) -> None:
    plugins(demo="no_such_plugin:demo")
    with pytest.raises(ModuleNotFoundError):
        run(["demo"])


def test_a_plugin_that_is_no_command(plugins: Callable[..., None], capsys: Capture) -> None:
    plugins(demo="json:dumps")
    assert run(["demo"]) == 2
    assert "no click command" in capsys.readouterr().err


def test_a_command_that_there_is_not(capsys: Capture) -> None:
    assert run(["sumbit"]) == 2
    assert "sumbit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.JobFailed(), 1),
        (errors.ConfigError([errors.Problem("job", "x")]), 2),
        (errors.UsageError(), 2),
        (errors.Unauthorized(status=401), 2),
        (errors.NotFound(status=404), 2),
        (errors.Conflict(status=409), 2),
        (errors.ApiError(status=400), 2),
        (errors.NotSupported(), 2),
        (errors.ServerUnreachable(), 3),
        (errors.ServerBusy(status=503), 3),
        (errors.FleetUnavailable(), 3),
        (errors.ApiError(status=500), 3),
        (errors.ApiError("no Spider API"), 3),
        (errors.JobCancelled(), 4),
        (Detached(), 130),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_exit_codes(error: errors.SpiderError, code: int) -> None:
    assert exit_code(error) == code


def test_ctrl_c_is_130(plugins: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def stuck() -> None:
        raise KeyboardInterrupt

    plugins(stuck="json:dumps")
    monkeypatch.setattr(root, "_load", lambda plugin: stuck)
    assert run(["stuck"]) == 130


def test_usage_errors_are_json_where_json_was_asked_for(capsys: Capture) -> None:
    assert run(["status", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 2
    assert "JOB_ID" in document["error"]["message"]


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    code = (
        "import sys; from spider_sdk.cli.main import main; sys.argv = ['spider', '--help']; main()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
        assert process.wait() == 141


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: Capture) -> None:
    assert run(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert "_SPIDER_COMPLETE" in out
    assert "spider" in out


def test_completion_offers_commands_and_options_without_importing_plugins() -> None:
    code = (
        "import sys; from spider_sdk.cli.main import main\n"
        "sys.argv = ['spider']\n"
        "try:\n    main()\n"
        "finally:\n    assert not {'celery', 'torch', 'flask', 'httpx2'} & set(sys.modules)"
    )
    asked = {"_SPIDER_COMPLETE": "bash_complete", "COMP_WORDS": "spider ", "COMP_CWORD": "1"}
    done = python(code, **asked)
    offered = [line.partition(",")[2] for line in done.stdout.splitlines()]
    assert {"submit", "up", "preview"} <= set(offered), done.stderr
    assert done.stderr == ""


def test_a_command_that_is_none_suggests_the_one_meant(capsys: Capture) -> None:
    assert run(["statsu"]) == 2
    assert "Did you mean status?" in capsys.readouterr().err
    assert run(["zzz"]) == 2
    assert "Did you mean" not in capsys.readouterr().err
