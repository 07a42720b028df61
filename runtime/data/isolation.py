"""Does a model keep documents apart that share a sequence?

transformers finds them by position ids that start again, where there is no attention mask, and makes a mask of it
(`create_causal_mask`). Not every model's forward hands it the position ids (GPT-OSS's doesn't, in 5.24), and what
carries a state along the sequence (convolutions, linear attention) can't. So the model's own forward is asked: what
each layer is called with must keep a second document from the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from slidetune.runtime.binding import Parts

# Tokens of two documents: an odd number in all, which no rotary embedding is wide.
_FIRST, _SECOND = 4, 3


def why_not_packed(parts: Parts, device: torch.device | str = "cpu") -> str | None:
    """Why documents can't share a sequence of this model, None if they can. `device`: where its buffers are."""
    device = torch.device(device)
    carried = next((m for layer in parts.layers for m in layer.modules() if isinstance(m, nn.Conv1d)), None)
    if carried is not None:
        return "its layers carry a state along the sequence"
    count = _FIRST + _SECOND
    positions = torch.cat((torch.arange(_FIRST), torch.arange(_SECOND)))[None].to(device)
    calls, ids = parts.record_calls(device, {"input_ids": torch.zeros_like(positions), "position_ids": positions})
    if len(ids) > 1 and not all(torch.equal(asked.expand_as(positions), positions) for asked in ids[1:]):
        return "its learned positions don't start again with a document"
    for layer, (args, kwargs) in enumerate(calls):
        masks = [mask for mask in _tensors((args, kwargs)) if mask.shape[-2:] == (count, count)]
        if not masks or any(_seen(mask)[..., _FIRST:, :_FIRST].any() for mask in masks):
            return f"layer {layer} is not told where a document begins"
    return None


def _seen(mask: Tensor) -> Tensor:
    """Where a mask lets a token look: it is of truth values, or added to the scores."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
