"""Messages to token ids, with a model's own chat template."""

from __future__ import annotations

__all__ = ["plain_message", "render"]

from collections.abc import Mapping, Sequence
from typing import Any

from spider_sdk.errors import RowError


def render(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
) -> list[int]:
    """The token ids of a prompt that asks for the next turn. ``arguments`` go to the template
    (``enable_thinking``). Raises RowError where the template or this function refuses."""
    plain = [plain_message(message) for message in messages]
    try:
        text = tokenizer.apply_chat_template(
            plain, add_generation_prompt=True, tokenize=False, **arguments
        )
    except Exception as error:  # a template is a program of the model's: it raises what it likes
        raise RowError(
            f"the model's chat template refuses these messages: {error}",
            stage="generation",
            kind="chat_template",
        ) from error
    # The template has already written the special tokens that the model expects.
    return list(tokenizer.encode(text, add_special_tokens=False))


def plain_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with a list of text parts joined."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    if any(not isinstance(part, Mapping) or part.get("type") != "text" for part in content):
        raise RowError(
            "a message has parts other than text", stage="generation", kind="unsupported_content"
        )
    return {**message, "content": "".join(str(part.get("text", "")) for part in content)}
