"""What a task costs on a machine: seconds at its top speed, and the resources it shares while it runs."""

from __future__ import annotations

from dataclasses import dataclass

from slidetune.gpu_time import gpu_seconds
from slidetune.hardware import HardwareProfile
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE, Work
from slidetune.simulator.kernel_times import KernelTimes
from slidetune.simulator.sharing import Demand, fair_speeds
from slidetune.units import GB

# A launching thread is short work at high priority: Adam's threads yield to it, not the reverse.
_LAUNCH_PRIORITY = 20.0

SHARED_RESOURCES = ("h2d link", "d2h link", "link duplex", "host DRAM", "NVMe drive", "CPU cores")


@dataclass(frozen=True, slots=True)
class Price:
    """A task's cost on one machine."""

    alone_s: float
    """Seconds it takes with the machine to itself."""
    demand: Demand


class PriceList:
    """Prices of one machine, and the fair speeds of every mix of tasks met so far."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile = profile
        self._kernel_times = KernelTimes(profile.gpu.times, profile.gpu.kernels)
        self.demands: list[Demand] = []
        self._prices: dict[Work, Price] = {}
        self._index: dict[Demand, int] = {}
        self._speeds: dict[tuple[int, ...], tuple[float, ...]] = {}

    def price(self, work: Work) -> Price:
        found = self._prices.get(work)
        if found is None:
            found = self._prices[work] = self._priced(work)
        return found

    def demand_index(self, demand: Demand) -> int:
        """A small number for a demand, from 1; 0 stands for an idle lane."""
        index = self._index.get(demand)
        if index is None:
            self.demands.append(demand)
            index = self._index[demand] = len(self.demands)
        return index

    def speeds(self, running: tuple[int, ...]) -> tuple[float, ...]:
        """Fair speeds of the demands running on each lane (0: idle), computed once a mix."""
        found = self._speeds.get(running)
        if found is None:
            busy = [lane for lane, index in enumerate(running) if index]
            fair = iter(fair_speeds([self.demands[running[lane] - 1] for lane in busy]))
            found = tuple(next(fair) if index else 0.0 for index in running)
            self._speeds[running] = found
        return found

    def _priced(self, work: Work) -> Price:
        # SlideFormer's one stream carries both directions: there the operation tells which.
        kind = _BY_OP[work.op] if work.lane == "link" else _BY_LANE[work.lane]
        return getattr(self, f"_{kind}")(work)

    def _gpu(self, work: Work) -> Price:
        launching = (("CPU cores", min(1.0, 1.0 / self.profile.host.cores.value)),)
        seconds = gpu_seconds(work, self.profile.gpu) * self._kernel_times.ratio(work)
        return Price(seconds, Demand(launching, _LAUNCH_PRIORITY))

    def _upload(self, work: Work) -> Price:
        link, host = self.profile.link, self.profile.host
        return self._transfer(
            work, "h2d link", link.h2d_gbs.value, host.upload_dram_weight.value, host.upload_priority.value
        )

    def _download(self, work: Work) -> Price:
        link, host = self.profile.link, self.profile.host
        return self._transfer(
            work,
            "d2h link",
            link.d2h_gbs.value,
            host.download_dram_weight.value,
            host.download_priority.value,
        )

    def _transfer(self, work: Work, direction: str, gbs: float, dram_weight: float, priority: float) -> Price:
        link, host = self.profile.link, self.profile.host
        seconds = link.latency_us.value * 1e-6 + work.bytes / (gbs * GB)
        shares = (
            (direction, 1.0),
            ("link duplex", gbs / link.duplex_gbs.value),
            ("host DRAM", dram_weight * gbs * GB / host.dram_bytes_per_s),
        )
        # Downloads have their higher priority only while no upload runs beside them: on the H200 host both
        # directions then run alike, 50.1 GB/s each alone and 35.1 each beside Adam.
        return _price(seconds, shares, priority, peers="link")

    def _adam(self, work: Work) -> Price:
        return self._on_cores(work, self.profile.host.adam_gparams_per_core.value)

    def _convert(self, work: Work) -> Price:
        return self._on_cores(work, self.profile.host.convert_gparams_per_core.value)

    def _on_cores(self, work: Work, gparams_per_core: float) -> Price:
        """Streaming over parameters on CPU threads: as fast as the cores, or as DRAM, allow."""
        host = self.profile.host
        threads = min(work.threads, host.cores.value)
        rate = min(threads * gparams_per_core * 1e9, host.dram_bytes_per_s / work.param_bytes)
        shares = (
            ("host DRAM", rate * work.param_bytes / host.dram_bytes_per_s),
            ("CPU cores", threads / host.cores.value),
        )
        return Price(work.params / rate, Demand(shares))

    def _read(self, work: Work) -> Price:
        # A read lands in DRAM as a download does, a write leaves it as an upload does.
        return self._drive(work, self.profile.nvme.read_gbs.value, self.profile.host.download_dram_weight.value)

    def _write(self, work: Work) -> Price:
        return self._drive(work, self.profile.nvme.write_gbs.value, self.profile.host.upload_dram_weight.value)

    def _drive(self, work: Work, gbs: float, dram_weight: float) -> Price:
        host = self.profile.host
        shares = (
            ("NVMe drive", 1.0 / self.profile.nvme.mixed_share.value),
            ("host DRAM", dram_weight * gbs * GB / host.dram_bytes_per_s),
            ("CPU cores", min(1.0, 1.0 / host.cores.value)),
        )
        return _price(work.bytes / (gbs * GB), shares)


def _price(seconds: float, shares: tuple[tuple[str, float], ...], weight: float = 1.0, peers: str = "") -> Price:
    """The price of a task that takes `seconds` and `shares` at the speed of its own lane. Where a resource can't
    give it that much, the resource sets its top speed: a link may be faster than the DRAM behind it."""
    most = max(1.0, *(share for _, share in shares))
    return Price(seconds * most, Demand(tuple((name, share / most) for name, share in shares), weight, peers))


_BY_LANE = {
    GPU: "gpu",
    H2D: "upload",
    D2H: "download",
    CPU_ADAM: "adam",
    NVME_READ: "read",
    NVME_WRITE: "write",
    "convert": "convert",
}
_BY_OP = {"fetch": "upload", "load": "upload", "store": "download", "save": "download"}
