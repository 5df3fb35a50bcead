"""A ``docker`` command without an engine: containers are folders, commands run under bubblewrap.

``install`` puts it on the PATH. Its state is a folder: ``calls.jsonl`` has every command line, each
image is a folder of ``images`` with the tree that ``/testbed`` is to be (or of ``pullable``, where
it has to be pulled first), each container one of ``containers``. ``fail`` names a subcommand that
fails, with what it says; ``extra`` is how many processes ``top`` shows beyond a container's own.
"""

from __future__ import annotations

__all__ = ["FakeDocker", "install"]

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

_SCRIPT = r"""
import json, os, shutil, subprocess, sys
from pathlib import Path

state = Path(os.environ["HOME"])
arguments = sys.argv[1:]
with open(state / "calls.jsonl", "a") as file:
    file.write(json.dumps({"arguments": arguments, "env": dict(os.environ)}) + "\n")

def end(status=0, out="", err=""):
    sys.stdout.write(out)
    sys.stderr.write(err)
    sys.stdout.flush()
    sys.exit(status)

faults = json.loads((state / "fail").read_text()) if (state / "fail").exists() else {}
what = " ".join(arguments[:2]) if arguments[0] in ("image", "network") else arguments[0]
if what in faults:
    end(1, err=faults[what] + "\n")

def container(name):
    path = state / "containers" / name
    if not path.exists():
        end(1, err=f"Error response from daemon: No such container: {name}\n")
    return path

if what == "version":
    end(out="28.0.0\n")
if what == "image inspect":
    if not (state / "images" / arguments[-1].replace("/", "_")).exists():
        end(1, err="Error: No such image\n")
    end(out='["PATH=/usr/bin:/bin","A=b"]\n')
if what == "pull":
    name = arguments[-1].replace("/", "_")
    source = state / "pullable" / name
    if not source.exists():
        end(1, err="Error response from daemon: pull access denied\n")
    source.rename(state / "images" / name)
    end()
if what == "create":
    name = arguments[arguments.index("--name") + 1]
    image = state / "images" / arguments[-2].replace("/", "_")
    path = state / "containers" / name
    path.mkdir()
    shutil.copytree(image, path / "tree", symlinks=True)
    mounts = [dict(part.split("=", 1) for part in value.split(",") if "=" in part)
              for key, value in zip(arguments, arguments[1:]) if key == "--mount"]
    (path / "mounts").write_text(json.dumps(mounts))
    end(out="0123abcd\n")
if what in ("start", "kill"):
    path = container(arguments[-1])
    if what == "start":
        (path / "running").touch()
    else:
        (path / "running").unlink()
        (state / "extra").unlink(missing_ok=True)
    end()
if what == "top":
    extra = int((state / "extra").read_text()) if (state / "extra").exists() else 0
    end(out="PID\n" + "1\n" * (2 + extra))
if what == "exec":
    variables, rest = [], arguments[1:]
    while rest[0].startswith("-"):
        if rest[0] == "-e":
            variables.append(rest[1].split("=", 1))
        rest = rest[1:] if rest[0] == "-i" else rest[2:]
    path = container(rest[0])
    if not (path / "running").exists():
        end(1, err=f"Error response from daemon: container {rest[0]} is not running\n")
    box = ["bwrap", "--unshare-pid", "--die-with-parent", "--ro-bind", "/usr", "/usr",
           "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
           "--bind", str(path / "tree"), "/testbed", "--chdir", "/testbed"]
    for name in ("bin", "lib", "lib64", "sbin"):
        box += ["--symlink", f"usr/{name}", f"/{name}"]
    for mount in json.loads((path / "mounts").read_text()):
        box += ["--ro-bind", mount["source"], mount["target"]]
    env = dict(variables)
    if rest[1].startswith("/") and not os.path.exists(rest[1]):
        end(127, err="OCI runtime exec failed: exec failed: no such file or directory\n")
    os.execvpe("bwrap", [*box, *rest[1:]], env | {"PATH": env["PATH"] + ":/usr/bin"})
if what == "rm":
    for name in arguments[3:]:
        shutil.rmtree(container(name))
    end()
if what == "ps":
    end(out="".join(f"{path.name}\n" for path in (state / "containers").iterdir()))
if what in ("network connect", "network disconnect"):
    container(arguments[-1])
    end()
end(1, err=f"docker: {what!r} is not a docker command\n")
"""


class FakeDocker:
    """The folder of its state."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def calls(self, what: str | None = None) -> list[list[str]]:
        """Command lines so far, all or those of one subcommand."""
        made = [call["arguments"] for call in self._calls()]
        return [call for call in made if what is None or call[0] == what]

    def environments(self) -> list[dict[str, str]]:
        return [call["env"] for call in self._calls()]

    def image(self, name: str, *, pulled: bool = True) -> Path:
        """The folder that an image's tree is to be made in; it must not be there yet."""
        return self.state / ("images" if pulled else "pullable") / name.replace("/", "_")

    def containers(self) -> list[Path]:
        return list((self.state / "containers").iterdir())

    def fail(self, what: str, said: str) -> None:
        (self.state / "fail").write_text(json.dumps({what: said}))

    def leave_processes(self, number: int) -> None:
        (self.state / "extra").write_text(str(number))

    def _calls(self) -> list[dict[str, Any]]:
        lines = (self.state / "calls.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    """Make it the ``docker`` of this test. Its HOME, which it is passed, is its state."""
    state = folder / "docker"
    for name in ("bin", "images", "pullable", "containers"):
        (state / name).mkdir(parents=True)
    (state / "calls.jsonl").touch()
    program = state / "bin" / "docker"
    program.write_text(f"#!{sys.executable} -IS\n{_SCRIPT}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{state / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(state))
    return FakeDocker(state)
