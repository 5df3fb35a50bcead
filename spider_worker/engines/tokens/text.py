"""A model's tokenizer, as far as training asks of it: prompts in its own words, and its bytes."""

from __future__ import annotations

__all__ = ["TokenizerText", "load_text"]

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from spider_sdk.errors import EngineUnavailable, RowError
from spider_worker.distill.vocabulary import Vocabulary, build_vocabulary
from spider_worker.engines.chat import plain_message, render
from spider_worker.tokens import Ids


class TokenizerText:
    """``arguments`` go to the chat template (``enable_thinking``). ``system_prompt`` takes the
    place of a conversation's system message, or comes first. ``stops`` are further token ids
    that end a turn.

    A model without a chat template (a base model) gets the messages' texts, a blank line between
    them, after the token that its tokenizer begins texts with, if it has one.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        arguments: Mapping[str, Any] | None = None,
        system_prompt: str | None = None,
        stops: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(arguments or {})
        self._system = system_prompt
        self.vocabulary: Vocabulary = build_vocabulary(tokenizer, stops=stops)

    @property
    def stops(self) -> tuple[int, ...]:
        return tuple(sorted(self.vocabulary.stops))

    def render(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The token ids of a prompt that asks for the next turn. Raises RowError."""
        if self._system is not None:
            rest = messages[1:] if messages and messages[0].get("role") == "system" else messages
            messages = [{"role": "system", "content": self._system}, *rest]
        if getattr(self._tokenizer, "chat_template", None):
            tokens = render(self._tokenizer, messages, self._arguments)
        else:
            tokens = self._render_plain(messages)
        if not tokens:
            raise RowError("the prompt is empty", stage="generation", kind="empty_prompt")
        return tokens

    def decode(self, tokens: Ids) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _render_plain(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        texts = (str(plain_message(message).get("content") or "") for message in messages)
        text = "\n\n".join(texts)
        bare = list(self._tokenizer.encode(text, add_special_tokens=False))
        whole = list(self._tokenizer.encode(text, add_special_tokens=True))
        # What it would end a text with is left out: the text is to go on.
        for start in range(len(whole) - len(bare) + 1):
            if whole[start : start + len(bare)] == bare:
                return whole[: start + len(bare)]
        return bare


def load_text(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    arguments: Mapping[str, Any] | None = None,
    system_prompt: str | None = None,
) -> TokenizerText:
    """The text side of the model ``name``, a folder or a name on the Hub. Blocking.

    Raises EngineUnavailable where no tokenizer can be loaded, FatalJobError where its tokens cannot
    be traced to bytes.
    """
    import transformers

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # tokenizers raises no class of its own for a broken file
        raise EngineUnavailable(
            f"the tokenizer of {name!r} cannot be loaded ({error}). Check the name, the revision"
            " and HF_TOKEN; a teacher served under another name says where its tokenizer is with"
            " parameters.tokenizer"
        ) from error
    stops: Any = []
    # Not every model has one; a chat model often ends turns by more tokens than its tokenizer's.
    with contextlib.suppress(OSError):
        stops = transformers.GenerationConfig.from_pretrained(name, **options).eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or ())
    return TokenizerText(tokenizer, arguments=arguments, system_prompt=system_prompt, stops=stops)
