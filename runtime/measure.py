"""A profile of the machine at hand: what the simulator must know, measured with the code that the runtime uses.

Takes about a minute on an idle machine, and means nothing on a busy one: every figure carries the spread of its
measurements, so that a reader can tell. On the CPU as device, "GPU" and "link" are matrix products and copies of the
same cores that run Adam: good enough to try the loop, no more.

What Adam, copies and kernels lose to each other is measured with all of them running, several times over, each time
against their speeds alone just before; the medians of those are also their rates. Not measured: the memory of a CUDA
context and of the process, and SlideFormer's conversion.
"""

from __future__ import annotations

import datetime
import itertools
import platform
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import torch
from torch import Tensor

from slidetune.hardware import Figure, Gpu, HardwareProfile, Host, Link, Nvme, amdahl_speedup
from slidetune.machines import DEFAULT_HOST, load_host
from slidetune.runtime.adam import AdamW, adam_implementation, adam_rows, adam_step
from slidetune.runtime.arena import Arena, available_bytes
from slidetune.runtime.fits import (
    Assumed,
    Beside,
    CallFit,
    Contention,
    Found,
    GapFit,
    Kept,
    Repeated,
    fit_call,
    fit_contention,
    fit_gaps,
    fit_link,
    fit_serial_share,
    rates_together,
    repeated,
)
from slidetune.runtime.nvme import NvmeFile
from slidetune.runtime.row_kernels import Readers, gather_rows, sum_rows
from slidetune.units import GB, GIB, KIB, MIB, format_bytes

# DRAM bytes that Adam over a split master moves for one parameter, and bytes that its state and gradient have.
_ADAM_BYTES, _STATE_BYTES = 26, 14
# Where Adam has at least this many cores, plans leave one to the rest of the process.
_MANY_CORES = 4

ADAM, UP, DOWN, KERNELS, SMALL_ADAM = "Adam", "uploads", "downloads", "kernels", "Adam in small calls"
MIXES = ((ADAM,), (SMALL_ADAM,), (UP,), (DOWN,), (UP, DOWN), (ADAM, UP), (ADAM, DOWN), (ADAM, UP, DOWN))
"""What runs side by side."""
KERNEL_MIXES = ((KERNELS,), (KERNELS, UP), (KERNELS, DOWN), (KERNELS, UP, DOWN), (KERNELS, ADAM, UP, DOWN))
"""And on a GPU, where kernels are not the cores' own work."""
PASSES = 9
"""Times that all mixes are gone through: a shared host's memory is 10 % faster or slower from one ten seconds to the
next."""
_MIX_SECONDS = 0.3
# Parameters of a small call of Adam: some of a layer's.
_SMALL_CALL = 2 * MIB
# About as long as Adam waits for a gradient where the GPU is the limit; its threads, and the cores, sleep by then.
_PAUSE_S = 5e-3
# Elements of an embedding row, and tokens of a batch that read one each.
_ROW, _ROW_TOKENS = 2560, 8192
# A kernel's length: as short as a layer's many, but longer than its launch takes the host.
_KERNEL_S = 30e-6
# Matrices of a multiple of this fill a GPU's tiles.
_KERNEL_ROWS = 256
_LINK_SIZES = (4 * KIB, 64 * KIB, MIB, 16 * MIB, 256 * MIB)

T = TypeVar("T")
# Calls a second of each action of each mix, in one pass.
Rates = dict[tuple[str, ...], dict[str, float]]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long and how much."""

    seconds: float = 1.0
    """Of each measurement, at least; of copies of one size and of each mix less, since there are many."""
    copy_bytes: int = 256 * MIB
    """Of the largest copy."""
    copies_bytes: int = 4 * GIB
    """Host memory that copies both ways go through in turn, as Adam's calls through theirs. No more than an eighth of
    the RAM that is free, and no less than one copy each way."""
    params: int = 64 * MIB
    """Parameters that a call of Adam updates."""
    adam_bytes: int = 14 * GIB
    """Memory that its calls go through in turn, as in training: many times what caches hold, which may be hundreds of
    megabytes. No more than a quarter of the RAM that is free, and no less than one call's."""
    matrix: int = 8192
    """Rows of the matrix product on a GPU; an eighth on the CPU."""
    nvme_bytes: int = 2 * GIB


