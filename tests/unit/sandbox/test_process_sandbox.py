"""The sandbox over real processes, in every mode that this host offers."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.errors import FatalJobError, NotSupported, SandboxError
from spider_worker.sandbox.base import Outcome
from spider_worker.sandbox.isolation import choose_launcher, inspect_interpreter
from spider_worker.sandbox.process import ProcessSandbox


def works(mode: str) -> bool:
    try:
        choose_launcher(mode, inspect_interpreter(sys.executable))
    except NotSupported:
        return False
    return True


ISOLATED = [mode for mode in ("bwrap", "namespaces") if works(mode)]
MODES = ["process", *ISOLATED]
needs_isolation = pytest.mark.skipif(not ISOLATED, reason="this host offers no isolation")


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def sandbox(source: str, mode: str = "process", **options: Any) -> ProcessSandbox:
    return ProcessSandbox(name="f", source=source, stage="pre_processor", mode=mode, **options)


def run(box: ProcessSandbox, rows: list[dict[str, Any]]) -> list[Outcome]:
    async def body() -> list[Outcome]:
        await box.start()
        try:
            return await box.call(rows)
        finally:
            await box.stop()

    return asyncio.run(body())


def value(source: str, row: dict[str, Any] | None = None, **options: Any) -> Any:
    (outcome,) = run(sandbox(source, **options), [row or {}])
    assert outcome.error is None, outcome.error
    return outcome.value


def kinds(outcomes: list[Outcome]) -> list[Any]:
    return [outcome.error.kind if outcome.error else outcome.value for outcome in outcomes]


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in ("Z", "X")


def test_rows_in_outcomes_out(mode: str) -> None:
    source = "def f(row, by=1):\n    return {'x': row['x'] * by}"
    rows = [{"x": number, "t": "ü" * 50} for number in range(3_000)]
    outcomes = run(sandbox(source, mode, kwargs={"by": 3}), rows)
    assert [outcome.value for outcome in outcomes] == [{"x": 3 * n} for n in range(3_000)]


def test_none_strings_and_messages_pass() -> None:
    source = "def f(row):\n    return row['v']"
    values = [None, "a", ["b", {"c": 1.5}], {"role": "user"}, True, 2**63, "\u2028\n"]
    assert kinds(run(sandbox(source), [{"v": one} for one in values])) == values


def test_a_row_that_ends_the_process_costs_that_row_only(mode: str) -> None:
    source = """
import ctypes, os, signal, sys
def f(row):
    match row["do"]:
        case "exit": os._exit(3)
        case "crash": ctypes.string_at(0)
        case "signal": os.kill(os.getpid(), signal.SIGKILL)
        case "sys.exit": sys.exit(1)
    return row["do"]
"""
    does = ["a", "exit", "b", "c", "crash", "signal", "d", "sys.exit", "e"]
    outcomes = run(sandbox(source, mode), [{"do": do} for do in does])
    assert kinds(outcomes) == ["a", "died", "b", "c", "died", "died", "d", "SystemExit", "e"]
    assert "exited with status 3" in str(outcomes[1].error)
    assert "SIGSEGV" in str(outcomes[4].error)
    assert "SIGKILL" in str(outcomes[5].error)


def test_a_hung_row_times_out_and_the_others_go_on(mode: str) -> None:
    source = """
import time
def f(row):
    while row["x"] in (2, 3):
        pass
    return row["x"]
"""
    outcomes = run(sandbox(source, mode, row_timeout=1.0), [{"x": n} for n in range(6)])
    assert kinds(outcomes) == [0, 1, "timeout", "timeout", 4, 5]
    assert " 1 s" in str(outcomes[2].error)


@pytest.mark.parametrize(
    "what", ["b'no json\\n'", "b'[1]\\n'", "b'x' * (34 << 20)", "b'[0,1]\\n' * 9"]
)
def test_what_a_row_writes_to_the_channel_harms_no_other(what: str) -> None:
    source = f"""
import os, socket, stat, time
def f(row):
    if row["x"] == 1:
        for fd in range(3, 100):
            try:
                if stat.S_ISSOCK(os.fstat(fd).st_mode):
                    left = memoryview({what})
                    while left:
                        left = left[os.write(fd, left):]
            except OSError:
                pass
        time.sleep(1000)
    return row["x"]
