"""``python -m spider_agent.zygote FD``: has imported everything, and forks a process an episode.

Importing takes seconds and hundreds of megabytes; a fork takes neither. There is one thread here,
now and ever: a fork of several would be born with locks that nobody holds.

Over the socket ``FD`` (SOCK_SEQPACKET) come ``{"op": "start", "id": n, "plan": …, "proxy": …}``
with three or four descriptors (where the request is read, where lines and what is printed go, and
``cgroup.procs`` of a group that is to hold the episode), and ``{"op": "kill", "id": n}``; out go
``ready``, ``started``, ``ended`` with a wait status, and ``failed`` where no process could be had.
The socket's end is the end of everything.

An episode is two or three processes: a *warden*, whose death or whose SIGTERM ends the rest; where
there is a plan, the first process of a namespace; and the agent.
"""

from __future__ import annotations

__all__ = ["LATER", "main", "warm_up"]

import array
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from spider_agent import confine
from spider_agent.forward import forward
from spider_agent.lines import LineWriter, read_request

LATER: Final = (
    "openai.resources", "openai.lib.streaming.chat", "httpcore", "h11", "jiter", "stringprep",
    "litellm.responses.mcp.chat_completions_handler", "litellm._service_logger",
    "litellm.litellm_core_utils.llm_request_utils",
    "litellm.llms.litellm_proxy.chat.transformation",
    "litellm.llms.openai.chat.gpt_audio_transformation", "litellm.llms.openai_like.dynamic_config",
    "litellm.llms.vertex_ai.vertex_ai_partner_models.anthropic.transformation",
)  # fmt: skip
#: Of the environment, what is read on import alone. An agent's shell has no use for it, and is
#: told each variable by a process of its own.
_IMPORTS_ONLY: Final = ("OPENHANDS_SUPPRESS_BANNER", "LITELLM_LOCAL_MODEL_COST_MAP", "LOG_LEVEL")
_PACKET: Final = 1 << 16


