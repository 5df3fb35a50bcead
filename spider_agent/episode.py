"""One episode: an OpenHands agent works on one task until it ends, told line by line."""

from __future__ import annotations

__all__ = ["run_episode"]

import contextlib
import json
import logging
import threading
import time
from typing import Any, Final

from openhands.sdk import Agent
from openhands.sdk.context.condenser import LLMSummarizingCondenser, default_condenser
from openhands.sdk.conversation.exceptions import ConversationRunError
from openhands.sdk.conversation.impl.local_conversation import LocalConversation
from openhands.sdk.event import Event, LLMConvertibleEvent
from openhands.sdk.event.conversation_error import ConversationErrorEvent
from openhands.sdk.event.llm_convertible import (
    ActionEvent,
    ObservationBaseEvent,
    SystemPromptEvent,
)
from openhands.sdk.llm.exceptions import (
    LLMBadRequestError,
    LLMContextWindowExceedError,
    LLMError,
    LLMMalformedConversationHistoryError,
)
from openhands.tools.preset.default import get_default_tools
from openhands.tools.terminal import TerminalAction, TerminalTool
from openhands.tools.terminal.terminal import terminal_session

from spider_agent.lines import LineWriter, Request
from spider_agent.llm import make_llm

log = logging.getLogger(__name__)

_LIMITS: Final = {"MaxIterationsReached": "max_iterations", "MaxBudgetReached": "max_budget"}
#: Answers of an endpoint that say that the same request would be refused again.
_REFUSALS: Final = frozenset({400, 404, 422})
#: Packages whose errors are the model's service's, and not the agent's.
_SERVICES: Final = ("litellm", "openai")
#: Seconds between two looks whether a command has ended. The SDK's half a second is what most
#: commands of an agent take, and they take it whole.
_POLL_SECONDS: Final = 0.2
_PROBES: Final = 7
_PROBE_SECONDS: Final = 5.0
_PAUSE: Final = 0.2  #: seconds after the first probe that failed; twice as many after each further

terminal_session.POLL_INTERVAL = _POLL_SECONDS


def run_episode(request: Request, out: LineWriter) -> None:
    """Run the request to its end. Whatever goes wrong is an end like others, and told as one."""
    try:
        status, error = _Episode(request, out).run()
    except Exception as failure:  # the boundary: an episode's failure is data
        log.exception("the episode broke")
        status, error = "agent_error", f"{type(failure).__name__}: {failure}"
    out.say("end", status=status, error=error)


