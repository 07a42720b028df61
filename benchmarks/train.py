"""Trains real models by planned settings and compares each run with its prediction.

    python benchmarks/train.py --model llama-3.1-8b --batch 8 --profile h200-16c [--gpu-memory 24] [--json FILE]

Weights are random (there is nothing to download), token ids too. A run is planned, warmed up for two steps and measured
for the following ones; tokens/s is of the median step. GPU memory is what torch allocated at most, RAM the process's
high-water mark. Appends one JSON line a run to --json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import slidetune
from slidetune.machines import adapted, load_profile
from slidetune.runtime.adam import AdamW
from slidetune.runtime.trainer import SlidingTrainer
from slidetune.trace import to_frame
from slidetune.traces.compare import by_kind, compare

sys.path.insert(0, str(Path(__file__).parent))
from machine import describe

WARM_UP = 2


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--profile", default="h200-16c")
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--ram", type=float)
    parser.add_argument("--nvme")
    parser.add_argument("--nvme-folder")
    parser.add_argument("--clip", type=float)
    parser.add_argument("--plan", help="a plan file in place of planning")
    parser.add_argument("--kernels", choices=("eager", "liger"))
    parser.add_argument("--device")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    import torch

    profile = adapted(
        load_profile(given.profile),
        gpu_memory_gib=given.gpu_memory,
        ram_gib=given.ram,
        nvme=given.nvme,
        kernels=given.kernels,
    )
    if given.plan:
        planned = slidetune.simulate(given.plan, profile)
    else:
        planned = slidetune.plan(given.model, profile, batch=given.batch, seq_len=given.seq_len, clip_norm=given.clip)
    plan, prediction = planned.plan, planned.prediction
    vocab = planned.model.vocab_size
    print(f"predicted {prediction.step_s:.3f} s a step, {prediction.tokens_per_s:,.0f} tokens/s; {plan}", flush=True)

    began = time.perf_counter()
    folder = given.nvme_folder or tempfile.gettempdir()
    with SlidingTrainer(
        given.model,
        plan,
        random_weights=True,
        optimizer=AdamW(lr=1e-5),
        device=given.device,
        nvme_folder=folder,
        trace=given.steps,
        kernels=profile.gpu.kernels,
    ) as trainer:
        loading_s = time.perf_counter() - began
        print(f"loaded in {loading_s:.1f} s", flush=True)
        cuda = trainer.device.type == "cuda"
        generator = torch.Generator().manual_seed(0)
        losses, ends = [], []
        for _ in range(WARM_UP + given.steps):
            ids = torch.randint(0, vocab, (plan.batch, plan.seq_len), generator=generator)
            losses.append(trainer.step({"input_ids": ids, "labels": ids}))
            ends.append(time.perf_counter())
            print(f"step {len(losses)}: loss {losses[-1]:.4f}", flush=True)
        trainer.finish()
        rows = trainer.trace
        # The last step's tail has no next step beside it.
        last_step = max(row.step for row in rows)
        measured = to_frame([row for row in rows if WARM_UP < row.step < last_step])
        steps = [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
        step_s = statistics.median(steps)
        row = {
            "model": planned.model.name,
            "batch": plan.batch,
            "seq_len": plan.seq_len,
            "step_s": step_s,
            "steps_s": steps,
            "predicted_step_s": prediction.step_s,
            "error": prediction.step_s / step_s - 1.0,
            "tokens_per_s": plan.tokens / step_s,
            "loading_s": loading_s,
            "losses": losses,
            "gpu_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "gpu_reserved_bytes": torch.cuda.max_memory_reserved() if cuda else None,
            "predicted_gpu_bytes": prediction.memory["gpu"].peak_bytes,
            "ram_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "predicted_ram_bytes": prediction.memory["ram"].peak_bytes,
            "plan": planned.as_dict()["plan"],
            "machine": describe() | {"gpu": torch.cuda.get_device_name() if cuda else "none"},
            "transformers": importlib.metadata.version("transformers"),
        }
    kinds = by_kind(compare(to_frame(prediction.trace), measured))
    print(kinds.to_string(), flush=True)
    row["kinds"] = kinds.to_dict("records")
    print(json.dumps({k: v for k, v in row.items() if k not in ("kinds", "machine")}, default=str), flush=True)
    if given.json:
        with given.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")


if __name__ == "__main__":
    main()
