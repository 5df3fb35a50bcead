"""A ``docker`` command without an engine: containers are folders, commands run under bubblewrap.

``running_engine`` puts it on the PATH. A started container is a process namespace of its own with
the first processes that Docker's have, in which ``exec`` has commands started: killing the client
leaves them alive, ``kill`` and ``rm`` end all. The state is a folder: ``calls.jsonl`` has every
command line, each image is a folder of ``images`` (or of ``pullable``, where it has to be pulled
first) with the ``testbed`` and where needed the ``opt`` that its containers are to have. ``fail``
names subcommands that fail, with what they say.

Unlike an engine: of the system's files containers see this host's, but for tmux, which the images
of software tasks lack; and a network is there from a container's start, or never.
"""

from __future__ import annotations

__all__ = ["FakeDocker", "running_engine"]

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from spider_worker.workspaces.docker import LABEL
from tests.support.fake_docker_client import folder_of

_CLIENT = Path(__file__).with_name("fake_docker_client.py")
_CONDA = "opt/miniconda3"


class FakeDocker:
    """The folder of its state."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def calls(self, what: str | None = None) -> list[list[str]]:
        """Command lines so far, all or those of one subcommand."""
        made = [call["arguments"] for call in self._calls()]
        return [call for call in made if what is None or call[0] == what]

    def environments(self) -> list[dict[str, str]]:
        """Those of the clients so far."""
        return [call["env"] for call in self._calls()]

    def image(self, name: str, *, pulled: bool = True) -> Path:
        """The folder of an image's tree, which is to be made; it must not be there yet."""
        folder = self.state / ("images" if pulled else "pullable") / folder_of(name)
        folder.mkdir()
        return folder / "testbed"

    def give_testbed(self, image: Path) -> None:
        """Give the image of a tree the conda environment of the public sets: a Python that is none
        of the host's, with what the tests' own has installed, and the tree. Activating it leaves a
        word in ``CONDA_DEFAULT_ENV``."""
        root = image.parent / _CONDA
        environment = root / "envs" / "testbed"
        subprocess.run(
            [sys.executable, "-m", "venv", "--without-pip", "--symlinks", environment], check=True
        )
        inside = f"/{environment.relative_to(image.parent)}"
        packages = next(environment.glob("lib/python*/site-packages"))
        installed = next(Path(sys.prefix).glob("lib/python*/site-packages"))
        (packages / "installed.pth").write_text(f"{installed}\n/testbed\n")
        program = environment / "bin" / "pytest"
        program.write_text(f"#!{inside}/bin/python\nimport pytest\nraise SystemExit(pytest.main())")
        program.chmod(0o755)
        (root / "bin").mkdir()
        (root / "bin" / "activate").write_text(
            f'export PATH="{inside}/bin:$PATH" CONDA_DEFAULT_ENV="$1"\n'
        )

    def containers(self) -> list[Path]:
        return list((self.state / "containers").iterdir())

    def leave(self, image: str, owner: str, owners: Path | None = None) -> str:
        """Make a container as a process of that name would have, which has died since: its name.
        With ``owners``, it had its own in that folder."""
        name = f"spider-{owner}"
        command = ["docker", "create", "--name", name, "--label", f"{LABEL}={owner}"]
        subprocess.run([*command, "--network", "none", image, "infinity"], check=True)
        if owners is not None:
            owners.mkdir(parents=True, exist_ok=True)
            (owners / owner).touch()
        return name

    def die(self, name: str, *, for_good: bool = False) -> None:
        """A container ends by itself, as one that has run out of memory does; ``for_good`` is one
        that somebody has removed."""
        command = [self.state / "bin" / "docker", *(("rm", "-f", "-v") if for_good else ("kill",))]
        subprocess.run([*command, name], check=True, env={"HOME": str(self.state)})

    def fail(self, what: str, said: str) -> None:
        (self.state / "fail").write_text(json.dumps({what: said}))

    def _calls(self) -> list[dict[str, Any]]:
        lines = (self.state / "calls.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


@contextlib.contextmanager
def running_engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDocker]:
    """Make it the ``docker`` of this test. Its HOME, which it is passed, is its state. Containers
    end with it, also when the test's process is killed."""
    if shutil.which("bwrap") is None:
        pytest.skip("no bubblewrap (make system installs it)")
    state = folder / "docker"
    for name in ("bin", "images", "pullable", "containers"):
        (state / name).mkdir(parents=True)
    (state / "calls.jsonl").touch()
    program = state / "bin" / "docker"
    program.write_text(f"#!{sys.executable} -IS\n{_CLIENT.read_text()}")
    program.chmod(0o755)
    no_tmux = state / "no-tmux"
    no_tmux.write_text("#!/bin/sh\nexit 127\n")
    no_tmux.chmod(0o755)
    monkeypatch.setenv("PATH", f"{state / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(state))
    engine = subprocess.Popen(
        [program, "engine"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert engine.stdin is not None
    assert engine.stdout is not None
    with engine.stdin, engine.stdout:
        engine.stdout.readline()
        yield FakeDocker(state)
    engine.wait()
