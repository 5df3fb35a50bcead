from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from spider_api.embedded.state import StateFolder
from spider_sdk.errors import UsageError
from spider_sdk.settings import ClientSettings, load

HOLDER = """
import signal, sys
from pathlib import Path
from spider_api.embedded.state import StateFolder
with StateFolder(Path(sys.argv[1])):
    print("held", flush=True)
    signal.pause()
"""


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_secret_is_readable_by_its_owner_alone(state: StateFolder) -> None:
    state.write_api_key("sk_1_secret")
    state.write_client_config("http://127.0.0.1:9000", "sk_1_secret")
    state.write_env({"SPIDER_REDIS_URL": "redis://:pw@127.0.0.1:1/0"})

    assert {mode(state.path / name) for name in ("api.key", "client.toml", "env")} == {0o600}
    assert mode(state.path) == 0o700
    assert state.read_api_key() == "sk_1_secret"


def test_a_rewritten_file_loses_the_mode_that_somebody_gave_it(state: StateFolder) -> None:
    state.write_api_key("one")
    (state.path / "api.key").chmod(0o644)
    state.write_api_key("two")
    assert mode(state.path / "api.key") == 0o600
    assert state.read_api_key() == "two"


def test_the_client_reads_the_config_that_was_written(state: StateFolder) -> None:
    state.write_client_config("http://127.0.0.1:4711", "sk_1_secret")
    settings = load(ClientSettings, {"SPIDER_CONFIG": str(state.client_config)})
    assert settings == ClientSettings(base_url="http://127.0.0.1:4711", api_key="sk_1_secret")


def test_a_shell_reads_the_env_file_as_it_was_meant(state: StateFolder) -> None:
    state.write_env({"SPIDER_REDIS_URL": "redis://:p'w $HOME@h/0"})
    done = subprocess.run(
        ["/bin/sh", "-c", f'. "{state.env_file}" && printf %s "$SPIDER_REDIS_URL"'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "redis://:p'w $HOME@h/0"


def test_a_second_fleet_on_one_folder_is_refused_with_the_holder(state: StateFolder) -> None:
    with pytest.raises(UsageError, match=rf"another embedded fleet \(process {os.getpid()}\)"):
        StateFolder(state.path).__enter__()


def test_the_lock_of_a_killed_process_is_no_lock(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match=f"process {holder.pid}"):
            StateFolder(folder).__enter__()
        holder.send_signal(signal.SIGKILL)
    assert (folder / "lock").read_text().strip() == str(holder.pid)
    with StateFolder(folder):
        pass


def test_clearing_forgets_all_but_the_lock(state: StateFolder) -> None:
    state.write_api_key("key")
    (state.redis / "appendonly.aof").write_text("data")
    state.clear()
    assert [entry.name for entry in state.path.iterdir()] == ["lock"]


def test_a_file_in_the_folders_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("no folder")
    with pytest.raises(UsageError, match="cannot hold a fleet's state: File exists"):
        StateFolder(tmp_path / "state").__enter__()
