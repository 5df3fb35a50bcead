"""What ``fake_docker`` puts on the PATH as ``docker``; of the standard library alone.

As ``engine`` it is what starts containers, until its standard input ends, and they with it. As
``init`` it is the process of a container that starts what is executed in it. A request comes
over its socket with the three streams; its answer is the status.
"""

from __future__ import annotations

import array
import contextlib
import itertools
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

STATE = Path(os.environ.get("HOME", "/"))
#: What a container's root may do by default.
CAPS = ("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID",
        "SETFCAP", "SETPCAP", "NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE")  # fmt: skip
SEEN = ("/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/terminfo", "/etc/alternatives")


def end(status: int = 0, out: str = "", err: str = "") -> NoReturn:
    sys.stdout.write(out)
    sys.stderr.write(err)
    sys.stdout.flush()
    sys.exit(status)


def refuse(said: str) -> NoReturn:
    end(1, err=f"Error response from daemon: {said}\n")


class Container:
    def __init__(self, name: str) -> None:
        self.name = name
        self.path = STATE / "containers" / name
        if not self.path.exists():
            refuse(f"No such container: {name}")
        self.options: dict[str, Any] = json.loads((self.path / "options").read_text())

    def request(self, document: dict[str, Any], streams: tuple[int, ...] = ()) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        os.chdir(self.path)  # a socket's path has 107 bytes at most
        try:
            connection.connect("socket")
        except OSError:
            refuse(f"container {self.name} is not running")
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
        connection.sendmsg([json.dumps(document).encode()], [rights] if streams else [])
        return connection

    def start(self) -> None:
        if self.process() is not None:
            return
        os.chdir(self.path)
        Path("socket").unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind("socket")
        listener.listen(64)
        told, telling = os.pipe()
        engine = os.dup(0)
        kept = (listener.fileno(), engine, telling)
        with open("said", "ab") as said:
            subprocess.Popen(
                [*self.command(telling), str(listener.fileno()), str(engine)],
                pass_fds=kept, start_new_session=True, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=said, env={},
            )  # fmt: skip
        for descriptor in (engine, telling):
            os.close(descriptor)
        listener.close()
        answer = b""
        while not answer.endswith(b"}\n"):
            if not (data := os.read(told, 1 << 12)):
                refuse(f"bubblewrap: {(self.path / 'said').read_text()}")
            answer += data
        os.close(told)
        (self.path / "pid").write_text(str(json.loads(answer)["child-pid"]))

    def command(self, telling: int) -> list[str]:
        path, options = self.path, self.options
        box = [str(shutil.which("bwrap")), "--unshare-pid", "--info-fd", str(telling),
               "--ro-bind", "/usr", "/usr", "--proc", "/proc", "--dev", "/dev"]  # fmt: skip
        box += ["--cap-drop", "ALL"]
        for cap in CAPS:
            box += ["--cap-add", f"CAP_{cap}"]
        if options["network"] == "none":
            box.append("--unshare-net")
        for name in ("bin", "lib", "lib64", "sbin"):
            box += ["--symlink", f"usr/{name}", f"/{name}"]
        for place in SEEN:
            box += ["--ro-bind-try", place, place]
        if os.path.exists("/usr/bin/tmux"):
            box += ["--ro-bind", str(STATE / "no-tmux"), "/usr/bin/tmux"]
        for name in ("tmp", "root", "opt", "testbed"):
            (path / name).mkdir(exist_ok=True)
            box += ["--bind", str(path / name), f"/{name}"]
        # The interpreters of the first process, and of an image's environment.
        for prefix in {sys.base_prefix, str(Path(sys.executable).parent.parent)} - {"/usr"}:
            box += ["--ro-bind", prefix, prefix]
        for mount in options["mounts"]:
            box += ["--ro-bind", mount["source"], mount["target"]]
        box += ["--ro-bind", str(STATE / "bin" / "docker"), "/.init"]
        return [*box, os.path.realpath(sys.executable), "-IS", "/.init", "init"]

    def process(self) -> int | None:
        """The handle of the first process; None where it has ended."""
        try:
            handle = os.pidfd_open(int((self.path / "pid").read_text()))
        except (FileNotFoundError, ProcessLookupError):
            return None
        if select.select([handle], [], [], 0)[0]:
            return None
        return handle

    def kill(self) -> bool:
        """Kill all of it; False where it has ended already. Its first process is the last to
        go."""
        handle = self.process()
        if handle is None:
            return False
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [])
        return True


