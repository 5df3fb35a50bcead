"""``spider demo`` and ``spider up`` as a person runs them, from the outside."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

from spider_sdk import Client
from spider_sdk.errors import Unauthorized
from spider_worker.engines.tokens.text import load_text

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "config" / "demo"
START_SECONDS = 120
LIMIT_BYTES = 8_000_000


def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)


def processes_with(text: str) -> list[str]:
    """Command lines of running processes whose environment or arguments hold ``text``."""
    found = []
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            seen = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if text.encode() in seen:
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # it ended
    return found


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("SPIDER_")}


class Up:
    """A running ``spider up --json`` and the documents that it prints."""

    def __init__(self, state: Path, *options: str) -> None:
        command = [sys.executable, "-m", "spider_sdk.cli.main", "up", "--json", "--port", "0"]
        self.process = subprocess.Popen(
            [*command, "--state", str(state), *options],
            cwd=ROOT,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a signal to it alone, as from a person's kill
        )
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.ready = self.document("ready")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def document(self, event: str) -> dict[str, Any]:
        """The next document of that kind; fails where the output ends before it."""
        while True:
            document = self._lines.get(timeout=START_SECONDS)
            assert document is not None, f"spider up ended before {event}"
            assert "error" not in document, document
            if document["event"] == event:
                return document

    def client(self) -> Client:
        key = (Path(self.ready["config"]).parent / "api.key").read_text().strip()
        return Client(DEMO / "demo.yaml", base_url=self.ready["base_url"], api_key=key)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(90)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def up(state: Path) -> Iterator[Up]:
    running = Up(state)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def processors() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_processors", DEMO / "processors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo(state: Path, *options: str) -> list[dict[str, Any]]:
    """The documents of ``spider demo --json``, which leaves nothing behind."""
    command = [sys.executable, "-m", "spider_sdk.cli.main", "demo", "--json", *options]
    done = subprocess.run(
        [*command, "--state", str(state)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (state / "fleet").exists()
    assert processes_with(str(state)) == []
    return [json.loads(line) for line in done.stdout.splitlines()]


def named(documents: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [document for document in documents if document.get("event") == event]


def test_the_models_are_small() -> None:
    for model in ("adder", "teacher", "student"):
        files = [path for path in (DEMO / model).iterdir() if path.is_file()]
        assert {"model.safetensors", "tokenizer.json", "config.json"} <= {f.name for f in files}
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT_BYTES


def test_the_processors_ask_and_check(processors: ModuleType) -> None:
    questions = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text().splitlines()]
    assert len(questions) == 400
    assert all(processors.ask(row) == row["question"] for row in questions)
    assert processors.ask({"question": "What is 1+2+3?"}) is None
    right = processors.check_sum({"question": "What is 7+8?", "completion": "15"})
    wrong = processors.check_sum({"question": "What is 7+8?", "completion": "16"})
    assert (right["expected"], right["correct"], wrong["correct"]) == (15, True, False)


def test_the_evaluator_scores_reversed_sums(processors: ModuleType) -> None:
    def score(completion: str) -> bool:
        found: bool = processors.score_sum({"question": "Reverse 47+85", "completion": completion})
        return found

    assert score("It is 231.") is True
    assert [score(text) for text in ("It is 132.", "It is 231", "It is 2310.", "")] == [False] * 4


def test_teacher_and_student_share_no_tokenizer() -> None:
    teacher, student = (load_text(str(DEMO / name)) for name in ("teacher", "student"))
    assert not student.vocabulary.same_ids(teacher.vocabulary)
    text = "It is 231."
    spans = [len(side.vocabulary.encode(text)) for side in (teacher, student)]
    assert spans == [10, 5]
    messages = [{"role": "user", "content": "Reverse 47+85"}]
    assert len(teacher.render(messages)) != len(student.render(messages))


def test_the_demo_runs_two_real_jobs_and_leaves_nothing_running(state: Path) -> None:
    documents = demo(state, "--rows", "40")
    (result,) = named(documents, "result")
    assert result["records"] == 40
    assert result["correct"] >= 39
    records = [json.loads(line) for line in Path(result["path"]).read_text().splitlines()]
    assert [record["index"] for record in records] == list(range(40))
    assert all(record["error"] is None for record in records)
    assert {"expected", "correct", "completion", "question"} <= records[0].keys()

    (distilled,) = named(documents, "distilled")
    assert distilled["before"] < 0.2
    assert distilled["after"] > 0.9
    shown = [
        document["data"]["eval/score"]
        for document in documents
        if document.get("code") == "train.step" and "eval/score" in document["data"]
    ]
    assert (shown[0], shown[-1]) == (distilled["before"], distilled["after"])
    assert len(shown) > 5  # as it happens
    weights = load_file(Path(distilled["adapter"]) / "adapter_model.safetensors")
    assert any(weights[name].abs().max() > 0 for name in weights if "lora_B" in name)
    assert Path(distilled["curves"]).read_bytes().startswith(b"\x89PNG")


def test_one_job_of_the_demo_runs_alone(state: Path) -> None:
    documents = demo(state, "--only", "rollouts", "--rows", "5")
    assert len(named(documents, "result")) == 1
    assert named(documents, "distilled") == []


def test_ctrl_c_in_the_demo_leaves_nothing_running(state: Path) -> None:
    command = [sys.executable, "-m", "spider_sdk.cli.main", "demo", "--json"]
    with subprocess.Popen(
        [*command, "--state", str(state)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as demo:
        assert demo.stdout is not None
        assert json.loads(demo.stdout.readline())["part"] == "redis"
        demo.send_signal(signal.SIGINT)
        assert demo.wait(90) == 130
    assert not (state / "fleet").exists()
    assert processes_with(str(state)) == []


def test_a_fleet_goes_on_where_it_was_stopped(state: Path) -> None:
    first = Up(state)
    try:
        with first.client() as client:
            job_id = client.submit_job({"source": {"max_examples": 5}})["job_id"]
            assert client.poll_job(job_id, timeout=120)["status"] == "completed"
        key = (state / "api.key").read_text()
    finally:
        code = first.stop()
    assert code == 0
    assert processes_with(str(state)) == []

    again = Up(state)
    try:
        assert (state / "api.key").read_text() == key
        with again.client() as client:
            assert client.get_job_status(job_id)["status"] == "completed"
    finally:
        again.stop()


def test_spider_uses_the_config_that_up_wrote(up: Up) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spider_sdk.cli.main", "list", "--json"],
        cwd=ROOT,
        env=clean_environment() | {"SPIDER_CONFIG": up.ready["config"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    with (
        Client(base_url=up.ready["base_url"], api_key="sk_none") as stranger,
        pytest.raises(Unauthorized),
    ):
        stranger.list_jobs()


def test_a_second_fleet_on_the_same_state_is_refused(up: Up, state: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "spider_sdk.cli.main", "up", "--port", "0", "--state", str(state)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert f"process {up.process.pid}" in done.stderr
    assert up.process.poll() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs PR_SET_PDEATHSIG (Linux)")
def test_a_killed_fleet_takes_everything_with_it_and_starts_again(state: Path) -> None:
    killed = Up(state)
    assert processes_with(str(state))
    killed.stop(signal.SIGKILL)
    eventually(lambda: processes_with(str(state)) == [])

    again = Up(state)
    assert again.stop(signal.SIGTERM) == 0