"""
    box = sandbox(source, row_timeout=60)

    async def body() -> list[Outcome]:
        try:
            return [*await box.call([{"x": 0}, {"x": 1}]), *await box.call([{"x": 2}])]
        finally:
            await box.stop()

    outcomes = asyncio.run(body())
    # Answers forged for a row of the same chunk are believed: a function may lie about rows.
    assert kinds(outcomes)[0] == (1 if "[0,1]" in what else 0)
    assert kinds(outcomes)[2] == 2


def test_slow_rows_that_keep_their_time_are_no_timeout() -> None:
    source = "import time\ndef f(row):\n    time.sleep(0.3)\n    return 1"
    assert kinds(run(sandbox(source, row_timeout=1.2), [{}] * 5)) == [1] * 5


def test_a_row_that_forges_the_count_of_rows_still_ends() -> None:
    source = """
import struct, sys, time
def f(row):
    if row["x"] == 1:
        shared = sys._getframe(2).f_locals["counter"]
        while True:
            struct.pack_into("<Q", shared, 0, int(time.time() * 1000))
    return row["x"]
"""
    outcomes = run(sandbox(source, row_timeout=1.0), [{"x": n} for n in range(3)])
    assert [outcome.error is not None for outcome in outcomes].count(True) >= 1
    assert outcomes[0].value == 0


def test_memory_is_bounded(mode: str) -> None:
    source = "def f(row):\n    return len(bytearray(row['n']))"
    box = sandbox(source, mode, memory_mb=256)
    assert kinds(run(box, [{"n": 10}, {"n": 1 << 30}, {"n": 20}])) == [10, "MemoryError", 20]


def test_an_exception_is_the_users_traceback_alone() -> None:
    source = """def helper(row):
    return 1 / row["x"]

def f(row):
    try:
        return helper(row)
    except ZeroDivisionError as error:
        raise ValueError("no zero, please") from error
"""
    (outcome,) = run(sandbox(source), [{"x": 0}])
    error = outcome.error
    assert error is not None
    assert (error.stage, error.kind) == ("pre_processor", "ValueError")
    assert str(error) == "no zero, please"
    assert error.trace is not None
    assert 'File "<pre_processor>", line 2, in helper\n    return 1 / row["x"]' in error.trace
    assert error.trace.count("File ") == 3
    assert error.trace.count("<pre_processor>") == 3


def test_async_functions_are_awaited() -> None:
    source = """
import asyncio
async def f(row):
    await asyncio.sleep(0)
    if row["x"] == 1:
        raise KeyError("x")
    return row["x"]
"""
    outcomes = run(sandbox(source), [{"x": n} for n in range(3)])
    assert kinds(outcomes) == [0, "KeyError", 2]
    assert outcomes[1].error is not None
    assert outcomes[1].error.trace is not None
    assert "asyncio" not in outcomes[1].error.trace


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("{1, 2}", "type set"),
        ("{'a': [1, b'x']}", "type bytes at ['a'][1]"),
        ("{'a': float('nan')}", "nan at ['a']"),
        ("float('inf')", "inf"),
        ("{(1, 2): 3}", "key of type tuple"),
        ("2 ** 70", "beyond 64 bits"),
        ("(x for x in [1])", "type generator"),
        ("'\\ud800'", "not UTF-8"),
        ("__import__('datetime').datetime.now()", "datetime.datetime"),
    ],
)
def test_what_is_no_json_is_an_error_row(expression: str, says: str) -> None:
    (outcome,) = run(sandbox(f"def f(row):\n    return {expression}"), [{}])
    assert outcome.error is not None
    assert outcome.error.kind == "not_json"
    assert says in str(outcome.error)


def test_a_circular_or_bottomless_value_is_an_error_row() -> None:
    source = """
def f(row):
    bottomless = {}
    bottomless["x"] = bottomless
    return bottomless if row["x"] else 1
"""
    assert kinds(run(sandbox(source), [{"x": 1}, {"x": 0}])) == ["not_json", 1]


def test_nan_goes_in_as_null_and_an_unsendable_row_is_an_error_row() -> None:
    source = "def f(row):\n    return row"
    outcomes = run(sandbox(source), [{"x": float("nan")}, {"x": object()}, {"x": 2**70 // 2**10}])
    assert kinds(outcomes) == [{"x": None}, "not_json", {"x": 2**60}]


def test_what_is_printed_goes_to_the_log_and_not_into_the_protocol() -> None:
    source = """
import os, sys
def f(row):
    print('[0, "forged"]')
    print("to stderr", file=sys.stderr)
    os.write(1, b"raw\\n")
    return "true"
"""
    log: list[str] = []
    assert value(source, on_output=log.append) == "true"
    text = "".join(log)
    assert "forged" in text
    assert "to stderr" in text
    assert "raw" in text


def test_the_environment_is_what_the_job_says(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    source = "import os\ndef f(row):\n    return dict(os.environ)"
    assert value(source, mode=mode, env={"A": "b"}) == {"A": "b"}


def test_privileges_and_limits(mode: str) -> None:
    source = """
