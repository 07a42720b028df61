"""A layer's forward pass again, for its backward pass; without the products that nobody reads.

Most layers end with a sum of the residual and their last product, and the gradient of a sum needs neither of its terms.
Of a gated MLP that product is a quarter of a layer's matrix work. Attention's last product, too, is only added: to the
layer's input. Where the forward pass has saved that sum, the one in the layer's middle, it need not be made again. And
what the forward pass has kept of the products between the two, gate and up, is taken as it is. Autograd builds its
graph as ever, only the products and sums themselves are not computed: so gradients are, bit for bit, those of the
whole pass.

The first pass leaves nothing out and shows what becomes of each product; only if all of that is sums is it left out.
Each later pass is checked again, by the functions that read those products and by autograd's graph, and made whole if
it went another way.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
_LINEAR = nn.functional.linear
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Saved = Mapping[nn.Linear, Tensor]
"""Products that a forward pass has kept, by the module that made them."""


class Again:
    """Runs one layer again and again. `whole`: always all of it, as must be where it draws random numbers: a pass that
    goes another way than the first is made twice."""

    def __init__(self, layer: nn.Module, *, whole: bool = False) -> None:
        self.layer = layer
        self.last: nn.Linear | None = None
        """Whose product is left out, since only the layer's output depends on it, by sums alone."""
        self.middle: nn.Linear | None = None
        """Whose product is only added to the layer's input."""
        self._looked = whole

    def __call__(self, x: Tensor, call: Call, middle: Tensor | None = None, products: Saved | None = None) -> Tensor:
        """The layer's output for autograd to go back from; its contents mean nothing. Gradients must be enabled.

        What `Saving` has left must be as it was until the backward pass has ended. `middle`: the sum of the layer's
        input and attention, shaped as `x`; `products`: those behind it. Raises SlidetuneError if the layer adds no
        product to its input alone.
        """
        # Whoever has hooked something sees it whole.
        if _hooked(self.layer):
            return layer_output(self.layer, x, call)
        if not self._looked:
            self._looked = True
            out = self._look(x, call, products or {})
            if middle is not None and self.middle is None:
                raise _no_middle(self.layer)
            return out
        passing = _Passing(x, products or {})
        if middle is not None and self.middle is not None:
            passing.know_sum(self.middle, middle)
        if self.last is not None:
            passing.leave_out(self.last)
        if not passing.forwards:
            return layer_output(self.layer, x, call)
        if all(map(_is_plain, passing.forwards)):
            with _instead(passing.forwards):
                out = layer_output(self.layer, x, call)
            if passing.went_as_expected(out):
                return out.as_subclass(Tensor)
            del out
        self.last = self.middle = None
        return layer_output(self.layer, x, call)

    def _look(self, x: Tensor, call: Call, products: Saved) -> Tensor:
        """All of the pass but what is known: there is no room for that twice."""
        with _instead(_Passing(x, products).forwards), _Products(self.layer, x) as ran:
            out = layer_output(self.layer, x, call)
        found = ran.products
        if ran.middle is not None and not ran.middle.read and _uses(out, ran.middle.node) == 1:
            self.middle = ran.once(ran.middle)
        if found and found[-1].only_added and _only_in_sum(out, found[-1].node):
            self.last = ran.once(found[-1])
        return out