def engine() -> None:
    """Start containers, until standard input ends. Whoever starts them is not their parent."""
    os.chdir(STATE)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("socket")
    listener.listen(64)
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([0, listener], [], [])
        if 0 in ready:
            return
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        connection, _ = listener.accept()
        with connection, contextlib.suppress(SystemExit):
            Container(connection.recv(1 << 12).decode()).start()
            connection.send(b"started")


def start(name: str) -> None:
    Container(name)
    os.chdir(STATE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect("socket")
        connection.send(name.encode())
        if not connection.recv(1 << 12):
            refuse(f"container {name} cannot be started")


def execute(arguments: list[str]) -> NoReturn:
    variables: dict[str, str] = {}
    given, folder = os.open(os.devnull, os.O_RDONLY), "/"
    while arguments[0].startswith("-"):
        option = arguments.pop(0)
        if option == "-i":
            given, feed = os.pipe()
            threading.Thread(target=pump, args=(0, feed), daemon=True).start()
            continue
        value = arguments.pop(0)
        if option == "-e":
            name, _, text = value.partition("=")
            variables[name] = text
        else:
            assert option == "-w", option
            folder = value
    name, *command = arguments
    env = {"HOME": "/root", "HOSTNAME": name[:12], **variables}
    outputs = {}
    theirs = []
    for number in (1, 2):
        ours, other = os.pipe()
        outputs[ours] = number
        theirs.append(other)
    request = {"command": command, "env": env, "cwd": folder}
    connection = Container(name).request(request, (given, *theirs))
    for descriptor in (given, *theirs):
        os.close(descriptor)
    answer: bytes | None = None
    while True:
        # Once it has ended, what others hold open is not waited for.
        waiting = [*outputs, *([connection.fileno()] if answer is None else [])]
        ready, _, _ = select.select(waiting, [], [], None if answer is None else 0)
        if not ready:
            break
        for descriptor in ready:
            if descriptor == connection.fileno():
                answer = connection.recv(1 << 16)
            elif data := os.read(descriptor, 1 << 16):
                write(outputs[descriptor], data)
            else:
                del outputs[descriptor]
    if not answer:
        end(137)
    said = json.loads(answer)
    if "error" in said:
        end(127, err=f"OCI runtime exec failed: exec failed: {said['error']}\n")
    end(said["status"])


def pump(source: int, sink: int) -> None:
    with contextlib.suppress(OSError):
        while data := os.read(source, 1 << 16):
            write(sink, data)
    os.close(sink)


def write(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def init(listener: socket.socket, engine: int) -> None:
    """Until the engine's end is closed."""
    running: dict[int, tuple[int, socket.socket]] = {}
    while True:
        ready, _, _ = select.select([listener, engine, *running], [], [])
        for one in ready:
            if one is listener:
                connection, _ = listener.accept()
                data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(12))
                request = json.loads(data) if data else {}
                if "command" in request:
                    streams = array.array("i")
                    for _, _, content in ancillary:
                        streams.frombytes(content)
                    pid = spawn(request, list(streams), connection)
                    running[os.pidfd_open(pid)] = pid, connection
                elif request:
                    connection.send(json.dumps({"processes": processes()}).encode())
            elif one == engine:
                return
            else:
                pid, connection = running.pop(one)
                os.close(one)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with contextlib.suppress(OSError):
                    status = code if code >= 0 else 128 - code
                    connection.send(json.dumps({"status": status}).encode())
                connection.close()


def spawn(request: dict[str, Any], streams: list[int], connection: socket.socket) -> int:
    if pid := os.fork():
        for descriptor in streams:
            os.close(descriptor)
        return pid
    try:
        os.setsid()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, 1 << 10)
        os.chdir(request["cwd"])
        command = request["command"]
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.set_inheritable(connection.fileno(), False)
        os.execvpe(command[0], command, request["env"])
    except OSError as error:
        connection.send(json.dumps({"error": f"{command[0]}: {error.strerror}".lower()}).encode())
    finally:
        os._exit(127)


