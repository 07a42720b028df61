"""A layer's forward pass again, for its backward pass; without the products that nobody reads.

Most layers end with a sum of the residual and their last product, and the gradient of a sum needs neither of its terms.
Of a gated MLP that product is a quarter of a layer's matrix work. Attention's last product, too, is only added: to the
layer's input. Where the forward pass has saved that sum, the one in the layer's middle, it need not be made again.
And what the forward pass has kept of the products between the two, gate and up, is taken as it is. Autograd builds its
graph as ever, only the products and sums themselves are not computed: so gradients are, bit for bit, those of the
whole pass.

The first pass leaves nothing out and shows what becomes of each product; only if all of that is sums is it left out.
Each later pass is checked again, by the functions it calls and by autograd's graph, and made whole if it went another
way.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from slidetune.errors import SlidetuneError
from slidetune.runtime.binding import Call

_PRODUCTS = {torch.ops.aten.mm.default: (0, 1), torch.ops.aten.addmm.default: (1, 2)}
"""With the places of their two matrices among the arguments."""
_ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
"""Of two tensors, without factors."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Again:
    """Runs one layer again and again. `whole`: always all of it, as must be where it draws random numbers: a pass that
    goes another way than the first is made twice."""

    def __init__(self, layer: nn.Module, *, whole: bool = False) -> None:
        self.layer = layer
        self.last: int | None = None
        """The linear product, counted from 0, that is left out since only the layer's output depends on it."""
        self.middle: int | None = None
        """The one that is only added to the layer's input."""
        self._looked = whole

    def __call__(self, x: Tensor, call: Call, middle: Tensor | None = None, products: Sequence[Tensor] = ()) -> Tensor:
        """The layer's output for autograd to go back from; its contents mean nothing. Gradients must be enabled.

        What the forward pass has saved must be as it was until the backward pass has ended. `middle`: the sum of the
        layer's input and attention, shaped as `x`. `products`: those between that sum and the last, in their order.
        Raises SlidetuneError if the layer has no such sum or products.
        """
        # Whoever has hooked something sees it whole.
        if has_hooks(self.layer) or _has_global_hooks():
            return layer_output(self.layer, x, call)
        left_out: dict[int, Tensor | None] = {} if self.last is None else {self.last: None}
        if middle is not None and self.middle is not None:
            left_out[self.middle] = middle
        if self._looked and not left_out:
            return layer_output(self.layer, x, call)
        with _Without(left_out, products, x) as ran:
            out = layer_output(self.layer, x, call)
        if not self._looked:
            self._looked = True
            self._look(ran, out)
            if (middle is not None or products) and self.middle is None:
                raise _no_middle(self.layer)
            if products and (self.last is None or not ran.took_all):
                raise _no_products(self.layer)
            return out
        if ran.went_the_same_way(out):
            return out
        del out
        self.last = self.middle = None
        return layer_output(self.layer, x, call)

    def _look(self, ran: _Products, out: Tensor) -> None:
        found = ran.products
        if ran.middle is not None and not found[ran.middle].read and _uses(out, found[ran.middle].node) == 1:
            self.middle = ran.middle
        if found and found[-1].only_added and _only_in_sum(out, found[-1].node):
            self.last = len(found) - 1


def saving(
    layer: nn.Module, x: Tensor, call: Call, *, middle: Tensor | None = None, products: bool = False
) -> tuple[Tensor, list[Tensor] | None]:
    """The layer's output without gradients, and what is saved for its recomputation; None if nothing is, since the
    layer has hooks, and what has them is recomputed whole.

    The sum of its input and attention is left in `middle`, shaped as `x`; with `products`, those between that sum and
    the last product are returned. Raises SlidetuneError if the layer has no such sum or products.
    """
    if has_hooks(layer) or _has_global_hooks():
        return layer_output(layer, x, call), None
    with _Saving(x, middle, keeps=products) as ran:
        out = layer_output(layer, x, call)
    if not ran.has_middle:
        raise _no_middle(layer)
    if products and not ran.has_products:
        raise _no_products(layer)
    # The last product is left out in any case.
    return out, ran.kept[:-1]


