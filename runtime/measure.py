"""A profile of the machine at hand: what the simulator must know, measured with the code that the runtime uses.

Takes about a minute on an idle machine, and means nothing on a busy one. On the CPU as device, "GPU" and "link" are
matrix products and copies of the same cores that run Adam: good enough to try the loop, no more.

Not measured: how well a drive mixes reads and writes, and who goes first where DRAM is short; those figures stay
what they are assumed to be elsewhere, and say so.
"""

from __future__ import annotations

import datetime
import itertools
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from slidetune.hardware import Figure, Gpu, HardwareProfile, Host, Link, Nvme
from slidetune.runtime.adam import AdamW, adam_implementation, adam_step
from slidetune.runtime.arena import Arena
from slidetune.runtime.nvme import NvmeFile
from slidetune.units import GB, GIB, MIB

# DRAM bytes that Adam over a split master moves for one parameter.
_ADAM_BYTES = 26


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How long and how much."""

    seconds: float = 1.0
    """Of each measurement, at least."""
    copy_bytes: int = 256 * MIB
    params: int = 64 * MIB
    """Parameters that Adam updates: far more than caches hold."""
    matrix: int = 8192
    """Rows of the matrix product on a GPU; an eighth on the CPU."""
    nvme_bytes: int = 2 * GIB


def measure_machine(
    device: torch.device | str, *, nvme_folder: str | Path | None = None, effort: Effort | None = None
) -> HardwareProfile:
    """Measure device, link, host and, if a folder is given, its drive.

    Raises NvmeError if the folder's drive can't be used, MemoryError if the machine is too small.
    """
    bench = _Bench(torch.device(device), effort or Effort())
    with bench.arena() as arena:
        link, copies = bench.link(arena)
        host = bench.host(copies)
    name = platform.node() or "this machine"
    nvme = None if nvme_folder is None else bench.nvme(nvme_folder)
    return HardwareProfile(name=name, gpu=bench.gpu(), link=link, host=host, nvme=nvme)


def _in_turn(action: Callable[[int], None], arguments: Sequence[int]) -> Callable[[], None]:
    """An action on one argument after the other, from the start again after the last."""
    endless = itertools.cycle(arguments)
    return lambda: action(next(endless))


@dataclass(slots=True)
class _Copies:
    """One copy each way, and what it moves in bytes; each waits for its end."""

    up: Callable[[], None]
    down: Callable[[], None]
    nbytes: int


class _Bench:
    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.source = f"measured {datetime.date.today()} with torch {torch.__version__}"
        self.cuda = device.type == "cuda"

    def arena(self) -> Arena:
        return Arena(2 * self.effort.copy_bytes, pin=self.cuda, name="measurement")

    # ---- device -------------------------------------------------------------------------------------------

    def gpu(self) -> Gpu:
        size = self.effort.matrix if self.cuda else max(64, self.effort.matrix // 8)
        a, b = (torch.randn(size, size, device=self.device).to(torch.bfloat16) for _ in range(2))
        flops = 2.0 * size**3 / self._seconds_of(lambda: a @ b)
        source = torch.empty(self.effort.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        traffic = 2.0 * source.nbytes / self._seconds_of(lambda: target.copy_(source))
        if self.cuda:
            properties = torch.cuda.get_device_properties(self.device)
            name, memory = properties.name, properties.total_memory
        else:
            name, memory = "CPU as device", psutil.virtual_memory().total // 2
        return Gpu(
            name=name,
            bf16_tflops=self._figure(flops / 1e12, f"bf16 product of {size}"),
            matmul_efficiency=self._figure(1.0, "bf16_tflops is already what products reach"),
            memory_gib=self._figure(memory / GIB, "what the device reports" if self.cuda else "half of the RAM"),
            memory_gbs=self._figure(traffic / GB, "device copy, reading and writing"),
            memory_efficiency=self._figure(1.0, "memory_gbs is already what copies reach"),
            launch_us=self._figure(self._launch_s() * 1e6, "a small layer's forward pass, a kernel of it"),
            context_gib=Figure(1.0 if self.cuda else 0.0, "guess", "CUDA context, libraries and allocator"),
        )

    def _launch_s(self) -> float:
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
        return self._seconds_of(forward) / launches

    # ---- link ---------------------------------------------------------------------------------------------

    def link(self, arena: Arena) -> tuple[Link, _Copies]:
        size = self.effort.copy_bytes
        # The device's side is made to outlive the measurement with the closures below.
        host = [arena.tensor(at, size, torch.uint8) for at in (0, size)]
        far = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(2)]
        up, down = self._copy(far[0], host[0]), self._copy(host[1], far[1])
        up_s, down_s = self._seconds_of(up), self._seconds_of(down)
        both = self._side_by_side(up, down)
        small_s = self._seconds_of(self._copy(far[0][:4096], host[0][:4096]))
        link = Link(
            name="measured",
            h2d_gbs=self._figure(size / up_s / GB, "large page-locked copy"),
            d2h_gbs=self._figure(size / down_s / GB, "large page-locked copy"),
            duplex_gbs=self._figure(sum(both) * size / GB, "both at once"),
            latency_us=self._figure(small_s * 1e6, "copy of 4 KiB"),
        )
        return link, _Copies(up, down, size)

    def _copy(self, target: Tensor, source: Tensor) -> Callable[[], None]:
        if not self.cuda:
            return lambda: target.copy_(source)
        stream = torch.cuda.Stream(self.device)

        def copy() -> None:
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)
            stream.synchronize()

        return copy

    # ---- host ---------------------------------------------------------------------------------------------

    def host(self, copies: _Copies) -> Host:
        cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
        cores = min(cores, len(psutil.Process().cpu_affinity()))
        params = self.effort.params
        with Arena(12 * params + 2 * params, name="Adam's measurement") as arena:
            one = self._adam(arena, params // 4, 1)
            all_cores = self._adam(arena, params, cores)
            single = params // 4 / self._seconds_of(one)
            alone = params / self._seconds_of(all_cores)
            capacity = alone * _ADAM_BYTES
            weights = [
                self._dram_weight(all_cores, copy, params, alone, capacity, copies.nbytes)
                for copy in (
                    copies.up,
                    copies.down,
                )
            ]
        what = f"AdamW over a split master ({adam_implementation()})"
        return Host(
            name=platform.processor() or platform.machine(),
            cores=self._figure(cores, "what the process may use"),
            ram_gib=self._figure(psutil.virtual_memory().total / GIB, "what the system reports"),
            dram_gbs=self._figure(capacity / GB, f"{what}, {cores} threads, 26 bytes a parameter"),
            dram_efficiency=self._figure(1.0, "dram_gbs is already what Adam reaches"),
            adam_gparams_per_core=self._figure(single / 1e9, f"{what}, 1 thread"),
            upload_dram_weight=self._figure(weights[0], "Adam beside uploads"),
            download_dram_weight=self._figure(weights[1], "Adam beside downloads"),
            process_gib=Figure(2.5, "guess", "1.5 GiB for the process and 1 left to the operating system"),
        )

    def _adam(self, arena: Arena, params: int, threads: int) -> Callable[[], None]:
        first = arena.tensor(0, params, torch.float32)
        second = arena.tensor(4 * params, params, torch.float32)
        low = arena.tensor(8 * params, params, torch.int16)
        high = arena.tensor(10 * params, params, torch.bfloat16)
        gradient = arena.tensor(12 * params, params, torch.bfloat16)
        return lambda: adam_step(high, low, first, second, gradient, hyper=AdamW(), step=1, threads=threads)

    def _dram_weight(
        self,
        adam: Callable[[], None],
        copy: Callable[[], None],
        params: int,
        alone: float,
        capacity: float,
        nbytes: int,
    ) -> float:
        """DRAM capacity that a copied byte takes from Adam: what Adam loses over what is copied meanwhile."""
        updates, copied = self._side_by_side(adam, copy)
        lost = capacity * (1.0 - min(1.0, updates * params / alone))
        return max(0.05, lost / (copied * nbytes))

    # ---- NVMe ---------------------------------------------------------------------------------------------

    def nvme(self, folder: str | Path) -> Nvme:
        size = self.effort.nvme_bytes
        piece = min(size, 64 * MIB)
        with NvmeFile(folder, size) as file, Arena(2 * piece, name="NVMe measurement") as arena:
            buffers = [arena.tensor(at, piece, torch.uint8) for at in (0, piece)]
            pieces = range(0, size - piece + 1, piece)
            rates = []
            for move, buffer in zip((file.write, file.read), buffers, strict=True):
                began = time.perf_counter()
                for at in pieces:
                    move(at, buffer)
                rates.append(len(pieces) * piece / (time.perf_counter() - began))
            # As training does it: what is written was read a few pieces before.
            both = self._side_by_side(
                _in_turn(lambda at: file.write(at, buffers[0]), pieces),
                _in_turn(lambda at: file.read(at, buffers[1]), [*pieces[len(pieces) // 2 :], *pieces]),
            )
            share = sum(count * piece / rate for count, rate in zip(both, rates, strict=True))
        return Nvme(
            size_gb=self._figure(psutil.disk_usage(str(folder)).free / GB, "space free in the folder"),
            write_gbs=self._figure(rates[0] / GB, f"O_DIRECT, {piece // MIB} MiB at a time"),
            read_gbs=self._figure(rates[1] / GB, f"O_DIRECT, {piece // MIB} MiB at a time"),
            mixed_share=self._figure(share, "reads and writes at once, each as a share of its rate alone"),
        )

    # ---- timing -------------------------------------------------------------------------------------------

    def _figure(self, value: float, how: str) -> Figure:
        digits = float(f"{value:.4g}")
        return Figure(digits, "measured", f"{how}; {self.source}")

    def _seconds_of(self, action: Callable[[], object]) -> float:
        """Median seconds of one call, after one that warms up; on a GPU, of calls in a row until all are done."""
        action()
        self._synchronize()
        began = time.perf_counter()
        action()
        self._synchronize()
        # Many short ones together, so that waiting for them doesn't count.
        together = max(1, round(0.05 * self.effort.seconds / max(time.perf_counter() - began, 1e-7)))
        found = []
        deadline = time.perf_counter() + self.effort.seconds
        while len(found) < 3 or time.perf_counter() < deadline:
            began = time.perf_counter()
            for _ in range(together):
                action()
            self._synchronize()
            found.append((time.perf_counter() - began) / together)
        return statistics.median(found)

    def _side_by_side(self, *actions: Callable[[], object]) -> list[float]:
        """Calls a second of each action while all of them run, each in a thread of its own."""
        rates = [0.0] * len(actions)
        start = threading.Barrier(len(actions))
        stop = threading.Event()

        def loop(number: int, action: Callable[[], object]) -> None:
            action()
            start.wait()
            began, count = time.perf_counter(), 0
            while not stop.is_set() or count == 0:
                action()
                count += 1
            rates[number] = count / (time.perf_counter() - began)

        threads = [threading.Thread(target=loop, args=pair, name="measure") for pair in enumerate(actions)]
        for thread in threads:
            thread.start()
        time.sleep(self.effort.seconds)
        stop.set()
        for thread in threads:
            thread.join()
        return rates

    def _synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)
