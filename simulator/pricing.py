"""What a task costs on a machine: seconds at its top speed, and the resources it shares while it runs."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace

from slidetune.errors import SlidetuneError
from slidetune.gpu_time import gpu_seconds
from slidetune.hardware import HardwareProfile, Nvme, amdahl_speedup
from slidetune.schedule import CPU_ADAM, D2H, GATHERED_BYTES, GPU, H2D, NVME_READ, NVME_WRITE, Work
from slidetune.simulator.kernel_times import KernelTimes
from slidetune.simulator.sharing import ADAM, DOWNLOAD, UPLOAD, Demand, fair_speeds
from slidetune.units import GB

# A launching thread is short work at high priority: Adam's threads yield to it, not the reverse.
_LAUNCH_PRIORITY = 20.0

_IDLE = Demand(())

SHARED_RESOURCES = ("h2d link", "d2h link", "link duplex", "host DRAM", "NVMe drive", "CPU cores")


@dataclass(frozen=True, slots=True)
class Price:
    """A task's cost on one machine."""

    alone_s: float
    """Seconds it takes with the machine to itself."""
    demand: Demand


class PriceList:
    """Prices of one machine, and the speeds of every mix of tasks met so far."""

    def __init__(self, profile: HardwareProfile) -> None:
        self.profile = profile
        self._kernel_times = KernelTimes(profile.gpu.times, profile.gpu.kernels)
        self.demands: list[Demand] = []
        self._prices: dict[Work, Price] = {}
        self._index: dict[Demand, int] = {}
        # By a demand's number, that of the demand that shares as it does and waits for no kernels.
        self._alike = [0]
        self._fair: dict[tuple[int, ...], tuple[float, ...]] = {}
        self._speeds: dict[tuple[int, ...], tuple[float, ...]] = {}
        gaps_us = {UPLOAD: profile.gpu.gap_uploads_us.value, DOWNLOAD: profile.gpu.gap_downloads_us.value}
        # By role, seconds that each kernel waits beside such a task; none where it never does.
        self._waits_s = {role: us * 1e-6 for role, us in gaps_us.items() if us}

    def price(self, work: Work) -> Price:
        found = self._prices.get(work)
        if found is None:
            found = self._prices[work] = self._priced(work)
        return found

    def demand_index(self, demand: Demand) -> int:
        """A small number for a demand, from 1; 0 stands for an idle lane."""
        index = self._index.get(demand)
        if index is None:
            alike = self.demand_index(replace(demand, kernels_per_s=0.0)) if demand.kernels_per_s else 0
            self.demands.append(demand)
            index = self._index[demand] = len(self.demands)
            self._alike.append(alike or index)
        return index

    def speeds(self, running: tuple[int, ...]) -> tuple[float, ...]:
        """Speeds of the demands running on each lane (0: idle), computed once a mix: fair, but for kernels that wait
        for copies."""
        found = self._speeds.get(running)
        if found is None:
            found = self._fair_speeds(running)
            if self._waits_s:
                found = self._with_waits(running, found)
            self._speeds[running] = found
        return found

    def _fair_speeds(self, running: tuple[int, ...]) -> tuple[float, ...]:
        """The same if kernels waited for nothing, computed once for mixes that share alike."""
        alike = tuple([self._alike[index] for index in running])
        found = self._fair.get(alike)
        if found is None:
            fair = iter(fair_speeds([self.demands[index - 1] for index in alike if index]))
            found = self._fair[alike] = tuple(next(fair) if index else 0.0 for index in alike)
        return found

    def _with_waits(self, running: tuple[int, ...], fair: tuple[float, ...]) -> tuple[float, ...]:
        """Fair speeds, less what GPU tasks lose because each of their kernels is fetched over a busy link."""
        demands = [self.demands[index - 1] if index else _IDLE for index in running]
        wait_s = self._wait_s({demand.role for demand in demands})
        return tuple(
            [speed / (1.0 + demand.kernels_per_s * wait_s) for speed, demand in zip(fair, demands, strict=True)]
        )

    def _wait_s(self, roles: Set[str]) -> float:
        """Seconds that each kernel waits beside tasks of these roles: it is copies that hold it up, however fast they
        are, and Adam makes them do so longer."""
        factor = self.profile.gpu.gap_adam_factor.value if ADAM in roles else 1.0
        return factor * sum(self._waits_s[role] for role in self._waits_s.keys() & roles)

    def _priced(self, work: Work) -> Price:
        # SlideFormer's one stream carries both directions: there the operation tells which.
        kind = _BY_OP[work.op] if work.lane == "link" else _BY_LANE[work.lane]
        return getattr(self, f"_{kind}")(work)

    def _gpu(self, work: Work) -> Price:
        launching = (("CPU cores", min(1.0, 1.0 / self.profile.host.cores.value)),)
        seconds = gpu_seconds(work, self.profile.gpu) * self._kernel_times.ratio(work)
        # Where no kernel ever waits, one demand stands for all GPU tasks, and mixes are few.
        kernels_per_s = work.launches / seconds if self._waits_s and seconds > 0 else 0.0
        return Price(seconds, Demand(launching, _LAUNCH_PRIORITY, kernels_per_s=kernels_per_s))

    def _upload(self, work: Work) -> Price:
        host = self.profile.host
        say = Demand((), host.upload_priority.value, UPLOAD, host.upload_duplex_priority.value)
        price = self._copy(work, "h2d link", self.profile.link.h2d_gbs.value, host.upload_dram_weight.value, say)
        return self._gathered(price, work) if work.op == "gather" else price

    def _download(self, work: Work) -> Price:
        host = self.profile.host
        say = Demand((), host.download_priority.value, DOWNLOAD, host.download_duplex_priority.value)
        price = self._copy(work, "d2h link", self.profile.link.d2h_gbs.value, host.download_dram_weight.value, say)
        # Without threads the device has summed the rows.
        sums = work.op == "store rows" and work.threads
        return self._with_rows(price, work, work.bytes / (host.sum_rows_gbs.value * GB)) if sums else price

    def _copy(self, work: Work, direction: str, gbs: float, dram_weight: float, say: Demand) -> Price:
        link, host = self.profile.link, self.profile.host
        shares = (
            (direction, 1.0),
            ("link duplex", gbs / link.duplex_gbs.value),
            ("host DRAM", dram_weight * gbs * GB / host.dram_bytes_per_s),
        )
        return _price(link.latency_us.value * 1e-6 + work.bytes / (gbs * GB), replace(say, shares=shares))

    def _gathered(self, price: Price, work: Work) -> Price:
        """The price of a copy of rows, each piece of which waits until threads of the host have gathered it: what of
        the slower of the two isn't hidden behind the other."""
        gather_s = work.bytes / (self.profile.host.gather_gbs.value * GB)
        first = min(1.0, GATHERED_BYTES / work.bytes) if work.bytes else 1.0
        beside_s = min(gather_s, price.alone_s)
        return self._with_rows(price, work, gather_s - (1.0 - first) * beside_s)

    def _with_rows(self, price: Price, work: Work, rows_s: float) -> Price:
        """The price of a copy before or after which threads of the host work on its rows for some seconds of their own,
        reading and writing them."""
        host = self.profile.host
        dram_s = dict(price.demand.shares)["host DRAM"] * price.alone_s + 2.0 * work.bytes / host.dram_bytes_per_s
        alone_s = max(price.alone_s + rows_s, dram_s)
        copying = price.alone_s / alone_s
        cores = host.cores.value
        shares = {name: share * copying for name, share in price.demand.shares}
        shares |= {"host DRAM": dram_s / alone_s, "CPU cores": min(work.threads, cores) / cores * (1.0 - copying)}
        return Price(alone_s, replace(price.demand, shares=tuple(shares.items())))

    def _adam(self, work: Work) -> Price:
        host = self.profile.host
        streaming = self._on_cores(work, host.adam_gparams_per_core.value, host.adam_serial_share.value)
        if work.op in ("adam rows", "adam other rows"):
            share = min(1.0, host.adam_rows_share.value)
            # Its threads are as busy, only slower.
            slower = tuple(
                (name, part * (share if name == "host DRAM" else 1.0)) for name, part in streaming.demand.shares
            )
            streaming = Price(streaming.alone_s / share, replace(streaming.demand, shares=slower))
        return Price(host.adam_call_us.value * 1e-6 + streaming.alone_s, replace(streaming.demand, role=ADAM))

    def _convert(self, work: Work) -> Price:
        return self._on_cores(work, self.profile.host.convert_gparams_per_core.value)

    def _on_cores(self, work: Work, gparams_per_core: float, serial_share: float = 0.0) -> Price:
        """Streaming over parameters on CPU threads: as fast as cores, which hold each other up, or DRAM allow."""
        host = self.profile.host
        threads = min(work.threads, host.cores.value)
        rate = min(
            amdahl_speedup(threads, serial_share) * gparams_per_core * 1e9, host.dram_bytes_per_s / work.param_bytes
        )
        shares = (
            ("host DRAM", rate * work.param_bytes / host.dram_bytes_per_s),
            ("CPU cores", threads / host.cores.value),
        )
        return Price(work.params / rate, Demand(shares))

    def _read(self, work: Work) -> Price:
        # A read lands in DRAM as a download does, a write leaves it as an upload does.
        return self._drive(work, self._nvme().read_gbs.value, self.profile.host.download_dram_weight.value)

    def _write(self, work: Work) -> Price:
        return self._drive(work, self._nvme().write_gbs.value, self.profile.host.upload_dram_weight.value)

    def _nvme(self) -> Nvme:
        if self.profile.nvme is None:
            raise SlidetuneError(
                f"{self.profile.name} has no NVMe drive, and the plan uses one.",
                "`slidetune profile --nvme-dir DIR` measures it too.",
            )
        return self.profile.nvme

    def _drive(self, work: Work, gbs: float, dram_weight: float) -> Price:
        host, drive = self.profile.host, self._nvme()
        # Beside Adam on all cores but one, reads and writes have that one, and reach this together; Adam has the first
        # say, since who waits for a drive must be woken.
        beside_adam = drive.mixed_share.value * drive.adam_share.value
        shares = (
            ("NVMe drive", 1.0 / drive.mixed_share.value),
            ("host DRAM", dram_weight * gbs * GB / host.dram_bytes_per_s),
            ("CPU cores", min(1.0, 1.0 / (beside_adam * host.cores.value))),
        )
        return _price(work.bytes / (gbs * GB), Demand(shares, beside_adam / 2.0))


def _price(seconds: float, full: Demand) -> Price:
    """The price of a task that takes `seconds` and asks for `full` at the speed of its own lane. Where a resource
    can't give it that much, the resource sets its top speed: a link may be faster than the DRAM behind it."""
    most = max(1.0, *(share for _, share in full.shares))
    return Price(seconds * most, replace(full, shares=tuple((name, share / most) for name, share in full.shares)))


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