def _no_middle(layer: nn.Module) -> SlidetuneError:
    return SlidetuneError(
        f"{type(layer).__name__} has no sum of its input and attention alone to save.",
        "In the plan, set recompute.middle and recompute.products to 0.",
    )


def _no_products(layer: nn.Module) -> SlidetuneError:
    return SlidetuneError(
        f"{type(layer).__name__} has no products between attention and its last one that could be kept.",
        "In the plan, set recompute.products to 0.",
    )


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


@dataclass(slots=True, eq=False)
class _Product:
    """A linear function's output."""

    node: Any
    """What autograd calls it."""
    sums: list[weakref.ref[Tensor]]
    """The product, and sums with it. Whoever doesn't hold them can't read them."""
    read: bool = False
    """The product itself was used for more than one addition."""
    only_added: bool = True
    """It and all sums with it were used for additions alone."""
    given: Tensor | None = None
    """What was handed out as the sum of it and something else."""
    version: int = 0

    def give(self, value: Tensor) -> Tensor:
        self.given, self.version = value, value._version
        return value

    def untouched(self) -> bool:
        """Whether a sum was handed out, and nobody has written to that since."""
        return self.given is not None and self.given._version == self.version


class _Products(TorchFunctionMode):
    """Takes note of linear products while a layer runs, and of what becomes of them."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x
        self.products: list[_Product] = []
        self.middle: int | None = None
        """Which product was the first to be added to the layer's input."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.linear:
            out = self.multiply(len(self.products), args, kwargs)
            self.products.append(_Product(out.grad_fn, [weakref.ref(out)]))
            return out
        # Shapes and the like, which getters are asked for, are no values.
        if getattr(func, "__name__", "") == "__get__":
            out = func(*args, **kwargs)
            if not isinstance(out, Tensor):
                return out
        uses = [(n, one) for n, one in enumerate(self.products) if any(_takes((args, kwargs), r()) for r in one.sums)]
        added = func in _ADDITIONS and len(args) == 2 and not kwargs
        if added:
            terms = [n for n, one in uses if _takes(args, one.sums[0]())]
            if self.middle is None and _takes(args, self.x) and terms and not self.products[terms[0]].read:
                self.middle = terms[0]
            out = self.add(func, args, terms)
        else:
            out = func(*args, **kwargs)
        for _, product in uses:
            # Dropout of nothing gives back what it was given.
            if any(out is one() for one in product.sums):
                continue
            if _takes((args, kwargs), product.sums[0]()):
                product.read |= not added or len(product.sums) > 1
            if added:
                product.sums.append(weakref.ref(out))
            else:
                product.only_added = False
        return out

    def multiply(self, place: int, args: tuple, kwargs: dict) -> Tensor:
        """The next product."""
        return nn.functional.linear(*args, **kwargs)

    def add(self, func: Any, terms: tuple, places: list[int]) -> Tensor:
        """The sum of two terms, the products in `places` among them."""
        return func(*terms)


class _Saving(_Products):
    """Leaves the sum of the layer's input and a product in `target`, if given, and keeps all products after it."""

    def __init__(self, x: Tensor, target: Tensor | None, *, keeps: bool) -> None:
        super().__init__(x)
        self.target, self.keeps = target, keeps
        self.kept: list[Tensor] = []
        self._versions: list[int] = []

    def multiply(self, place: int, args: tuple, kwargs: dict) -> Tensor:
        out = super().multiply(place, args, kwargs)
        if self.keeps and self.middle is not None:
            self.kept.append(out)
            self._versions.append(out._version)
        return out

    def add(self, func: Any, terms: tuple, places: list[int]) -> Tensor:
        if self.middle not in places or self.products[self.middle].given is not None or not _alike(*terms):
            return super().add(func, terms, places)
        product = self.products[self.middle]
        if self.target is None:
            return product.give(super().add(func, terms, places))
        torch.add(*terms, out=self.target)
        return product.give(self.target.data)

    @property
    def has_middle(self) -> bool:
        return self.middle is not None and self.products[self.middle].untouched()

    @property
    def has_products(self) -> bool:
        """Whether there are any but the last, and nobody has written to them."""
        return len(self.kept) > 1 and [one._version for one in self.kept] == self._versions


