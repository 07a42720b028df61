"""The search space: for each knob the values worth trying on this model and machine, in order.

A point names one value an axis by its index, so that neighbours are neighbours to the sampler. Counts of layers
are even shares of the model, which also lets the simulator recognise repeating layers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from slidetune.hardware import HardwareProfile
from slidetune.model import BF16_BYTES, ModelSpec
from slidetune.plans import Activations, Plan, Recompute
from slidetune.units import MIB

Point = tuple[int, ...]
"""An index into each axis, in the axes' order."""

# An optimizer step of more tokens than this is no use for fine-tuning.
MAX_STEP_TOKENS = 2**19
_SEQUENCES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension: a name and its values in order."""

    name: str
    values: tuple


@dataclass(frozen=True, slots=True)
class Space:
    """Axes, and how a point on them becomes a plan."""

    base: Plan
    """Model, sequence length, clipping and memory cap, the same for every plan."""
    layers: int
    axes: tuple[Axis, ...]

    @property
    def size(self) -> int:
        product = 1
        for axis in self.axes:
            product *= len(axis.values)
        return product

    def plan(self, point: Point) -> Plan:
        """The plan at a point. Shares become whole layers; each knob leaves room for those after it."""
        v = {axis.name: axis.values[i] for axis, i in zip(self.axes, point, strict=True)}
        layers = self.layers
        resident = round(v["resident_layers"] * layers)
        sliding = layers - resident
        optimizer_nvme = round(v["optimizer_nvme"] * sliding)
        weights_nvme = round(v["weights_nvme"] * optimizer_nvme)
        inputs_gpu = round(v["activations.gpu"] * layers)
        keep = round(v["recompute.keep"] * layers)
        offload = round(v["recompute.offload"] * (layers - keep))
        products = round(v["recompute.products"] * (layers - keep - offload))
        inputs_nvme = round(v["activations.nvme"] * (layers - inputs_gpu))
        middle = round(v["recompute.middle"] * max(0, layers - keep - offload - inputs_nvme))
        late = round(v["late_updates"] * sliding) if v["update"] == "backward" else 0
        micro_batch, batch = v["micro_batch"], v.get("batch")
        most = max(1, MAX_STEP_TOKENS // (micro_batch * self.base.seq_len))
        return replace(
            self.base,
            micro_batch=micro_batch,
            accumulation=batch // micro_batch if batch else min(v["accumulation"], most),
            prefetch=v["prefetch"],
            window=v["prefetch"] + v["spare_slots"],
            resident_layers=resident,
            resident_weights=round(v["resident_weights"] * (sliding - weights_nvme)),
            optimizer_nvme=optimizer_nvme,
            weights_nvme=weights_nvme,
            activations=Activations(gpu=inputs_gpu, nvme=inputs_nvme),
            recompute=Recompute(keep=keep, offload=offload, products=products, middle=middle),
            chunk_bytes=v["chunk_bytes"],
            adam_threads=v["adam_threads"],
            update=v["update"],
            late_updates=late,
            gradient_ring=max(1, min(v["gradient_ring"], sliding - late)) if v["update"] == "backward" else 1,
        )

    def points(self) -> Iterator[Point]:
        """Every point."""
        return itertools.product(*(range(len(axis.values)) for axis in self.axes))

    def point(self, choices: Mapping[str, object]) -> Point:
        """The point with the given values, and the first value of every other axis; numbers take the nearest."""
        point = []
        for axis in self.axes:
            wanted = choices.get(axis.name, axis.values[0])
            if wanted in axis.values:
                point.append(axis.values.index(wanted))
            else:
                point.append(min(range(len(axis.values)), key=lambda i, a=axis: abs(a.values[i] - wanted)))
        return tuple(point)

    def neighbours(self, point: Point) -> Iterator[Point]:
        """Points one step away on one axis; and a step each way on two that trade: micro-batch against accumulation
        (the same batch) and against kept activations (about the same memory)."""
        for i in range(len(self.axes)):
            for step in (1, -1):
                yield from self._moved(point, {i: step})
        keep = next(i for i, axis in enumerate(self.axes) if axis.name == "recompute.keep")
        for other in (1, keep):
            for step in (1, -1):
                yield from self._moved(point, {0: step, other: -step})

    def _moved(self, point: Point, steps: Mapping[int, int]) -> Iterator[Point]:
        moved = tuple(v + steps.get(i, 0) for i, v in enumerate(point))
        if all(0 <= v < len(axis.values) for v, axis in zip(moved, self.axes, strict=True)):
            yield moved

    def restricted(self, **values: tuple) -> Space:
        """The same space with fewer values on some axes (dots in names as underscores)."""
        narrowed = {name.replace("__", "."): v for name, v in values.items()}
        return replace(
            self,
            axes=tuple(replace(a, values=narrowed[a.name]) if a.name in narrowed else a for a in self.axes),
        )


def full_space(model: ModelSpec, profile: HardwareProfile, base: Plan, batch: int | None = None) -> Space:
    """Everything the tuner considers. `batch` fixes the sequences of a step."""
    drive = profile.nvme is not None
    quarters = (0.0, 0.25, 0.5, 0.75, 1.0)
    cores = int(profile.host.cores.value)
    threads = sorted({max(1, cores - 1), max(1, cores - 2), max(1, cores * 3 // 4), max(1, cores // 2)})
    if batch:
        sequences = (
            Axis("micro_batch", tuple(d for d in range(1, min(batch, 128) + 1) if batch % d == 0)),
            Axis("batch", (batch,)),
        )
    else:
        most = max(1, MAX_STEP_TOKENS // base.seq_len)
        sequences = (
            Axis("micro_batch", tuple(n for n in _SEQUENCES if n <= min(64, most))),
            Axis("accumulation", tuple(n for n in _SEQUENCES if n <= min(32, most))),
        )
    with_middle = all(unit.middle_elements for unit in model.layers)
    with_products = all(unit.product_elements for unit in model.layers)
    updates = ("forward",) if base.clip_norm is not None else ("backward", "forward")
    return Space(
        base=base,
        layers=len(model.layers),
        axes=(
            *sequences,
            Axis("prefetch", (1, 2, 3, 0)[: 4 if len(model.layers) > 3 else 1]),
            Axis("spare_slots", (1, 2)),
            Axis("resident_layers", (0.0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)),
            Axis("resident_weights", quarters),
            Axis("optimizer_nvme", quarters if drive else (0.0,)),
            Axis("weights_nvme", (0.0, 0.5, 1.0) if drive else (0.0,)),
            Axis("activations.gpu", (0.0, 0.125, 0.25, 0.5, 1.0)),
            Axis("activations.nvme", (0.0, 0.5, 1.0) if drive else (0.0,)),
            Axis("recompute.keep", (0.0, 0.0625, 0.125, 0.25, 0.5, 1.0)),
            Axis("recompute.offload", (0.0, 0.125, 0.25, 0.5)),
            Axis("recompute.products", (0.0, 0.125, 0.25, 0.5, 1.0) if with_products else (0.0,)),
            Axis("recompute.middle", (0.0, 0.5, 1.0) if with_middle else (0.0,)),
            Axis("chunk_bytes", chunk_sizes(model)),
            Axis("adam_threads", tuple(reversed(threads))),
            Axis("update", updates),
            Axis("late_updates", (0.0, 0.125, 0.25, 0.375, 0.5, 0.75, 1.0) if "backward" in updates else (0.0,)),
            Axis("gradient_ring", (1, 3) if "backward" in updates else (1,)),
        ),
    )


def coarse_space(model: ModelSpec, profile: HardwareProfile, base: Plan, batch: int | None = None) -> Space:
    """Few enough points to try them all (`--exhaustive`): the knobs that matter, at telling values."""
    space = full_space(model, profile, base, batch)
    axes = {axis.name: axis.values for axis in space.axes}
    narrowed = {
        "micro_batch": tuple(n for n in axes["micro_batch"] if batch or n in (1, 4, 16))[-4:],
        "prefetch": axes["prefetch"][:1],
        "spare_slots": (1,),
        "resident_layers": (0.0, 1 / 8, 1 / 2),
        "resident_weights": (0.0, 1.0),
        "optimizer_nvme": tuple(v for v in axes["optimizer_nvme"] if v in (0.0, 0.5, 1.0)),
        "weights_nvme": tuple(v for v in axes["weights_nvme"] if v in (0.0, 1.0)),
        "activations__gpu": (0.0,),
        "activations__nvme": (0.0,),
        "recompute__keep": (0.0, 0.125),
        "recompute__offload": (0.0,),
        "recompute__products": (0.0,),
        "recompute__middle": (0.0,),
        "chunk_bytes": axes["chunk_bytes"][1:2],
        "adam_threads": axes["adam_threads"][:1],
        "late_updates": (0.0,),
        "gradient_ring": (1,),
    }
    if not batch:
        narrowed["accumulation"] = tuple(n for n in axes["accumulation"] if n in (1, 2, 4, 8, 16, 32))
    return space.restricted(**narrowed)


def chunk_sizes(model: ModelSpec) -> tuple[int, ...]:
    """Powers of two that cut a layer's gradient into about 8, 4 and 2 chunks, of 4 to 512 MiB."""
    largest = max(unit.params for unit in model.layers) * BF16_BYTES
    eighth = max(1, largest // 8)
    first = min(max(1 << (eighth - 1).bit_length(), 4 * MIB), 256 * MIB)
    return tuple(size for size in (first, first * 2, first * 4) if size <= 512 * MIB)
