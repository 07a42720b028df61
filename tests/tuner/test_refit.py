"""Refitting a profile: runs of a machine whose figures are known, because the run was simulated from them."""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.builder import build
from slidetune.gpu_time import gpu_seconds
from slidetune.hardware import Figure
from slidetune.machines import adapted, machine
from slidetune.models import load_model
from slidetune.plans import Activations, Plan
from slidetune.simulator.predict import predict
from slidetune.tuner.refit import LARGEST_MOVE, carried_over, refit
from slidetune.validating import compare_with

from ..traces.runs import as_if_run

PROFILE = machine("rtx4090")
PLANS = {
    "plain": Plan(model="llama-3.1-8b", micro_batch=8),
    "spilled": Plan(
        model="llama-3.1-8b",
        accumulation=4,
        optimizer_nvme=8,
        weights_nvme=4,
        activations=Activations(gpu=2, nvme=2),
    ),
    "small transfers": Plan(model="qwen3-0.6b", seq_len=64, chunk_bytes=2**20),
    "forward": Plan(model="llama-3.1-8b", adam_threads=4, update="forward", window=4, prefetch=3),
}
SCHEDULES = {name: build(load_model(plan.model), plan) for name, plan in PLANS.items()}
FIGURES = [
    "gpu.launch_us",
    "gpu.matmul_efficiency",
    "gpu.memory_efficiency",
    "link.h2d_gbs",
    "link.d2h_gbs",
    "link.duplex_gbs",
    "link.latency_us",
    "host.dram_gbs",
    "host.adam_gparams_per_core",
    "host.upload_dram_weight",
    "host.download_dram_weight",
    "nvme.read_gbs",
    "nvme.write_gbs",
    "nvme.mixed_share",
]


def run_on(real, name, profile=PROFILE):
    """A run of a plan on the machine `real`, beside what another profile foresaw."""
    schedule = SCHEDULES[name]
    return compare_with(predict(schedule, profile), as_if_run(predict(schedule, real), PLANS[name]))


def step_s(profile, name):
    return predict(SCHEDULES[name], profile).step_s


@pytest.mark.parametrize("name", PLANS)
def test_a_profile_that_was_right_stays_as_it_is(name):
    profile, lessons = refit(PROFILE, run_on(PROFILE, name))
    assert profile is PROFILE
    assert lessons == ()


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(PLANS)), figure=st.sampled_from(FIGURES), factor=st.floats(0.6, 1.6))
def test_whatever_figure_was_wrong_the_refitted_profile_predicts_the_run(name, figure, factor):
    real = PROFILE.scaled(figure, factor)
    found = run_on(real, name)
    refitted, _ = refit(PROFILE, found)
    assert step_s(refitted, name) == pytest.approx(found.step.measured, rel=0.015)


@settings(max_examples=20, deadline=None)
@given(first=st.sampled_from(FIGURES), second=st.sampled_from(FIGURES), factors=st.tuples(*[st.floats(0.7, 1.4)] * 2))
def test_two_wrong_figures(first, second, factors):
    real = PROFILE.scaled(first, factors[0]).scaled(second, factors[1])
    found = run_on(real, "plain")
    refitted, _ = refit(PROFILE, found)
    assert step_s(refitted, "plain") == pytest.approx(found.step.measured, rel=0.02)


@pytest.mark.parametrize(
    ("name", "figure", "what"),
    [
        ("plain", "link.h2d_gbs", "uploads alone"),
        ("plain", "link.d2h_gbs", "downloads"),
        ("plain", "host.dram_gbs", "CPU Adam alone"),
        ("small transfers", "host.download_dram_weight", "CPU Adam beside downloads"),
        ("spilled", "nvme.mixed_share", "NVMe reads and writes together"),
        ("spilled", "nvme.write_gbs", "NVMe writes"),
        ("small transfers", "link.latency_us", "small transfers"),
    ],
)
@pytest.mark.parametrize("factor", [0.7, 1.4])
def test_the_figure_that_was_wrong_is_the_one_that_moves(name, figure, what, factor):
    profile, lessons = refit(PROFILE, run_on(PROFILE.scaled(figure, factor), name))
    (lesson,) = lessons
    assert lesson.change.figure == figure
    assert lesson.what.startswith(what)
    found = profile.figure(figure)
    assert found.value == pytest.approx(factor * PROFILE.figure(figure).value, rel=0.01)
    assert found.kind == "measured"
    assert f"measured step of {PLANS[name].model}" in found.source
    changed = [path for path, now in profile.figures() if now != PROFILE.figure(path)]
    assert changed == [figure]


