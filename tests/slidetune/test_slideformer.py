"""SlideFormer's policy: what its schedule must be like, and how far it is from the published rows."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import cache
from itertools import pairwise

import pytest

from slidetune.errors import SlidetuneError
from slidetune.machines import default_link, load_gpu, load_profile
from slidetune.models import load_model
from slidetune.schedule import CPU_ADAM, GPU, Schedule
from slidetune.simulator.predict import Prediction, predict
from slidetune.slideformer import build_slideformer, power_of_two

from ..scripts import load_script

LAYERS = 36


@cache
def compared() -> dict[tuple[str, int], dict]:
    return {
        (row["model"], row["batch"]): row
        for row in load_script("slideformer").compare(load_profile("slideformer-rtx4090"))
    }


@cache
def step(model: str = "qwen3-8b", batch: int = 8) -> Schedule:
    return build_slideformer(load_model(model), batch=batch, seq_len=1024, adam_threads=32)


@cache
def run(batch: int = 8) -> Prediction:
    return predict(step(batch=batch), load_profile("slideformer-rtx4090"))


def times(prediction: Prediction) -> dict[int, tuple[float, float]]:
    return {row.task: (row.start_s, row.end_s) for row in prediction.trace}


# --- Against what was published


@pytest.mark.parametrize("batch", [2, 4, 8, 16, 32])
def test_a_row_that_nothing_was_fitted_to_is_within_5_percent(batch):
    assert abs(compared()["qwen3-8b", batch]["error_percent"]["step_s"]) < 5


@pytest.mark.parametrize("batch", [1, 64])
def test_the_two_fitted_rows_come_out(batch):
    row = compared()["qwen3-8b", batch]
    assert row["fitted"]
    assert abs(row["error_percent"]["step_s"]) < 1


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32, 64])
def test_peaks_are_within_2_percent(batch):
    errors = compared()["qwen3-8b", batch]["error_percent"]
    # torch's allocated bytes (not what its allocator reserved), and the process' resident memory.
    assert abs(errors["gpu_allocated_gib"]) < 2
    assert abs(errors["ram_gib"]) < 2


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("model", ["qwen3-4b", "qwen3-14b"])
def test_models_that_nothing_was_fitted_to_are_near(model, batch):
    errors = compared()[model, batch]["error_percent"]
    assert abs(errors["step_s"]) < 10
    assert abs(errors["gpu_allocated_gib"]) < 2
    # Up to batch 4 the smallest model's peak is that of loading it.
    assert abs(errors["ram_gib"]) < (4 if model == "qwen3-4b" and batch <= 4 else 2)


def test_seven_rows_of_the_model_are_published():
    rows = [row for row in load_script("slideformer").published() if row["model"] == "qwen3-8b"]
    assert [row["batch"] for row in rows] == [1, 2, 4, 8, 16, 32, 64]
    assert all(row["batch"] * 1024 / row["step_s"] == pytest.approx(row["tokens_per_s"], rel=1e-3) for row in rows)


# --- The fitted profile


def test_gpu_and_link_are_the_catalogs():
    profile = load_profile("slideformer-rtx4090")
    gpu = load_gpu("rtx4090")
    assert profile.link == default_link("rtx4090")
    assert profile.gpu.kernels == "liger"
    assert all(
        getattr(profile.gpu, name) == getattr(gpu, name) for name in gpu.__dataclass_fields__ if name != "kernels"
    )


def test_every_figure_has_a_source_and_fitted_ones_name_their_two_rows():
    fitted = {}
    for path, figure in load_profile("slideformer-rtx4090").figures():
        assert figure.kind
        assert figure.source, path
        if "fitted to" in figure.source:
            fitted[path] = figure
    host = {path for path in fitted if path.startswith("host.")}
    assert host == {"host.adam_gparams_per_core", "host.convert_gparams_per_core"}
    for path in host:
        assert fitted[path].kind == "derived"
        assert "batch 1 and 64" in fitted[path].source


def test_the_fitted_host_is_one_that_exists():
    host = load_profile("slideformer-rtx4090").host
    cores = host.cores.value
    assert 8 <= cores <= 64
    # The 14B runs hold 211 GiB.
    assert 211 < host.ram_gib.value <= 2048
    assert 80 < host.dram_gbs.value * host.dram_efficiency.value < 400
    # All cores: the H200 probe's 16 reach 2.9 to 5.0 (Adam) and 13.3 (conversion).
    assert 1.5 < cores * host.adam_gparams_per_core.value < 10
    assert 5 < cores * host.convert_gparams_per_core.value < 40


def test_fitting_again_gives_the_shipped_profile():
    again, shipped = load_script("slideformer").fit(), load_profile("slideformer-rtx4090")
    for path, figure in shipped.figures():
        assert again.figure(path).value == pytest.approx(figure.value, rel=0.1), path


# --- The schedule


def test_one_link_lane_carries_both_directions():
    schedule = step()
    ops = {op: {task.work.lane for task in schedule.tasks if task.work.op == op} for op in ("fetch", "load")}
    ops |= {op: {task.work.lane for task in schedule.tasks if task.work.op == op} for op in ("store", "save")}
    assert all(lanes == {"link"} for lanes in ops.values())
    assert set(schedule.lanes) == {GPU, "link", "convert", CPU_ADAM}
    moving = sorted((row.start_s, row.end_s) for row in run().trace if row.lane == "link")
    assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(moving))


def test_every_weight_is_converted_and_uploaded_twice_but_for_the_turnaround():
    model, schedule = load_model("qwen3-8b"), step()
    uploads = Counter()
    for task in schedule.tasks:
        if task.work.op == "fetch":
            uploads[task.unit] += task.work.bytes
    for unit in model.units:
        times_up = 1 if unit.kind == "head" else 2
        assert uploads[unit.index] == times_up * 2 * unit.params
    assert schedule.total("params", "convert") * 2 == sum(uploads.values())


def test_there_are_two_cache_units_and_never_more_in_use():
    schedule = step()
    index, pool = next((i, pool) for i, pool in enumerate(schedule.pools) if pool.name == "cache units")
    largest = max(unit.params for unit in load_model("qwen3-8b").units)
    assert (pool.tier, pool.slots, pool.slot_bytes) == ("gpu", 2, 2 * 2 * largest)
    assert {hold.slot for hold in schedule.holds if hold.pool == index} == {0, 1}


@pytest.mark.parametrize("model", ["qwen3-8b", "qwen3-4b"])
@pytest.mark.parametrize("batch", [1, 16])
def test_no_slot_has_two_owners(model, batch):
    schedule = step(model, batch)
    at = times(predict(schedule, load_profile("slideformer-rtx4090")))
    owners: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for hold in schedule.holds:
        span = (at[hold.first][0], max(at[task][1] for task in hold.last))
        owners.setdefault((hold.pool, hold.slot), []).append(span)
    names = {schedule.pools[pool].name for pool, _ in owners}
    assert names == {"cache units", "gradient buffer", "weight buffer", "saved inputs"}
    for spans in owners.values():
        spans.sort()
        assert all(end <= start + 1e-9 for (_, end), (start, _) in pairwise(spans))


def test_a_gradient_waits_until_adam_has_emptied_the_one_buffer():
    schedule = step()
    assert next(pool.slots for pool in schedule.pools if pool.name == "gradient buffer") == 1
    at = times(run(batch=8))
    first_store, last_adam = {}, {}
    for i, task in enumerate(schedule.tasks):
        if task.work.op == "store":
            first_store.setdefault(task.unit, i)
        if task.work.op == "adam":
            last_adam[task.unit] = i
    for unit in range(LAYERS + 1):
        # Units go backwards: the unit above was applied before.
        assert last_adam[unit + 1] in schedule.tasks[first_store[unit]].after
        assert at[first_store[unit]][0] >= at[last_adam[unit + 1]][1] - 1e-9


def test_the_one_thread_converts_only_when_it_has_sent():
    schedule, at = step(), times(run(batch=8))
    sent = None
    for i, task in enumerate(schedule.tasks):
        if task.work.op == "convert" and sent is not None and schedule.tasks[sent].unit != task.unit:
            assert at[i][0] >= at[sent][1] - 1e-9
        if task.work.op in ("fetch", "store"):
            sent = i


def test_every_layer_recomputes_and_sends_its_input_down():
    ops = Counter(task.work.op for task in step().tasks)
    assert {op: ops[op] for op in ("recompute", "save", "load")} == dict.fromkeys(("recompute", "save", "load"), LAYERS)
    assert ops["forward"] == ops["backward"] == LAYERS + 1
    assert ops["head"] == 1


def test_every_parameter_is_updated_once():
    for model in ("qwen3-8b", "qwen3-4b"):
        assert step(model).total("params", CPU_ADAM) == load_model(model).params


def test_a_barrier_ends_the_step():
    schedule = step()
    lanes = schedule.lane_tasks()
    last = {tasks[-1] for tasks in lanes.values()}
    for tasks in lanes.values():
        assert set(schedule.tasks[tasks[0]].after_previous) == last
    starts = {row.lane: row.start_s for row in reversed(run().trace)}
    ends = [row.end_s for row in run().trace]
    assert min(starts.values()) >= max(ends) - run().step_s - 1e-6


def test_tasks_depend_on_earlier_ones_alone():
    schedule = step()
    assert all(dep < i for i, task in enumerate(schedule.tasks) for dep in task.after)
    assert schedule.visits[0] == 0
    assert list(schedule.visits) == sorted(set(schedule.visits))


def test_chunks_are_of_64_mib():
    sizes = {task.work.bytes for task in step().tasks if task.work.op in ("fetch", "store")}
    assert max(sizes) == 64 * 2**20


def test_a_larger_batch_never_takes_less():
    rows = [compared()["qwen3-8b", batch]["predicted"] for batch in (1, 2, 4, 8, 16, 32, 64)]
    for name in ("step_s", "gpu_allocated_gib", "ram_gib"):
        values = [row[name] for row in rows]
        assert values == sorted(values)


def test_a_tied_matrix_has_a_gradient_kept_in_ram():
    pools = {pool.name: pool for pool in step("qwen3-4b").pools}
    assert pools["tied gradient"].bytes == power_of_two(2 * load_model("qwen3-4b").embedding.params)
    assert "tied gradient" not in {pool.name for pool in step().pools}


@pytest.mark.parametrize(("size", "rounded"), [(1, 1), (2, 2), (3, 4), (2**30, 2**30), (2**30 + 1, 2**31)])
def test_page_locked_memory_is_rounded_to_powers_of_two(size, rounded):
    assert power_of_two(size) == rounded


@pytest.mark.parametrize("path", ["host.convert_gparams_per_core", "host.adam_gparams_per_core", "link.h2d_gbs"])
def test_every_lane_can_be_the_one_that_limits(path):
    slow = load_profile("slideformer-rtx4090").scaled(path, 0.05)
    slowed = predict(step(), slow)
    assert slowed.step_s > 1.5 * run().step_s
    named = {"host.convert": "conversion to bf16", "host.adam": "CPU Adam", "link.h2d": "transfers"}
    assert named[path.split("_")[0]] in slowed.limiter


# --- Refused


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": -1}, "batch"),
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": 10**6}, "positions"),
        ({"adam_threads": 0}, "adam_threads"),
        ({"kernels": "magic"}, "kernels"),
    ],
)
def test_sizes_that_make_no_step_are_refused(wrong, named):
    sizes = {"batch": 1, "seq_len": 1024, "adam_threads": 8} | wrong
    with pytest.raises(SlidetuneError, match=named):
        build_slideformer(load_model("qwen3-8b"), **sizes)


def test_the_shortest_step_is_one_token():
    schedule = build_slideformer(load_model("qwen3-0.6b"), batch=1, seq_len=1, adam_threads=1)
    assert schedule.tokens == 1
    assert predict(schedule, load_profile("slideformer-rtx4090")).step_s > 0


# --- The script


def test_the_script_prints_json(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["slideformer.py", "--json", "--shipped"])
    load_script("slideformer").main()
    printed = json.loads(capsys.readouterr().out)
    assert len(printed["rows"]) == 21
    assert sum(row["fitted"] for row in printed["rows"]) == 2
    assert printed["profile"]["name"] == "slideformer-rtx4090"


def test_the_scripts_table_has_signed_errors(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["slideformer.py", "--shipped"])
    load_script("slideformer").main()
    printed = capsys.readouterr().out
    assert printed.count("| +") + printed.count("| -") >= 3 * 21
    assert "| 64* |" in printed


def test_the_written_profile_is_read_back(tmp_path, monkeypatch):
    module, shipped = load_script("slideformer"), load_profile("slideformer-rtx4090")
    (tmp_path / "profiles").mkdir()
    monkeypatch.setattr(module, "CATALOG", tmp_path)
    assert load_profile(module.write(shipped)) == shipped
