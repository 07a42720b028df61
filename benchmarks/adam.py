"""CPU AdamW: our kernel against torch's fused one, on the machine it runs on, in one run.

    python benchmarks/adam.py [--json] [--params N] [--threads 1,2] [--repeats R] [--pages small]

Three contenders, in turn, so that a disturbance meets all of them:

    ours              adam_step over a split master, bf16 gradient                               26 B/parameter
    cast_fused_cast   bf16 gradient -> fp32, torch._fused_adamw_, fp32 -> bf16 weights           48 B/parameter
    fused             torch._fused_adamw_ alone, everything fp32                                 28 B/parameter

B/parameter is the DRAM traffic of the algorithm: what it reads and writes, once each pass. All contenders work in the
same kind of memory: 2 MiB pages as the runtime's arenas have them, or with `--pages small` what torch allocates.

ratio_over_cast_fused_cast compares parameters/s, ratio_over_fused_bytes bytes/s (26 B against 28 B), with all threads;
each is the median of the ratios within a repeat.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import machine
import psutil
import torch

from slidetune.runtime.adam import AdamW, adam_implementation, adam_implementations, adam_step
from slidetune.runtime.arena import Arena

BYTES = {"ours": 26, "cast_fused_cast": 48, "fused": 28}
HYPER = AdamW(lr=1e-5, weight_decay=0.01)
# A call shorter than this is repeated within one measurement.
SHORTEST_S = 0.05


class Contenders:
    """The three over memory of their own (the two torch ones share the fp32 tensors); 34 bytes/parameter in all."""

    def __init__(self, count: int, small_pages: bool, implementation: str) -> None:
        def array(dtype: torch.dtype) -> torch.Tensor:
            if small_pages:
                return torch.zeros(count, dtype=dtype)
            return Arena(count * dtype.itemsize).tensor(0, count, dtype)

        self.implementation = implementation
        half, full = torch.bfloat16, torch.float32
        self.grad, self.high, self.low = array(half), array(half), array(torch.int16)
        self.exp_avg, self.exp_avg_sq = array(full), array(full)
        self.param32, self.grad32, self.avg32, self.avg_sq32 = (array(full) for _ in range(4))
        self.weights = array(half)
        self.step = torch.tensor(10.0)
        random = torch.Generator().manual_seed(0)
        self.grad.normal_(0, 1e-3, generator=random)
        self.grad32.copy_(self.grad)
        for high in (self.high, self.param32):
            high.normal_(0, 0.02, generator=random)
        for second in (self.exp_avg_sq, self.avg_sq32):
            second.fill_(1e-6)

    def ours(self, threads: int) -> None:
        adam_step(
            self.high,
            self.low,
            self.exp_avg,
            self.exp_avg_sq,
            self.grad,
            hyper=HYPER,
            step=10,
            threads=threads,
            implementation=self.implementation,
        )

    def cast_fused_cast(self, threads: int) -> None:
        self.grad32.copy_(self.grad)
        self.fused(threads)
        self.weights.copy_(self.param32)

    def fused(self, threads: int) -> None:
        torch._fused_adamw_(
            [self.param32],
            [self.grad32],
            [self.avg32],
            [self.avg_sq32],
            [],
            [self.step],
            lr=HYPER.lr,
            beta1=HYPER.beta1,
            beta2=HYPER.beta2,
            weight_decay=HYPER.weight_decay,
            eps=HYPER.eps,
            amsgrad=False,
            maximize=False,
        )


def seconds(call: Callable[[int], None], threads: int) -> float:
    """Time of one call, after one that wakes the threads and is not counted."""
    call(threads)
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < SHORTEST_S:
        call(threads)
        calls += 1
    return (time.perf_counter() - start) / calls


def measure(contenders: Contenders, count: int, threads: list[int], repeats: int) -> dict[str, dict[int, list[float]]]:
    """Gparam/s by contender and threads, one figure a repeat."""
    rates: dict[str, dict[int, list[float]]] = {name: {t: [] for t in threads} for name in BYTES}
    before = torch.get_num_threads()
    for _ in range(repeats):
        for number in threads:
            torch.set_num_threads(number)
            for name, by_threads in rates.items():
                by_threads[number].append(count / seconds(getattr(contenders, name), number) / 1e9)
    torch.set_num_threads(before)
    return rates


def report(rates: dict[str, dict[int, list[float]]], threads: list[int]) -> dict[str, object]:
    """Medians, spread and the two ratios."""
    most = {name: by_threads[threads[-1]] for name, by_threads in rates.items()}
    over_cast = [ours / other for ours, other in zip(most["ours"], most["cast_fused_cast"], strict=True)]
    over_bytes = [
        ours * BYTES["ours"] / (other * BYTES["fused"]) for ours, other in zip(most["ours"], most["fused"], strict=True)
    ]
    return {
        "gparam_s": {
            name: {t: dict(zip(("median", "min", "max"), spread(values), strict=True)) for t, values in table.items()}
            for name, table in rates.items()
        },
        "ratio_over_cast_fused_cast": round(statistics.median(over_cast), 3),
        "ratio_over_cast_fused_cast_range": [round(f(over_cast), 3) for f in (min, max)],
        "ratio_over_fused_bytes": round(statistics.median(over_bytes), 3),
        "ratio_over_fused_bytes_range": [round(f(over_bytes), 3) for f in (min, max)],
    }


def spread(values: list[float]) -> tuple[float, float, float]:
    return round(statistics.median(values), 3), round(min(values), 3), round(max(values), 3)


def table(result: dict, threads: list[int]) -> str:
    lines = [
        "threads  " + "".join(f"{name:>28}" for name in BYTES),
        "         " + f"{'Gparam/s (min-max)  GB/s':>28}" * 3,
    ]
    for number in threads:
        cells = []
        for name, bytes_each in BYTES.items():
            middle, low, high = result["gparam_s"][name][number].values()
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f}) {middle * bytes_each:5.1f}")
        lines.append(f"{number:7}  " + "".join(f"{cell:>28}" for cell in cells))
    for name, goal in (("ratio_over_cast_fused_cast", 1.5), ("ratio_over_fused_bytes", 0.9)):
        low, high = result[f"{name}_range"]
        lines.append(f"{name}: {result[name]:.2f} ({low:.2f}-{high:.2f}), target {goal}")
    return "\n".join(lines)


def thread_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all, with three quarters of all between."""
    powers = {2**k for k in range(cores.bit_length()) if 2**k <= cores}
    return sorted(powers | {max(1, cores * 3 // 4), cores})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=int, default=1 << 26, help="parameters (34 bytes each)")
    parser.add_argument("--threads", type=lambda text: [int(t) for t in text.split(",")], help="such as 1,2,4")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pages", choices=("huge", "small"), default="huge", help="2 MiB, or as torch allocates")
    parser.add_argument("--implementation", choices=adam_implementations(), default=adam_implementation())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    threads = options.threads or thread_counts(len(psutil.Process().cpu_affinity()))
    contenders = Contenders(options.params, options.pages == "small", options.implementation)
    result = report(measure(contenders, options.params, threads, options.repeats), threads)
    about = {"params": options.params, "pages": options.pages, "implementation": options.implementation}
    if options.json:
        print(json.dumps({"machine": machine.describe(), **about, **result}, indent=1))
    else:
        print("\n".join(f"{key}: {value}" for key, value in {**machine.describe(), **about}.items()))
        print(table(result, threads))


if __name__ == "__main__":
    main()
