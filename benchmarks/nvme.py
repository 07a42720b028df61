"""The NVMe tier against a raw O_DIRECT loop over the same disk, in one run.

    python benchmarks/nvme.py FOLDER [--json] [--size BYTES] [--request BYTES] [--threads N] [--repeats R]

The raw loop is what a disk benchmark does: threads that call preadv or pwritev at the next offset on one descriptor,
from aligned buffers of one request each, with no bookkeeping. The tier moves tensors of `--tensor` bytes, one at a
time, as a lane does. Same request size, same threads, the same number of bytes; both take turns.

ratio_read and ratio_write are the medians of tier / raw within a repeat; the target is 0.85.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import threading
import time
from collections.abc import Callable

import machine
import torch

from slidetune.runtime.arena import Arena
from slidetune.runtime.nvme import NvmeFile

MIB = 1 << 20
TARGET = 0.85


def raw(operation: str, fd: int, size: int, request: int, buffers: list[memoryview]) -> float:
    """Bytes/s of the loop; one thread a buffer."""
    offsets = itertools.count(0, request)
    call = os.preadv if operation == "read" else os.pwritev

    def loop(buffer: memoryview) -> None:
        # next() on a count is atomic.
        while (offset := next(offsets)) < size:
            if call(fd, [buffer], offset) != request:
                raise OSError(f"short {operation}")

    threads = [threading.Thread(target=loop, args=(buffer,)) for buffer in buffers]
    return size / seconds(lambda: [[each.start() for each in threads], [each.join() for each in threads]])


def tier(operation: str, file: NvmeFile, size: int, tensor: torch.Tensor) -> float:
    """Bytes/s of whole tensors, one after the other."""
    call = file.read if operation == "read" else file.write
    return size / seconds(lambda: [call(offset, tensor) for offset in range(0, size, tensor.nbytes)])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {f"{who}_{what}": [] for what in ("write", "read") for who in ("raw", "tier")}
    with (
        Arena(options.tensor + options.threads * options.request) as arena,
        NvmeFile(options.folder, options.size, request_bytes=options.request, threads=options.threads) as file,
    ):
        tensor = arena.tensor(0, options.tensor, torch.uint8).random_()
        buffers = [
            memoryview(arena.tensor(options.tensor + k * options.request, options.request, torch.uint8).numpy())
            for k in range(options.threads)
        ]
        # Blocks never written read as zeros from no disk, and the first write of one costs more.
        tier("write", file, options.size, tensor)
        for repeat in range(options.repeats):
            for operation in ("write", "read"):
                order = ("raw", "tier") if repeat % 2 == 0 else ("tier", "raw")
                for who in order:
                    rate = (
                        raw(operation, file._fds[0], options.size, options.request, buffers)
                        if who == "raw"
                        else tier(operation, file, options.size, tensor)
                    )
                    rates[f"{who}_{operation}"].append(rate)
        del tensor, buffers
    return rates


def report(rates: dict[str, list[float]]) -> dict[str, object]:
    result: dict[str, object] = {
        f"{name}_gbs": {
            "median": round(statistics.median(values) / 1e9, 3),
            "min": round(min(values) / 1e9, 3),
            "max": round(max(values) / 1e9, 3),
        }
        for name, values in rates.items()
    }
    for operation in ("read", "write"):
        ratios = [t / r for t, r in zip(rates[f"tier_{operation}"], rates[f"raw_{operation}"], strict=True)]
        result[f"ratio_{operation}"] = round(statistics.median(ratios), 3)
        result[f"ratio_{operation}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="on the disk to measure")
    parser.add_argument("--size", type=int, default=1 << 30, help="bytes of the file")
    parser.add_argument("--tensor", type=int, default=128 * MIB, help="bytes the tier moves at once")
    parser.add_argument("--request", type=int, default=8 * MIB)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.size % options.tensor or options.size % options.request:
        parser.error("--size must be a multiple of --tensor and of --request")

    result = report(measure(options))
    about = {name: getattr(options, name) for name in ("size", "tensor", "request", "threads", "repeats")}
    if options.json:
        print(json.dumps({"machine": machine.describe(), **about, **result}, indent=1))
        return
    print("\n".join(f"{key}: {value}" for key, value in {**machine.describe(), **about}.items()))
    for operation in ("write", "read"):
        for who in ("raw", "tier"):
            rate = result[f"{who}_{operation}_gbs"]
            print(f"{who:4} {operation:5}  {rate['median']:.2f} GB/s ({rate['min']:.2f}-{rate['max']:.2f})")
        low, high = result[f"ratio_{operation}_range"]
        print(f"ratio_{operation}: {result[f'ratio_{operation}']:.2f} ({low:.2f}-{high:.2f}), target {TARGET}")


if __name__ == "__main__":
    main()