class _Without(_Products):
    """Some products and their sums are not computed: their outputs have their shape and their place in autograd's
    graph. `sums`: by product, what the sum of it and the layer's input is, or None where nobody will read it. `known`:
    the products after that sum, as far as they are known."""

    def __init__(self, sums: Mapping[int, Tensor | None], known: Sequence[Tensor], x: Tensor) -> None:
        super().__init__(x)
        self.sums, self.known = sums, known

    def multiply(self, place: int, args: tuple, kwargs: dict) -> Tensor:
        after = -1 if self.middle is None else place - self.middle - 1
        known = self.known[after] if 0 <= after < len(self.known) else None
        if known is None and place not in self.sums:
            return super().multiply(place, args, kwargs)
        with _LeftOut(known):
            return super().multiply(place, args, kwargs)

    def add(self, func: Any, terms: tuple, places: list[int]) -> Tensor:
        places = [place for place in places if place in self.sums and self.products[place].given is None]
        if not places or not _alike(*terms):
            return super().add(func, terms, places)
        product, known = self.products[places[0]], self.sums[places[0]]
        if known is None:
            # Memory that means nothing, as the product's.
            known = product.sums[0]()
        elif places[0] != self.middle:
            return super().add(func, terms, places)
        return product.give(_Known.apply(*terms, [known]))

    @property
    def took_all(self) -> bool:
        """Whether all known products were taken, and none but the last came after them."""
        return not self.known or (self.middle is not None and len(self.products) == self.middle + len(self.known) + 2)

    def went_the_same_way(self, out: Tensor) -> bool:
        """Whether the layer's output depends on no value that was left out."""
        if len(self.products) <= max(self.sums) or not self.took_all:
            return False
        return all(
            product.untouched()
            and not product.read
            and (
                product.only_added and _only_in_sum(out, product.node)
                if known is None
                else _uses(out, product.node) == 1
            )
            for product, known in ((self.products[place], known) for place, known in self.sums.items())
        )


def _alike(one: Any, other: Any) -> bool:
    """Whether the sum of two terms is a tensor of the same kind."""
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.dtype == other.dtype


class _Known(torch.autograd.Function):
    """A sum whose value is known, or will not be read: for autograd a sum."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor, value: list[Tensor]) -> Tensor:
        return value[0].data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient, None


_SUMS = ("AddBackward0", "_KnownBackward")


def _takes(arguments: Any, value: Tensor | None) -> bool:
    """Whether a value is among a function's arguments."""
    if value is None:
        return False
    if isinstance(arguments, dict):
        arguments = arguments.values()
    return any(one is value or (isinstance(one, list | tuple | dict) and _takes(one, value)) for one in arguments)


def _only_in_sum(out: Tensor, product: Any) -> bool:
    """Whether an output depends on a product, told by its node in autograd's graph, by sums alone."""
    node = out.grad_fn
    while node is not None and node.name() in _SUMS:
        through = [term for term in _terms(node) if any(one is product for one in _graph(term))]
        if len(through) != 1:
            return False
        if through[0] is product:
            return True
        node = through[0]
    return False


def _uses(out: Tensor, product: Any) -> int:
    """How often a product is used for an output."""
    return sum(term is product for node in _graph(out.grad_fn) for term in _terms(node))


def _terms(node: Any) -> list[Any]:
    return [term for term, _ in node.next_functions if term is not None]


def _graph(start: Any) -> Iterator[Any]:
    """A node of autograd's graph and all that it depends on, each once."""
    seen, ahead = {start}, [start]
    while ahead:
        node = ahead.pop()
        yield node
        for term in _terms(node):
            if term not in seen:
                seen.add(term)
                ahead.append(term)


class _LeftOut(TorchDispatchMode):
    """Products inside are what is known of them, or memory as it comes."""

    def __init__(self, known: Tensor | None = None) -> None:
        super().__init__()
        self.known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        places = _PRODUCTS.get(func)
        if places is None:
            return func(*args, **(kwargs or {}))
        left, right = (args[place] for place in places)
        shape = left.shape[0], right.shape[1]
        return left.new_empty(shape) if self.known is None else self.known.data.view(shape)