def measure_machine(
    device: torch.device | str,
    *,
    nvme_folder: str | Path | None = None,
    effort: Effort | None = None,
    progress: Progress = lambda done, total, what: None,
) -> HardwareProfile:
    """Measure device, link, host and, if a folder is given, its drive.

    `progress` is called with measurements done, measurements to do, and what is measured now. Raises NvmeError if the
    folder's drive can't be used, MemoryError if the machine is too small.
    """
    bench = _Bench(torch.device(device), effort or Effort(), progress, drive=nvme_folder is not None)
    with bench.arena() as arena, bench.adam_arena() as adam_arena:
        sizes, copies = bench.copies(arena), bench.large_copies(arena)
        one, all_of_them = bench.adam_alone(adam_arena)
        rows = bench.rows(adam_arena)
        passes = bench.side_by_side(adam_arena, copies)
        nvme = None if nvme_folder is None else bench.nvme(nvme_folder, adam_arena)
    link = bench.link(sizes, passes)
    host = bench.host(one, all_of_them, link, passes, rows)
    gpu = bench.gpu(passes)
    profile = HardwareProfile(name=platform.node() or "this machine", gpu=gpu, link=link, host=host, nvme=nvme)
    bench.finished()
    return profile


def _in_turn(action: Callable[[T], None], arguments: Sequence[T]) -> Callable[[], None]:
    """An action on one argument after the other, from the start again after the last."""
    endless = itertools.cycle(arguments)
    return lambda: action(next(endless))


def _one_behind(stream: torch.cuda.Stream) -> Callable[[], None]:
    """Waits for what a stream had been given at the call before: it never runs dry until a thread wakes up, which
    beside Adam's takes milliseconds, nor does a thread that waits take a core from them."""
    events = [torch.cuda.Event(blocking=True) for _ in range(2)]

    def wait() -> None:
        events[0].record(stream)
        events.reverse()
        # Not recorded yet, in the first call, it has passed.
        events[0].synchronize()

    return wait


@dataclass(frozen=True, slots=True)
class _SizedCopies:
    """Seconds of a copy of each size, each way."""

    sizes: list[int]
    up: list[Repeated]
    down: list[Repeated]


