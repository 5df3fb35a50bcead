"""The agent's own interpreter: found, and asked about models."""

from __future__ import annotations

__all__ = ["HELP", "HELP_IN_IMAGES", "INPUTRC", "QUIET", "agent_python", "ask_model", "library"]

import asyncio
import importlib.resources
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from spider_sdk.errors import EngineUnavailable

HELP: Final = "`make agent` makes an environment for it; SPIDER_AGENT_PYTHON names another"
#: For one that is of no use in containers.
HELP_IN_IMAGES: Final = (
    "Make the agents' environment with an interpreter that has a folder of its own and runs on old "
    "systems, as uv's do (uv python install 3.12), and name it with SPIDER_AGENT_PYTHON"
)
#: What the SDK and what it uses read: no banner, no prices from the network, and of its steps only
#: what went wrong. They are told as events, and drawn as a table on a terminal besides.
QUIET: Final = {
    "OPENHANDS_SUPPRESS_BANNER": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LOG_LEVEL": "WARNING",
}
#: In ``library``'s folder, for the variable of that name. Without tmux the SDK types into a shell,
#: which would mark what is pasted, in what the model sees.
INPUTRC: Final = "inputrc"
_ASK_SECONDS: Final = 180.0
_ASK: Final = (
    "import sys; sys.path.insert(0, {library!r}); from spider_agent.models import main; main()"
)


def agent_python(named: str | None) -> str:
    """The interpreter of the setting, or of ``.venv-agent`` beside the worker's own environment
    or in the working directory. Raises EngineUnavailable where there is none."""
    if named:
        path = Path(named).expanduser()
        if not os.access(path, os.X_OK):
            raise EngineUnavailable(f"SPIDER_AGENT_PYTHON: {named} is no program. {HELP}")
        return str(path.absolute())
    for folder in (Path(sys.prefix).parent, Path.cwd()):
        path = folder / ".venv-agent" / "bin" / "python"
        if os.access(path, os.X_OK):
            return str(path)
    raise EngineUnavailable(
        f"there is no interpreter with openhands-ai, which agents need, on this worker. {HELP}"
    )


def library(folder: Path) -> Path:
    """``folder`` with ``spider_agent`` and ``INPUTRC`` in it and nothing else: the agent's
    interpreter is another than ours, and must not find our packages beside it."""
    target = folder / "spider_agent"
    target.mkdir(parents=True, exist_ok=True)
    for item in importlib.resources.files("spider_agent").iterdir():
        if item.name.endswith(".py"):
            (target / item.name).write_bytes(item.read_bytes())
    (folder / INPUTRC).write_text("set enable-bracketed-paste off\n")
    return folder


async def ask_model(python: str, name: str) -> dict[str, Any]:
    """What LiteLLM makes of a model's name (see ``spider_agent.models``). Raises EngineUnavailable
    where the interpreter does not answer."""
    with tempfile.TemporaryDirectory(prefix="spider-agent-") as folder:
        code = _ASK.format(library=str(library(Path(folder))))
        process = await asyncio.create_subprocess_exec(
            python, "-I", "-c", code, name,
            env={"PATH": os.defpath, "HOME": folder, **QUIET},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                out, err = await process.communicate()
        except TimeoutError:
            raise EngineUnavailable(f"{python} does not answer. {HELP}") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    try:
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (ValueError, IndexError):
        said = err.decode(errors="replace").strip()[-1000:]
        if missing := re.search(r"ModuleNotFoundError: No module named '([\w.]+)'", said):
            raise EngineUnavailable(
                f"the agents' environment of {python} is not complete, or still being made: it "
                f"has no {missing[1]}. {HELP}"
            ) from None
        raise EngineUnavailable(
            f"{python} cannot say what model {name} is: {said or 'no answer'}. {HELP}"
        ) from None
    return answer
