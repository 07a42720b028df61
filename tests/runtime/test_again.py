"""Recomputed layers: products are left out where gradients don't depend on them, and nowhere else."""

from __future__ import annotations

from functools import partial

import pytest

torch = pytest.importorskip("torch")

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from slidetune.errors import SlidetuneError
from slidetune.families import spec_from_config
from slidetune.runtime import again
from slidetune.runtime.again import Again, Saving, layer_output
from slidetune.runtime.binding import Parts

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model

NO_CALL = ((), {})
WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.fixture
def worthless(monkeypatch):
    """What is not computed is not a number: whoever reads it is found out."""

    def unmade(self, func, types, args=(), kwargs=None):
        out = plain(self, func, types, args, kwargs)
        return out.fill_(float("nan")) if func in again._PRODUCTS and self.known is None else out

    plain = again._LeftOut.__torch_dispatch__
    monkeypatch.setattr(again._LeftOut, "__torch_dispatch__", unmade)


def gradients(run, layer, x, upward, call=NO_CALL):
    """Of a layer's input and parameters."""
    x = x.detach().requires_grad_()
    layer.zero_grad(set_to_none=True)
    with torch.enable_grad():
        out = run(x, call)
    torch.autograd.backward(torch.autograd.graph.get_gradient_edge(out), upward)
    found = [x.grad, *(p.grad for p in layer.parameters())]
    return [None if grad is None else grad.clone() for grad in found]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)


def layers_of(name):
    """Each layer of a small model: its unit, module, call, an input and a gradient of its output."""
    config = SMALL_CONFIGS[name] | (WITHOUT_DROPOUT if SMALL_CONFIGS[name]["model_type"] == "gpt2" else {})
    spec = spec_from_config(config, name)
    model = make_model(config).train()
    parts = Parts(model, spec)
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    calls, _ = parts.record_calls(torch.device("cpu"), {"input_ids": ids})
    x, upward = (torch.randn(2, 20, spec.hidden_size).to(torch.bfloat16) for _ in range(2))
    for unit, layer, call in zip(spec.layers, parts.layers, calls, strict=True):
        yield unit, layer, call, x, upward


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_gradients_are_those_of_the_whole_pass_and_the_spec_says_what_is_left_out(name, worthless):
    for unit, layer, call, x, upward in layers_of(name):
        whole = gradients(lambda x, call, layer=layer: layer_output(layer, x, call), layer, x, upward, call)
        recomputed = Again(layer)
        for _ in range(3):
            assert_same(gradients(recomputed, layer, x, upward, call), whole)
        left_out = 0 if recomputed.last is None else recomputed.last.weight.numel()
        assert left_out == unit.left_out_elements
        assert unit.forward_flops(2, 20) - unit.recompute_flops(2, 20) == 2 * left_out * 40


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_with_the_sum_in_the_middle_saved_too(name, worthless):
    for unit, layer, call, x, upward in layers_of(name):
        if not unit.product_elements:
            with pytest.raises(SlidetuneError, match="no "), torch.no_grad():
                Saving(layer, products=True)(x, call)
        middle = torch.full_like(x, float("nan"))
        if not unit.middle_elements:
            with pytest.raises(SlidetuneError, match="no sum"), torch.no_grad():
                Saving(layer)(x, call, middle)
            continue
        with torch.no_grad():
            out, products = Saving(layer, products=bool(unit.product_elements))(x, call, middle)
            assert torch.equal(out, layer_output(layer, x, call))
        whole = gradients(lambda x, call, layer=layer: layer_output(layer, x, call), layer, x, upward, call)
        recomputed = Again(layer)
        for _ in range(3):

            def known(x, call, recomputed=recomputed, middle=middle, products=products):
                return recomputed(x, call, middle, products)

            assert_same(gradients(known, layer, x, upward, call), whole)
        assert recomputed.middle.weight.numel() == unit.middle_elements
        assert sum(module.weight.numel() for module in products) == unit.product_elements
        assert sum(one.nbytes for one in products.values()) == unit.product_bytes(2, 20)
        saved = unit.recompute_flops(2, 20) - unit.recompute_flops(2, 20, middle=True)
        assert saved == 2 * unit.middle_elements * 40


