"""A layer's forward pass again, for its backward pass; without its last product where nobody reads it.

Most layers end with a sum of the residual and their last product, and the gradient of a sum needs neither of its terms.
Of a gated MLP that product is a quarter of a layer's matrix work. Autograd builds its graph as ever, only the product
itself is not computed: so gradients are, bit for bit, those of the whole pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from slidetune.runtime.binding import Call

_PRODUCTS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2)}
"""With the places of their two matrices among the arguments."""
_SUM = "AddBackward0"


class Again:
    """Runs one layer again and again: the whole of it the first time, to see what its last product is needed for."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.left_out: nn.Linear | None = None
        """Whose product is left out from the second time on."""
        self._looked = False

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """The layer's output for autograd to go back from; its contents mean nothing. Gradients must be enabled."""
        if not self._looked:
            self._looked = True
            with _last_linear(self.layer) as last:
                out = layer_output(self.layer, x, call)
            if last and _only_in_sum(out, last[-1][1]):
                self.left_out = last[-1][0]
            return out
        # Whoever has hooked it since wants to see its output.
        if self.left_out is None or _is_changed(self.left_out):
            return layer_output(self.layer, x, call)
        with _without_product(self.left_out):
            return layer_output(self.layer, x, call)


def layer_output(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """What a layer makes of its input, called as transformers calls it."""
    args, kwargs = call
    out = layer(x, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


@contextlib.contextmanager
def _last_linear(layer: nn.Module) -> Iterator[list[tuple[nn.Linear, Any]]]:
    """Inside, the list has the linear module of `layer` that ran last, if any did, with what autograd calls its
    output."""
    last: list[tuple[nn.Linear, Any]] = []

    def ran(module: nn.Linear, _: Any, out: Tensor) -> None:
        last[:] = [(module, out.grad_fn)]

    modules = [module for module in layer.modules() if type(module) is nn.Linear and not _is_changed(module)]
    hooks = [module.register_forward_hook(ran) for module in modules]
    try:
        yield last
    finally:
        for hook in hooks:
            hook.remove()


def _is_changed(module: nn.Module) -> bool:
    """Whether a module does more than its class."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in module.__dict__ or any(hooks)


def _only_in_sum(out: Tensor, product: Any) -> bool:
    """Whether an output depends on a product, told by its node in autograd's graph, by sums alone."""
    node = out.grad_fn
    while node is not None and node.name() == _SUM:
        through = [term for term, _ in node.next_functions if term is not None and _reaches(term, product)]
        if len(through) != 1:
            return False
        if through[0] is product:
            return True
        node = through[0]
    return False


def _reaches(start: Any, product: Any) -> bool:
    """Whether a node of autograd's graph depends on another."""
    seen, ahead = set(), [start]
    while ahead:
        node = ahead.pop()
        if node is product:
            return True
        if node in seen:
            continue
        seen.add(node)
        ahead += [term for term, _ in node.next_functions if term is not None]
    return False


@contextlib.contextmanager
def _without_product(linear: nn.Linear) -> Iterator[None]:
    """Inside, a linear module's output has its shape and its place in autograd's graph, and is not computed."""
    whole = linear.forward

    def forward(x: Tensor) -> Tensor:
        with _Unmade():
            return whole(x)

    linear.forward = forward
    try:
        yield
    finally:
        del linear.forward


class _Unmade(TorchDispatchMode):
    """Products inside are memory as it comes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        places = _PRODUCTS.get(func)
        if places is None:
            return func(*args, **(kwargs or {}))
        left, right = (args[place] for place in places)
        return left.new_empty(left.shape[0], right.shape[1])
