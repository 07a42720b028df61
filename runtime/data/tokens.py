"""Text to token ids: a tokenizer with what it puts around a document, or bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slidetune.errors import SlidetuneError

Encode = Callable[[str], Sequence[int]]
"""Text to token ids."""

# A tokenizer needs some hundred bytes a token: books are encoded in parts.
_AT_ONCE = 1 << 20
# No tokenizer in use joins a line's first word to the newline before it.
_LINE_START = re.compile(r"\n(?=\S)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """How text becomes token ids for one model."""

    encode: Encode
    """Without special tokens."""
    vocab_size: int
    begin: int | None = None
    """Stands before a document, where the model was trained so."""
    end: int | None = None
    """Stands behind a document, if the model has such a token."""
    tokenizer: Any = None
    """Of transformers, whose chat template renders messages; None for bytes."""

    def text(self, text: str) -> list[int]:
        """The ids of a text of any length, checked. Raises ValueError for a text or token that can't be used."""
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError("has half a surrogate pair, which is no text") from None
        ids: list[int] = []
        for part in _parts(text):
            ids += self.encode(part)
        return checked_ids(ids, self.vocab_size, "text")

    def enclosed(self, ids: list[int]) -> list[int]:
        """The ids with `begin` and `end` around them, where they are not there already."""
        before = [] if self.begin is None or ids[:1] == [self.begin] else [self.begin]
        behind = [] if self.end is None or ids[-1:] == [self.end] else [self.end]
        return before + ids + behind


def tokens_of(tokenizer: Any, vocab_size: int) -> Tokens:
    """A transformers tokenizer's tokens, for a model whose embedding has `vocab_size` rows."""
    begin = tokenizer.bos_token_id
    # Of those that have the token, only some put it before a text.
    if begin is not None and list(tokenizer("a")["input_ids"][:1]) != [begin]:
        begin = None
    return Tokens(
        encode=lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        vocab_size=vocab_size,
        begin=begin,
        end=tokenizer.eos_token_id,
        tokenizer=tokenizer,
    )


def byte_tokens(vocab_size: int) -> Tokens:
    """Bytes, for a model without a tokenizer. Raises SlidetuneError for a vocabulary that can't hold them."""
    if vocab_size < 256:
        raise SlidetuneError(
            f"a vocabulary of {vocab_size} can't hold bytes, and the model has no tokenizer.",
            "Copy the tokenizer's files to the model's directory, or give rows of input_ids.",
        )
    return Tokens(encode=as_bytes, vocab_size=vocab_size)


def as_bytes(text: str) -> list[int]:
    """Encode text as its UTF-8 bytes: for models without a tokenizer."""
    return list(text.encode("utf-8"))


def checked_ids(ids: Sequence[int], vocab_size: int, what: str, *, empty: bool = True) -> list[int]:
    """The ids as a list. Raises ValueError, naming the field `what`, unless each is a token of the vocabulary, and if
    there are none where `empty` is not allowed."""
    ids = list(ids)
    if not ids and not empty:
        raise ValueError(f"has an empty {what}")
    # Of many tokens few are different.
    try:
        different = set(ids)
    except TypeError:
        raise ValueError(f"has lists or objects in its {what}, where token ids should be") from None
    wrong = next((i for i in different if type(i) is not int or not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"has {wrong!r} in its {what}, which is no token of a vocabulary of {vocab_size}")
    return ids


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many elements both begin with."""
    count = min(len(one), len(other))
    if one[:count] == other[:count]:
        return count
    return next((i for i in range(count) if one[i] != other[i]), count)


def _parts(text: str) -> Iterator[str]:
    at = 0
    while len(text) - at > _AT_ONCE and (found := _LINE_START.search(text, at + _AT_ONCE)):
        yield text[at : found.end()]
        at = found.end()
    yield text[at:]
