"""A conversation as training data.

A record's ``messages`` are what the model saw, in the form of OpenAI's chat API, and its last
answer. Data sets have them in one of two formats:

``openai``
    The same messages, each with the same six fields, so that all rows have one type: ``role``,
    ``content`` (always text: the text parts joined by line feeds, an image as ``[image]``),
    ``reasoning_content``, ``tool_calls`` (``arguments`` stays the raw text that the model wrote),
    ``tool_call_id`` and ``name``. What is absent is null.

``text``
    ``{"role", "content"}`` alone, with the roles ``system``, ``user`` and ``assistant``, written as
    the chat templates of Hermes and Qwen write them::

        assistant   <think>
                    the reasoning, where there was any
                    </think>

                    what it said
                    <tool_call>
                    {"name": "terminal", "arguments": {"command": "ls"}}
                    </tool_call>
        user        <tool_response>
                    what the tool printed
                    </tool_response>

    Neighbours of one role become one message, since many templates demand that user and assistant
    take turns: results of tools are joined by a line feed, all else by an empty line. Two turns of
    the agent are joined only when both are trained on, or neither.

``train`` has a boolean for each message: whether it is to be learnt. Those are the agent's own,
but for empty ones and for those with a call that came to nothing: its arguments are no JSON object
(OpenHands shows the model a word on that in their place), there is no tool of that name, or the
tool takes no such arguments.
"""

from __future__ import annotations

__all__ = ["FORMATS", "Conversation", "convert", "has_agent_turn"]

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from spider_sdk.errors import UsageError

FORMATS: Final = ("text", "openai")
IMAGE: Final = "[image]"
#: The key in what OpenHands puts in the place of arguments that are no JSON.
MALFORMED: Final = "_openhands_malformed_tool_call"

Message = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Conversation:
    """``train`` is as long as ``messages``."""

    messages: list[Message]
    train: list[bool]


def convert(
    messages: Sequence[Mapping[str, Any]], messages_format: str, history: Sequence[Any] = ()
) -> Conversation:
    """A record's messages in a data set's format; ``history`` are its events, which say of which
    calls no action could be made. Raises UsageError for a format that is none."""
    if messages_format not in FORMATS:
        raise UsageError(f"messages_format is text or openai, not {messages_format!r}")
    plain = [_openai(message) for message in messages]
    refused = _refused(plain, history)
    train = [_trainable(one) and number not in refused for number, one in enumerate(plain)]
    if messages_format == "openai":
        return Conversation(plain, train)
    return _as_text(plain, train)


def has_agent_turn(messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is anything to learn from: a row without an answer trains nothing."""
    return any(message.get("role") == "assistant" for message in messages)


def _openai(message: Mapping[str, Any]) -> Message:
    calls = [_call(call) for call in message.get("tool_calls") or ()]
    return {
        "role": str(message.get("role") or "user"),
        "content": _content(message.get("content")),
        "reasoning_content": _reasoning(message),
        "tool_calls": calls or None,
        "tool_call_id": _optional(message.get("tool_call_id")),
        "name": _optional(message.get("name")),
    }


def _call(call: Mapping[str, Any]) -> Message:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": _optional(call.get("id")),
        "type": str(call.get("type") or "function"),
        "function": {"name": str(function.get("name") or ""), "arguments": arguments},
    }


def _content(content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    return "\n".join(_part(part) for part in parts)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping):
        if isinstance(part.get("text"), str):
            return str(part["text"])
        if "image" in str(part.get("type")):
            return IMAGE
    return json.dumps(part, ensure_ascii=False)


def _reasoning(message: Mapping[str, Any]) -> str | None:
    """``reasoning_content``, or else the text of Anthropic's thinking blocks."""
    reasoning = message.get("reasoning_content")
    if isinstance(reasoning, str) and reasoning:
        return reasoning
    blocks = message.get("thinking_blocks") or ()
    texts = [str(block["thinking"]) for block in blocks if block.get("thinking")]
    return "\n".join(texts) or None


def _optional(value: Any) -> str | None:
    return None if value is None else str(value)


def _trainable(message: Message) -> bool:
    if message["role"] != "assistant":
        return False
    calls = message["tool_calls"] or []
    if not calls and not message["content"].strip() and not message["reasoning_content"]:
        return False
    return all(call["function"]["name"] and _is_object(call) for call in calls)


def _is_object(call: Message) -> bool:
    try:
        found = json.loads(call["function"]["arguments"])
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and MALFORMED not in found


def _refused(messages: Sequence[Message], history: Sequence[Any]) -> set[int]:
    """The numbers of messages with a call of which no action was made."""
    made: dict[str, list[bool]] = collections.defaultdict(list)
    for event in history:
        if isinstance(event, Mapping) and event.get("kind") == "ActionEvent" and "action" in event:
            made[str(event.get("tool_call_id"))].append(event["action"] is not None)
    places: dict[str, list[int]] = collections.defaultdict(list)
    for number, message in enumerate(messages):
        for call in message["tool_calls"] or ():
            places[str(call["id"])].append(number)
    refused: set[int] = set()
    for identity, numbers in places.items():
        fates = made.get(identity, [])
        # Some endpoints give the same id in every turn: then the order tells.
        if len(fates) == len(numbers):
            refused |= {number for number, fine in zip(numbers, fates, strict=True) if not fine}
        elif not all(fates):
            refused |= set(numbers)
    return refused


def _as_text(messages: Sequence[Message], train: Sequence[bool]) -> Conversation:
    texts: list[Message] = []
    flags: list[bool] = []
    before = ""
    for message, flag in zip(messages, train, strict=True):
        role = message["role"]
        shown = "user" if role == "tool" else "system" if role == "developer" else role
        content = _rendered(message)
        if texts and shown != "system" and (texts[-1]["role"], flags[-1]) == (shown, flag):
            between = "\n" if before == role == "tool" else "\n\n"
            texts[-1]["content"] += between + content
        else:
            texts.append({"role": shown, "content": content})
            flags.append(flag)
        before = role
    return Conversation(texts, flags)


def _rendered(message: Message) -> str:
    content: str = message["content"]
    if message["role"] == "tool":
        return f"<tool_response>\n{content}\n</tool_response>"
    if message["role"] != "assistant":
        return content
    calls = "\n".join(_rendered_call(call["function"]) for call in message["tool_calls"] or ())
    said = "\n".join(part for part in (content, calls) if part)
    if message["reasoning_content"]:
        thought = message["reasoning_content"].strip("\n")
        return f"<think>\n{thought}\n</think>\n\n{said}"
    return said


def _rendered_call(function: Message) -> str:
    # The arguments as the model wrote them, even where they are no JSON.
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {function["arguments"]}}}\n</tool_call>'
