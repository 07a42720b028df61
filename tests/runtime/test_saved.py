"""Inner activations that move, and come back, while the slots of weights and input go to others."""

from __future__ import annotations

import weakref

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from slidetune.runtime.saved import Inner

CPU = torch.device("cpu")


def layer(x, weight):
    return torch.tanh(x @ weight.t()) * torch.sigmoid(x)


def plain_gradients(x, weight, upward):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    layer(x, weight).backward(upward)
    return x.grad, weight.grad


@pytest.mark.parametrize("room", [0, 300, 1 << 16], ids=["no room", "room for some", "room"])
@pytest.mark.parametrize("offload", [False, True], ids=["kept", "offloaded"])
def test_gradients_as_if_nothing_had_moved(offload, room):
    torch.manual_seed(0)
    width = 8
    input_slots, weight_slots = torch.randn(2, 4 * width), torch.randn(2, width * width)
    x_values, w_values = input_slots[0].clone().view(4, width), weight_slots[0].clone().view(width, width)
    upward = torch.randn(4, width)

    inner = Inner(CPU)
    x = input_slots[0].view(4, width).data.requires_grad_()
    weight = nn.Parameter(weight_slots[0].view(width, width).data)
    with inner.collecting(set(), x, weight_slots[0]):
        out = layer(x, weight)
    if offload:
        inner.save(torch.zeros(room, dtype=torch.uint8))
    # Others use the slots; weights and input come back in the second ones.
    input_slots[1], weight_slots[1] = x_values.flatten(), w_values.flatten()
    input_slots[0].fill_(7.0)
    weight_slots[0].fill_(7.0)
    if offload:
        inner.load()
    with inner.brought_back(input_slots[1].view(4, width), weight_slots[1]):
        out.backward(upward)
    expected = plain_gradients(x_values, w_values, upward)
    assert torch.equal(x.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])
    assert not inner._held


def test_what_stays_where_it_is_is_not_held():
    mask = torch.rand(4, 4)
    x = torch.randn(4, 4).requires_grad_()
    inner = Inner(CPU)
    with inner.collecting({mask.untyped_storage().data_ptr()}, x, torch.zeros(1)):
        out = x * mask
    assert not inner._held
    with inner.brought_back(x.detach(), torch.zeros(1)):
        out.sum().backward()
    assert torch.equal(x.grad, mask)


def test_what_is_kept_goes_as_the_backward_pass_uses_it_up():
    x = torch.randn(4, 4).requires_grad_()
    inner, alive = Inner(CPU), []
    with inner.collecting(set(), x, torch.zeros(1)):
        first = x.exp()
        out = (first * 2.0).sin()
    last = weakref.ref(list(inner._held.values())[-1].storage)
    first.register_hook(lambda gradient: alive.append(last() is not None))
    with inner.brought_back(x.detach(), torch.zeros(1)):
        out.sum().backward()
    assert alive == [False]
