"""What the interpreter itself costs: host time a task of an 8B model's schedule whose tasks do nothing.

    python benchmarks/overhead.py [--model NAME] [--device cpu|cuda] [--json]

The bar: at most 100 microseconds a task, and at most 3 % of a step whose layers take 2 ms or more each way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import machine
import torch

from slidetune.builder import build
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.runtime.lanes import Lanes
from slidetune.runtime.steps import Step

# Milliseconds of a layer's forward pass below which nobody minds.
_LAYER_MS = 2.0
# Forward, recomputation and backward of one layer, in forward passes.
_PASSES = 4


def measure(model_name: str, steps: int, device: torch.device) -> dict[str, float]:
    """Host seconds a task (wall clock, lanes side by side) and its share of a step of short layers."""
    model = load_model(model_name)
    schedule = build(model, Plan(model=model.name, accumulation=2, optimizer_nvme=len(model.layers) // 4))
    lanes = Lanes(schedule, [lambda step: None] * len(schedule.tasks), device)
    found = []
    for number in range(1, steps + 1):
        began = time.perf_counter()
        lanes.submit(Step(number=number))
        lanes.drain()
        found.append(time.perf_counter() - began)
    lanes.stop()
    step_s = statistics.median(found)
    layers_s = len(model.layers) * 2 * _PASSES * _LAYER_MS * 1e-3
    return {
        "tasks": len(schedule.tasks),
        "us_per_task": step_s / len(schedule.tasks) * 1e6,
        "step_ms": step_s * 1e3,
        "share_of_short_step": step_s / layers_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.model, options.steps, torch.device(options.device))
    if options.json:
        print(json.dumps(found | {"device": options.device} | machine.describe()))
        return
    print(f"{found['tasks']:.0f} tasks: {found['us_per_task']:.1f} us each, {found['step_ms']:.1f} ms a step,")
    print(f"{found['share_of_short_step']:.1%} of a step whose layers take {_LAYER_MS:g} ms")


if __name__ == "__main__":
    main()