def processes() -> int:
    found = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                found += b"\nState:\tZ" not in Path(f"/proc/{name}/status").read_bytes()
    return found


def folder_of(image: str) -> str:
    return image.replace("/", "_").replace(":", "_")


def create(arguments: list[str]) -> None:
    pairs = list(itertools.pairwise(arguments))
    named = dict(pairs)
    image = STATE / "images" / folder_of(arguments[-2])
    path = STATE / "containers" / named["--name"]
    if not image.exists():
        refuse(f"No such image: {arguments[-2]}")
    shutil.copytree(image, path, symlinks=True)
    mounts = [
        dict(part.split("=", 1) for part in value.split(",") if "=" in part)
        for key, value in pairs
        if key == "--mount"
    ]
    labels = [value for key, value in pairs if key == "--label"]
    options = {"mounts": mounts, "labels": labels, "network": named["--network"]}
    (path / "options").write_text(json.dumps(options))


def listed(arguments: list[str]) -> str:
    wanted = arguments[arguments.index("--filter") + 1].removeprefix("label=")
    names = []
    for file in sorted((STATE / "containers").glob("*/options")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            if wanted in json.loads(file.read_text())["labels"]:
                names.append(f"{file.parent.name}\n")
    return "".join(names)


def client(arguments: list[str]) -> None:
    with (STATE / "calls.jsonl").open("a") as file:
        file.write(json.dumps({"arguments": arguments, "env": dict(os.environ)}) + "\n")
    what = " ".join(arguments[:2]) if arguments[0] in ("image", "network") else arguments[0]
    faults = json.loads((STATE / "fail").read_text()) if (STATE / "fail").exists() else {}
    if what in faults:
        end(1, err=faults[what] + "\n")
    match what:
        case "version":
            end(out="28.0.0\n")
        case "image inspect":
            if not (STATE / "images" / folder_of(arguments[-1])).exists():
                end(1, err="Error: No such image\n")
            end(out='["PATH=/usr/bin:/bin","A=b"]\n')
        case "pull":
            name = folder_of(arguments[-1])
            if not (STATE / "pullable" / name).exists():
                refuse("pull access denied")
            (STATE / "pullable" / name).rename(STATE / "images" / name)
        case "create":
            create(arguments[1:])
            end(out="0123abcd\n")
        case "start":
            start(arguments[-1])
        case "kill":
            if not Container(arguments[-1]).kill():
                refuse(f"cannot kill container: {arguments[-1]}: it is not running")
        case "top":
            connection = Container(arguments[1]).request({"top": True})
            end(out="PID\n" + "1\n" * json.loads(connection.recv(1 << 16))["processes"])
        case "exec":
            execute(arguments[1:])
        case "rm":
            for name in arguments[3:]:
                container = Container(name)
                container.kill()
                shutil.rmtree(container.path)
        case "ps":
            end(out=listed(arguments))
        case "network connect" | "network disconnect":
            Container(arguments[-1])
        case _:
            end(1, err=f"docker: {what!r} is not a docker command\n")


if __name__ == "__main__":
    if sys.argv[1] == "engine":
        engine()
    elif sys.argv[1] == "init":
        init(socket.socket(fileno=int(sys.argv[2])), int(sys.argv[3]))
    else:
        client(sys.argv[1:])