class Layer(nn.Module):
    """x and a linear module, put together by `ends`."""

    def __init__(self, ends, bias=True):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(32, 32, bias=bias) for _ in range(3))
        self.ends = ends

    def forward(self, x):
        return self.ends(self, x, torch.tanh(self.first(x)))


def in_place(layer, x, h):
    out = layer.second(h)
    out += x
    return out


LEFT_OUT = {
    "sum": lambda layer, x, h: x + layer.second(h),
    "sum of three": lambda layer, x, h: (x + layer.second(h)) + layer.third(h),
    "the other sum of three": lambda layer, x, h: x + (layer.second(h) + layer.third(h)),
    "first of a tuple": lambda layer, x, h: (x + layer.second(h), h),
}
NEEDED = {
    "no sum": lambda layer, x, h: layer.second(h),
    "product": lambda layer, x, h: x * layer.second(h),
    "norm behind": lambda layer, x, h: nn.functional.layer_norm(x + layer.second(h), (32,)),
    "activation behind": lambda layer, x, h: x + torch.tanh(layer.second(h)),
    "scaled": lambda layer, x, h: x + 0.5 * layer.second(h),
    "twice": lambda layer, x, h: (lambda out: out + torch.tanh(out))(layer.second(h)),
    "added to itself": lambda layer, x, h: (lambda out: out + out)(layer.second(h)),
    "read by its value": lambda layer, x, h: (lambda out: x + out + x * out.detach().norm())(layer.second(h)),
    "looked at": lambda layer, x, h: (lambda out: x + (out if out.isfinite().all() else 0 * out))(layer.second(h)),
    "a sum looked at": lambda layer, x, h: (lambda out: out + x * out.detach().norm())(x + layer.second(h)),
    "run before": lambda layer, x, h: x + layer.second(torch.tanh(layer.second(h))),
    "read by a getter": lambda layer, x, h: (lambda out: x + out + x * out.data.norm())(layer.second(h)),
    "read by a view's getter": lambda layer, x, h: (lambda out: x + out + x * out.mT.detach().norm())(layer.second(h)),
    "an argument by name": lambda layer, x, h: x + torch.clamp(input=layer.second(h), max=0.1),
    "no module": lambda layer, x, h: x + h @ layer.third.weight,
}

# In place, autograd keeps the product's name or not, as a bias has it.
EITHER = {"in place": in_place, "multiplied in place": lambda layer, x, h: x + layer.second(h).mul_(2.0)}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("ends", LEFT_OUT | NEEDED | EITHER)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_only_what_is_added_and_nothing_else_is_left_out(ends, bias, dtype, worthless):
    layer = Layer((LEFT_OUT | NEEDED | EITHER)[ends], bias).to(DEVICE, dtype)
    x, upward = (torch.randn(2, 8, 32, device=DEVICE).to(dtype) for _ in range(2))
    whole = gradients(lambda x, call: layer_output(layer, x, call), layer, x, upward)
    recomputed = Again(layer)
    for _ in range(3):
        assert_same(gradients(recomputed, layer, x, upward), whole)
    assert ends in EITHER or (recomputed.last is not None) == (ends in LEFT_OUT)
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in layer.modules())


