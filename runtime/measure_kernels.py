"""How long a model's layers and head take on the device at hand, over a grid of micro-batches and lengths.

The model's own modules run with random weights, one after the other on one stream, through the code that training runs
them with. Each measurement belongs to a task of the schedule, so that the simulator can look it up.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slidetune.builder import build
from slidetune.gpu_time import gpu_seconds
from slidetune.hardware import Gpu, KernelTime
from slidetune.plans import Plan, Recompute, captured
from slidetune.runtime import batches
from slidetune.runtime.adam import AdamW
from slidetune.runtime.again import Again, layer_output
from slidetune.runtime.binding import Call, Parts
from slidetune.runtime.captured import recorder
from slidetune.runtime.counted_spec import spec_of
from slidetune.runtime.head_loss import chunked_loss, head_loss
from slidetune.runtime.kernels import apply_kernels, choose_kernels
from slidetune.runtime.pointing import Pointed
from slidetune.runtime.randomness import draws_random_numbers
from slidetune.runtime.rounding import round_in_place
from slidetune.runtime.skeleton import skeleton
from slidetune.runtime.unit_layouts import unit_layouts
from slidetune.schedule import GPU, Schedule, Work

# Kinds of tasks that are measured; Adam on the device is bound by memory bandwidth alone.
OPS = ("forward", "recompute", "backward", "head")


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """A micro-batch of the grid."""

    micro_batch: int
    seq_len: int
    accumulation: int = 1
    """Above 1, gradients are added up in fp32."""

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len


CUDA_GRID = (
    *(Point(n, 1024) for n in (1, 2, 4, 8, 16, 32, 64)),
    *(Point(n, 512) for n in (1, 8)),
    *(Point(n, 4096) for n in (1, 4)),
    *(Point(n, 8192) for n in (1, 4)),
    *(Point(n, 1024, 2) for n in (1, 4, 16)),
)
CPU_GRID = (Point(1, 64), Point(4, 64), Point(1, 256), Point(4, 64, 2), Point(4, 256))

Progress = Callable[[int, int], None]
Action = Callable[[], None]
Actions = dict[str, Action]
"""A layer's, by kind of task; with accumulation "recompute 2" and "backward 2", those of a further micro-batch."""

# Compilers and libraries try variants in the first rounds: a point may take twice as long in its first as in its fifth.
_WARM_UP_ROUNDS, _WARM_UP_SECONDS = 8, 1.0
# A GPU's clocks go down for tens of seconds of work; most of it in the first ten.
_HEAT_S = 8.0
_AGREE = 0.05
# At its power limit a GPU lowers its clocks, until they have settled some seconds later (H200: layers then take up to
# 9 % longer). Fewer tokens don't bring it there.
_SETTLE_S, _HARD_TOKENS = 2.5, 4096
# Layers of each kind in the steps that are timed.
_LAYERS = 12


def warm_up(one_round: Callable[[], Sequence[float]]) -> float:
    """Run rounds until no action's seconds differ by more than 5 % from the round before, or they have been eight or
    taken one second, but for a second one; the seconds of the last."""
    before, seconds = one_round(), 0.0
    spent = sum(before)
    for _ in range(_WARM_UP_ROUNDS - 1):
        now = one_round()
        seconds = sum(now)
        spent += seconds
        agree = all(abs(a - b) <= _AGREE * max(a, b) for a, b in zip(before, now, strict=True))
        if agree or spent > _WARM_UP_SECONDS:
            break
        before = now
    return seconds


def measure_kernels(
    ref: str,
    gpu: Gpu,
    device: torch.device,
    *,
    kernels: str = "auto",
    grid: Sequence[Point] | None = None,
    seconds: float = 75.0,
    progress: Progress = lambda done, total: None,
) -> tuple[KernelTime, ...]:
    """Times of every kind of GPU task of a model; `gpu` has the figures they are compared with.

    The grid is gone through from both ends, many tokens and few in turn, without those too many for device memory,
    until `seconds` have passed: on a GPU that is warm from work, as in training, where clocks are a few per cent below
    a cold one's. On a CPU, which may take minutes for the largest, the small ones come first.
    `ref`: directory, config.json, hub id or catalog name. `progress` is called with points done and to do.
    """
    bench = _Bench(ref, gpu, device, kernels)
    cuda = device.type == "cuda"
    grid = sorted(grid or (CUDA_GRID if cuda else CPU_GRID), key=lambda point: point.tokens)
    grid = [point for point in grid if point.seq_len <= bench.spec.max_seq_len]
    if cuda:
        grid = from_both_ends(grid[::-1])
        progress(0, len(grid))
        _heat(device)
    stream = torch.cuda.stream(torch.cuda.Stream(device)) if cuda else contextlib.nullcontext()
    deadline = time.perf_counter() + seconds
    found: list[KernelTime] = []
    for done, point in enumerate(grid):
        progress(done, len(grid))
        if time.perf_counter() > deadline:
            break
        try:
            # In this thread and on a stream, as lanes do it.
            with torch.autograd.set_multithreading_enabled(False), stream:
                found += bench.measure(point)
        except torch.OutOfMemoryError:
            continue
        finally:
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    progress(len(grid), len(grid))
    return tuple(found)


