"""Environments of ``runtime.packages``, built from a wheel made on the spot."""

import asyncio
import base64
import hashlib
import shutil
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spider_sdk.config.model import ProcessorConfig, RuntimeConfig
from spider_sdk.errors import FatalJobError, NotSupported
from spider_worker.sandbox import packages
from spider_worker.sandbox.build import build_sandbox
from spider_worker.sandbox.packages import PackageEnvironment, check_requirements
from spider_worker.settings import WorkerSettings
from tests.unit.sandbox.test_process_sandbox import MODES

INSTALLERS = ["pip", *(["uv"] if shutil.which("uv") else [])]


def make_wheel(folder: Path, name: str, version: str) -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"ANSWER = {version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=")
        record += f"{path},sha256={digest.decode()},{len(text)}\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)
        wheel.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheels, and with environments where a test does not want its own."""
    folder = tmp_path_factory.mktemp("packages")
    for version in ("1.0", "2.0"):
        make_wheel(folder / "wheels", "spidertestpkg", version)
    return folder


@pytest.fixture(autouse=True)
def index(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installer that has the test's wheels and no network."""
    for name in ("PIP_FIND_LINKS", "UV_FIND_LINKS"):
        monkeypatch.setenv(name, str(shared / "wheels"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_NO_INDEX", "1")


@pytest.fixture(params=INSTALLERS)
def installer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pip":
        monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    return str(request.param)


def answer(python: str) -> str:
    code = "import spidertestpkg; print(spidertestpkg.ANSWER)"
    run = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.strip()


def test_an_environment_is_built_once_and_kept(tmp_path: Path, installer: str) -> None:
    environment = PackageEnvironment(("spidertestpkg<2",), tmp_path / "envs")
    with ThreadPoolExecutor(2) as pool:
        pythons = {future.result() for future in [pool.submit(environment.ensure) for _ in "ab"]}
    (python,) = pythons
    assert answer(python) == "1.0"
    (folder,) = [path for path in (tmp_path / "envs").iterdir() if path.is_dir()]
    (folder / "marker").touch()
    assert PackageEnvironment(("Spidertestpkg <2",), tmp_path / "envs").ensure() == python
    assert (folder / "marker").exists()


def test_a_failed_installation_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    environment = PackageEnvironment(("spidertestpkg==9",), tmp_path / "envs")
    with pytest.raises(FatalJobError, match=r"runtime\.packages cannot be installed") as caught:
        environment.ensure()
    assert "spidertestpkg==9" in str(caught.value)
    assert not [path for path in (tmp_path / "envs").iterdir() if path.is_dir()]


def test_the_installer_does_not_see_the_secrets_of_the_job() -> None:
    env = {"HF_TOKEN": "x", "PIP_INDEX_URL": "i", "PATH": "p", "https_proxy": "q", "MY_KEY": "z"}
    assert packages._installer_env(env) == {"PIP_INDEX_URL": "i", "PATH": "p", "https_proxy": "q"}


def test_another_index_is_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = PackageEnvironment(("six",), tmp_path)
    key = environment._key(("six",))
    assert environment._key(("six",)) == key
    monkeypatch.setenv("PIP_INDEX_URL", "https://other.invalid/simple")
    assert environment._key(("six",)) != key


@pytest.mark.parametrize(
    "text",
    ["./folder", "/folder", "name @ https://host/name.whl", "name @ file:///x", "--pre", "-e .",
     "git+https://host/x", "https://host/x.whl", "a b", ""],
)  # fmt: skip
def test_paths_urls_and_options_are_refused(text: str) -> None:
    with pytest.raises(FatalJobError, match=r"runtime\.packages"):
        check_requirements([text])


def test_requirements_have_one_spelling() -> None:
    given = ["Six >= 1.0, <2", "a_B[x]", "six>=1.0,<2"]
    assert check_requirements(given) == ("a-b[x]", "six<2,>=1.0")


def processor(source: str) -> ProcessorConfig:
    return ProcessorConfig("f", source, {"k": 1})


def called(settings: WorkerSettings, runtime: RuntimeConfig, source: str) -> Any:
    async def body() -> Any:
        box = build_sandbox(processor(source), runtime, settings, stage="post_processor")
        try:
            await box.start()
            return (await box.call([{}]))[0]
        finally:
            await box.stop()

    return asyncio.run(body())


@pytest.mark.parametrize("mode", MODES)
def test_a_function_sees_its_packages_and_cannot_change_them(shared: Path, mode: str) -> None:
    settings = WorkerSettings(env_cache=shared / "envs", sandbox=mode)
    runtime = RuntimeConfig(packages=("spidertestpkg==2.0",), env={"A": "b"})
    source = """
import os, spidertestpkg
def f(row, k):
    try:
        open(spidertestpkg.__file__, "a").close()
        writable = True
    except OSError:
        writable = False
    return [spidertestpkg.ANSWER, os.environ["A"], k, writable]
"""
    outcome = called(settings, runtime, source)
    assert outcome.error is None, outcome.error
    assert outcome.value == ["2.0", "b", 1, mode == "process"]


def test_settings_reach_the_sandbox(tmp_path: Path) -> None:
    settings = WorkerSettings(sandbox="process", sandbox_row_timeout=1.0, sandbox_memory_mb=300)
    source = "import time\ndef f(row, k):\n    time.sleep(100)"
    error = called(settings, RuntimeConfig(), source).error
    assert (error.kind, error.stage) == ("timeout", "post_processor")
    source = "import resource\ndef f(row, k):\n    return resource.getrlimit(resource.RLIMIT_AS)[0]"
    assert called(settings, RuntimeConfig(), source).value == 300 << 20


def test_a_worker_that_installs_nothing_refuses(tmp_path: Path) -> None:
    settings = WorkerSettings(allow_packages=False)
    runtime = RuntimeConfig(packages=("six",))
    with pytest.raises(NotSupported, match="SPIDER_ALLOW_PACKAGES=false"):
        build_sandbox(processor(""), runtime, settings, stage="pre_processor")