class Zygote:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._wardens: dict[int, int] = {}  # by pid: the episode's number
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)

    def serve(self) -> None:
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        self._say(op="ready", pid=os.getpid())
        while True:
            ready, _, _ = select.select([self._control, self._wake], [], [])
            if self._wake in ready:
                os.read(self._wake, 512)
            self._reap()
            if self._control in ready and not self._take():
                return

    def _take(self) -> bool:
        data, ancillary, _, _ = self._control.recvmsg(_PACKET, socket.CMSG_SPACE(64))
        if not data:
            return False
        descriptors = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                descriptors.frombytes(content[: len(content) - len(content) % 4])
        message = json.loads(data)
        try:
            if message["op"] == "start":
                self._start(message, list(descriptors))
            else:
                self._kill(message["id"])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        return True

    def _start(self, message: dict[str, Any], descriptors: list[int]) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            self._say(op="failed", id=message["id"], error=str(error))
            return
        if pid == 0:
            self._become_warden(message, descriptors)
        self._wardens[pid] = message["id"]
        self._say(op="started", id=message["id"], pid=pid)

    def _kill(self, number: int) -> None:
        for pid, other in self._wardens.items():
            if other == number:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)

    def _reap(self) -> None:
        while self._wardens:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._say(op="ended", id=self._wardens.pop(pid), status=status)

    def _say(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._control.send(json.dumps(message).encode())

    # -- in the forked processes ----------------------------------------------------

    def _become_warden(self, message: dict[str, Any], descriptors: list[int]) -> NoReturn:
        """Never returns, whatever happens: there is a loop of another process above."""
        status = 70
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            os.setsid()
            confine.be_warden()
            if len(descriptors) > 3:
                os.write(descriptors[3], b"0")  # this process, and what it forks from here on
            status = _warden(message, descriptors)
        except BaseException as error:  # noqa: BLE001 - said, and then the process ends
            os.write(descriptors[2], f"the episode could not begin: {error!r}\n".encode())
        finally:
            os._exit(status)


def _warden(message: dict[str, Any], descriptors: list[int]) -> int:
    """Start the agent, wait for it, and leave nothing of it behind."""
    plan = confine.Plan(**message["plan"]) if message["plan"] else None
    if plan is not None:
        confine.enter(plan)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    first = os.fork()
    if first == 0:
        _first(plan, message["proxy"], descriptors)
    status = 0
    while True:
        number = signal.sigwait({signal.SIGTERM, signal.SIGCHLD})
        if number == signal.SIGTERM:
            status = 128 + signal.SIGTERM
            break
        ended = dict(_ended())
        if first in ended:
            code = os.waitstatus_to_exitcode(ended[first])
            status = code if code >= 0 else 128 - code
            break
    confine.kill_all()
    return status


def _ended() -> Iterator[tuple[int, int]]:
    """Children that have ended, orphans that we inherited among them: one signal may stand for
    several."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, status


def _first(plan: confine.Plan | None, proxy: str | None, descriptors: list[int]) -> NoReturn:
    status = 70
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        confine.die_with_parent()
        if plan is not None:
            confine.furnish(plan)
        confine.close_memory()  # and that of the processes forked from here on
        if plan is not None:
            # As the first of its namespace it gets no signal that it has no handler for, and it
            # inherits all that lose their parents: neither is for an agent.
            if agent := os.fork():
                while True:
                    pid, ended = os.wait()
                    if pid == agent:
                        code = os.waitstatus_to_exitcode(ended)
                        os._exit(code if code >= 0 else 128 - code)
            os.chdir(plan.path)
        _agent(proxy, descriptors)
        status = 0
    except BaseException as error:  # noqa: BLE001 - said, and then the process ends
        os.write(descriptors[2], f"the episode broke: {error!r}\n".encode())
    finally:
        os._exit(status)


def _agent(proxy: str | None, descriptors: list[int]) -> None:
    source, sink, printed = descriptors[:3]
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for descriptor in (*descriptors[3:], null):
        os.close(descriptor)
    os.set_inheritable(printed, False)
    with os.fdopen(source, encoding="utf-8") as stream:
        request = read_request(stream)
    if proxy is not None:
        request.llm["base_url"] = f"http://127.0.0.1:{forward(proxy)}/v1"
    from spider_agent.episode import run_episode

    run_episode(request, LineWriter(os.fdopen(sink, "w", encoding="utf-8")))
    sys.stdout.flush()


def warm_up() -> None:
    """Do what the SDK's libraries put off until the first call of a model, which in a fork is every
    episode's first: imports above all, half of the processor's time that one of ten turns takes."""
    for name in LATER:
        with contextlib.suppress(ModuleNotFoundError):  # in other versions; it is imported later
            importlib.import_module(name)
    from litellm.types import utils as litellm_types
    from openai.types.chat import chat_completion, chat_completion_message
    from openhands.sdk.tool.builtins import FinishTool, ThinkTool
    from openhands.tools.file_editor import FileEditorAction, FileEditorTool
    from openhands.tools.task_tracker import TaskTrackerAction, TaskTrackerTool
    from openhands.tools.terminal import TerminalAction, TerminalTool

    # An answer's types, which are completed when the first of their values is made.
    for model in (
        litellm_types.Function, litellm_types.ChatCompletionMessageToolCall,
        litellm_types.Message, litellm_types.Choices, litellm_types.Usage,
        litellm_types.ModelResponse, chat_completion_message.ChatCompletionMessage,
        chat_completion.Choice, chat_completion.ChatCompletion,
    ):  # fmt: skip
        model.model_rebuild()
    tools = (
        (FileEditorTool, FileEditorAction),
        (TaskTrackerTool, TaskTrackerAction),
        (TerminalTool, TerminalAction),
    )
    # The types that a model fills in are made once, with the first description.
    for tool, action in tools:
        definition = tool(action_type=action, observation_type=None, description="")
        definition.to_openai_tool(add_security_risk_prediction=True)
    for builtin in (FinishTool, ThinkTool):
        for definition in builtin.create():
            definition.to_openai_tool(add_security_risk_prediction=True)


def main() -> None:
    from spider_agent import episode

    del episode  # imported for those that come after
    warm_up()
    for name in _IMPORTS_ONLY:
        os.environ.pop(name, None)
    control = socket.socket(fileno=int(sys.argv[1]))
    if threading.active_count() > 1 or len(os.listdir("/proc/self/task")) > 1:
        raise SystemExit("spider_agent: a thread was started on import; no process can be forked")
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that holds an object
    Zygote(control).serve()


if __name__ == "__main__":
    main()
