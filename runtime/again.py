"""A layer's forward pass again, for its backward pass; without its last product where nobody reads it.

Most layers end with a sum of the residual and their last product, and the gradient of a sum needs neither of its terms.
Of a gated MLP that product is a quarter of a layer's matrix work. Autograd builds its graph as ever, only the product
itself is not computed: so gradients are, bit for bit, those of the whole pass.

The first pass is whole and shows what becomes of the product; only if all of that is sums that end in the layer's
output is it left out. Each later pass is checked by autograd's graph again, and made whole if it went another way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slidetune.runtime.binding import Call

_PRODUCTS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2)}
"""With the places of their two matrices among the arguments."""
_SUM = "AddBackward0"
_ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Again:
    """Runs one layer again and again. `whole`: always all of it, as must be where it draws random numbers: a pass that
    goes another way than the first is made twice."""

    def __init__(self, layer: nn.Module, *, whole: bool = False) -> None:
        self.layer = layer
        self.left_out: nn.Linear | None = None
        """Whose product is left out from the second time on."""
        self._looked = whole

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """The layer's output for autograd to go back from; its contents mean nothing. Gradients must be enabled."""
        # Whoever has hooked something sees it whole.
        if has_hooks(self.layer) or _has_global_hooks():
            return layer_output(self.layer, x, call)
        if not self._looked:
            self._looked = True
            return self._look(x, call)
        if self.left_out is None:
            return layer_output(self.layer, x, call)
        if _is_plain(self.left_out):
            with _without_product(self.left_out) as outputs:
                out = layer_output(self.layer, x, call)
            if len(outputs) == 1 and _only_in_sum(out, outputs[0]):
                return out
        self.left_out = None
        return layer_output(self.layer, x, call)

    def _look(self, x: Tensor, call: Call) -> Tensor:
        with _last_linear(self.layer) as ran:
            out = layer_output(self.layer, x, call)
        if ran.calls and ran.only_added and [module for module, _ in ran.calls].count(ran.calls[-1][0]) == 1:
            module, product = ran.calls[-1]
            if _only_in_sum(out, product):
                self.left_out = module
        return out


def layer_output(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """What a layer makes of its input, called as transformers calls it."""
    args, kwargs = call
    out = layer(x, *args, **kwargs)
    return out if isinstance(out, Tensor) else out[0]


def has_hooks(module: nn.Module) -> bool:
    """Whether anything in a module has hooks."""
    return any(getattr(part, kind) for part in module.modules() for kind in _HOOKS)


def _has_global_hooks() -> bool:
    return any(getattr(torch_module, f"_global{kind}", None) for kind in _HOOKS)


class _Ran(TorchFunctionMode):
    """Which linear modules ran, and whether what the last of them gave is only added to something, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[nn.Linear, Any]] = []
        """Each with what autograd calls its output."""
        self.only_added = True
        self._sums: list[Tensor] = []
        """The output of the last one, and sums with it."""

    def ran(self, module: nn.Linear, _: Any, out: Tensor) -> None:
        self.calls.append((module, out.grad_fn))
        self.only_added, self._sums = True, [out]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Shapes and the like, which are no values, are asked for by getters.
        if getattr(func, "__name__", "") != "__get__" and self._takes_sum((args, kwargs)):
            if func in _ADDITIONS:
                self._sums.append(out)
            # Dropout of nothing gives back what it was given.
            elif not any(out is one for one in self._sums):
                self.only_added = False
        return out

    def _takes_sum(self, value: Any) -> bool:
        if isinstance(value, Tensor):
            return any(value is one for one in self._sums)
        if isinstance(value, dict):
            return any(self._takes_sum(one) for one in value.values())
        return isinstance(value, list | tuple) and any(self._takes_sum(one) for one in value)


@contextlib.contextmanager
def _last_linear(layer: nn.Module) -> Iterator[_Ran]:
    """Inside, notes are taken of the plain linear modules of `layer` that run."""
    ran = _Ran()
    hooks = [module.register_forward_hook(ran.ran) for module in layer.modules() if _is_plain(module)]
    try:
        with ran:
            yield ran
    finally:
        for hook in hooks:
            hook.remove()


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is linear and nothing else."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


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
def _without_product(linear: nn.Linear) -> Iterator[list[Any]]:
    """Inside, a linear module's output has its shape and its place in autograd's graph, and is not computed. The list
    has what autograd calls each output."""
    whole, outputs = linear.forward, []

    def forward(x: Tensor) -> Tensor:
        with _LeftOut():
            out = whole(x)
        outputs.append(out.grad_fn)
        return out

    linear.forward = forward
    try:
        yield outputs
    finally:
        del linear.forward


class _LeftOut(TorchDispatchMode):
    """Products inside are memory as it comes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        places = _PRODUCTS.get(func)
        if places is None:
            return func(*args, **(kwargs or {}))
        left, right = (args[place] for place in places)
        return left.new_empty(left.shape[0], right.shape[1])
