"""Inner activations that are kept or offloaded in place of recomputed: what autograd saves of one layer's forward.

Autograd is handed descriptions in place of tensors. Weights and the layer's input are described by where they lie
in their slot, because both slots have other owners until the backward pass brings them back, perhaps elsewhere. What
the layer made itself is held here, storage by storage, on the device or in RAM. Masks and rotary embeddings, which
live all step long, are handed through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGN = 64


class _Held:
    """A storage that the layer made, wherever it is now. The views that autograd has keep it alive, so that in the
    backward pass it goes with the last of them."""

    __slots__ = ("storage",)

    def __init__(self, storage: Tensor) -> None:
        self.storage = storage
        """uint8, all of it."""


class _View(NamedTuple):
    """A tensor as a view of something that moves: a storage held here, the weights or the input."""

    of: _Held | str
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    at: int
    """Bytes from the start of the storage, the slot or the input."""


class Inner:
    """The inner activations of one layer and micro-batch, from its forward to its backward pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[int, _Held] = {}
        self._weights: Tensor | None = None
        self._input: Tensor | None = None

    @contextlib.contextmanager
    def collecting(self, shared: set[int], x: Tensor, weights: Tensor) -> Iterator[None]:
        """Forward passes inside have what autograd saves of them collected.

        `shared`: addresses of storages that stay where they are.
        """
        self._held.clear()
        self._weights, self._input = weights, x

        def describe(tensor: Tensor) -> Tensor | _View:
            storage = tensor.untyped_storage()
            address = tensor.data_ptr()
            for name, slot in (("weights", self._weights), ("input", self._input)):
                if slot.data_ptr() <= address < slot.data_ptr() + slot.nbytes:
                    return self._view(name, tensor, address - slot.data_ptr())
            if storage.data_ptr() in shared or not storage.nbytes():
                return tensor
            held = self._held.get(storage.data_ptr())
            if held is None:
                held = _Held(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
                self._held[storage.data_ptr()] = held
            return self._view(held, tensor, address - storage.data_ptr())

        with torch.autograd.graph.saved_tensors_hooks(describe, self._restore):
            yield
        # Both slots go to others now.
        self._weights = self._input = None

    def save(self, slot: Tensor) -> None:
        """Copy all to RAM, into `slot` (bytes, page-locked) as far as it reaches, and let go of it on the device."""
        at = 0
        for held in self._held.values():
            source = held.storage
            size = source.numel()
            if at + size <= slot.numel():
                target = slot[at : at + size]
                at += -(-size // _ALIGN) * _ALIGN
            else:
                target = torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
            target.copy_(source, non_blocking=True)
            self._used_by_this_stream(source)
            held.storage = target

    def load(self) -> None:
        """Copy all back to the device."""
        for held in self._held.values():
            source = held.storage
            held.storage = torch.empty(source.numel(), dtype=torch.uint8, device=self.device)
            held.storage.copy_(source, non_blocking=True)

    @contextlib.contextmanager
    def brought_back(self, x: Tensor, weights: Tensor) -> Iterator[None]:
        """Backward passes inside find the weights in `weights` and the layer's input in `x`; what was held goes as it
        is used up."""
        self._weights, self._input = weights, x
        while self._held:
            # No name may hold on to one of them during the backward pass.
            self._used_by_this_stream(self._held.popitem()[1].storage)
        try:
            yield
        finally:
            self._weights = self._input = None

    def _view(self, of: _Held | str, tensor: Tensor, at: int) -> _View:
        return _View(of, tensor.dtype, tensor.shape, tensor.stride(), at)

    def _restore(self, saved: Tensor | _View) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        home = (
            saved.of.storage
            if isinstance(saved.of, _Held)
            else {"weights": self._weights, "input": self._input}[saved.of]
        )
        start = home.data_ptr() - home.untyped_storage().data_ptr() + saved.at
        tensor = torch.empty(0, dtype=saved.dtype, device=home.device)
        return tensor.set_(home.untyped_storage(), start // saved.dtype.itemsize, saved.shape, saved.stride)

    def _used_by_this_stream(self, tensor: Tensor) -> None:
        """Keep torch's allocator from giving the memory away before this lane's stream is done with it."""
        if tensor.device.type == "cuda":
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
