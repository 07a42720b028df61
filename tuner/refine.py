"""Plans a few layers away from one: what the axes of a search space, shares of the layers, leave out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

from slidetune.model import ModelSpec
from slidetune.plans import Activations, Plan, knobs, may_save_middle, problems
from slidetune.tuner.space import Space

_SLOTS = ("prefetch", "spare_slots")
_COUNTS = ("resident_layers", "resident_weights", "late_updates")
# Axes whose values are shares of the layers.
_SHARES = (*_COUNTS, "recompute.keep", "recompute.products", "recompute.middle", "activations.gpu")


def refined(plan: Plan, space: Space, model: ModelSpec) -> list[Plan]:
    """Valid plans with some layers more or fewer of a kind; and, since GPU memory is what they compete for, more layers
    kept in place of resident ones, of inputs on the GPU and of slots for weights. Of what the space leaves open
    alone."""
    most = {a.name: round(max(a.values) * space.layers) for a in space.axes if len(a.values) > 1 and a.name in _SHARES}
    if all(1 in axis.values for axis in space.axes if axis.name in _SLOTS):
        most |= {"window": plan.window, "prefetch": plan.prefetch}
    now = knobs(plan)

    def within(other: Plan) -> bool:
        changed = {name: value for name, value in knobs(other).items() if value != now[name]}
        return all(0 <= value <= most.get(name, -1) for name, value in changed.items()) and not problems(other, model)

    around = dict.fromkeys((*_single(plan, space.layers), *_for_keeping(plan, space.layers)))
    return [p for p in around if p != plan and within(p)]


def _single(plan: Plan, layers: int) -> Iterator[Plan]:
    for knob, step in itertools.product(_COUNTS, (1, -1, 2, -2)):
        yield dataclasses.replace(plan, **{knob: getattr(plan, knob) + step})
    for keep, products in ((-1, 0), (0, 1), (0, -1), (0, 2)):
        yield _keeping(plan, layers, keep, products)
    for middle in (plan.recompute.middle + 1, plan.recompute.middle - 1, sum(may_save_middle(plan, layers))):
        yield _with(plan, middle=middle)


def _for_keeping(plan: Plan, layers: int) -> Iterator[Plan]:
    narrow = dataclasses.replace(plan, window=min(plan.window, 2), prefetch=min(plan.prefetch, 1))
    # Two layers' products take about the memory of one layer's all.
    more = ((1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (0, 4), (-1, 2), (-2, 4), (-1, 3), (1, -2))
    for wide, (keep, products), fewer, on_gpu in itertools.product(
        dict.fromkeys((plan, narrow)), more, (0, 1, 2), sorted({plan.activations.gpu, 0})
    ):
        kept = _keeping(wide, layers, keep, products)
        activations = Activations(gpu=on_gpu, nvme=plan.activations.nvme)
        yield dataclasses.replace(kept, resident_layers=plan.resident_layers - fewer, activations=activations)


def _keeping(plan: Plan, layers: int, keep: int, products: int) -> Plan:
    """With so many layers more that keep all, and so many more that keep products."""
    now = plan.recompute
    before = sum(may_save_middle(plan, layers))
    after = max(0, before - keep)
    # Where all that recompute save their middle, so do they afterwards.
    middle = after if 0 < now.middle == before else min(now.middle, after)
    return _with(plan, keep=now.keep + keep, products=now.products + products, middle=middle)


def _with(plan: Plan, **recompute: int) -> Plan:
    return dataclasses.replace(plan, recompute=dataclasses.replace(plan.recompute, **recompute))
