"""What `slidetune run` trains on: a text file, rows of JSON, or random tokens, in memory; a faulty row is refused.

A text file, and rows that have nothing but a `text`, become one long stream of tokens cut into sequences: no padding.
Rows with a `prompt` and a `completion` are a sequence each, padded, with a loss on the completion only; rows of
`input_ids`, perhaps with `labels`, are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidetune.errors import BadFile
from slidetune.plans import Plan
from slidetune.runtime.batches import IGNORED
from slidetune.runtime.data.tokens import Encode, checked_ids

Batch = dict[str, Tensor]

_SHOWN_ROWS = 10


@dataclass(frozen=True, slots=True)
class Samples:
    """Sequences of one length: int64 [count, seq_len] each."""

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor | None = None
    """None where nothing is padded."""
    truncated: int = 0
    """Rows of which an end was cut off, being longer than a sequence."""

    def batches(self, plan: Plan, seed: int = 0) -> Iterator[Batch]:
        """Batches without end: every sequence once, in random order, then again in another. What is left of a
        round fills up with the next."""
        generator = torch.Generator().manual_seed(seed)
        waiting = torch.empty(0, dtype=torch.long)
        while True:
            while waiting.numel() < plan.batch:
                order = torch.randperm(self.input_ids.shape[0], generator=generator)
                waiting = torch.cat((waiting, order))
            picked, waiting = waiting[: plan.batch], waiting[plan.batch :]
            batch = {"input_ids": self.input_ids[picked], "labels": self.labels[picked]}
            if self.attention_mask is not None:
                batch["attention_mask"] = self.attention_mask[picked]
            yield batch


def synthetic(vocab_size: int, plan: Plan, seed: int = 0) -> Iterator[Batch]:
    """Batches of uniformly random tokens without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield {"input_ids": torch.randint(0, vocab_size, (plan.batch, plan.seq_len), generator=generator)}


def read_samples(path: str | Path, encode: Encode, seq_len: int, *, vocab_size: int, end: int | None = None) -> Samples:
    """The sequences of a text file, or of a .jsonl file's rows.

    `end`: the token that ends a row, if the model has one. Raises BadFile, naming malformed rows by number, for a
    file that is missing, empty, too short for one sequence or has rows that can't be used, or of which nothing is
    left to learn where the sequence ends.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file.") from None
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise BadFile(f"{path}: not UTF-8 (byte {error.start}).") from None
    if not text.strip():
        raise BadFile(f"{path}: the file is empty.")
    if path.suffix != ".jsonl":
        return _stream(path, [_text_tokens(path, text, encode, vocab_size)], seq_len, None)
    rows = _rows(path, text, encode, vocab_size, end)
    if all(labels is None for _, _, labels in rows):
        return _stream(path, [ids for _, ids, _ in rows], seq_len, end)
    filled = [(number, ids, ids if labels is None else labels) for number, ids, labels in rows]
    _check_something_is_left(path, filled, seq_len)
    return _padded([(ids, labels) for _, ids, labels in filled], seq_len)


Row = tuple[list[int], "list[int] | None"]
"""Token ids, and labels where they are not the ids of a stream."""
NumberedRow = tuple[int, list[int], "list[int] | None"]
"""The same, with the row's number in the file before it."""


def _text_tokens(path: Path, text: str, encode: Encode, vocab_size: int) -> list[int]:
    try:
        return checked_ids(encode(text), vocab_size, "text", empty=False)
    except ValueError as error:
        raise BadFile(f"{path}: {error}.") from None


def _rows(path: Path, text: str, encode: Encode, vocab_size: int, end: int | None) -> list[NumberedRow]:
    """Rows that are not blank."""
    rows: list[NumberedRow] = []
    faults: list[str] = []
    # splitlines would also break a row at characters that JSON takes as they are, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, *_row(json.loads(line), encode, vocab_size, end)))
        except json.JSONDecodeError as error:
            faults.append(f"row {number} is not JSON ({error.msg} at column {error.colno})")
        except ValueError as error:
            faults.append(f"row {number} {error}")
    _refuse(
        path, faults, "A row is an object with text, with prompt and completion, or with input_ids and perhaps labels."
    )
    return rows


def _refuse(path: Path, faults: list[str], hint: str) -> None:
    """Raise BadFile with the first faults of rows, if there are any."""
    if faults:
        more = f"; and {len(faults) - _SHOWN_ROWS} rows more" if len(faults) > _SHOWN_ROWS else ""
        raise BadFile(f"{path}: {'; '.join(faults[:_SHOWN_ROWS])}{more}.", hint)


def _check_something_is_left(path: Path, rows: list[tuple[int, list[int], list[int]]], seq_len: int) -> None:
    """Raise BadFile for rows whose labels all lie behind the end of a sequence: a step could do nothing with them."""
    # The first label is nobody's next token.
    faults = [
        f"row {number} has {len(ids):,} tokens, and none to learn in its first {seq_len:,}"
        for number, ids, labels in rows
        if len(ids) > seq_len and all(label == IGNORED for label in labels[1:seq_len])
    ]
    _refuse(path, faults, "Shorten or remove these rows, or make a plan for longer sequences (--seq-len).")


def _row(row: Any, encode: Encode, vocab_size: int, end: int | None) -> Row:
    """One row's ids and labels; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("is no object")
    ending = [] if end is None else [end]
    if isinstance(row.get("text"), str):
        return checked_ids(encode(row["text"]), vocab_size, "text", empty=False), None
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        prompt = checked_ids(encode(row["prompt"]), vocab_size, "prompt")
        completion = [*checked_ids(encode(row["completion"]), vocab_size, "completion", empty=False), *ending]
        return prompt + completion, [IGNORED] * len(prompt) + completion
    if isinstance(row.get("input_ids"), list):
        ids = checked_ids(row["input_ids"], vocab_size, "input_ids", empty=False)
        labels = row.get("labels", ids)
        if not isinstance(labels, list) or len(labels) != len(ids):
            raise ValueError("has labels that are not as many as its input_ids")
        checked_ids([label for label in labels if label != IGNORED], vocab_size, "labels")
        return ids, labels
    raise ValueError("has no text, no prompt and completion, and no input_ids")


def _stream(path: Path, rows: list[list[int]], seq_len: int, end: int | None) -> Samples:
    flat: list[int] = []
    for ids in rows:
        flat += ids if end is None else [*ids, end]
    count = len(flat) // seq_len
    if not count:
        raise BadFile(f"{path}: {len(flat)} tokens are too few for one sequence of {seq_len}.")
    ids = torch.tensor(flat[: count * seq_len], dtype=torch.long).view(count, seq_len)
    return Samples(ids, ids)


def _padded(rows: list[tuple[list[int], list[int]]], seq_len: int) -> Samples:
    shape = (len(rows), seq_len)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    for number, (row_ids, row_labels) in enumerate(rows):
        count = min(len(row_ids), seq_len)
        ids[number, :count] = torch.tensor(row_ids[:count])
        labels[number, :count] = torch.tensor(row_labels[:count])
        mask[number, :count] = 1
    return Samples(ids, labels, mask, sum(len(row_ids) > seq_len for row_ids, _ in rows))