import resource
def f(row):
    status = open("/proc/self/status").read()
    return ["NoNewPrivs:\\t1\\n" in status, *(
        resource.getrlimit(getattr(resource, "RLIMIT_" + n))[1] for n in ("AS", "CORE", "NOFILE"))]
"""
    assert value(source, mode=mode, memory_mb=512) == [True, 512 << 20, 0, 256]


@needs_isolation
@pytest.mark.parametrize("mode", ISOLATED)
def test_nothing_of_the_kernel_is_written_or_entered_anew(mode: str) -> None:
    """The worker may be root, whose user id these belong to; opening them is enough to tell."""
    source = """
import ctypes, os
def f(row):
    found = []
    for name in ("/proc/sys/kernel/core_pattern", "/proc/sys/vm/overcommit_memory"):
        try:
            os.close(os.open(name, os.O_WRONLY))
            found.append(name)
        except OSError:
            pass
    if ctypes.CDLL(None).unshare(0x10000000) == 0:  # CLONE_NEWUSER
        found.append("a user namespace")
    return found
"""
    assert value(source, mode=mode) == []


@needs_isolation
@pytest.mark.parametrize("mode", ISOLATED)
def test_isolation_hides_files_network_and_processes(mode: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    source = """
import os, socket
def f(row):
    found = [path for path in row["paths"] if os.path.exists(path)]
    try:
        socket.create_connection(("127.0.0.1", row["port"]), 1)
        reached = True
    except OSError:
        reached = False
    written = []
    for place in ("/", "/usr", row["prefix"], "/tmp"):
        try:
            open(place + "/new", "w").close()
            written.append(place)
        except OSError:
            pass
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    caps = [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff")]
    return found, reached, written, max(pids) < 50, caps
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        row = {
            "paths": [str(tmp_path / "secret"), "/etc/passwd", "/etc/hostname", __file__],
            "port": server.getsockname()[1],
            "prefix": sys.prefix,
        }
        found, reached, written, alone, caps = value(source, row, mode=mode)
    assert (found, reached, written, alone) == ([], False, ["/tmp"], True)
    assert caps == ["0" * 16]


@needs_isolation
@pytest.mark.skipif(os.getuid() == 0, reason="the kernel exempts root's processes")
@pytest.mark.parametrize("mode", ISOLATED)
def test_the_number_of_processes_is_bounded(mode: str) -> None:
    source = """
import os, time
def f(row):
    children = 0
    try:
        for _ in range(100):
            if os.fork() == 0:
                time.sleep(60)
                os._exit(0)
            children += 1
    except OSError:
        return children
"""
    made = value(source, mode=mode, processes=12)
    assert made is not None
    assert 0 < made < 12


LEAVES_A_CHILD = """
import subprocess
def f(row):
    child = subprocess.Popen(["/bin/sleep", row["seconds"]], start_new_session=row["session"])
    return child.pid
"""


def sleepers(seconds: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if command.split(b"\0")[:2] == [b"/bin/sleep", seconds.encode()]:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize(
    ("mode", "session"), [("process", False), *((mode, True) for mode in ISOLATED)]
)
def test_grandchildren_die_with_the_sandbox(mode: str, session: bool) -> None:
    seconds = f"{1_000_000 + os.getpid()}"
    box = sandbox(LEAVES_A_CHILD, mode)

    async def body() -> None:
        await box.call([{"seconds": seconds, "session": session}])
        assert await asyncio.to_thread(until, lambda: bool(sleepers(seconds)))
        await box.stop()
        await box.stop()

    asyncio.run(body())
    assert until(lambda: not sleepers(seconds))


def test_a_child_that_holds_the_socket_does_not_hide_the_death(mode: str) -> None:
    source = """
import os, time
def f(row):
    if row["x"] == 1:
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(9)
    return row["x"]
"""
    box = sandbox(source, mode, row_timeout=30)
    begun = time.monotonic()
    assert kinds(run(box, [{"x": n} for n in range(3)])) == [0, "died", 2]
    assert time.monotonic() - begun < 25


PARENT = """
import asyncio, os, sys
from spider_worker.sandbox.process import ProcessSandbox
source = "import time\\ndef f(row):\\n    print('begun', flush=True)\\n    time.sleep(row['s'])"
async def body():
    box = ProcessSandbox(name="f", source=source, stage="x", mode=sys.argv[1],
                         on_output=lambda text: print(text, flush=True))
    await box.start()
    print(box._channel._process.pid, flush=True)
    await box.call([{"s": 1000}])
asyncio.run(body())
"""


def test_the_sandbox_dies_with_its_worker(mode: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, mode], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
        assert parent.stdout.readline() == "begun\n"
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert until(lambda: not alive(pid))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def g(row): ...", "defines nothing under the name 'f'"),
        ("f = 3", "defines a int"),
        ("def f(row:", "SyntaxError"),
        ("import nothing_of_that_name\ndef f(row): ...", "job.runtime.packages"),
        ("raise RuntimeError('at import')", "at import"),
    ],
)
def test_a_source_that_does_not_define_the_function_fails_the_job(source: str, says: str) -> None:
    with pytest.raises(FatalJobError, match="pre_processor: f cannot be defined") as caught:
        run(sandbox(source), [{}])
    assert says in str(caught.value)
    assert "<spider sandbox>" not in str(caught.value)


