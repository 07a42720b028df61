"""Head and loss of some tokens, forward and backward.

On the CPU, and for a model with a loss of its own, autograd runs the model's head and loss as they are. On CUDA the
cross entropy is one kernel that leaves the logits' gradient in the logits' place, and the matrix's gradient is added
to its fp32 sum by the product that makes it: there are no fp32 logits and no bf16 copy of the gradient, and each
gradient is rounded no more often.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from slidetune.runtime.binding import Parts
from slidetune.runtime.pointing import Pointed

HeadLoss = Callable[[Tensor, Tensor, int], Tensor]
"""(hidden states [tokens, width] that require a gradient, shifted labels [tokens], labels of the step) -> these
tokens' part of the loss, a detached fp32 scalar. The gradients have gone where they belong."""


def head_loss(parts: Parts, pointed: Pointed, device: torch.device) -> HeadLoss:
    """How this model's head and loss are run on a device; `pointed` are the head's modules."""
    if _fuses(parts, device):
        return _fused(parts, pointed)
    logits_of = parts.head()

    def run(x: Tensor, labels: Tensor, items: int) -> Tensor:
        loss = parts.loss(logits_of(x.unsqueeze(0)), labels, items)
        loss.backward()
        return loss.detach()

    return run


def loss_alone(parts: Parts, device: torch.device) -> HeadLoss:
    """The same without gradients, of hidden states that require none: by the same kernels, so to the same bits."""
    logits_of = parts.head()
    if not _fuses(parts, device):
        return lambda x, labels, items: parts.loss(logits_of(x.unsqueeze(0)), labels, items)

    from slidetune.runtime.cross_entropy_triton import cross_entropy_in_place

    def run(x: Tensor, labels: Tensor, items: int) -> Tensor:
        logits = logits_of(x.unsqueeze(0))
        return cross_entropy_in_place(logits.view(-1, logits.shape[-1]), labels, 1.0 / items).sum()

    return run


def chunked_loss_alone(run: HeadLoss, hidden: Tensor, labels: Tensor, items: int, chunk_tokens: int) -> Tensor:
    """`chunked_loss` without gradients; `hidden` stays as it is."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    with torch.no_grad():
        for part, wanted in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
            total += run(part, wanted, items)
    return total


def chunked_loss(run: HeadLoss, hidden: Tensor, labels: Tensor, items: int, chunk_tokens: int) -> Tensor:
    """The sum over chunks of tokens; fp32 scalar. `hidden`: bf16 [tokens, width]; receives its own gradient."""
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for part, wanted in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        with torch.enable_grad():
            x = part.data.requires_grad_()
            total += run(x, wanted, items)
        part.copy_(x.grad)
    return total


def _fuses(parts: Parts, device: torch.device) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return device.type == "cuda" and parts.model.loss_function is ForCausalLMLoss


def _fused(parts: Parts, pointed: Pointed) -> HeadLoss:
    from slidetune.runtime.cross_entropy_triton import cross_entropy_in_place

    linear = _SummingLinear(parts.head_module, pointed)
    logits_of = parts.head(linear)

    def run(x: Tensor, labels: Tensor, items: int) -> Tensor:
        logits = logits_of(x.unsqueeze(0))
        gradient = logits.detach()
        losses = cross_entropy_in_place(gradient.view(-1, gradient.shape[-1]), labels, 1.0 / items)
        torch.autograd.backward(logits, gradient)
        linear.collect()
        return losses.sum()

    return run


class _SummingLinear(nn.Module):
    """The head's linear module, whose matrix's gradient goes straight into the slot that collects it."""

    def __init__(self, linear: nn.Module, pointed: Pointed) -> None:
        super().__init__()
        # Neither is a child: the matrix is the original module's, and pointed anew at each step.
        self.__dict__["linear"], self.__dict__["pointed"] = linear, pointed
        self.factors: tuple[Tensor, Tensor] | None = None
        """Upstream gradient [tokens, vocabulary] and input [tokens, width] of the last backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        linear = self.__dict__["linear"]
        return _Product.apply(x, linear.weight.detach(), linear.bias, self)

    def collect(self) -> None:
        """Add the matrix's gradient of the last backward pass; on the caller's thread, not on autograd's."""
        (upstream, x), self.factors = self.factors, None
        target, fresh = self.__dict__["pointed"].claim(self.__dict__["linear"], "weight")
        if target is None:
            return
        if fresh:
            torch.mm(upstream.T, x, out_dtype=torch.float32, out=target)
        else:
            torch.addmm(target, upstream.T, x, out_dtype=torch.float32, out=target)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, module: _SummingLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.module, ctx.has_bias = module, bias is not None and bias.requires_grad
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        flat = upstream.reshape(-1, upstream.shape[-1])
        ctx.module.factors = flat, x.reshape(-1, x.shape[-1])
        return upstream @ weight, None, flat.sum(0) if ctx.has_bias else None, None
