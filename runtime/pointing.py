"""A unit's modules with their parameters pointed into a slot, and their gradients collected in another."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from slidetune.runtime.layout import Entry, Layout

Target = tuple[nn.Module, str, Entry]
"""A module, the name of a parameter in it, and that parameter's place in the unit's layout."""


class Pointed:
    """The modules of one unit. `point` before they compute, `collect_into` before a backward pass.

    Used by one thread at a time.
    """

    def __init__(self, layout: Layout, targets: Sequence[Target]) -> None:
        self.layout = layout
        self.targets = list(targets)
        # A unit meets few slots: its parameters are made once for each.
        self._made: dict[int, list[nn.Parameter]] = {}
        self._gradient: list[Tensor | None] = []
        self._arrived: set[int] = set()

    def point(self, weights: Tensor) -> None:
        """Make the modules read their parameters from `weights`, a flat bf16 slot of at least the unit's size."""
        parameters = self._made.get(weights.data_ptr())
        if parameters is None:
            parameters = self._made[weights.data_ptr()] = [self._parameter(i, weights) for i in self._numbers()]
        for (module, name, _), parameter in zip(self.targets, parameters, strict=True):
            module._parameters[name] = parameter

    def collect_into(self, gradient: Tensor | None, *, fresh: bool) -> None:
        """Send the gradients of coming backward passes into `gradient`, a flat slot (bf16, or fp32 to add up in);
        None if the unit trains nothing.

        `fresh`: the first gradient of each parameter overwrites what is there.
        """
        self._gradient = [None if entry.hyper is None else entry.of(gradient) for _, _, entry in self.targets]
        if fresh:
            self._arrived.clear()

    def claim(self, module: nn.Module, name: str) -> tuple[Tensor | None, bool]:
        """Where the gradient of a module's parameter is collected, None if it isn't trained, and whether what is put
        there is the first; for whoever puts it there without autograd."""
        number = next(i for i, (owner, own, _) in enumerate(self.targets) if owner is module and own == name)
        fresh = number not in self._arrived
        self._arrived.add(number)
        return self._gradient[number], fresh

    def finish_collecting(self) -> None:
        """Set to zero the gradient of parameters that took no part."""
        for number, (_, _, entry) in enumerate(self.targets):
            if entry.hyper is not None and number not in self._arrived:
                self._gradient[number].zero_()
                self._arrived.add(number)

    def release(self) -> None:
        """Let go of all slots; the modules have no parameters after it."""
        for module, name, _ in self.targets:
            module._parameters[name] = None
        self._made.clear()
        self._gradient.clear()

    def _numbers(self) -> range:
        return range(len(self.targets))

    def _parameter(self, number: int, weights: Tensor) -> nn.Parameter:
        entry = self.targets[number][2]
        # .data: a version counter of its own, since other parts of the slot's memory are written meanwhile.
        parameter = nn.Parameter(entry.of(weights).data, requires_grad=entry.hyper is not None)
        if entry.hyper is not None:
            parameter.register_post_accumulate_grad_hook(lambda p: self._receive(number, p))
        return parameter

    def _receive(self, number: int, parameter: nn.Parameter) -> None:
        # Taken out at once, parameter by parameter: no second copy of a whole layer's gradient ever exists.
        if number in self._arrived:
            self._gradient[number].add_(parameter.grad)
        else:
            self._gradient[number].copy_(parameter.grad)
            self._arrived.add(number)
        parameter.grad = None
