"""How long planning takes, process start to exit, against the targets.

    python benchmarks/planner.py [--repeats 5] [--json]

Each command runs as a user would run it. One simulation is timed inside this process. Medians of the repeats;
the machine and the versions are printed with them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from machine import host

from slidetune.builder import build
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.simulator.engine import simulate
from slidetune.simulator.pricing import PriceList

SLIDETUNE = shutil.which("slidetune", path=str(Path(sys.executable).parent)) or "slidetune"
COMMANDS = {
    "plan llama-3.1-8b": (["plan", "--gpu", "rtx4090", "--model", "llama-3.1-8b"], 4.0),
    "plan mistral-large-123b": (["plan", "--gpu", "rtx4090", "--model", "mistral-large-123b"], 8.0),
    "--help": (["--help"], 0.4),
}
SIMULATION_TARGET_S = 0.008


def seconds(arguments: list[str], repeats: int) -> list[float]:
    """Wall time of the command, process start to exit, run by run."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run([SLIDETUNE, *arguments], check=True, capture_output=True, cwd=folder)
            times.append(time.perf_counter() - began)
    return times


def plans_simulated(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([SLIDETUNE, *arguments, "--json"], check=True, capture_output=True, cwd=folder)
    return json.loads(done.stdout)["trials"]


def simulation(repeats: int) -> list[float]:
    """One steady-state simulation of 32 layers, schedule built already."""
    schedule = build(load_model("llama-3.1-8b"), Plan(model="llama-3.1-8b", micro_batch=8))
    times = []
    for _ in range(repeats):
        prices = PriceList(machine())
        began = time.perf_counter()
        simulate(schedule, prices)
        times.append(time.perf_counter() - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows = []
    for name, (arguments, target) in COMMANDS.items():
        times = seconds(arguments, given.repeats)
        rows.append({"what": name, "median_s": statistics.median(times), "worst_s": max(times), "target_s": target})
        if arguments[0] == "plan":
            rows[-1]["plans"] = plans_simulated(arguments)
    times = simulation(max(20, given.repeats))
    rows.append(
        {
            "what": "one simulation of 32 layers",
            "median_s": statistics.median(times),
            "worst_s": max(times),
            "target_s": SIMULATION_TARGET_S,
        }
    )
    if given.json:
        print(json.dumps({"machine": host("simpy", "optuna", "typer", "rich"), "rows": rows}, indent=2))
        return
    print("\n".join(f"{key}: {value}" for key, value in host("simpy", "optuna", "typer", "rich").items()))
    print(f"{'':30} {'median':>9} {'worst':>9} {'target':>9}  plans")
    for row in rows:
        print(
            f"{row['what']:30} {row['median_s']:8.4f}s {row['worst_s']:8.4f}s {row['target_s']:8.3f}s  "
            f"{row.get('plans', '')}"
        )


if __name__ == "__main__":
    main()