def from_both_ends(points: Sequence[Point]) -> list[Point]:
    """The first, the last, the second, the last but one and so on."""
    count = len(points)
    return [points[n // 2 if n % 2 == 0 else count - 1 - n // 2] for n in range(count)]


def _heat(device: torch.device) -> None:
    a = torch.randn(8192, 8192, device=device).to(torch.bfloat16)
    until = time.perf_counter() + _HEAT_S
    while time.perf_counter() < until:
        for _ in range(100):
            a @ a
        torch.cuda.synchronize(device)


class _Bench:
    def __init__(self, ref: str, gpu: Gpu, device: torch.device, kernels: str) -> None:
        self.ref, self.gpu, self.device = ref, gpu, device
        model = skeleton(ref)
        self.spec = spec_of(model, ref)
        self.parts = Parts(model, self.spec)
        model.train()
        # As training recomputes them.
        self.draws = draws_random_numbers(model)
        units = unit_layouts(self.parts, lambda name, parameter: AdamW())
        self.kernels = choose_kernels(kernels, model, device)
        apply_kernels(self.kernels, model)
        self.pointed = [Pointed(unit.computed, unit.targets) if unit.targets else None for unit in units]
        for pointed in self.pointed:
            if pointed is not None:
                pointed.release()
        for table in self.parts.tables:
            getattr(self.parts.base, table.name)._parameters["weight"] = None
        model.to(device)
        self.head_loss = head_loss(self.parts, self.pointed[-1], device)

    def measure(self, point: Point) -> list[KernelTime]:
        """Times of all kinds of tasks of one micro-batch."""
        plan = Plan(
            model=self.spec.name,
            seq_len=point.seq_len,
            micro_batch=point.micro_batch,
            accumulation=point.accumulation,
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.spec.vocab_size, (point.micro_batch, point.seq_len), generator=generator)
        calls, _ = self.parts.record_calls(self.device, {"input_ids": ids.to(self.device)})
        labels = batches.shifted(ids).flatten().to(self.device)
        kinds = _kinds(build(self.spec, plan, self.kernels))
        head = self.spec.head.index
        layers = {unit: self._layer(unit, point, calls[unit - 1]) for unit in kinds if unit != head}
        recorded = captured(plan, self.spec)
        timed = self._timed(layers, self._head(point, labels), point.tokens, recorded=recorded)
        found = [
            self._time(point, work, timed[unit, op]) for unit, works in kinds.items() for op, work in works.items()
        ]
        if not recorded or point.accumulation > 1:
            return found
        # Where inner activations are offloaded, passes run as they are; on the CPU they do anyway.
        kinds = _kinds(build(self.spec, replace(plan, recompute=Recompute(offload=1)), self.kernels))
        if self.device.type == "cuda":
            timed = self._timed(layers, None, 0, recorded=False)
        return found + [
            self._time(point, work, timed[unit, op])
            for unit, works in kinds.items()
            # The layer that offloads takes other memory, and the same time.
            if unit in layers
            for op, work in works.items()
        ]

    def _time(self, point: Point, work: Work, seconds: list[float]) -> KernelTime:
        quarters = statistics.quantiles(seconds, n=4)
        middle = statistics.median(seconds)
        return KernelTime(
            model=self.ref,
            kernels=self.kernels,
            op=work.op,
            micro_batch=point.micro_batch,
            seq_len=point.seq_len,
            flops=work.flops,
            traffic_bytes=work.traffic_bytes,
            launches=work.launches,
            seconds=float(f"{middle:.4g}"),
            spread=round((quarters[2] - quarters[0]) / 2 / middle, 4),
            model_s=float(f"{gpu_seconds(work, self.gpu):.6g}"),
        )

    def _layer(self, unit: int, point: Point, call: Call) -> Actions:
        layer, pointed = self.parts.layers[unit - 1], self.pointed[unit]
        shape = (point.micro_batch, point.seq_len, self.spec.hidden_size)
        source, target, upward = (torch.randn(shape, device=self.device, dtype=torch.bfloat16) for _ in range(3))
        weights = self._weights(pointed)
        sums = point.accumulation > 1
        gradient = self._empty(pointed.layout.trained, torch.float32 if sums else torch.bfloat16)
        again, edge, x = Again(layer, whole=self.draws), None, None

        def forward() -> None:
            pointed.point(weights)
            with torch.no_grad():
                target.copy_(layer_output(layer, source.data, call))

        def recompute() -> None:
            nonlocal edge, x
            pointed.point(weights)
            x = source.data.requires_grad_()
            with torch.enable_grad():
                edge = torch.autograd.graph.get_gradient_edge(again(x, call))

        def backward(fresh: bool = True, last: bool = not sums) -> None:
            pointed.collect_into(gradient, fresh=fresh)
            torch.autograd.backward(edge, upward)
            upward.copy_(x.grad)
            x.grad = None
            if sums and last:
                round_in_place(gradient)

        actions = {"forward": forward, "recompute": recompute, "backward": backward}
        if sums:
            # The first gradient is written, the others are added: one of each.
            actions["recompute 2"] = recompute
            actions["backward 2"] = lambda: backward(fresh=False, last=True)
        return actions

    def _head(self, point: Point, labels: Tensor) -> Action:
        pointed = self.pointed[self.spec.head.index]
        hidden = torch.randn(point.tokens, self.spec.hidden_size, device=self.device, dtype=torch.bfloat16)
        source = hidden.clone()
        weights, gradient = self._weights(pointed), self._empty(pointed.layout.trained, torch.float32)
        chunk = self.spec.loss_chunk_tokens(point.tokens)

        def head() -> None:
            pointed.point(weights)
            pointed.collect_into(gradient, fresh=True)
            hidden.copy_(source)
            chunked_loss(self.head_loss, hidden, labels, point.tokens, chunk)
            round_in_place(gradient)

        return head

    def _weights(self, pointed: Pointed) -> Tensor:
        return torch.randn(pointed.layout.total, device=self.device).mul_(0.02).to(torch.bfloat16)

    def _empty(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(count, device=self.device, dtype=dtype)

    def _timed(
        self, layers: Mapping[int, Actions], head: Action | None, tokens: int, *, recorded: bool
    ) -> dict[tuple[int, str], list[float]]:
        """Seconds of each action, by unit and kind of task, while they follow one another as in a step, `recorded` as
        training records them; after some time of it on a GPU, for `tokens` enough to work it hard."""
        once = [action for actions in layers.values() for action in actions.values()] + ([head] if head else [])
        warm_up(lambda: self._rounds(once, 1)[0])
        cuda = self.device.type == "cuda"
        if recorded and cuda:
            record = recorder(torch.cuda.graph_pool_handle())
            layers = {
                unit: {name: record(action) for name, action in actions.items()} for unit, actions in layers.items()
            }
        names, actions = _step(layers, head, self.spec.head.index, repeats=_LAYERS if cuda else 1)
        step_s = sum(self._rounds(actions, 1)[0])
        if cuda:
            settle_s = _SETTLE_S if tokens >= _HARD_TOKENS else _SETTLE_S / 4
            self._rounds(actions, int(settle_s / step_s))
        rounds = self._rounds(actions, (2 if cuda else 4) + int(min(20, 0.5 / step_s)))
        found: dict[tuple[int, str], list[float]] = {}
        for row in rounds:
            for name, seconds in zip(names, row, strict=True):
                found.setdefault(name, []).append(seconds)
        for unit, actions in layers.items():
            if "backward 2" in actions:
                first, second = found[unit, "backward"], found[unit, "backward 2"]
                found[unit, "backward"] = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        return found

    def _rounds(self, actions: Sequence[Action], count: int) -> list[list[float]]:
        """Seconds of each action in each round."""
        marks = [[] for _ in range(count)]
        self._synchronize()
        for row in marks:
            row.append(self._now())
            for action in actions:
                action()
                row.append(self._now())
        self._synchronize()
        return [[self._between(start, end) for start, end in itertools.pairwise(row)] for row in marks]

    def _now(self) -> object:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start, end) -> float:
        return end - start if self.device.type != "cuda" else start.elapsed_time(end) / 1e3

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _step(
    layers: Mapping[int, Actions], head: Action | None, head_unit: int, repeats: int
) -> tuple[list[tuple[int, str]], list[Action]]:
    """What follows what in a step of so many layers of each kind, by unit and kind of task: all forward passes, the
    head, and all backward passes, each after its recomputation."""
    forward = [(unit, "forward", actions["forward"]) for unit, actions in layers.items()]
    backward = [
        (unit, name, action)
        for unit, actions in layers.items()
        for name, action in actions.items()
        if name != "forward"
    ]
    # Twice on a GPU, where one step may be all there is time for.
    heads = [(head_unit, "head", head)] * min(2, repeats) if head else []
    sequence = forward * repeats + heads + backward * repeats
    return [(unit, name) for unit, name, _ in sequence], [action for *_, action in sequence]


def _kinds(schedule: Schedule) -> dict[int, dict[str, Work]]:
    """By the first unit that has it, each kind of task that differs from those of the units before."""
    found: dict[int, dict[str, Work]] = {}
    seen: set[Work] = set()
    for task in sorted((t for t in schedule.tasks if t.work.lane == GPU), key=lambda t: t.unit):
        if task.work.op in OPS and task.work not in seen:
            seen.add(task.work)
            found.setdefault(task.unit, {})[task.work.op] = task.work
    return found
