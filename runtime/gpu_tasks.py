"""Tasks that compute: forward, recomputation and backward of layers, and head with loss."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from slidetune.plans import Placement
from slidetune.runtime.binding import Call
from slidetune.runtime.clipping import add_squares
from slidetune.runtime.head_loss import chunked_loss
from slidetune.runtime.rounding import round_in_place
from slidetune.runtime.saved import Inner
from slidetune.runtime.steps import Step
from slidetune.runtime.walk import Operation, Walk, as_hidden
from slidetune.schedule import Task


def forward(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's forward pass of one micro-batch."""
    i, m = task.unit - 1, task.micro_batch
    source = walk.hidden[i, m]
    target = walk.slot(index, "hidden states")
    target = walk.slot(index, "saved inputs") if target is None else target
    walk.hidden[i + 1, m] = target
    pointed, weights = walk.machine.pointed[task.unit], walk.weights[task.unit]
    place, inner = walk.machine.places[i], None
    if place.inner != "recompute" and not stays_as_it_is(place):
        inner = walk.inner[i, m] = Inner(walk.device)

    def run(step: Step) -> None:
        batch = step.micro_batches[m]
        if i == 0 and m == 0 and step.prepared is not None:
            torch.cuda.current_stream(walk.device).wait_event(step.prepared)
        pointed.point(weights)
        x = as_hidden(source, batch.shape, walk.spec.hidden_size)
        if place.inner == "recompute":
            with torch.no_grad():
                out = _layer(walk, step, i, m, x)
        else:
            x.requires_grad_()
            collecting = contextlib.nullcontext() if inner is None else inner.collecting(batch.shared, x, weights)
            with torch.enable_grad(), collecting:
                out = _layer(walk, step, i, m, x)
            step.graphs[i, m] = (x, get_gradient_edge(out))
        with torch.no_grad():
            as_hidden(target, batch.shape, walk.spec.hidden_size).copy_(out.detach())

    return run


def stays_as_it_is(place: Placement) -> bool:
    """Whether a layer's weights and input lie where its forward pass had them until its backward pass has ended, so
    that what autograd saves can be left to autograd."""
    return place.inner == "keep" and place.weights == "gpu" and place.saved_input == "gpu"


def _layer(walk: Walk, step: Step, i: int, m: int, x: Tensor) -> Tensor:
    with walk.randomly(step, i + 1, m):
        return layer_output(walk.machine.parts.layers[i], x, step.micro_batches[m].calls[i])


def layer_output(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """What a layer makes of its input, called as transformers calls it."""
    args, kwargs = call
    out = layer(x, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def recompute(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's forward pass again, for its backward pass."""
    i, m = task.unit - 1, task.micro_batch
    source = walk.hidden[i, m]
    pointed, weights = walk.machine.pointed[task.unit], walk.weights[task.unit]

    def run(step: Step) -> None:
        pointed.point(weights)
        x = as_hidden(source, step.micro_batches[m].shape, walk.spec.hidden_size).requires_grad_()
        with torch.enable_grad():
            step.graphs[i, m] = (x, get_gradient_edge(_layer(walk, step, i, m, x)))

    return run


def backward(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's backward pass of one micro-batch; the gradient of its input takes the place of that of its output."""
    i, m, unit = task.unit - 1, task.micro_batch, task.unit
    accumulates = walk.plan.accumulation > 1
    pointed, weights, source = walk.machine.pointed[unit], walk.weights[unit], walk.hidden[i, m]
    if m == 0:
        slot = walk.slot(index, "gradients", torch.float32 if accumulates else torch.bfloat16)
        walk.gradient[unit] = None if slot is None else slot[: pointed.layout.trained]
    gradient, upstream = walk.gradient[unit], walk.upstream[m]
    place, inner = walk.machine.places[i], walk.inner.pop((i, m), None)
    last = m == walk.plan.accumulation - 1
    keeps = walk.waiting.get(unit) if place.resident and last and gradient is not None else None

    def run(step: Step) -> None:
        shape = step.micro_batches[m].shape
        x, out = step.graphs.pop((i, m))
        pointed.collect_into(gradient, fresh=m == 0)
        upward = as_hidden(upstream, shape, walk.spec.hidden_size)
        again = contextlib.nullcontext()
        if inner is not None:
            again = inner.brought_back(as_hidden(source, shape, walk.spec.hidden_size), weights)
        with again:
            torch.autograd.backward(out, upward)
        if m == 0:
            pointed.finish_collecting()
        upward.copy_(x.grad)
        if not last or gradient is None:
            return
        whole = gradient
        if keeps is not None:
            whole = keeps.copy_(gradient)
        elif accumulates and not place.resident:
            whole = round_in_place(gradient)
        if walk.plan.clip_norm is not None:
            add_squares(step.squares, whole)

    return run


def head(walk: Walk, index: int, task: Task) -> Operation:
    """Norm, head and loss of one micro-batch, forward and backward."""
    m, unit = task.micro_batch, task.unit
    pointed, weights = walk.machine.pointed[unit], walk.weights[unit]
    if m == 0:
        slot = walk.slot(index, "head gradient", torch.float32)
        walk.gradient[unit] = None if slot is None else slot[: pointed.layout.trained]
    gradient = walk.gradient[unit]
    hidden = walk.upstream[m] = walk.hidden[walk.layers, m]
    last = m == walk.plan.accumulation - 1

    def run(step: Step) -> None:
        pointed.point(weights)
        pointed.collect_into(gradient, fresh=m == 0)
        loss = _loss(walk, step, m, hidden)
        step.losses[m].copy_(loss, non_blocking=True)
        if m == 0:
            pointed.finish_collecting()
        if last and gradient is not None:
            rounded = round_in_place(gradient)
            if walk.plan.clip_norm is not None:
                add_squares(step.squares, rounded)
        if last and walk.device.type == "cuda":
            step.loss_event = torch.cuda.Event(blocking=True)
            step.loss_event.record()

    return run


def _loss(walk: Walk, step: Step, m: int, hidden: Tensor) -> Tensor:
    """Forward and backward of norm, head and loss, some tokens at a time; the gradient takes the place of the
    hidden states."""
    batch = step.micro_batches[m]
    rows = as_hidden(hidden, batch.shape, walk.spec.hidden_size).view(-1, walk.spec.hidden_size)

    def run(x: Tensor, labels: Tensor, items: int) -> Tensor:
        with walk.randomly(step, walk.spec.head.index, m):
            return walk.head_loss(x, labels, items)

    return chunked_loss(run, rows, batch.labels, step.items, walk.machine.loss_chunk)
