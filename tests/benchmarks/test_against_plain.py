"""The comparison with the plain loop, on the CPU with models of a few thousand parameters."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "against_plain.py"
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 200,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


@cache
def benchmark():
    """The script, which is no package's module."""
    spec = importlib.util.spec_from_file_location("against_plain_benchmark", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measured(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        BENCHMARK,
        "--model",
        folder,
        "--profile",
        "h200-16c",
        "--gpu-memory",
        4,
        "--seq-len",
        32,
    ]
    command += ["--batch", 2, "--steps", 2, "--device", "cpu", "--json", folder / "out.jsonl", *options]
    ran = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran


def rows(folder: Path) -> list[dict]:
    return benchmark().read_rows(folder / "out.jsonl")


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_both_sides_see_the_same_losses_and_a_row_is_measured_once(tiny):
    ran = measured(tiny, "--kernels", "eager", "--plain")
    (row,) = rows(tiny)
    assert len(row["slidetune"]["losses"]) == 4
    assert row["slidetune"]["losses"][-1] < row["slidetune"]["losses"][0]
    assert row["max_loss_difference"] < 1e-3
    assert row["share_of_bound"] == pytest.approx(row["predicted"]["bound_s"] / row["slidetune_s"])
    assert [each["checkpointing"] for each in row["plain"]["variants"]] == [False, True]
    assert str(tiny) in ran.stdout
    again = measured(tiny, "--kernels", "eager", "--plain")
    assert again.stderr == ""
    assert again.stdout == ran.stdout
    # The plain loop knows no cap: another row takes it over.
    other = measured(tiny, "--kernels", "eager", "--plain", "--no-cap").stderr
    assert "slidetune" in other
    assert "plain" not in other
    assert [one["plain"] for one in rows(tiny)] == [row["plain"]] * 2


def test_a_run_that_fails_is_a_row_with_its_error_and_is_tried_again(tiny):
    for _ in range(2):
        ran = measured(tiny, "--kernels", "liger")
        (row,) = rows(tiny)
        assert "need a CUDA device" in row["error"]
        assert "need a CUDA device" in ran.stdout
    assert len((tiny / "out.jsonl").read_text().splitlines()) == 2


def test_nothing_is_started_when_the_time_is_over(tiny):
    ran = measured(tiny, "--kernels", "eager", "--budget-s", "0")
    assert "not started" in ran.stderr
    assert rows(tiny) == []


def test_the_micro_batch_is_halved_until_it_fits():
    tried = []

    def timed(ids, micro_batch, steps):
        tried.append(micro_batch)
        if micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return [1.0] * steps, [0.0] * steps

    loop = SimpleNamespace(timed=timed, device=torch.device("cpu"), model=torch.nn.Linear(1, 1))
    found = benchmark().largest_that_fits(loop, torch.zeros(8, 4), steps=3)
    assert tried == [8, 4, 2]
    assert (found["micro_batch"], found["step_s"]) == (2, 1.0)
    loop.timed = lambda *_: timed(None, 8, 0)
    assert benchmark().largest_that_fits(loop, torch.zeros(8, 4), steps=3) is None


def test_other_errors_are_no_lack_of_memory():
    def wrong():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        benchmark().if_it_fits(wrong)


def test_figures_of_a_row():
    row = {"model": "qwen3-4b", "batch": 8, "kernels": "liger", "cap_gib": 24.0, "seq_len": 1024, "error": None}
    row |= {
        "predicted": {"step_s": 0.9, "bound_s": 0.8, "params": 1 << 30, "ram_activations_gib": 1.0},
        "slidetune": {"step_s": 1.0, "losses": [3.0, 2.0], "ram_gib": 13.0, "gpu_gib": 23.0, "drawn_on_host": []},
        "plain": {
            "losses": [3.0, 2.5],
            "drawn_on_host": [],
            "variants": [
                {"checkpointing": False, "micro_batch": 4, "step_s": 0.6},
                {"checkpointing": True, "micro_batch": 8, "step_s": 0.5},
            ],
        },
    }
    found = benchmark().figures(row)
    assert (found["plain_s"], found["plain_micro_batch"], found["plain_over_slidetune"]) == (0.5, 8, 0.5)
    assert found["share_of_bound"] == 0.8
    assert (found["ram_bytes_per_param"], found["ram_bytes_per_param_allowed"]) == (12.0, 14.5)
    assert (found["slideformer_s"], found["over_slideformer"], found["over_megatrain"]) == (1.70, 1.70, 3.48)
    assert found["max_loss_difference"] == 0.5
    elsewhere = benchmark().figures(row | {"seq_len": 2048, "plain": row["plain"] | {"drawn_on_host": ["lm_head"]}})
    assert "slideformer_s" not in elsewhere
    assert "max_loss_difference" not in elsewhere