class Products(TorchDispatchMode):
    """Counts the matrix products that are computed."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in again._PRODUCTS
        return func(*args, **(kwargs or {}))


def test_the_product_is_not_computed():
    layer, x = Layer(LEFT_OUT["sum"]), torch.randn(2, 8, 32).requires_grad_()
    recomputed, counts = Again(layer), []
    for _ in range(3):
        with Products() as products:
            recomputed(x, NO_CALL)
        counts.append(products.count)
    assert counts == [2, 1, 1]


@pytest.mark.parametrize("hooked", ["product", "layer", "all modules"])
def test_a_hook_sees_the_whole_output(hooked, worthless):
    layer, x = Layer(LEFT_OUT["sum"]), torch.randn(2, 8, 32).requires_grad_()
    recomputed, seen = Again(layer), []
    recomputed(x, NO_CALL)
    recomputed(x, NO_CALL)

    def see(module, args, out):
        seen.append(out.detach().clone())

    if hooked == "all modules":
        hook = nn.modules.module.register_module_forward_hook(see)
    else:
        hook = (layer if hooked == "layer" else layer.second).register_forward_hook(see)
    try:
        recomputed(x, NO_CALL)
    finally:
        hook.remove()
    expected = layer(x) if hooked != "product" else layer.second(torch.tanh(layer.first(x)))
    assert torch.equal(seen[-1], expected.detach())
    # And without it, on as before.
    recomputed(x, NO_CALL)
    assert recomputed.last is layer.second


def test_a_layer_that_goes_another_way_later_is_run_whole(worthless):
    layer = Layer(lambda layer, x, h: (NEEDED["activation behind"] if layer.other else LEFT_OUT["sum"])(layer, x, h))
    layer.other = False
    x, upward = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    recomputed = Again(layer)
    for other in (False, False, True, True, False):
        layer.other = other
        whole = gradients(lambda x, call: layer_output(layer, x, call), layer, x, upward)
        assert_same(gradients(recomputed, layer, x, upward), whole)


LATER = {
    "sum read": lambda layer, x, h: (lambda out: out + x * out.detach().norm())(x + layer.second(h)),
    "sum written to": lambda layer, x, h: (x + layer.second(h)).mul_(2.0),
    "sum written to unseen": lambda layer, x, h: (lambda out: (out.data.mul_(2.0), out)[1])(x + layer.second(h)),
}


@pytest.mark.parametrize("way", LATER)
def test_a_sum_that_is_used_otherwise_later_is_made(way, worthless):
    layer = Layer(lambda layer, x, h: (LATER[way] if layer.other else LEFT_OUT["sum"])(layer, x, h))
    layer.other = False
    x, upward = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    recomputed = Again(layer)
    for other in (False, False, True, True, False):
        layer.other = other
        whole = gradients(lambda x, call: layer_output(layer, x, call), layer, x, upward)
        assert_same(gradients(recomputed, layer, x, upward), whole)


class Block(nn.Module):
    """As in a transformer: a sum in the middle, products behind it, and a last sum."""

    def __init__(self):
        super().__init__()
        self.attend, self.gate, self.up, self.more, self.down = (nn.Linear(32, 32) for _ in range(5))
        self.gate_first = self.writes = self.in_fp32 = False

    def forward(self, x):
        gate = self.gate(x) if self.gate_first else None
        attended = self.attend(torch.tanh(x))
        h = x + (attended.float() if self.in_fp32 else attended)
        gate = self.gate(h) if gate is None else gate
        up = self.up(h)
        if self.writes:
            up.mul_(0.5)
        inner = torch.tanh(gate) * up
        # As many products behind the sum, whichever way it goes.
        return h + self.down(inner + self.more(inner) if self.gate_first else inner)


def test_what_was_saved_belongs_to_the_pass_that_saved_it(worthless):
    """Products before the sum in one step and behind it in another are not taken for each other."""
    layer = Block()
    x, upward = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    recomputed, saves = Again(layer), Saving(layer, products=True)
    for layer.gate_first in (False, False, True, True, False):
        whole = gradients(lambda x, call: layer_output(layer, x, call), layer, x, upward)
        middle = torch.empty_like(x)
        with torch.no_grad():
            _, products = saves(x, NO_CALL, middle)
        assert set(products) == {layer.up, layer.more if layer.gate_first else layer.gate}
        run = partial(recomputed, middle=middle, products=products)
        assert_same(gradients(run, layer, x, upward), whole)


def test_the_first_pass_takes_kept_products_too(worthless):
    """There is no room for them twice."""
    layer, x = Block(), torch.randn(2, 8, 32)
    with torch.no_grad():
        _, products = Saving(layer, products=True)(x, NO_CALL)
    with Products() as computed:
        Again(layer)(x.requires_grad_(), NO_CALL, None, products)
    assert computed.count == 2


def test_products_that_are_written_to_cannot_be_kept():
    layer = Block()
    layer.writes = True
    with pytest.raises(SlidetuneError, match="no products"), torch.no_grad():
        Saving(layer, products=True)(torch.randn(2, 8, 32), NO_CALL)


def test_a_sum_of_another_type_cannot_be_saved():
    layer, x = Block().to(torch.bfloat16), torch.randn(2, 8, 32).to(torch.bfloat16)
    layer.in_fp32 = True
    layer.gate, layer.up, layer.down = (nn.Linear(32, 32) for _ in range(3))
    with pytest.raises(SlidetuneError, match="no sum"), torch.no_grad():
        Saving(layer)(x, NO_CALL, torch.empty_like(x))


def test_with_hooks_nothing_is_saved_and_all_is_made(worthless):
    """A hook may put something else in a product's place."""
    layer = Block()
    x, upward = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    layer.attend.register_forward_hook(lambda module, args, out: 2 * out)
    whole = gradients(lambda x, call: layer_output(layer, x, call), layer, x, upward)
    with torch.no_grad():
        out, saved = Saving(layer, products=True)(x, NO_CALL, torch.empty_like(x))
        assert torch.equal(out, layer_output(layer, x, NO_CALL))
    assert saved is None
    assert_same(gradients(Again(layer), layer, x, upward), whole)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight @ torch.eye(32) * 2


