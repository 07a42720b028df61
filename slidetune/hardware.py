"""What a machine can do: rates in GB/s (1e9), FLOP/s and seconds, each figure with its kind and its source.

A `HardwareProfile` is a YAML file. Catalog entries (`slidetune.machines`) come from data sheets and published
measurements. Achieved rates are never peak rates: wherever a data sheet gives a peak, an efficiency stands
beside it, with its own source.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from slidetune.units import GB, GIB

PROFILE_VERSION = 1

Kind = Literal["measured", "data sheet", "derived", "given", "guess"]

# How far a figure of each kind is taken to be off, one way, as a fraction. Measured: the run-to-run spread of
# a shared machine (the H200 probe states 5 %), for figures that don't state their own. Data sheet: what boards
# differ by in clocks and power limits. Derived: carried over from a measurement on a neighbouring machine. Given:
# the user's word.
RELATIVE_SPREAD: dict[Kind, float] = {
    "measured": 0.05,
    "data sheet": 0.05,
    "derived": 0.12,
    "given": 0.0,
    "guess": 0.25,
}
# No measurement is better than the least: the machine is another tomorrow. Nor is one so bad that nothing is left.
LEAST_SPREAD, MOST_SPREAD = 0.01, 0.9
# A measured figure with a larger spread is noise: the machine was busy.
NOISY_SPREAD = 0.10


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a profile and how it is known."""

    value: float
    """The number, in the unit its field names."""
    kind: Kind = "given"
    """measured, data sheet, derived (from another machine's measurement), given (by the user) or guess."""
    source: str = ""
    """Where it comes from: a document, a measurement, or the reasoning."""
    measured_spread: float | None = None
    """Half the distance between the quartiles of repeated measurements over their median; none was stated if absent."""

    def __float__(self) -> float:
        return float(self.value)

    @property
    def spread(self) -> float:
        """One-sided relative uncertainty."""
        if self.kind == "measured" and self.measured_spread is not None:
            return min(MOST_SPREAD, max(LEAST_SPREAD, self.measured_spread))
        return RELATIVE_SPREAD[self.kind]

    @property
    def noisy(self) -> bool:
        """Whether repeated measurements of it differed by so much that it means little."""
        return self.kind == "measured" and self.spread > NOISY_SPREAD

    def times(self, factor: float) -> Figure:
        return dataclasses.replace(self, value=self.value * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTime:
    """One kind of GPU task as it was measured: what it asks for, and how long it took."""

    model: str
    kernels: Literal["eager", "liger"]
    op: Literal["forward", "recompute", "backward", "head"]
    micro_batch: int
    seq_len: int
    flops: float
    """Of its matrix products, as the schedule has it."""
    traffic_bytes: float
    launches: int
    seconds: float
    """Median."""
    spread: float
    """Half the distance between the quartiles over the median."""
    model_s: float
    """Seconds that the GPU's figures alone give it; the rest is what they don't say."""


_NO_GAPS = "not measured: kernels beside copies are taken to be as fast as alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU."""

    name: str
    bf16_tflops: Figure
    """Dense bf16 matrix rate with fp32 accumulation, TFLOP/s, as the data sheet has it (no sparsity)."""
    matmul_efficiency: Figure
    """Share of that rate large matrix products reach over a whole training step."""
    memory_gib: Figure
    """Memory the driver reports, GiB."""
    memory_gbs: Figure
    """Device memory bandwidth, GB/s."""
    memory_efficiency: Figure
    """Share of that bandwidth the memory-bound kernels reach."""
    launch_us: Figure
    """Host time to launch one kernel of a transformers module, microseconds: the floor of small batches."""
    context_gib: Figure
    """Memory taken by the CUDA context, libraries and the allocator's slack, GiB."""
    gap_uploads_us: Figure = Figure(0.0, "derived", _NO_GAPS)
    """Time by which each kernel takes longer while copies go up, microseconds: the GPU fetches its commands from host
    memory over the same link."""
    gap_downloads_us: Figure = Figure(0.0, "derived", _NO_GAPS)
    """Time by which each kernel takes longer while copies go down, microseconds."""
    gap_adam_factor: Figure = Figure(1.0, "derived", _NO_GAPS)
    """Factor by which CPU Adam beside the copies makes both of these longer; 1 if not at all."""
    kernels: Literal["eager", "liger"] = "eager"
    """Norm, rotary and activation kernels in use: transformers' own, or Liger's fused ones."""
    times: tuple[KernelTime, ...] = ()
    """Measured tasks: predictions of others go by those nearest to them."""

    @property
    def matmul_flops(self) -> float:
        """Achieved FLOP/s of large matrix products."""
        return self.bf16_tflops.value * 1e12 * self.matmul_efficiency.value

    @property
    def memory_bytes_per_s(self) -> float:
        return self.memory_gbs.value * GB * self.memory_efficiency.value

    @property
    def usable_bytes(self) -> int:
        return int((self.memory_gib.value - self.context_gib.value) * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """The path between host memory and the GPU."""

    name: str
    """Such as "PCIe 4.0 x16"."""
    h2d_gbs: Figure
    """Upload rate of a large page-locked transfer alone, GB/s."""
    d2h_gbs: Figure
    """Download rate of a large page-locked transfer alone, GB/s."""
    duplex_gbs: Figure
    """Both directions together when both are busy, GB/s."""
    latency_us: Figure
    """Fixed cost of a transfer, microseconds: what makes small copies slow."""


_ROWS = "H200 machine, 15 threads: rows of 5 KiB are gathered at 45 GB/s, summed at 18, updated at 75 % of Adam's speed"
_BOTH_WAYS = "H200 probe: beside each other and Adam, copies keep 64 % of their rates and Adam 60 % of its own"


def amdahl_speedup(threads: float, serial_share: float) -> float:
    """How many times as fast as one so many threads are, by Amdahl's law."""
    return threads / (1.0 + max(0.0, threads - 1.0) * serial_share)


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """CPU and RAM."""

    name: str
    cores: Figure
    """Physical cores."""
    ram_gib: Figure
    """RAM, GiB."""
    dram_gbs: Figure
    """Peak DRAM bandwidth of all channels, GB/s."""
    dram_efficiency: Figure
    """Share of it a streaming Adam kernel reaches with all cores."""
    adam_gparams_per_core: Figure
    """Parameters one core updates a second while DRAM is not the limit, in 1e9."""
    upload_dram_weight: Figure
    """DRAM capacity an uploaded byte takes, in bytes of Adam traffic."""
    download_dram_weight: Figure
    """DRAM capacity a downloaded byte takes, in bytes of Adam traffic."""
    process_gib: Figure
    """RAM of the process itself and of the operating system: all that is no arena, GiB."""
    upload_priority: Figure = Figure(
        1.06, "derived", "H200 probe: beside Adam, uploads keep 83 % of their rate and Adam 78 % of its own"
    )
    """Weight of uploads against Adam where both are held back by DRAM and no downloads run."""
    download_priority: Figure = Figure(
        1.52, "derived", "H200 probe: beside Adam, downloads keep 96 % of their rate and Adam 63 % of its own"
    )
    """Weight of downloads against Adam where both are held back by DRAM and no uploads run: posted writes go first."""
    upload_duplex_priority: Figure = Figure(1.06, "derived", _BOTH_WAYS)
    """Weight of uploads against Adam where both are held back by DRAM and downloads run too."""
    download_duplex_priority: Figure = Figure(1.06, "derived", _BOTH_WAYS)
    """Weight of downloads against Adam where both are held back by DRAM and uploads run too."""
    adam_serial_share: Figure = Figure(0.0, "derived", "not measured: cores are taken not to hold each other up")
    """Of Adam's threads, by Amdahl's law (`amdahl_speedup`): all wait for the same DRAM."""
    adam_call_us: Figure = Figure(0.0, "derived", "not measured: Adam's rate is taken to be that of large calls")
    """Fixed cost of a call of CPU Adam, microseconds: waking its threads and gathering them."""
    gather_gbs: Figure = Figure(45.0, "derived", _ROWS)
    """Rate at which embedding rows here and there are copied to where they go up from, GB/s."""
    sum_rows_gbs: Figure = Figure(18.0, "derived", _ROWS)
    """Rate at which the host adds the gradients of tokens up to those of rows, GB/s of the tokens'; used where several
    micro-batches are added up."""
    adam_rows_share: Figure = Figure(0.75, "derived", _ROWS)
    """Speed of Adam over rows here and there, as a share of its speed over a whole matrix."""
    convert_gparams_per_core: Figure = Figure(
        1.1, "derived", "H200 probe: 13.3 G parameters/s on 16 threads is 0.83 a core, DRAM-bound"
    )
    """fp32 to bf16 conversion, 1e9 parameters/s a core. Only the SlideFormer policy converts."""

    @property
    def dram_bytes_per_s(self) -> float:
        """Achieved DRAM capacity in bytes/s of Adam traffic."""
        return self.dram_gbs.value * GB * self.dram_efficiency.value

    @property
    def usable_bytes(self) -> int:
        return int((self.ram_gib.value - self.process_gib.value) * GIB)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nvme:
    """One NVMe drive, or several striped."""

    size_gb: Figure
    """Space that may be used, GB (1e9)."""
    read_gbs: Figure
    """Sustained direct reads of large requests, GB/s."""
    write_gbs: Figure
    """Sustained direct writes of large requests, GB/s."""
    mixed_share: Figure = Figure(1.3, "guess", "no measurement: drives gain little from mixing directions")
    """Reads and writes at once reach this sum of their shares of the rates alone; 1 shares one rate, 2 would
    be two independent directions."""
    adam_share: Figure = Figure(1.0, "guess", "no measurement: as if Adam left the drive's threads the cores they need")
    """What reads and writes at once keep of that beside Adam on all cores but one."""

    @property
    def usable_bytes(self) -> int:
        return int(self.size_gb.value * GB)


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """A machine: one GPU, its link, the host, and an NVMe drive if there is one."""

    name: str
    gpu: Gpu
    link: Link
    host: Host
    nvme: Nvme | None = None
    version: Literal[1] = PROFILE_VERSION

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Every figure with its path, such as ("link.h2d_gbs", Figure(...))."""
        for part_name in ("gpu", "link", "host", "nvme"):
            part = getattr(self, part_name)
            if part is None:
                continue
            for field in dataclasses.fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Figure):
                    yield f"{part_name}.{field.name}", value

    def figure(self, path: str) -> Figure:
        part, name = path.split(".")
        return getattr(getattr(self, part), name)

    def replaced(self, path: str, figure: Figure) -> HardwareProfile:
        """The same machine with one figure exchanged."""
        part_name, name = path.split(".")
        part = dataclasses.replace(getattr(self, part_name), **{name: figure})
        return dataclasses.replace(self, **{part_name: part})

    def scaled(self, path: str, factor: float) -> HardwareProfile:
        """The same machine with one figure multiplied."""
        return self.replaced(path, self.figure(path).times(factor))

    def capacity_bytes(self, tier: str) -> int:
        """Bytes that plans may use of "gpu", "ram" or "nvme"; 0 for a drive that isn't there."""
        part = {"gpu": self.gpu, "ram": self.host, "nvme": self.nvme}[tier]
        return 0 if part is None else part.usable_bytes
