"""Both formats of messages, and which of them are learnt."""

from __future__ import annotations

from typing import Any

import pytest

from spider_sdk.errors import UsageError
from spider_worker.trajectories.messages import convert, has_agent_turn
from tests.support.trajectories import call, conversation

FIELDS = {"role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name"}


def assistant(content: str = "", *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **more}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_openai_is_what_the_model_saw() -> None:
    made = convert(conversation('{"command":  "ls"}'), "openai")
    assert [message["role"] for message in made.messages] == [
        "system", "user", "assistant", "tool", "tool", "assistant",
    ]  # fmt: skip
    assert all(set(message) == FIELDS for message in made.messages)
    system, _, first, result, _, last = made.messages
    assert system["content"] == "You mend code."
    assert first["content"] == "I look around."
    assert first["reasoning_content"] == "First the files."
    calls = first["tool_calls"]
    assert calls[0] == call("c1", "terminal", '{"command":  "ls"}')  # the text, not its meaning
    assert (result["tool_call_id"], result["name"], result["content"]) == (
        "c1", "terminal", "sum.py",
    )  # fmt: skip
    assert (last["content"], last["reasoning_content"]) == ("", None)
    assert system["tool_calls"] is None
    assert made.train == [False, False, True, False, False, True]


def test_text_is_written_as_documented() -> None:
    made = convert(conversation(), "text")
    assert made.messages == [
        {"role": "system", "content": "You mend code."},
        {"role": "user", "content": "The sum is wrong."},
        {
            "role": "assistant",
            "content": "<think>\nFirst the files.\n</think>\n\nI look around.\n"
            '<tool_call>\n{"name": "terminal", "arguments": {"command": "ls"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "terminal", "arguments": {"command": "pwd"}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\nsum.py\n</tool_response>\n"
            "<tool_response>\n/testbed\n</tool_response>",
        },
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "finish", "arguments": {"message": "done"}}\n'
            "</tool_call>",
        },
    ]
    assert made.train == [False, False, True, False, True]


@pytest.mark.parametrize("messages_format", ["text", "openai"])
@pytest.mark.parametrize(
    "arguments", ["", "{", '["ls"]', '"ls"', "null", '{"command": "ls"', "[" * 100_000]
)
def test_a_malformed_call_is_kept_and_not_learnt(arguments: str, messages_format: str) -> None:
    made = convert(conversation(arguments), messages_format)
    flags = [
        flag
        for message, flag in zip(made.messages, made.train, strict=True)
        if message["role"] == "assistant"
    ]
    assert flags == [False, True]
    assert len(made.train) == len(made.messages)
    if messages_format == "text":
        shown = f'{{"name": "terminal", "arguments": {arguments}}}'
        assert shown in made.messages[2]["content"]
    else:
        assert made.messages[2]["tool_calls"][0]["function"]["arguments"] == arguments


def test_an_empty_answer_and_a_call_of_nothing_are_not_learnt() -> None:
    messages = [user("x"), assistant(), user("y"), assistant("", call("c", "", "{}"))]
    assert convert(messages, "openai").train == [False] * 4
    assert convert([assistant("", reasoning_content="so")], "openai").train == [True]


def test_neighbours_of_one_role_are_joined_so_that_turns_alternate() -> None:
    messages = [
        {"role": "system", "content": "s"},
        user("a"),
        user("b"),
        assistant("c"),
        assistant("d"),
        {"role": "tool", "content": "e", "tool_call_id": "1"},
        user("f"),
    ]
    made = convert(messages, "text")
    assert [(one["role"], one["content"]) for one in made.messages] == [
        ("system", "s"),
        ("user", "a\n\nb"),
        ("assistant", "c\n\nd"),
        ("user", "<tool_response>\ne\n</tool_response>\n\nf"),
    ]
    assert len(convert(messages, "openai").messages) == 7


def action(identity: str, *, made: bool) -> dict[str, Any]:
    done = {"kind": "TerminalAction"} if made else None
    return {"kind": "ActionEvent", "tool_call_id": identity, "action": done}


def test_a_call_of_which_no_action_was_made_is_not_learnt() -> None:
    said = [
        assistant("", call("c1", "terminal", '{"_openhands_malformed_tool_call": true}')),
        assistant("", call("c2", "no_such_tool", "{}")),
        assistant("", call("c3", "terminal", "{}"), call("c4", "terminal", '{"x": 1}')),
        assistant("", call("c5", "terminal", "{}")),
    ]
    fates = [("c2", False), ("c3", True), ("c4", False), ("c5", True)]
    history = [{"kind": "MessageEvent"}, "?", *(action(name, made=made) for name, made in fates)]
    assert convert(said, "openai", history).train == [False, False, False, True]
    assert convert(said, "openai").train == [False, True, True, True]


def test_an_id_that_comes_again_is_told_apart_by_its_place() -> None:
    turn = assistant("", call("0", "terminal", "{}"))
    history = [action("0", made=True), action("0", made=False), action("0", made=True)]
    assert convert([turn] * 3, "openai", history).train == [True, False, True]
    assert convert([turn] * 2, "openai", history).train == [False, False], "a condensed one"


def test_a_malformed_turn_is_not_joined_to_a_good_one() -> None:
    messages = [user("a"), assistant("", call("c", "t", "{")), assistant("b")]
    made = convert(messages, "text")
    assert made.train == [False, False, True]


def test_images_and_other_parts_are_named() -> None:
    parts = [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "refusal", "refusal": "no"},
        "plain",
    ]
    (made,) = convert([{"role": "user", "content": parts}], "openai").messages
    assert made["content"] == 'see\n[image]\n{"type": "refusal", "refusal": "no"}\nplain'


def test_thinking_blocks_are_reasoning() -> None:
    blocks = [
        {"type": "thinking", "thinking": "one", "signature": "x"},
        {"type": "redacted_thinking", "data": "y"},
        {"type": "thinking", "thinking": "two"},
    ]
    (made,) = convert([assistant("a", thinking_blocks=blocks)], "openai").messages
    assert made["reasoning_content"] == "one\ntwo"


def test_arguments_that_came_as_an_object_become_text() -> None:
    made = convert([assistant("", call("c", "t", {"a": "ü"}))], "openai")  # type: ignore[arg-type]
    assert made.messages[0]["tool_calls"][0]["function"]["arguments"] == '{"a": "ü"}'
    assert made.train == [True]


def test_an_unknown_format_and_a_run_without_an_answer() -> None:
    with pytest.raises(UsageError, match="text or openai, not 'chat'"):
        convert([], "chat")
    assert not has_agent_turn(conversation()[:2])
    assert has_agent_turn(conversation())