def test_a_module_that_changes_later_is_run_whole(worthless):
    layer = Layer(LEFT_OUT["sum"])
    x, upward = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    recomputed = Again(layer)
    for _ in range(2):
        recomputed(x.requires_grad_(), NO_CALL)
    nn.utils.parametrize.register_parametrization(layer.second, "weight", Doubled())
    whole = gradients(lambda x, call: layer_output(layer, x, call), layer, x, upward)
    assert_same(gradients(recomputed, layer, x, upward), whole)


def test_one_module_under_two_names(worthless):
    layer = Layer(lambda layer, x, h: x + layer.third(torch.tanh(layer.second(h))))
    layer.third = layer.second
    x, upward = torch.randn(2, 8, 32), torch.randn(2, 8, 32)
    whole = gradients(lambda x, call: layer_output(layer, x, call), layer, x, upward)
    recomputed = Again(layer)
    for _ in range(2):
        assert_same(gradients(recomputed, layer, x, upward), whole)
    assert recomputed.last is None


def test_where_random_numbers_are_drawn_all_of_it_is_run():
    layer = Layer(LEFT_OUT["sum"])
    recomputed = Again(layer, whole=True)
    recomputed(torch.randn(2, 8, 32).requires_grad_(), NO_CALL)
    assert recomputed.last is None


def test_a_module_that_does_more_than_its_class_is_run_whole():
    class Doubling(nn.Linear):
        def forward(self, x):
            return 2.0 * super().forward(x)

    for change in ("class", "forward"):
        layer = Layer(LEFT_OUT["sum"])
        if change == "class":
            layer.second = Doubling(32, 32)
        else:
            plain = layer.second.forward
            layer.second.forward = lambda x, plain=plain: 2.0 * plain(x)
        recomputed = Again(layer)
        recomputed(torch.randn(2, 8, 32).requires_grad_(), NO_CALL)
        assert recomputed.last is None
