"""Cross entropy on the device as one pass over the logits for the loss and one for their gradient, in their place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_IGNORED = -100
_BLOCK = 8192


@triton.jit
def _cross_entropy(logits, stride, labels, losses, scale, vocabulary, ignored: tl.constexpr, block: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    label = tl.load(labels + token)
    columns = tl.arange(0, block)
    if label == ignored:
        for start in range(0, vocabulary, block):
            inside = start + columns < vocabulary
            tl.store(row + start + columns, tl.zeros((block,), row.dtype.element_ty), inside)
        tl.store(losses + token, 0.0)
    else:
        # Maximum and sum of exponentials so far, of each place in the block apart.
        most = tl.full((block,), float("-inf"), tl.float32)
        total = tl.zeros((block,), tl.float32)
        for start in range(0, vocabulary, block):
            inside = start + columns < vocabulary
            x = tl.load(row + start + columns, inside, other=float("-inf")).to(tl.float32)
            above = tl.maximum(most, x)
            # A place outside the vocabulary has seen nothing yet: its exponentials are of -inf less -inf.
            total = tl.where(inside, total * tl.exp(most - above) + tl.exp(x - above), total)
            most = tl.where(inside, above, most)
        highest = tl.max(most, 0)
        normaliser = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
        own = tl.load(row + label).to(tl.float32)
        tl.store(losses + token, (normaliser - own) * scale)
        for start in range(0, vocabulary, block):
            at = start + columns
            inside = at < vocabulary
            x = tl.load(row + at, inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - normaliser) - tl.where(at == label, 1.0, 0.0)
            tl.store(row + at, (gradient * scale).to(row.dtype.element_ty), inside)


def cross_entropy_in_place(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """The losses of each token times `scale`, fp32 [tokens]; the logits become their gradient.

    Args:
        logits: [tokens, vocabulary], rows contiguous, any float type; computed with in fp32.
        labels: int64 [tokens]; -100 where there is no loss.
        scale: what each loss is multiplied by.
    """
    tokens, vocabulary = logits.shape
    losses = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    with torch.cuda.device(logits.device):
        _cross_entropy[tokens,](
            logits,
            logits.stride(0),
            labels,
            losses,
            scale,
            vocabulary,
            ignored=_IGNORED,
            block=block,
            num_warps=8,
        )
    return losses
