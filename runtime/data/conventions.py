"""A row to token ids and labels, by the fields it has: the conventions that TRL's users know.

Each row by itself, in this order: `input_ids` (perhaps with `labels`), `messages` (perhaps with `tools`), `prompt` and
`completion` (text, or messages both), `text`. What other fields a row has is not used, and said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slidetune.runtime.batches import IGNORED
from slidetune.runtime.data.chat import Chat
from slidetune.runtime.data.tokens import Tokens, checked_ids, common_length

_NEEDED = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "text": ("text",),
}
_OPTIONAL = {
    "input_ids": ("labels", "attention_mask"),
    "messages": ("tools",),
    "prompt/completion": ("tools",),
    "text": (),
}


@dataclass(frozen=True, slots=True)
class Document:
    """One row's tokens, of any length."""

    ids: list[int]
    labels: list[int] | None
    """As many as ids, -100 where no loss is wanted; None: every token is learned, and the document may be cut."""


def convention_of(fields: Mapping[str, Any]) -> str:
    """The convention that a row follows. Raises ValueError for one that follows none."""
    for name, needed in _NEEDED.items():
        if all(fields.get(field) is not None for field in needed):
            return name
    has = ", ".join(fields) or "nothing"
    raise ValueError(f"has no text, no prompt and completion, no messages and no input_ids, but {has}")


def unused_fields(fields: Mapping[str, Any], convention: str) -> list[str]:
    """The fields of a row that its convention doesn't look at."""
    used = _NEEDED[convention] + _OPTIONAL[convention]
    return [name for name in fields if name not in used]


class Conventions:
    """Turns rows into documents for one model.

    `assistant_only`: the loss of a conversation is that of the assistant's turns, else that of all. `chat_template`:
    in the place of the tokenizer's own.
    """

    def __init__(self, tokens: Tokens, *, assistant_only: bool = True, chat_template: str | None = None) -> None:
        self._tokens = tokens
        self._assistant_only, self._template = assistant_only, chat_template
        self._chat: Chat | None = None

    def document(self, fields: Mapping[str, Any], convention: str) -> Document:
        """The row's tokens and labels. Raises ValueError, which continues a sentence that the row begins, for one
        that can't be used; SlidetuneError where no row of its convention could be."""
        if convention == "input_ids":
            return self._input_ids(fields)
        if convention == "messages":
            return self._conversation(fields["messages"], fields.get("tools"))
        if convention == "prompt/completion":
            prompt, completion = fields["prompt"], fields["completion"]
            if isinstance(prompt, list) and isinstance(completion, list):
                return self._conversation(prompt + completion, fields.get("tools"), learn_from=len(prompt))
            return self._completion(prompt, completion)
        text = _text(fields["text"], "text")
        return Document(self._tokens.enclosed(self._tokens.text(text)), None)

    def _input_ids(self, fields: Mapping[str, Any]) -> Document:
        size = self._tokens.vocab_size
        if not isinstance(fields["input_ids"], list):
            raise ValueError("has input_ids that are no list")
        ids = checked_ids(fields["input_ids"], size, "input_ids", empty=False)
        labels = fields.get("labels")
        if labels is None:
            return Document(ids, None)
        if not isinstance(labels, list) or len(labels) != len(ids):
            raise ValueError("has labels that are not as many as its input_ids")
        checked_ids([label for label in labels if label != IGNORED], size, "labels")
        return Document(ids, labels)

    def _completion(self, prompt: Any, completion: Any) -> Document:
        prompt, completion = _text(prompt, "prompt", empty=True), _text(completion, "completion")
        asked = self._tokens.text(prompt)
        # As one text, since tokens may differ where the two meet; one that spans the seam is the completion's.
        ids = self._tokens.text(prompt + completion)
        if not ids:
            raise ValueError("has no token in its prompt and completion")
        whole = self._tokens.enclosed(ids)
        first = common_length(ids, asked) + (whole[0] != ids[0])
        return Document(whole, [IGNORED] * first + whole[first:])

    def _conversation(self, messages: Any, tools: Any, learn_from: int = 0) -> Document:
        self._chat = self._chat or Chat(self._tokens.tokenizer, self._template)
        if isinstance(tools, str):
            try:
                tools = json.loads(tools)
            except json.JSONDecodeError:
                raise ValueError("has tools that are no list and no JSON") from None
        size = self._tokens.vocab_size
        if not self._assistant_only and not learn_from:
            ids = checked_ids(self._chat.all_tokens(messages, tools), size, "messages")
            return Document(ids, list(ids))
        ids, said = self._chat.tokens(messages, tools, learn_from=learn_from)
        checked_ids(ids, size, "messages")
        return Document(ids, [token if flag else IGNORED for token, flag in zip(ids, said, strict=True)])


def _text(value: Any, what: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"has a {what} that is no text")
    if not empty and not value:
        raise ValueError(f"has an empty {what}")
    return value