class _Bench:
    def __init__(self, device: torch.device, effort: Effort, progress: Progress, *, drive: bool) -> None:
        self.device, self.effort, self.progress = device, effort, progress
        self.source = f"measured {datetime.date.today()} with torch {torch.__version__}"
        self.cuda = device.type == "cuda"
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        self.cores = min(cores, len(psutil.Process().cpu_affinity()))
        self.sizes = sorted({size for size in _LINK_SIZES if size < effort.copy_bytes} | {effort.copy_bytes})
        self.mixes = (*MIXES, *KERNEL_MIXES) if self.cuda else MIXES
        # Parameters whose state calls of Adam go through.
        calls = min(self.effort.adam_bytes, available_bytes() // 4) // (_STATE_BYTES * self.effort.params)
        self.most = max(1, calls) * self.effort.params
        copies = min(self.effort.copies_bytes, available_bytes() // 8) // (2 * self.effort.copy_bytes)
        self.copies_each_way = max(1, copies)
        self.small_call = min(_SMALL_CALL, effort.params // 8)
        # In one call, enough kernels that waiting for the last doesn't count.
        self.kernels = max(100, round(1000 * effort.seconds))
        self.done = 0
        adam = 1 if self.threads == self.all_threads else 2
        self.total = 2 * len(self.sizes) + adam + PASSES * len(self.mixes) + (4 if drive else 0) + 6

    def arena(self) -> Arena:
        size = 2 * self.copies_each_way * self.effort.copy_bytes
        return Arena(size, pin=self.cuda, name="measurement")

    def adam_arena(self) -> Arena:
        arena = Arena(_STATE_BYTES * self.most, name="Adam's measurement")
        # Numbers around 0.01 of any width, as in training: CPUs may leave out writing zeros over zeros.
        arena.tensor(0, arena.nbytes, torch.uint8).fill_(0x3C)
        return arena

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """One measurement, for the progress bar."""
        self.progress(self.done, self.total, what)
        yield
        self.done += 1

    def finished(self) -> None:
        self.progress(self.total, self.total, "")

    # ---- device -------------------------------------------------------------------------------------------

    def gpu(self, passes: Sequence[Rates]) -> Gpu:
        size = self.effort.matrix if self.cuda else max(64, self.effort.matrix // 8)
        a, b = (torch.randn(size, size, device=self.device).to(torch.bfloat16) for _ in range(2))
        with self.step("matrix products"):
            product = self._seconds_of(lambda: a @ b)
        source = torch.empty(self.effort.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        with self.step("device memory"):
            copy = self._seconds_of(lambda: target.copy_(source))
        with self.step("launches"):
            launch = self._launch_s()
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            name, memory = properties.name, properties.total_memory
        else:
            name, memory = "CPU as device", psutil.virtual_memory().total // 2
        flops, traffic = 2.0 * size**3, 2.0 * source.nbytes
        return Gpu(
            name=name,
            bf16_tflops=self._figure(flops / product.value / 1e12, f"bf16 product of {size}", product.spread),
            matmul_efficiency=self._figure(1.0, "bf16_tflops is already what products reach"),
            memory_gib=self._figure(memory / GIB, "what the device reports" if self.cuda else "half of the RAM"),
            memory_gbs=self._figure(traffic / copy.value / GB, "device copy, reading and writing", copy.spread),
            memory_efficiency=self._figure(1.0, "memory_gbs is already what copies reach"),
            launch_us=self._figure(launch.value * 1e6, "a small layer's forward pass, a kernel of it", launch.spread),
            context_gib=Figure(1.0 if self.cuda else 0.0, "guess", "CUDA context, libraries and allocator"),
            **self._gaps(passes),
        )

    def _gaps(self, passes: Sequence[Rates]) -> dict[str, Figure]:
        """What copies cost kernels that run beside them."""
        if not self.cuda:
            why = "not measured: on the CPU as device kernels are the cores' own and fetch nothing over a link"
            return {
                "gap_uploads_us": Figure(0.0, "derived", why),
                "gap_downloads_us": Figure(0.0, "derived", why),
                "gap_adam_factor": Figure(1.0, "derived", why),
            }
        alone, *beside = ([self._kernel_s(rates, mix) for rates in passes] for mix in KERNEL_MIXES)
        gaps = [[later - sooner for later, sooner in zip(mix, alone, strict=True)] for mix in beside]
        middle = [repeated(gap).value for gap in gaps]
        found, each = fit_gaps(*middle), [fit_gaps(*one) for one in zip(*gaps, strict=True)]
        told = ", ".join(f"{gap * 1e6:.2g}" for gap in middle)
        how = (
            f"products of {repeated(alone).value * 1e6:.0f} us take {told} us longer beside {UP}, {DOWN}, both, and "
            f"both and Adam"
        )
        spreads = GapFit(*(repeated(column).spread for column in zip(*each, strict=True)))
        return {
            "gap_uploads_us": self._figure(found.uploads_s * 1e6, how, spreads.uploads_s),
            "gap_downloads_us": self._figure(found.downloads_s * 1e6, how, spreads.downloads_s),
            "gap_adam_factor": self._figure(found.adam_factor, how, spreads.adam_factor),
        }

    def _kernel_s(self, rates: Rates, mix: tuple[str, ...]) -> float:
        """Seconds of one kernel in a mix."""
        return 1.0 / rates[mix][KERNELS] / self.kernels

    def _short_kernels(self) -> Callable[[], None]:
        """Many short matrix products one after the other on a stream of their own; waits for the last."""

        def products(rows: int) -> Callable[[], None]:
            a, b = (torch.randn(rows, rows, device=self.device).to(torch.bfloat16) for _ in range(2))
            out = torch.empty_like(a)
            return lambda: torch.mm(a, b, out=out)

        rows = 2048
        product_s = self._seconds_of(products(rows), 0.1 * self.effort.seconds).value
        tiles = round(rows * (_KERNEL_S / product_s) ** (1 / 3) / _KERNEL_ROWS)
        product = products(_KERNEL_ROWS * max(1, tiles))
        torch.cuda.synchronize(self.device)
        stream, ended = torch.cuda.Stream(self.device), torch.cuda.Event(blocking=True)

        def kernels() -> None:
            with torch.cuda.stream(stream):
                for _ in range(self.kernels):
                    product()
            ended.record(stream)
            ended.synchronize()

        return kernels

    def _launch_s(self) -> Repeated:
        """Host seconds a kernel of a layer so small that launching is all."""
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        from slidetune.families import spec_from_config

        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=1,
            vocab_size=64,
            attn_implementation="sdpa",
        )
        layer = LlamaDecoderLayer(config, 0).to(self.device, torch.bfloat16)
        x = torch.zeros(1, 8, 64, dtype=torch.bfloat16, device=self.device)
        positions = torch.arange(8, device=self.device)[None]
        rotary = LlamaRotaryEmbedding(config).to(self.device)(x, positions)

        def forward() -> None:
            with torch.no_grad():
                layer(x, attention_mask=None, position_embeddings=rotary)

        launches = spec_from_config(config.to_dict(), "launches").layers[0].eager.launches
        layer_s = self._seconds_of(forward)
        return layer_s._replace(value=layer_s.value / launches)

    # ---- link ---------------------------------------------------------------------------------------------

    def copies(self, arena: Arena) -> _SizedCopies:
        up, down = self._ends(arena)
        found = _SizedCopies(self.sizes, [], [])
        for size in self.sizes:
            for name, ends, seconds in (("up", up, found.up), ("down", down, found.down)):
                with self.step(f"copies of {format_bytes(size)} {name}"):
                    copy = self._copy([(target[:size], source[:size]) for target, source in ends])
                    seconds.append(self._seconds_of(copy, 0.5 * self.effort.seconds))
        return found

    def large_copies(self, arena: Arena) -> dict[str, Callable[[], None]]:
        """One copy each way, queued before the one before it has ended, as in a step; each waits for that one."""
        up, down = self._ends(arena)
        return {UP: self._copy(up, queued=True), DOWN: self._copy(down, queued=True)}

    def link(self, copies: _SizedCopies, passes: Sequence[Rates]) -> Link:
        fit = fit_link(copies.sizes, *([time.value for time in times] for times in (copies.up, copies.down)))
        size = self.effort.copy_bytes
        up, down = (
            # Where copies queue, the latency of one is hidden behind the one before.
            repeated([rates[side,][side] * size / GB for rates in passes])
            for side in (UP, DOWN)
        )
        duplex = repeated([sum(rates[UP, DOWN].values()) * size / GB for rates in passes])
        kind = "page-locked copies" if self.cuda else "copies"
        sizes = (
            f"{kind} of {format_bytes(copies.sizes[0])} to {format_bytes(size)} as latency + bytes/rate, "
            f"off by {fit.worst:.0%} at worst ({format_bytes(fit.worst_bytes)})"
        )
        large = f"{kind} of {format_bytes(size)} alone, one after the other, median of {PASSES} passes"
        return Link(
            name="measured",
            h2d_gbs=self._figure(up.value, large, up.spread),
            d2h_gbs=self._figure(down.value, large, down.spread),
            duplex_gbs=self._figure(duplex.value, f"copies of {format_bytes(size)} both ways at once", duplex.spread),
            latency_us=self._figure(fit.latency_s * 1e6, sizes, max(copies.up[0].spread, copies.down[0].spread)),
        )

    def _ends(self, arena: Arena) -> list[list[tuple[Tensor, Tensor]]]:
        """Target and source of the largest copies up, and of those down."""
        size, count = self.effort.copy_bytes, self.copies_each_way
        here = [arena.tensor(number * size, size, torch.uint8) for number in range(2 * count)]
        there = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        return [[(there[0], source) for source in here[:count]], [(target, there[1]) for target in here[count:]]]

    def _copy(self, ends: Sequence[tuple[Tensor, Tensor]], *, queued: bool = False) -> Callable[[], None]:
        """Copies between one target and source after the other, so that no cache has large ones; each call waits for
        its copy's end, or if they are `queued`, for that of the call before."""
        if not self.cuda:
            return _in_turn(lambda pair: pair[0].copy_(pair[1]), ends)
        stream = torch.cuda.Stream(self.device)
        wait = _one_behind(stream) if queued else stream.synchronize

        def copy(pair: tuple[Tensor, Tensor]) -> None:
            target, source = pair
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            wait()

        return _in_turn(copy, ends)

    # ---- host ---------------------------------------------------------------------------------------------

    @property
    def threads(self) -> int:
        """Adam's, as plans have it."""
        return max(1, self.cores - 1)

    @property
    def all_threads(self) -> int:
        """Those that show what DRAM gives: as plans have it, or where one less would miss it, all."""
        return self.threads if self.cores >= _MANY_CORES else self.cores

    def adam_alone(self, arena: Arena) -> tuple[Repeated, Repeated | None]:
        """Seconds a parameter: one thread, and as many as DRAM can feed, if what runs side by side has fewer."""
        params, threads = self.effort.params, self.all_threads
        one = self._adam_s(arena, params // 4, 1)
        return one, None if threads == self.threads else self._adam_s(arena, params, threads)

    def _adam_s(self, arena: Arena, params: int, threads: int) -> Repeated:
        """Seconds a parameter."""
        with self.step(f"Adam, {_threads(threads)}"):
            seconds = self._seconds_of(self._adam(arena, params, threads))
        return seconds._replace(value=seconds.value / params)

    def rows(self, arena: Arena) -> dict[str, Figure]:
        """What the host does with rows of a matrix here and there: of its speed, what is left."""
        params, threads = self.most, self.threads
        # A matrix larger than caches, and a batch's tokens in it.
        table = arena.tensor(0, 7 * params, torch.bfloat16)[: 7 * params // _ROW * _ROW].view(-1, _ROW)
        state, gradient = self._adam_state(arena)
        count = min(_ROW_TOKENS, params // _ROW // 4)
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randint(0, table.shape[0], (count,), generator=generator) for _ in range(8)]
        tokens, sums = (torch.zeros(count, _ROW, dtype=torch.bfloat16) for _ in range(2))
        parts = [torch.randperm(params // _ROW, generator=generator)[:count].sort().values for _ in range(8)]
        places, scattered = torch.arange(count), Readers.of(torch.randperm(count, generator=generator), count)
        state, dense = ([tensor[: params // _ROW * _ROW] for tensor in state], gradient[: params // _ROW * _ROW])
        actions = {
            "gather_gbs": _in_turn(lambda ids: gather_rows(table, ids, tokens, threads=threads), batches),
            "sum_rows_gbs": lambda: sum_rows(tokens, scattered, sums, fresh=True, threads=threads),
            "adam_rows_share": _in_turn(
                lambda ids: adam_rows(
                    *state,
                    width=_ROW,
                    rows=ids,
                    places=places,
                    values=sums,
                    dense=dense,
                    hyper=AdamW(),
                    step=1,
                    threads=threads,
                ),
                parts,
            ),
        }
        seconds = {}
        for name, action in actions.items():
            with self.step("embedding rows"):
                seconds[name] = self._seconds_of(action, 0.3 * self.effort.seconds)
        call = self.effort.params
        whole_s = self._seconds_of(self._adam(arena, call, threads), 0.3 * self.effort.seconds).value
        how = f"{count} rows of {2 * _ROW} bytes, {_threads(threads)}"
        values = {
            "gather_gbs": tokens.nbytes / seconds["gather_gbs"].value / GB,
            "sum_rows_gbs": tokens.nbytes / seconds["sum_rows_gbs"].value / GB,
            "adam_rows_share": whole_s / call * count * _ROW / seconds["adam_rows_share"].value,
        }
        return {name: self._figure(value, how, seconds[name].spread) for name, value in values.items()}

    def side_by_side(self, arena: Arena, copies: dict[str, Callable[[], None]]) -> list[Rates]:
        """Calls a second of Adam, copies and kernels in every mix, several times over."""
        actions = {
            ADAM: self._adam(arena, self.effort.params, self.threads),
            SMALL_ADAM: self._adam(arena, self.small_call, self.threads),
            **copies,
        }
        if self.cuda:
            actions[KERNELS] = self._short_kernels()
        passes: list[Rates] = []
        for _ in range(PASSES):
            passes.append({})
            for mix in self.mixes:
                with self.step(" beside ".join(mix)):
                    if mix == (SMALL_ADAM,):
                        passes[-1][mix] = {SMALL_ADAM: 1.0 / self._after_pauses(actions[SMALL_ADAM], _MIX_SECONDS)}
                        continue
                    ends = self._side_by_side(*(actions[name] for name in mix), seconds=_MIX_SECONDS)
                    rates = (rate for (rate,) in rates_together(ends))
                    passes[-1][mix] = dict(zip(mix, rates, strict=True))
                    # The last copies are still under way.
                    self._synchronize()
        return passes

    def _after_pauses(self, action: Callable[[], object], seconds: float) -> float:
        """Median seconds of a call after a pause, as in training, where Adam waits for gradients: by then its threads
        sleep."""
        found: list[float] = []
        until = time.perf_counter() + seconds * self.effort.seconds
        while len(found) < 5 or time.perf_counter() < until:
            time.sleep(_PAUSE_S)
            began = time.perf_counter()
            action()
            found.append(time.perf_counter() - began)
        return repeated(found).value

    def host(
        self,
        one: Repeated,
        all_of_them: Repeated | None,
        link: Link,
        passes: Sequence[Rates],
        rows: dict[str, Figure],
    ) -> Host:
        what = f"AdamW over a split master ({adam_implementation()})"
        calls = [self._call(rates) for rates in passes]
        call_s, per_s = (repeated(column) for column in zip(*calls, strict=True))
        if all_of_them is None:
            threads, dram = self.threads, per_s
            how = f"less the cost of a call, {_threads(threads)}, median of {PASSES} passes"
        else:
            threads, dram = self.all_threads, all_of_them._replace(value=1.0 / all_of_them.value)
            how = _threads(threads)
        serial_share = fit_serial_share(1.0 / one.value, threads, dram.value)
        capacity = _ADAM_BYTES * dram.value
        small, large = (f"{params / MIB:.3g} Mi" for params in (self.small_call, self.effort.params))
        figures = {
            "dram_gbs": self._figure(capacity / GB, f"{what}, {how}, 26 bytes a parameter", dram.spread),
            "adam_gparams_per_core": self._figure(1.0 / one.value / 1e9, f"{what}, 1 thread", one.spread),
            "adam_serial_share": self._figure(
                serial_share, f"{what}, 1 thread against {_threads(threads)}", max(one.spread, dram.spread)
            ),
            "adam_call_us": self._figure(
                call_s.value * 1e6,
                f"{what}, {_threads(self.threads)}, {small} parameters against {large}",
                call_s.spread,
            ),
        }
        # As the simulator has it: the rate of these threads, or DRAM's.
        adam_share = min(1.0, amdahl_speedup(self.threads, serial_share) / one.value * _ADAM_BYTES / capacity)
        return Host(
            name=platform.processor() or platform.machine(),
            cores=self._figure(self.cores, "what the process may use"),
            ram_gib=self._figure(psutil.virtual_memory().total / GIB, "what the system reports"),
            dram_efficiency=self._figure(1.0, "dram_gbs is already what Adam reaches"),
            process_gib=Figure(2.5, "guess", "1.5 GiB for the process and 1 left to the operating system"),
            **figures,
            **rows,
            **self._contention(passes, adam_share, capacity, link),
        )

    def _call(self, rates: Rates) -> CallFit:
        """Adam's cost of a call and parameters a second, in one pass."""
        small, large = (1.0 / rates[name,][name] for name in (SMALL_ADAM, ADAM))
        return fit_call((self.small_call, small), (self.effort.params, large))

    def _contention(self, passes: Sequence[Rates], adam_share: float, capacity: float, link: Link) -> dict[str, Figure]:
        """DRAM weights and priorities of copies each way; `capacity` of DRAM in bytes a second of Adam's traffic."""
        assumed_host = load_host(DEFAULT_HOST)
        guesses = {
            field: {name: getattr(assumed_host, f"{field}_{figure}") for name, figure in _CONTENTION.items()}
            for field in ("upload", "download")
        }
        assumed = tuple(
            Assumed(gbs.value * GB / capacity, **{name: figure.value for name, figure in guesses[field].items()})
            for field, gbs in (("upload", link.h2d_gbs), ("download", link.d2h_gbs))
        )

        def fit(kept: Kept) -> tuple[Contention, Contention]:
            return fit_contention(kept, adam_share=adam_share, assumed=assumed)

        middle, each = fit(_typical(passes)), [fit(_typical([rates])) for rates in passes]
        how = self._told(_typical(passes))
        figures = {}
        for side, field in enumerate(guesses):
            for name, figure in _CONTENTION.items():
                found: Found = getattr(middle[side], name)
                spread = repeated([getattr(fitted[side], name).value for fitted in each]).spread
                figures[f"{field}_{figure}"] = (
                    self._figure(found.value, how, spread)
                    if found.known
                    else _assumed(guesses[field][name], f"held back too little here to tell ({how}), so as assumed: ")
                )
        return figures

    def _told(self, kept: Kept) -> str:
        """What the contention figures follow from, in words."""
        (up, down), all_of_them = kept.pairs, (kept.adam, *kept.copies)
        return (
            f"Adam, {_threads(self.threads)}, keeps {up.adam:.0%} of its speed beside {UP}, which keep {up.copy:.0%}; "
            f"{down.adam:.0%} beside {DOWN}, which keep {down.copy:.0%}; all three "
            f"{', '.join(f'{speed:.0%}' for speed in all_of_them)}"
        )

    def _adam(self, arena: Arena, params: int, threads: int) -> Callable[[], None]:
        """Calls of Adam on so many parameters; on the next ones each time, so that no cache has them, if there are."""
        most = self.most
        state, gradient = self._adam_state(arena)
        parts = [
            [tensor[at : at + params] for tensor in (*state, gradient)] for at in range(0, most - params + 1, params)
        ]
        return _in_turn(lambda part: adam_step(*part, hyper=AdamW(), step=1, threads=threads), parts)

    def _adam_state(self, arena: Arena) -> tuple[tuple[Tensor, ...], Tensor]:
        """Halves of masters and moments, and gradients, of all parameters of the arena."""
        most = self.most
        return (
            arena.tensor(10 * most, most, torch.bfloat16),
            arena.tensor(8 * most, most, torch.int16),
            arena.tensor(0, most, torch.float32),
            arena.tensor(4 * most, most, torch.float32),
        ), arena.tensor(12 * most, most, torch.bfloat16)

    # ---- NVMe ---------------------------------------------------------------------------------------------

    def nvme(self, folder: str | Path, adam_arena: Arena) -> Nvme:
        size = self.effort.nvme_bytes
        piece = min(size, 64 * MIB)
        with NvmeFile(folder, size) as file, Arena(2 * piece, name="NVMe measurement") as arena:
            buffers = [arena.tensor(at, piece, torch.uint8) for at in (0, piece)]
            pieces = range(0, size - piece + 1, piece)
            rates, spreads = [], []
            for name, move, buffer in zip(("writes", "reads"), (file.write, file.read), buffers, strict=True):
                with self.step(f"NVMe {name}"):
                    ends = [time.perf_counter()]
                    for at in pieces:
                        move(at, buffer)
                        ends.append(time.perf_counter())
                rates.append(len(pieces) * piece / (ends[-1] - ends[0]))
                spreads.append(repeated([b - a for a, b in itertools.pairwise(ends)]).spread)
            # As training does it: what is written was read a few pieces before.
            both = (
                _in_turn(lambda at: file.write(at, buffers[0]), pieces),
                _in_turn(lambda at: file.read(at, buffers[1]), [*pieces[len(pieces) // 2 :], *pieces]),
            )
            with self.step("NVMe reads beside writes"):
                share = _sum_of_shares(self._side_by_side(*both), piece, rates)
            with self.step("NVMe reads and writes beside Adam"):
                adam = self._adam(adam_arena, self.effort.params, self.threads)
                beside_adam = _sum_of_shares(self._side_by_side(*both, adam), piece, rates)
        how = f"O_DIRECT, {piece // MIB} MiB at a time"
        return Nvme(
            size_gb=self._figure(psutil.disk_usage(str(folder)).free / GB, "space free in the folder"),
            write_gbs=self._figure(rates[0] / GB, how, spreads[0]),
            read_gbs=self._figure(rates[1] / GB, how, spreads[1]),
            mixed_share=self._figure(
                share.value, "reads and writes at once, each as a share of its rate alone", share.spread
            ),
            adam_share=self._figure(
                min(1.0, beside_adam.value / share.value),
                f"of that, reads and writes at once beside Adam, {_threads(self.threads)}",
                beside_adam.spread,
            ),
        )

    # ---- timing -------------------------------------------------------------------------------------------

    def _figure(self, value: float, how: str, spread: float = 0.0) -> Figure:
        return Figure(float(f"{value:.4g}"), "measured", f"{how}; {self.source}", round(spread, 4))

    def _seconds_of(self, action: Callable[[], object], seconds: float | None = None) -> Repeated:
        """Seconds of one call, after two that warm up; on a GPU, of calls in a row until all are done."""
        seconds = seconds or self.effort.seconds
        action()
        self._synchronize()
        began = time.perf_counter()
        action()
        self._synchronize()
        # Many short ones together, so that waiting for them doesn't count.
        together = max(1, round(0.05 * seconds / max(time.perf_counter() - began, 1e-7)))
        found = []
        deadline = time.perf_counter() + seconds
        while len(found) < 5 or time.perf_counter() < deadline:
            began = time.perf_counter()
            for _ in range(together):
                action()
            self._synchronize()
            found.append((time.perf_counter() - began) / together)
        return repeated(found)

    def _side_by_side(self, *actions: Callable[[], object], seconds: float = 1.0) -> list[list[float]]:
        """For each action, run over and over in a thread of its own beside the others, the time it began and the time
        each call ended; for `seconds` of the effort's."""
        start = threading.Barrier(len(actions) + 1)
        stop = threading.Event()
        # Each goes on until all have ended a call: on a busy machine one may begin when others would have stopped.
        once = [threading.Event() for _ in actions]

        def loop(action: Callable[[], object], ended: threading.Event) -> list[float]:
            try:
                action()
                start.wait()
                ends = [time.perf_counter()]
                while not stop.is_set() or not all(event.is_set() for event in once):
                    action()
                    ends.append(time.perf_counter())
                    ended.set()
                return ends
            except BaseException:
                start.abort()
                raise
            finally:
                ended.set()

        with ThreadPoolExecutor(len(actions), thread_name_prefix="measure") as pool:
            running = [pool.submit(loop, *pair) for pair in zip(actions, once, strict=True)]
            try:
                start.wait()
                time.sleep(seconds * self.effort.seconds)
            except threading.BrokenBarrierError:
                pass  # An action failed: its own error tells why.
            finally:
                stop.set()
        failed = [error for error in (future.exception() for future in running) if error is not None]
        for error in failed:
            if not isinstance(error, threading.BrokenBarrierError):
                raise error
        return [future.result() for future in running]

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)


def _sum_of_shares(ends: Sequence[Sequence[float]], piece: int, rates: Sequence[float]) -> Repeated:
    """What a drive's writes and reads, piece by piece, reach at once: the sum of their shares of their rates alone."""
    both = [
        [calls * piece / alone for calls in found] for found, alone in zip(rates_together(ends, 4), rates, strict=False)
    ]
    return repeated([sum(shares) for shares in zip(*both, strict=True)])


# The names of a fit's figures in a profile, after "upload_" or "download_".
_CONTENTION = {"weight": "dram_weight", "priority": "priority", "duplex_priority": "duplex_priority"}


def _typical(passes: Sequence[Rates]) -> Kept:
    """The medians of what Adam and copies keep of their speeds."""

    def kept(name: str, *mix: str) -> float:
        return repeated([_kept(rates, name, mix) for rates in passes]).value

    return Kept(
        pairs=tuple(Beside(kept(ADAM, ADAM, side), kept(side, ADAM, side)) for side in (UP, DOWN)),
        adam=kept(ADAM, ADAM, UP, DOWN),
        copies=tuple(kept(side, ADAM, UP, DOWN) for side in (UP, DOWN)),
        both_ways=tuple(kept(side, UP, DOWN) for side in (UP, DOWN)),
    )


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _kept(rates: Rates, name: str, mix: tuple[str, ...]) -> float:
    """Speed of an action in a mix, as a fraction of its speed alone."""
    return rates[mix][name] / rates[name,][name]


def _assumed(figure: Figure, why: str) -> Figure:
    return Figure(figure.value, "derived", why + figure.source)