def test_gpu_tasks_become_measured_ones_of_the_profile():
    real = PROFILE.scaled("gpu.matmul_efficiency", 0.8)
    profile, lessons = refit(PROFILE, run_on(real, "plain"))
    assert {lesson.what for lesson in lessons} >= {"GPU forward passes", "GPU backward passes"}
    works = {task.work for task in SCHEDULES["plain"].tasks if task.work.lane == "gpu"}
    for time in profile.gpu.times:
        (work,) = (w for w in works if (w.op, w.flops, w.launches) == (time.op, time.flops, time.launches))
        assert time.seconds == pytest.approx(gpu_seconds(work, real.gpu), rel=0.01)
        assert time.model_s == pytest.approx(gpu_seconds(work, PROFILE.gpu), rel=1e-4)
    # The same run again teaches nothing; another one takes the places of the first.
    assert refit(profile, run_on(real, "plain"))[1] == ()
    again, _ = refit(profile, run_on(PROFILE, "plain"))
    assert len(again.gpu.times) == len(profile.gpu.times)


def test_the_kernels_that_ran_are_the_ones_that_are_measured():
    run = dataclasses.replace(run_on(PROFILE.scaled("gpu.matmul_efficiency", 0.8), "plain").run, kernels="liger")
    profile, _ = refit(PROFILE, compare_with(predict(SCHEDULES["plain"], PROFILE), run))
    assert profile.gpu.kernels == "eager"
    assert {time.kernels for time in profile.gpu.times} == {"liger"}


@pytest.mark.parametrize("factor", [0.2, 5.0])
def test_a_figure_moves_by_a_limited_factor_at_once(factor):
    profile = PROFILE
    real = PROFILE.scaled("link.h2d_gbs", factor)
    first, _ = refit(profile, run_on(real, "forward"))
    ratio = first.link.h2d_gbs.value / PROFILE.link.h2d_gbs.value
    assert 1 / LARGEST_MOVE - 1e-4 <= ratio <= LARGEST_MOVE + 1e-4
    assert ratio == pytest.approx(LARGEST_MOVE if factor > 1 else 1 / LARGEST_MOVE, rel=0.35)


def test_lessons_say_what_was_learned_in_figures():
    _, lessons = refit(PROFILE, run_on(PROFILE.scaled("host.dram_gbs", 0.8), "plain"))
    share = lessons[0].ratio - 1
    assert share == pytest.approx(1 / 0.8 - 1, abs=0.02)
    assert lessons[0].text == f"CPU Adam alone took {share:.0%} longer than profiled"
    _, lessons = refit(PROFILE, run_on(PROFILE.scaled("gpu.matmul_efficiency", 1.25), "plain"))
    assert "less time than profiled" in lessons[0].text
    assert [lesson.effect_s for lesson in lessons] == sorted((one.effect_s for one in lessons), reverse=True)


def test_a_run_whose_tasks_are_not_known_teaches_nothing():
    found = dataclasses.replace(run_on(PROFILE.scaled("host.dram_gbs", 0.5), "plain"), rows=())
    assert refit(PROFILE, found) == (PROFILE, ())


def test_noise_is_hardly_a_lesson():
    found, noise = run_on(PROFILE, "plain"), random.Random(0)
    rows = [row._replace(end_s=row.start_s + noise.gauss(1, 0.05) * (row.end_s - row.start_s)) for row in found.rows]
    profile, _ = refit(PROFILE, dataclasses.replace(found, rows=rows))
    assert step_s(profile, "plain") == pytest.approx(step_s(PROFILE, "plain"), rel=0.02)
    for path in ("link.h2d_gbs", "link.d2h_gbs", "host.dram_gbs"):
        assert profile.figure(path).value == pytest.approx(PROFILE.figure(path).value, rel=0.03), path


def test_what_was_learned_under_a_cap_is_carried_over_to_the_whole_machine():
    here = adapted(PROFILE, gpu_memory_gib=12, ram_gib=64)
    learned = here.replaced("link.h2d_gbs", Figure(20.0, "measured", "refitted"))
    whole = carried_over(here, learned, PROFILE)
    assert whole == PROFILE.replaced("link.h2d_gbs", Figure(20.0, "measured", "refitted"))