class Saving:
    """A layer's forward passes without gradients, which save what its recomputation then goes without."""

    def __init__(self, layer: nn.Module, *, products: bool = False) -> None:
        self.layer, self.products = layer, products
        self._middle: nn.Linear | None = None
        self._behind: list[nn.Linear] = []

    def __call__(self, x: Tensor, call: Call, middle: Tensor | None = None) -> tuple[Tensor, Saved | None]:
        """The layer's output, and the products that are kept; None if nothing is saved, since the layer has hooks, and
        what has them is recomputed whole.

        The sum of the layer's input and attention is left in `middle`, shaped as `x`. Raises SlidetuneError if the
        layer has no such sum, or products wanted.
        """
        if _hooked(self.layer):
            return layer_output(self.layer, x, call), None
        if self._middle is not None and all(map(_is_plain, (self._middle, *self._behind))):
            passing = _Passing(x)
            passing.save_sum(self._middle, middle)
            for module in self._behind:
                passing.keep_product(module)
            with _instead(passing.forwards):
                out = layer_output(self.layer, x, call)
            if passing.saved_as_expected():
                return out, passing.kept
            # It went another way.
            del out, passing
        return self._look(x, call, middle)

    def _look(self, x: Tensor, call: Call, middle: Tensor | None) -> tuple[Tensor, Saved]:
        with _Products(self.layer, x, target=middle, keeps=self.products) as ran:
            out = layer_output(self.layer, x, call)
        if ran.middle is None or not ran.untouched():
            raise _no_middle(self.layer)
        self._middle = ran.once(ran.middle)
        # The last product is left out in any case.
        behind = ran.products[ran.products.index(ran.middle) + 1 : -1] if self.products else []
        modules = [ran.once(product) for product in behind]
        if self._middle is None or (self.products and (not behind or None in modules)):
            raise _no_products(self.layer) if self.products else _no_middle(self.layer)
        if any(value._version != version for value, version in ran.kept[:-1]):
            raise _no_products(self.layer)
        self._behind = modules
        return out, dict(zip(modules, (value for value, _ in ran.kept), strict=False))


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


def _hooked(layer: nn.Module) -> bool:
    return has_hooks(layer) or any(getattr(torch_module, f"_global{kind}", None) for kind in _HOOKS)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is linear and nothing else."""
    return type(module) is nn.Linear and "forward" not in module.__dict__


@contextlib.contextmanager
def _instead(forwards: Mapping[nn.Linear, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside, modules have other forward passes."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward


# ---- the first pass: what becomes of each product


@dataclass(slots=True, eq=False)
class _Product:
    """A linear function's output."""

    module: nn.Linear | None
    node: Any
    """What autograd calls it."""
    out: weakref.ref[Tensor]
    """Who doesn't hold it can't read it."""
    added: bool = False
    read: bool = False
    """It was used for more than one addition."""
    only_added: bool = True
    """It and all sums with it were used for additions alone."""


