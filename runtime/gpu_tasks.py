"""Tasks that compute: forward, recomputation and backward of layers, and head with loss."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from slidetune.plans import Placement
from slidetune.runtime.again import Again, Saving, layer_output
from slidetune.runtime.captured import Inputs
from slidetune.runtime.clipping import add_squares
from slidetune.runtime.head_loss import chunked_loss, chunked_loss_alone, loss_alone
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
    place, inner, passes = walk.machine.places[i], None, walk.machine.passes
    if place.inner != "recompute" and not stays_as_it_is(place):
        inner = walk.inner[i, m] = Inner(walk.device)
    middle = walk.slot(index, "middles")
    middle = walk.slot(index, "saved middles") if middle is None else middle
    if middle is not None:
        walk.middles[i, m] = middle
    saving = None
    if middle is not None or place.products:
        saving = Saving(walk.machine.parts.layers[i], products=place.products)

    def saved(step: Step, x: Tensor, inputs: Inputs) -> Tensor:
        target = None if middle is None else as_hidden(middle, x.shape[:2], walk.spec.hidden_size)
        out, step.saved[i, m] = saving(x, inputs.calls[i], target)
        if passes.recording:
            passes.keep(step.saved[i, m])
        return out

    def body(step: Step, inputs: Inputs) -> None:
        shape = step.micro_batches[m].shape
        pointed.point(weights)
        x = as_hidden(source, shape, walk.spec.hidden_size)
        if place.inner == "recompute":
            with torch.no_grad():
                out = _layer(walk, step, i, m, x, inputs) if saving is None else saved(step, x, inputs)
        else:
            x.requires_grad_()
            collecting = contextlib.nullcontext() if inner is None else inner.collecting(inputs.shared, x, weights)
            with torch.enable_grad(), collecting:
                out = _layer(walk, step, i, m, x, inputs)
            graph = step.graphs[i, m] = (x, get_gradient_edge(out))
            if passes.recording:
                passes.keep(graph)
        with torch.no_grad():
            as_hidden(target, shape, walk.spec.hidden_size).copy_(out.detach())

    once = passes.bind(m, body)
    if i or m:
        return once

    def first(step: Step) -> None:
        if step.prepared is not None:
            torch.cuda.current_stream(walk.device).wait_event(step.prepared)
        once(step)

    return first


def stays_as_it_is(place: Placement) -> bool:
    """Whether a layer's weights and input lie where its forward pass had them until its backward pass has ended, so
    that what autograd saves can be left to autograd."""
    return place.inner == "keep" and place.weights == "gpu" and place.saved_input == "gpu"


def _layer(walk: Walk, step: Step, i: int, m: int, x: Tensor, inputs: Inputs) -> Tensor:
    with walk.randomly(step, i + 1, m):
        return layer_output(walk.machine.parts.layers[i], x, inputs.calls[i])


def recompute(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's forward pass again, for its backward pass."""
    i, m = task.unit - 1, task.micro_batch
    source, middle = walk.hidden[i, m], walk.middles.get((i, m))
    pointed, weights = walk.machine.pointed[task.unit], walk.weights[task.unit]
    again = Again(walk.machine.parts.layers[i], whole=walk.machine.randomness.active)

    def body(step: Step, inputs: Inputs) -> None:
        pointed.point(weights)
        shape, width = step.micro_batches[m].shape, walk.spec.hidden_size
        x = as_hidden(source, shape, width).requires_grad_()
        products = step.saved.pop((i, m), None)
        known = None if middle is None or products is None else as_hidden(middle, shape, width)
        with torch.enable_grad(), walk.randomly(step, task.unit, m):
            out = again(x, inputs.calls[i], known, products)
            step.graphs[i, m] = (x, get_gradient_edge(out))

    return walk.machine.passes.bind(m, body)


def backward(walk: Walk, index: int, task: Task) -> Operation:
    """A layer's backward pass of one micro-batch; the gradient of its input takes the place of that of its output."""
    i, m, unit = task.unit - 1, task.micro_batch, task.unit
    accumulates = walk.plan.accumulation > 1
    pointed, weights, source = walk.machine.pointed[unit], walk.weights[unit], walk.hidden[i, m]
    if m == 0:
        slot = walk.slot(index, "gradients", torch.float32 if accumulates else torch.bfloat16)
        walk.gradient[unit] = None if slot is None else slot[: pointed.layout.trained]
    gradient, upstream = walk.gradient[unit], walk.upstream[m]
    place, inner, passes = walk.machine.places[i], walk.inner.pop((i, m), None), walk.machine.passes
    last = m == walk.plan.accumulation - 1
    keeps = walk.waiting.get(unit) if place.resident and last and gradient is not None else None

    def body(step: Step, _: Inputs) -> None:
        shape = step.micro_batches[m].shape
        x, out = step.graphs.pop((i, m))
        pointed.collect_into(gradient, fresh=m == 0)
        upward = as_hidden(upstream, shape, walk.spec.hidden_size)
        again = contextlib.nullcontext()
        if inner is not None:
            again = inner.brought_back(as_hidden(source, shape, walk.spec.hidden_size), weights)
        with again:
            # Replays need what a recorded forward pass has saved.
            torch.autograd.backward(out, upward, retain_graph=passes.recording and place.inner != "recompute")
        if m == 0:
            pointed.finish_collecting()
        upward.copy_(x.grad)
        x.grad = None

    once = passes.bind(m, body)
    if not last or gradient is None:
        return once

    def run(step: Step) -> None:
        once(step)
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
        with walk.machine.passes.memory():
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


def loss(walk: Walk, index: int, task: Task) -> Operation:
    """Norm, head and loss of one micro-batch, of a forward pass that no backward pass follows."""
    m, unit = task.micro_batch, task.unit
    pointed, weights, hidden = walk.machine.pointed[unit], walk.weights[unit], walk.hidden[walk.layers, m]
    run_alone = loss_alone(walk.machine.parts, walk.device)

    def run(step: Step) -> None:
        batch = step.micro_batches[m]
        pointed.point(weights)
        rows = as_hidden(hidden, batch.shape, walk.spec.hidden_size).view(-1, walk.spec.hidden_size)
        with walk.machine.passes.memory():
            found = chunked_loss_alone(run_alone, rows, batch.labels, step.items, walk.machine.loss_chunk)
        step.losses[m].copy_(found, non_blocking=True)

    return run
