"""A user's batch cut into micro-batches, with all that their passes through the model need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slidetune.errors import SlidetuneError
from slidetune.plans import Plan
from slidetune.runtime.binding import Call, Parts
from slidetune.runtime.row_kernels import Readers
from slidetune.runtime.steps import MicroBatch

IGNORED = -100
_KNOWN = ("input_ids", "attention_mask", "position_ids", "labels")


def checked(batch: Mapping[str, Any], plan: Plan, vocab_size: int, positions: int) -> dict[str, Tensor]:
    """The batch's tensors on the host, int64, its labels among them. Raises SlidetuneError for one that the plan or
    the model, of so many positions, can't take.

    Labels are as transformers has them: the ids themselves, unshifted, -100 where no loss is wanted. Without them
    every token that is no padding is one.
    """
    if not isinstance(batch, Mapping):
        raise SlidetuneError(f"a batch is a mapping of {', '.join(_KNOWN)}, not {type(batch).__name__}.")
    unknown = [name for name, value in batch.items() if name not in _KNOWN and value is not None]
    if unknown:
        raise SlidetuneError(f"the batch has {', '.join(unknown)}; a step takes {', '.join(_KNOWN)}.")
    if batch.get("input_ids") is None:
        raise SlidetuneError("the batch has no input_ids.")
    tensors = {name: _integers(name, value) for name, value in batch.items() if value is not None}
    ids = tensors["input_ids"]
    if ids.dim() != 2 or ids.shape[0] != plan.batch or not 0 < ids.shape[1] <= plan.seq_len:
        raise SlidetuneError(
            f"input_ids are {tuple(ids.shape)}; the plan is for {plan.batch} sequences "
            f"(micro_batch {plan.micro_batch} x accumulation {plan.accumulation}) of at most {plan.seq_len} tokens."
        )
    wrong = [name for name, tensor in tensors.items() if tensor.shape != ids.shape]
    if wrong:
        raise SlidetuneError(f"{', '.join(wrong)} must have the shape of input_ids, {tuple(ids.shape)}.")
    _check_range("input_ids", ids, vocab_size, f"the vocabulary is {vocab_size}")
    if "position_ids" in tensors:
        _check_range("position_ids", tensors["position_ids"], positions, f"the model has {positions} positions")
    if "labels" in tensors:
        # CUDA would end the process at a label that is no token.
        counted = tensors["labels"][tensors["labels"] != IGNORED]
        _check_range("labels", counted, vocab_size, f"the vocabulary is {vocab_size}, and {IGNORED} is no label")
    else:
        labels = ids.clone()
        if "attention_mask" in tensors:
            labels[tensors["attention_mask"] == 0] = IGNORED
        tensors["labels"] = labels
    return tensors


def _integers(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise SlidetuneError(f"{name} can't be made a tensor of integers: {error}.") from None
    # A mask may be of truth values.
    whole = not (tensor.is_floating_point() or tensor.is_complex())
    if not whole or (tensor.dtype == torch.bool and name != "attention_mask"):
        raise SlidetuneError(f"{name} must be integers, not {str(tensor.dtype).removeprefix('torch.')}.")
    return tensor.long()


def _check_range(name: str, values: Tensor, end: int, because: str) -> None:
    if values.numel() and (int(values.min()) < 0 or int(values.max()) >= end):
        raise SlidetuneError(f"{name} go from {int(values.min())} to {int(values.max())}; {because}.")


def shifted(labels: Tensor) -> Tensor:
    """What each position is to predict: the next label, and nothing at the end of a sequence."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:].contiguous()


def micro_batches(
    tensors: Mapping[str, Tensor], plan: Plan, parts: Parts, device: torch.device, *, trained: bool = True
) -> tuple:
    """(micro-batches, rows of the embedding tables they read, sorted, labels that count). `trained`: a backward pass
    follows."""
    labels = shifted(tensors["labels"])
    items = int((labels != IGNORED).sum())
    if not items:
        raise SlidetuneError("no label in this batch counts: all are -100, or sequences have one token.")
    recorded = []
    for m in range(plan.accumulation):
        span = slice(m * plan.micro_batch, (m + 1) * plan.micro_batch)
        inputs = {name: tensor[span] for name, tensor in tensors.items() if name != "labels"}
        on_device = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
        calls, ids = parts.record_calls(device, on_device)
        recorded.append((span, inputs, calls, [i.cpu() for i in ids]))
    bases, at = [], 0
    for table in parts.tables:
        bases.append(at)
        at += table.rows
    read = [torch.unique(torch.cat([r[3][t].flatten() for r in recorded])) for t in range(len(bases))]
    result = []
    for span, inputs, calls, ids in recorded:
        rows = [torch.searchsorted(known, one.contiguous()) for known, one in zip(read, ids, strict=True)]
        readers = Readers.of(rows[0].reshape(-1), read[0].numel()) if trained and len(rows) == 1 else None
        there = readers is not None and plan.accumulation == 1 and device.type == "cuda"
        result.append(
            MicroBatch(
                inputs=inputs,
                labels=labels[span].flatten().to(device, non_blocking=True),
                calls=calls,
                rows=rows,
                readers=readers,
                readers_there=readers.on(device) if there else None,
                shape=tuple(inputs["input_ids"].shape),
                shared=_storages(calls),
            )
        )
    return result, torch.cat([known + base for known, base in zip(read, bases, strict=True)]), items


def _storages(calls: list[Call]) -> set[int]:
    """Addresses of the storages of all tensors in the layers' arguments."""
    found: set[int] = set()
    waiting: list[Any] = [calls]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            found.add(value.untyped_storage().data_ptr())
        elif isinstance(value, Mapping):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple):
            waiting.extend(value)
    return found