class _Products(TorchFunctionMode):
    """Takes note of linear products while a layer runs, and of what becomes of them. The first sum of one and the
    layer's input is left in `target`, if given; with `keeps`, products after it are kept."""

    def __init__(self, layer: nn.Module, x: Tensor, *, target: Tensor | None = None, keeps: bool = False) -> None:
        super().__init__()
        self.x, self.target, self.keeps = x, target, keeps
        self._modules = {id(part.weight): part for part in layer.modules() if type(part) is nn.Linear}
        self.products: list[_Product] = []
        self.middle: _Product | None = None
        """Which was the first to be added to the layer's input."""
        self.kept: list[tuple[Tensor, int]] = []
        """With their versions."""
        self._sum: tuple[Tensor, int] | None = None
        self._watched: dict[int, tuple[weakref.ref[Tensor], list[_Product]]] = {}
        """By address: products and sums with them, and which products are in them."""

    def once(self, product: _Product) -> nn.Linear | None:
        """The module that made a product and no other."""
        runs = Counter(one.module for one in self.products)
        return product.module if runs[product.module] == 1 else None

    def untouched(self) -> bool:
        """Whether nobody has written to the first sum."""
        return self._sum is not None and self._sum[0]._version == self._sum[1]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        out = self._sum_saved(func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if func is _LINEAR:
            product = _Product(self._modules.get(id(args[1])), out.grad_fn, weakref.ref(out))
            self.products.append(product)
            self._watched[id(out)] = product.out, [product]
            if self.keeps and self.middle is not None:
                self.kept.append((out, out._version))
            return out
        # Shapes and the like, which getters are asked for, are no values. Dropout of nothing gives back what it got.
        no_value = _is_getter(func) and not isinstance(out, Tensor)
        found = list(self._found((args, kwargs)))
        if no_value or any(out is one for one, _ in found):
            return out
        added = _is_sum(func, args, kwargs)
        for one, products in found:
            for product in products:
                if one is product.out():
                    if added and self.middle is None and not product.added and any(term is self.x for term in args):
                        self.middle = product
                    product.read |= not added or product.added
                    product.added = True
                product.only_added &= added
        if added and found:
            self._watched[id(out)] = weakref.ref(out), list(dict.fromkeys(one for _, many in found for one in many))
        return out

    def _sum_saved(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        """The first sum of the layer's input and a product, where it is to be left."""
        if self._sum is not None or not _is_sum(func, args, kwargs) or not any(term is self.x for term in args):
            return None
        terms = [product for one, products in self._found(args) for product in products if one is product.out()]
        if not terms or terms[0].added or not _alike(*args):
            return None
        out = _sum_in(self.target, args)
        self._sum = out, out._version
        return out

    def _found(self, arguments: Any) -> Iterator[tuple[Tensor, list[_Product]]]:
        """The products, and sums with them, among a function's arguments, each with the products that are in it."""
        for one in arguments.values() if isinstance(arguments, dict) else arguments:
            watched = self._watched.get(id(one))
            # Another one may have taken its place in memory.
            if watched is not None and watched[0]() is one:
                yield one, watched[1]
            elif isinstance(one, list | tuple | dict):
                yield from self._found(one)


# ---- later passes: some modules do something else


class _Passing:
    """What some linear modules do instead in one pass of a layer, and whether the pass went as those before.

    No function here may hold on to this object, which holds on to them: what is kept would stay until it is found to be
    garbage.
    """

    def __init__(self, x: Tensor, known: Saved | None = None) -> None:
        """`known`: products that need not be computed."""
        self.x = x
        self.forwards: dict[nn.Linear, Callable[[Tensor], Tensor]] = {}
        self.kept: dict[nn.Linear, Tensor] = {}
        self._runs: Counter[nn.Linear] = Counter()
        self._versions: list[int] = []
        self._middle: _Use | None = None
        self._last: _Use | None = None
        for module, value in (known or {}).items():
            self._know_product(module, value)

    def save_sum(self, module: nn.Linear, target: Tensor | None) -> None:
        """The sum of the layer's input and a module's product is left in `target`, if given."""

        whole, use = module.forward, _Use(lambda terms, _: _sum_in(target, terms), self.x)
        self._middle = use
        self._run_instead(module, lambda x: use.watched(whole(x)))

    def keep_product(self, module: nn.Linear) -> None:
        """A module's product is kept."""
        whole, kept, versions = module.forward, self.kept, self._versions

        def forward(x: Tensor) -> Tensor:
            out = kept[module] = whole(x)
            versions.append(out._version)
            return out

        self._run_instead(module, forward)

    def know_sum(self, module: nn.Linear, value: Tensor) -> None:
        """The sum of the layer's input and a module's product is `value`: neither is computed."""
        whole, use = module.forward, _Use(lambda terms, _: _Known.apply(*terms, [value]), self.x)
        self._middle = use
        self._run_instead(module, lambda x: use.watched(_left_out(whole, x)))

    def leave_out(self, module: nn.Linear) -> None:
        """Nobody reads a module's product, or the sum of it and something else."""
        whole, use = module.forward, _Use(lambda terms, product: _Known.apply(*terms, [product]), None)
        self._last = use
        self._run_instead(module, lambda x: use.watched(_left_out(whole, x)))

    def _know_product(self, module: nn.Linear, value: Tensor) -> None:
        """A module's product is `value`."""
        whole = module.forward
        self._run_instead(module, lambda x: _left_out(whole, x, value))

    def saved_as_expected(self) -> bool:
        """Whether the sum and all products were saved, in their order, and nobody has written to them."""
        ran = all(self._runs[module] == 1 for module in self.forwards) and list(self._runs) == list(self.forwards)
        versions = [value._version for value in self.kept.values()]
        return ran and versions == self._versions and self._middle.untouched()

    def went_as_expected(self, out: Tensor) -> bool:
        """Whether the layer's output depends on no value that was left out."""
        if any(self._runs[module] != 1 for module in self.forwards):
            return False
        middle, last = self._middle, self._last
        return (middle is None or (middle.untouched() and not middle.read and _uses(out, middle.node) == 1)) and (
            last is None or (last.untouched() and not last.read and _only_in_sum(out, last.node))
        )

    def _run_instead(self, module: nn.Linear, forward: Callable[[Tensor], Tensor]) -> None:
        runs = self._runs

        def counted(x: Tensor) -> Tensor:
            runs[module] += 1
            return forward(x)

        self.forwards[module] = counted


class _Use:
    """What becomes of a product: one addition is made by `add`, to `x` if given; other uses are noted."""

    def __init__(self, add: Callable[[tuple[Tensor, Tensor], Tensor], Tensor], x: Tensor | None) -> None:
        self.add, self.x = add, x
        self.read = False
        """It was used for anything but that addition; with no `x`, but for additions."""
        self.node: Any = None
        """What autograd calls it."""
        self.value: Tensor | None = None
        self._sum: Tensor | None = None
        self._version = 0

    def watched(self, product: Tensor) -> Tensor:
        """The product, which from now on tells what is done with it."""
        self.value = product
        term = self._term(product)
        self.node = term.grad_fn
        return term

    def untouched(self) -> bool:
        """Whether the addition was made, and nobody has written to the sum."""
        return self._sum is not None and self._sum._version == self._version

    def __call__(self, func: Any, args: tuple, kwargs: dict) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if _is_sum(func, args, kwargs) and self._is_awaited(args):
                self._sum = self.add(args, self.value)
                self._version = self._sum._version
                return self._sum if self.x is not None else self._term(self._sum)
            out = func(*args, **kwargs)
            if self.x is None and _is_sum(func, args, kwargs):
                return self._term(out)
        # Shapes and the like, which getters are asked for, are no values. Dropout of nothing gives back what it got.
        if _is_getter(func) and not isinstance(out, Tensor):
            return out
        self.read |= not any(out is one for one in args)
        return out

    def _is_awaited(self, terms: tuple) -> bool:
        to_x = self.x is None or any(term is self.x for term in terms)
        return self._sum is None and to_x and _alike(*terms)

    def _term(self, value: Tensor) -> Tensor:
        term = value.as_subclass(_Term)
        term.use = self
        return term


class _Term(Tensor):
    """A product, or a sum with it, whose uses are noted."""

    use: _Use

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        return next(_terms_in((args, kwargs))).use(func, args, kwargs)


def _terms_in(arguments: Any) -> Iterator[_Term]:
    for one in arguments.values() if isinstance(arguments, dict) else arguments:
        if isinstance(one, _Term):
            yield one
        elif isinstance(one, list | tuple | dict):
            yield from _terms_in(one)


class _Known(torch.autograd.Function):
    """A sum whose value is known, or will not be read: for autograd a sum."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, other: Tensor, value: list[Tensor]) -> Tensor:
        return value[0].data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, gradient, None


def _left_out(forward: Callable[[Tensor], Tensor], x: Tensor, known: Tensor | None = None) -> Tensor:
    """A linear module's output, for autograd; its value is `known`, or memory as it comes."""
    with _LeftOut(known):
        return forward(x)


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


def _is_sum(func: Any, args: tuple, kwargs: dict) -> bool:
    return func in _ADDITIONS and len(args) == 2 and not kwargs


def _sum_in(target: Tensor | None, terms: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of two terms, left in `target`, if given."""
    return torch.add(*terms) if target is None else torch.add(*terms, out=target).data


def _is_getter(func: Any) -> bool:
    return getattr(func, "__name__", "") == "__get__"


def _alike(one: Any, other: Any) -> bool:
    """Whether the sum of two terms is a tensor of the same kind."""
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and one.dtype == other.dtype


# ---- autograd's graph

_SUMS = ("AddBackward0", "_KnownBackward", "AliasBackward0")


def _only_in_sum(out: Tensor, product: Any) -> bool:
    """Whether an output depends on a product, told by its node in autograd's graph, by sums alone."""
    node = out.grad_fn
    while node is not None and node.name() in _SUMS:
        through = [term for term in _terms(node) if any(one is product for one in _made_since(product, term))]
        if len(through) != 1:
            return False
        if through[0] is product:
            return True
        node = through[0]
    return False


def _uses(out: Tensor, product: Any) -> int:
    """How often a product is used for an output."""
    return sum(term is product for node in _made_since(product, out.grad_fn) for term in _terms(node))


def _terms(node: Any) -> list[Any]:
    return [term for term, _ in node.next_functions if term is not None]


def _made_since(product: Any, start: Any) -> Iterator[Any]:
    """Of a node of autograd's graph and all that it depends on, each once: the product's node and younger ones. No
    other depends on it."""
    seen, ahead, first = {start}, [start], product._sequence_nr()
    while ahead:
        node = ahead.pop()
        if node._sequence_nr() < first:
            continue
        yield node
        for term in _terms(node):
            if term not in seen:
                seen.add(term)
                ahead.append(term)