class _Episode:
    def __init__(self, request: Request, out: LineWriter) -> None:
        self._request = request
        self._out = out
        self._told: list[str] = []
        self._tools_told = False
        self._limit: ConversationErrorEvent | None = None
        self._probe = threading.Thread(target=self._probe_shell, daemon=True)
        self._probe_error: Exception | None = None
        self._llm = make_llm(request.llm)
        agent = Agent(
            llm=self._llm,
            tools=get_default_tools(enable_browser=False),
            system_prompt_kwargs={"cli_mode": True},
            condenser=self._condenser(),
        )
        self._conversation = LocalConversation(
            agent=agent,
            workspace=request.path,
            persistence_dir=request.state,
            callbacks=[self._heard],
            max_iteration_per_run=request.max_iterations,
            max_budget_per_run=request.max_budget,
            visualizer=None,
        )

    def _condenser(self) -> Any:
        wanted = self._request.condenser
        if wanted is False:
            return None
        llm = self._llm.model_copy(update={"usage_id": "condenser"})
        if wanted is True:
            return default_condenser(llm)
        return LLMSummarizingCondenser(llm=llm, **wanted)

    def run(self) -> tuple[str, str | None]:
        """How it ended, and what went wrong (None: nothing)."""
        self._conversation.send_message(self._request.instruction)
        # While the model thinks about its first answer; no tool runs before it is done.
        self._probe.start()
        self._out.say("ready")
        self._tell_messages()
        try:
            self._conversation.run()
        except ConversationRunError as error:
            cause = error.original_exception
            said = f"{type(cause).__name__}: {cause}"
            return _end_by(cause), said
        finally:
            self._tell_messages()
            self._tell_metrics()
        if self._limit is not None:
            return _LIMITS.get(self._limit.code, "agent_error"), self._limit.detail
        return ("stuck" if self._state == "stuck" else "finished"), None

    @property
    def _state(self) -> str:
        return str(self._conversation.state.execution_status.value)

    def _probe_shell(self) -> None:
        """Have the shell answer before the model waits for it: one that is still reading its
        start-up files returns the first command early and empty."""
        try:
            self._wait_for_shell()
        except Exception as error:  # noqa: BLE001 - the episode's, which is on another thread
            self._probe_error = error

    def _wait_for_shell(self) -> None:
        """Twice in a row a command has to end with the status that it alone has: then the last
        prompt to be seen is the one behind it. Its output would not tell. A prompt that still comes
        after that ends the next command before its time, and every answer from then on is late by
        one."""
        in_step = 0
        for number in range(_PROBES):
            status = 100 + number
            action = TerminalAction(command=f"(exit {status})", timeout=_PROBE_SECONDS)
            seen = self._conversation.execute_tool(TerminalTool.name, action)
            in_step = in_step + 1 if getattr(seen, "exit_code", None) == status else 0
            if in_step == 2:
                return
            if not in_step:
                time.sleep(_PAUSE * 2**number)  # let the prompts come that belong to others
        raise RuntimeError("the terminal does not answer")

    def _heard(self, event: Event) -> None:
        self._out.say("event", event=json.loads(event.model_dump_json()))
        if isinstance(event, ActionEvent):
            self._probe.join()
            if self._probe_error is not None:
                raise self._probe_error
        if isinstance(event, SystemPromptEvent) and not self._tools_told:
            self._tools_told = True
            tools = [tool.to_openai_tool(add_security_risk_prediction=True) for tool in event.tools]
            self._out.say("tools", tools=tools)
        if isinstance(event, ConversationErrorEvent):
            self._limit = event
        if isinstance(event, ActionEvent):
            self._tell_metrics()
        if isinstance(event, ActionEvent | ObservationBaseEvent):
            # Killed while a tool runs or the model thinks, it has been heard to its last word.
            self._tell_messages(event)

    def _tell_messages(self, *latest: LLMConvertibleEvent) -> None:
        """What the model has been shown and has said, as the SDK would send it next; ``latest``
        is not in the conversation's state yet. A model's reasoning is kept with what it led to,
        also where this model is not shown it again."""
        view = self._conversation.state.view
        said = LLMConvertibleEvent.events_to_messages([*view.events, *latest])
        messages = self._llm.format_messages_for_llm(said)
        for message, document in zip(said, messages, strict=True):
            if message.reasoning_content:
                document["reasoning_content"] = message.reasoning_content
        texts = [json.dumps(message, ensure_ascii=False, sort_keys=True) for message in messages]
        keep = 0
        while keep < min(len(texts), len(self._told)) and texts[keep] == self._told[keep]:
            keep += 1
        if keep < len(texts) or keep < len(self._told):
            self._out.say("messages", keep=keep, messages=messages[keep:])
            self._told = texts

    def _tell_metrics(self) -> None:
        with contextlib.suppress(AttributeError):  # before the first answer there are none
            metrics = self._conversation.conversation_stats.get_combined_metrics().get()
            self._out.say("metrics", turns=len(metrics["token_usages"]), metrics=metrics)


def _end_by(error: BaseException) -> str:
    """The status of an episode that this error ended."""
    if not (isinstance(error, LLMError) or type(error).__module__.startswith(_SERVICES)):
        return "agent_error"
    if isinstance(error, LLMContextWindowExceedError):
        return "context_window"
    bad = isinstance(error, LLMBadRequestError | LLMMalformedConversationHistoryError)
    if bad or getattr(error, "status_code", None) in _REFUSALS:
        return "llm_refused"
    return "llm_error"