def test_a_source_that_hangs_or_kills_while_it_is_defined() -> None:
    with pytest.raises(FatalJobError, match=r"more than 0\.5 s"):
        run(sandbox("while True: pass", start_timeout=0.5), [{}])
    with pytest.raises(SandboxError, match="exited with status 4 while it started"):
        run(sandbox("import os\nos._exit(4)"), [{}])


def test_a_process_that_keeps_dying_between_rows_is_an_error_of_the_sandbox() -> None:
    source = """
import os, threading
def f(row):
    return 1
threading.Timer(0.05, os._exit, [7]).start()
"""

    async def body() -> None:
        box = sandbox(source)
        await box.start()
        channel = box._channel
        assert channel is not None
        assert await asyncio.to_thread(until, lambda: channel._process.poll() is not None)
        # The next call finds it dead, starts another and goes on.
        assert kinds(await box.call([{}])) == [1]
        await box.stop()

    asyncio.run(body())


SLEEPS = """
import time
def f(row):
    print("begun", flush=True)
    time.sleep(row["s"])
    return row["x"]
"""


def test_calls_overlap_and_a_cancelled_one_harms_no_other() -> None:
    async def body() -> None:
        begun = asyncio.Event()
        box = sandbox(SLEEPS, on_output=lambda _: begun.set())
        await box.start()
        slow = asyncio.create_task(box.call([{"s": 1000, "x": 0}]))
        others = [asyncio.create_task(box.call([{"s": 0, "x": n}])) for n in (1, 2)]
        await begun.wait()
        slow.cancel()
        assert [kinds(one) for one in await asyncio.gather(*others)] == [[1], [2]]
        await box.stop()

    asyncio.run(body())


def test_stop_ends_a_call_that_hangs() -> None:
    async def body() -> None:
        begun = asyncio.Event()
        box = sandbox(SLEEPS, on_output=lambda _: begun.set())
        await box.start()
        call = asyncio.create_task(box.call([{"s": 1000, "x": 0}]))
        await begun.wait()
        await box.stop()
        with pytest.raises(SandboxError, match="stopped"):
            await call

    asyncio.run(body())


def test_a_mode_that_is_unknown_or_does_not_work_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(NotSupported, match="SPIDER_SANDBOX=chroot: expected one of auto"):
        run(sandbox("def f(row): ...", mode="chroot"), [{}])
    monkeypatch.setenv("PATH", "/nonexistent")
    choose_launcher.cache_clear()
    try:
        with pytest.raises(NotSupported, match=r"no bwrap on PATH.*SPIDER_SANDBOX=process"):
            run(sandbox("def f(row): ...", mode="bwrap"), [{}])
    finally:
        choose_launcher.cache_clear()


def test_bwrap_is_used_wherever_it_works_at_all() -> None:
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        pytest.skip("bubblewrap is not installed")
    command = [bwrap, "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this host does not let bubblewrap work")
    assert "bwrap" in ISOLATED


@needs_isolation
def test_auto_takes_the_first_mode_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    interpreter = inspect_interpreter(sys.executable)
    assert choose_launcher("auto", interpreter).mode == ISOLATED[0]
    monkeypatch.setenv("PATH", "/nonexistent")
    choose_launcher.cache_clear()
    try:
        if "namespaces" in ISOLATED:
            assert choose_launcher("auto", interpreter).mode == "namespaces"
        else:
            with pytest.raises(NotSupported, match="namespaces:"):
                choose_launcher("auto", interpreter)
    finally:
        choose_launcher.cache_clear()


def test_it_runs_on_uvloop() -> None:
    uvloop = pytest.importorskip("uvloop")

    async def body() -> list[Outcome]:
        box = sandbox("import os\ndef f(row):\n    return row['x'] or os._exit(1)")
        await box.start()
        outcomes = await box.call([{"x": 1}, {"x": 0}, {"x": 2}])
        await box.stop()
        return outcomes

    assert kinds(uvloop.run(body())) == [1, "died", 2]
