"""The record of a training, on the CPU with a model of a few thousand parameters, and from made-up steps."""

from __future__ import annotations

import json
import subprocess

import pytest

from ..scripts import load_script, run_script

pytest.importorskip("torch")
pytest.importorskip("transformers")

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 320,
    "max_position_embeddings": 64,
}


def ran(*options: object) -> subprocess.CompletedProcess[str]:
    return run_script("training", *options, timeout_s=100)


def test_a_training_is_recorded(tmp_path):
    config, out, folder = tmp_path / "config.json", tmp_path / "out.json", tmp_path / "work"
    config.write_text(json.dumps(CONFIG))
    options = ["--model", config, "--profile", "h200-16c", "--gpu-memory", 4, "--batch", 4, "--seq-len", 32]
    options += ["--steps", 12, "--save-every", 4, "--evaluate-every", 6, "--data-mb", 0.2, "--trials", 10]
    options += ["--device", "cpu", "--folder", folder, "--json", out]
    done = ran(*options)
    found = json.loads(out.read_text())
    seen, got = found["seen"], found["figures"]
    assert [row["step"] for row in seen["steps"]] == list(range(1, 13))
    assert [save["step"] for save in seen["saves"]] == [4, 8, 12]
    assert [one["step"] for one in seen["evaluations"]] == [6, 12]
    assert found["plan"]["gpu_memory_gib"] == 4.0
    assert found["forward"]["batches"] > 1
    assert 0 < found["forward"]["predicted_s"] < seen["started"]["predicted_step_s"]
    # The pauses that its steps show are those that checkpoints tell of.
    assert got["pauses_s"] == pytest.approx(got["told_pauses_s"], abs=0.02)
    assert "| loss |" in done.stdout
    assert ran("--table", out).stdout == done.stdout
    # What is trained is there for the next time.
    made = {path: path.stat().st_mtime_ns for path in (folder / "data.jsonl", *(folder / "model").iterdir())}
    load_script("training").prepare(str(config), str(folder), "cpu", 1e6)
    assert made == {path: path.stat().st_mtime_ns for path in made}


def seen(steps: int, seconds: dict[int, float], saves: list[dict], evaluations: list[dict]) -> dict:
    """Steps of 1 s, but for those that take other `seconds`, with the pauses of saves and evaluations behind them."""
    now, rows = 0.0, []
    for step in range(1, steps + 1):
        now += seconds.get(step, 1.0)
        waited_s = 0.25 if step == 6 else 0.0
        rows.append(
            {"at_s": now, "step": step, "step_s": seconds.get(step, 1.0), "waited_s": waited_s, "loss": 1 / step}
        )
        for one in evaluations:
            if one["step"] == step:
                now += one["seconds"]
                one["at_s"] = now
        now += sum(save["paused_s"] for save in saves if save["step"] == step)
    started = {"at_s": 0.0, "tokens": 100, "predicted_step_s": 0.8, "total_steps": steps}
    started |= {"save_every": 10, "evaluate_every": 16}
    ended = {"peak_bytes": {"gpu": 0, "page_locked": 0, "ram": 1 << 30}}
    return {"steps": rows, "saves": saves, "evaluations": evaluations, "started": started, "ended": ended, "notes": []}


def figures(seen: dict) -> dict:
    return load_script("training").figures(
        {"seen": seen, "forward": {"batches": 3, "made_s": 0.1, "predicted_s": 0.25}}
    )


def test_steps_beside_a_checkpoint_are_told_from_those_alone():
    # Saving pauses for 2 s after step 10; until 5.3 s later it is written, beside steps 11 to 15, the last of them at
    # 1.2 s; a bit of step 16 too. The step before a pause has its backward pass in it, the one after it has none.
    slow = {10: 1.5, 11: 0.5, **dict.fromkeys((12, 13, 14, 15), 1.2), 16: 1.4, 17: 0.6}
    save = {"step": 10, "paused_s": 2.0, "seconds": 7.4, "nbytes": 12}
    last = {"step": 20, "paused_s": 9.0, "seconds": 9.0, "nbytes": 12}
    evaluations = [{"step": step, "loss": 1.0, "seconds": 1.5} for step in (16, 20)]
    got = figures(seen(20, slow, [save, last], evaluations))
    # 6 to 9 and 18 to 20; 12 to 15.
    assert (got["steps_alone"], got["steps_saving"]) == (7, 4)
    assert (got["step_s"], got["tokens_per_s"]) == (1.0, 100.0)
    assert got["saving_over_alone"] == pytest.approx(1.2)
    assert got["share_of_predicted"] == pytest.approx(0.8)
    assert got["pauses_s"] == pytest.approx([2.0])
    assert (got["saving_s"], got["last_saving_s"]) == ([7.4], 9.0)
    # 13 steps, those beside the evaluation not among them: 2 s of pause, and 0.2 s in each of four.
    assert got["save_costs_s"] == pytest.approx(2.8)
    assert got["saving_share"] == pytest.approx(2.8 / 13)
    # The first evaluation does not count.
    assert got["evaluation_tokens_per_s"] == pytest.approx(200.0)
    assert got["evaluation_share"] == pytest.approx(0.5)
    assert (got["waited_s"], got["steps_that_waited"]) == (0.25, 1)


def test_what_did_not_happen_has_no_figure():
    got = figures(seen(9, {}, [], []))
    assert (got["steps_alone"], got["steps_saving"]) == (4, 0)
    names = ("saving_step_s", "saving_over_alone", "saving_share", "save_costs_s", "checkpoint_bytes")
    assert all(got[name] is None for name in (*names, "evaluation_tokens_per_s", "evaluation_share"))
    short = figures(seen(3, {}, [], []))
    assert all(short[name] is None for name in ("step_s", "tokens_per_s", "waited_s", "most_waited_s", "waited_share"))


def test_a_pause_beside_an_evaluation_is_not_counted_by_halves():
    watched = seen(30, {10: 1.5, 11: 0.5, 20: 1.5, 21: 0.5}, [], [{"step": 9, "loss": 1.0, "seconds": 2.0}])
    watched["started"]["evaluate_every"] = 9
    got = figures(watched)
    # 9 and 10 stand beside the evaluation, so 11 is left out too; 18, 19 and 27, 28 for theirs, which took no time.
    assert got["saves_counted"] == 1
    assert got["saving_share"] == pytest.approx(0.0)
