"""Conversations to token ids, and which of them the assistant said.

The tokenizer's chat template renders them. Where it marks the assistant's words with {% generation %}, transformers
says where in the text those are. Elsewhere they are found by rendering the conversation up to each of the assistant's
turns: what a turn adds behind the prompt that asks for it is the assistant's, its end-of-turn token included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from slidetune.errors import SlidetuneError
from slidetune.runtime.data.tokens import common_length

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ASSISTANT = "assistant"


class Chat:
    """Renders conversations by a tokenizer's chat template, or by `template`.

    Raises SlidetuneError for a tokenizer that has no template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        if tokenizer is None or not (template or getattr(tokenizer, "chat_template", None)):
            has = "the model has no tokenizer" if tokenizer is None else "the tokenizer has no chat template"
            raise SlidetuneError(
                f"rows of messages need a chat template, and {has}.",
                "Take the tokenizer files of the model's instruct version, or give prompt and completion as text.",
            )
        self._tokenizer, self._template = tokenizer, template

    def tokens(self, messages: Any, tools: Any = None, *, learn_from: int = 0) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and for each whether the assistant said it in message `learn_from` or later.

        An assistant's turn that opens a conversation counts only where the template marks it: no prompt asks for it.
        Raises ValueError for messages that can't be rendered, SlidetuneError for a template that is not Jinja, or by
        which the assistant's turns can't be told.
        """
        messages = [_message(message) for message in _listed(messages, "messages")]
        tools = _listed(tools, "tools") if tools else None
        template = self._tokenizer.get_chat_template(self._template, tools=tools)
        if _MARKED.search(template):
            ids, said = self._marked(messages, tools, template)
            if learn_from:
                before = common_length(ids, self._encode(self._render(messages[:learn_from], tools)))
                said[:before] = [False] * before
            return ids, said
        return self._by_prefixes(messages, tools, learn_from)

    def all_tokens(self, messages: Any, tools: Any = None) -> list[int]:
        """Token ids of a conversation. Raises ValueError for messages that can't be rendered, SlidetuneError for a
        template that is not Jinja."""
        messages = [_message(message) for message in _listed(messages, "messages")]
        return self._encode(self._render(messages, _listed(tools, "tools") if tools else None))

    def _marked(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, template: str
    ) -> tuple[list[int], list[bool]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self._tokenizer.is_fast:
            raise SlidetuneError(
                "the chat template marks the assistant's words with {% generation %}, and the tokenizer is not a fast "
                "one: which tokens those are can't be told.",
                "Take a template without {% generation %}, or the loss of all turns.",
            )
        # Not apply_chat_template's own mask: in transformers 5.17 and others before 5.24, a turn that ends in a space
        # without a token goes on through all later turns, and one that begins with such a space is the last.
        with _refusals():
            (text,), (turns,) = render_jinja_template(
                [messages],
                tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        found = self._tokenized(text, return_offsets_mapping=True)
        spoken = bytearray(len(text))
        for start, end in turns:
            spoken[start:end] = b"\1" * (end - start)
        # Some offsets leave spaces out: a token of nothing else is then empty, and stands behind them.
        said = [1 in spoken[min(start, end - 1) : end] for start, end in found["offset_mapping"]]
        return list(found["input_ids"]), said

    def _by_prefixes(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, learn_from: int
    ) -> tuple[list[int], list[bool]]:
        whole = self._render(messages, tools)
        ids = self._encode(whole)
        said = [False] * len(ids)
        for turn, message in enumerate(messages):
            if message["role"] != _ASSISTANT or turn < max(learn_from, 1):
                continue
            before = self._asked(messages[:turn], tools, whole)
            upto = whole if turn == len(messages) - 1 else self._render(messages[: turn + 1], tools)
            if before is None or not whole.startswith(upto):
                raise SlidetuneError(
                    "the chat template writes a conversation's beginning differently once it goes on (message "
                    f"{turn + 1} of {len(messages)}): which tokens are the assistant's can't be told.",
                    "Put {% generation %} and {% endgeneration %} around the assistant's words in the template, or "
                    "take the loss of all turns.",
                )
            # A token that spans a boundary is the later side's.
            first = common_length(ids, self._encode(before))
            behind = len(ids) if upto is whole else common_length(ids, self._encode(upto))
            said[first:behind] = [True] * (behind - first)
        return ids, said

    def _asked(self, messages: list[dict[str, Any]], tools: list[Any] | None, whole: str) -> str | None:
        """What stands before the assistant's answer: with the prompt for it, unless the template writes another
        prompt than it later keeps, as those do that open with a thought."""
        for prompted in (True, False):
            before = self._render(messages, tools, prompted)
            if whole.startswith(before):
                return before
        return None

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, prompted: bool = False) -> str:
        with _refusals():
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=self._template, tokenize=False, add_generation_prompt=prompted
            )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenized(text)["input_ids"])

    def _tokenized(self, text: str, **how: Any) -> Mapping[str, Any]:
        try:
            # The template has written special tokens itself.
            return self._tokenizer(text, add_special_tokens=False, verbose=False, **how)
        except (TypeError, UnicodeEncodeError):
            if not any("\ud800" <= letter <= "\udfff" for letter in text):
                raise
            raise ValueError("has messages with half a surrogate pair, which is no text") from None


@contextmanager
def _refusals() -> Iterator[None]:
    """What goes wrong while a template is rendered, in our words."""
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as error:
        # Not the row's fault: no row could be rendered.
        raise SlidetuneError(
            f"the chat template is not Jinja: {str(error.message).rstrip('.')} (line {error.lineno} of it).",
            "Correct the template.",
        ) from None
    except (TemplateError, TypeError, KeyError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ValueError(f"has messages that its chat template refuses ({reason})") from None


def _listed(value: Any, what: str) -> list[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise ValueError(f"has {what} that are no list, or an empty one")
    return [_without_none(item) for item in value]


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError("has a message that is no object with a role and a content")
    content = message.get("content")
    if isinstance(content, list):
        # Templates of text models would write the list itself.
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise ValueError("has a message with something other than text in its content")
        return {**message, "content": "".join(part["text"] for part in content)}
    if not isinstance(content, str) and not message.get("tool_calls"):
        raise ValueError(f"has a message of the {message['role']} without a content of text")
    return dict(message)


def _without_none(value: Any) -> Any:
    """Columns of Parquet have every field in every row; templates ask whether a field is there."""
    if isinstance(value, Mapping):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
