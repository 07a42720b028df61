"""The comparison with the plain loop, on the CPU with models of a few thousand parameters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from slidetune.traces.recorded import load_run
from slidetune.validating import validate_recorded

from ..scripts import load_script, run_script

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

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


def measured(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    case = ["--model", folder, "--profile", "h200-16c", "--gpu-memory", 4, "--seq-len", 32, "--batch", 2]
    how = ["--steps", 2, "--device", "cpu", "--json", folder / "out.jsonl"]
    return run_script("against_plain", *case, *how, *options)


def rows(folder: Path) -> list[dict]:
    return load_script("against_plain").read_rows(folder / "out.jsonl")


@pytest.fixture
def tiny(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_both_sides_see_the_same_losses_and_a_row_is_measured_once(tiny):
    ran = measured(tiny, "--kernels", "eager", "--plain")
    (row,) = rows(tiny)
    # Two to warm up, and one after those that count.
    assert len(row["slidetune"]["losses"]) == 5
    assert len(row["plain"]["losses"]) == 5
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


def test_runs_are_recorded_as_validate_records_them(tiny):
    measured(tiny, "--kernels", "eager", "--no-cap", "--record", tiny / "runs")
    names = [f"{tiny.name}-b2-s32-eager-{cap}" for cap in ("4gib", "nocap")]
    found = validate_recorded(tiny / "runs").runs
    assert [one.run.name for one in found] == names
    assert all(one.lanes for one in found)
    for row, name in zip(rows(tiny), names, strict=True):
        run = load_run(tiny / "runs" / f"{name}.json.gz")
        assert run.measured.median_step_s == row["slidetune_s"]
        assert run.plan.gpu_memory_gib == row["cap_gib"]
        assert run.profile == "h200-16c.yaml"


def test_one_process_measures_all_batches_from_the_same_weights(tiny):
    ran = measured(tiny, "--kernels", "eager", "--plain", "--batch", "4", "2", "--plain-steps", "2")
    assert ran.stderr.count(" plain ") == 2
    by_batch = {row["batch"]: row for row in rows(tiny)}
    for batch, row in by_batch.items():
        assert len(row["plain"]["losses"]) == 4
        assert row["max_loss_difference"] < 1e-3
        assert {each["micro_batch"] for each in row["plain"]["variants"]} == {batch}
    lines = load_script("against_plain").plain_results(tiny / "out.plain.jsonl")
    assert [one["batch"] for one in lines] == [2, 4]
    # What a job that was cut off has left is taken up.
    kept = [row | {"plain": None} for row in by_batch.values()]
    (tiny / "out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    again = measured(tiny, "--kernels", "eager", "--plain", "--batch", "4", "2", "--plain-steps", "2")
    assert again.stderr == ""
    assert {row["batch"]: row["plain"] for row in rows(tiny)} == {one["batch"]: one["found"] for one in lines}


def test_what_was_measured_before_its_process_was_ended_is_kept(tiny, monkeypatch):
    bench, row = bench_with(tiny, batches=(2, 4))

    def ended_early(work, job, timeout_s):
        line = {key: job[key] for key in ("model", "kernels", "seq_len")} | {"batch": 2, "found": {"variants": []}}
        Path(job["results"]).write_text(json.dumps(line) + '\n{"model": "cut o')
        return load_script("against_plain").apart.Ended(error="ended after 1 s")

    monkeypatch.setattr(load_script("against_plain").apart, "run", ended_early)
    bench._plain([row(2), row(4)])
    first, second = rows(tiny)
    assert first["plain"] == {"variants": []}
    assert "ended after 1 s" in second["plain"]["error"]


def bench_with(folder, batches):
    """A bench with rows whose slidetune run failed, and a row of each batch."""
    options = SimpleNamespace(json=folder / "out.jsonl", budget_s=60, run_s=1, plain_steps=1, device="cpu")
    about = {"model": "m", "kernels": "eager", "cap_gib": 4.0, "seq_len": 32, "error": "no"}
    made = {batch: about | {"batch": batch, "slidetune": None, "plain": None, "predicted": None} for batch in batches}
    return load_script("against_plain").Bench(options), made.get


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


class Small:
    """A plain loop on a device that holds two sequences."""

    def __init__(self):
        self.tried, self.restarts, self.updates = [], 0, 0
        self.device, self.model = torch.device("cpu"), torch.nn.Linear(1, 1)
        self.model.config = SimpleNamespace(vocab_size=9)

    def timed(self, batches, micro_batch, steps):
        self.tried.append(micro_batch)
        if micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        self.updates += steps
        return [1.0] * steps, [0.0] * steps

    def checkpointing(self, on):
        pass

    def restart(self):
        self.restarts, self.updates = self.restarts + 1, 0


def test_the_micro_batch_is_halved_until_it_fits():
    loop = Small()
    found = load_script("against_plain").largest_that_fits(loop, [torch.zeros(8, 4)], steps=3, at_most=8)
    assert loop.tried == [8, 4, 2]
    assert (found["micro_batch"], found["step_s"]) == (2, 1.0)
    assert not loop.restarts
    assert load_script("against_plain").largest_that_fits(loop, [torch.zeros(8, 4)], steps=3, at_most=0) is None


def test_larger_batches_start_afresh_from_the_micro_batch_that_is_known_to_fit():
    loop, at_most = Small(), {}
    job = {"model": "m", "seq_len": 4, "plain_steps": 1}
    for batch in (2, 4, 8):
        found = load_script("against_plain").both_ways(loop, job | {"batch": batch}, at_most)
        assert [each["micro_batch"] for each in found["variants"]] == [2, 2]
        assert len(found["losses"]) == 3
    assert loop.tried == [2, 2, 4, 2, 4, 2, 2, 2]
    assert loop.restarts == 2


def test_other_errors_are_no_lack_of_memory():
    def wrong():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        load_script("against_plain").if_it_fits(wrong)


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
    found = load_script("against_plain").figures(row)
    assert (found["plain_s"], found["plain_micro_batch"], found["plain_over_slidetune"]) == (0.5, 8, 0.5)
    assert found["share_of_bound"] == 0.8
    assert (found["ram_bytes_per_param"], found["ram_bytes_per_param_allowed"]) == (12.0, 14.5)
    assert (found["slideformer_s"], found["over_slideformer"], found["over_megatrain"]) == (1.70, 1.70, 3.48)
    assert found["max_loss_difference"] == 0.5
    elsewhere = load_script("against_plain").figures(
        row | {"seq_len": 2048, "plain": row["plain"] | {"drawn_on_host": ["lm_head"]}}
    )
    assert "slideformer_s" not in elsewhere
    assert "max_loss_difference" not in elsewhere
