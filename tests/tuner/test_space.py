"""Points and plans: whatever the sampler proposes can be built, and a step on an axis is a small change."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Plan, problems
from slidetune.tuner.space import MAX_STEP_TOKENS, Space, chunk_sizes, coarse_space, full_space
from slidetune.units import MIB

from ..strategies import small_models
from .small_spaces import an_evaluator, small_space

WITH_DRIVE, WITHOUT = machine("rtx4090"), machine("rtx4090", "desktop")


@st.composite
def spaces(draw: st.DrawFn):
    model = draw(st.one_of(small_models(6), st.sampled_from(("llama-3.1-8b", "gpt2", "qwen3-30b-a3b")).map(load_model)))
    clip = draw(st.sampled_from((None, 1.0)))
    base = Plan(
        model=model.name,
        seq_len=draw(st.sampled_from((1, 128, 1000, model.max_seq_len))),
        clip_norm=clip,
        update="forward" if clip else "backward",
    )
    batch = draw(st.one_of(st.none(), st.integers(1, 300)))
    return model, full_space(model, draw(st.sampled_from((WITH_DRIVE, WITHOUT))), base, batch)


def a_point(draw, space: Space):
    return tuple(draw(st.integers(0, len(axis.values) - 1)) for axis in space.axes)


@st.composite
def points(draw: st.DrawFn):
    model, space = draw(spaces())
    return model, space, a_point(draw, space)


@given(points())
@settings(max_examples=300)
def test_every_point_is_a_sound_plan(case):
    model, space, point = case
    assert problems(space.plan(point), model) == []


@given(points())
def test_a_plan_keeps_what_was_asked_for(case):
    _, space, point = case
    plan = space.plan(point)
    assert (plan.model, plan.seq_len, plan.clip_norm) == (space.base.model, space.base.seq_len, space.base.clip_norm)
    assert plan.clip_norm is None or plan.update == "forward"
    batch = next((axis.values[0] for axis in space.axes if axis.name == "batch"), None)
    assert plan.batch == batch if batch else plan.tokens <= max(MAX_STEP_TOKENS, plan.seq_len)


@given(points())
def test_values_lead_back_to_the_point(case):
    _, space, point = case
    assert space.point({axis.name: axis.values[i] for axis, i in zip(space.axes, point, strict=True)}) == point


@given(points())
def test_neighbours_are_a_step_away_and_see_each_other(case):
    _, space, point = case
    found = list(space.neighbours(point))
    assert len(set(found)) == len(found)
    assert found or all(len(axis.values) == 1 for axis in space.axes)
    for near in found:
        steps = {i: b - a for i, (a, b) in enumerate(zip(point, near, strict=True)) if a != b}
        assert set(map(abs, steps.values())) == {1}
        # Or a trade with the micro-batch: one axis up, the other down.
        traded = {space.axes[i].name for i in steps if i}
        assert len(steps) == 1 or (0 in steps and sum(steps.values()) == 0)
        assert len(steps) == 1 or traded in ({space.axes[1].name}, {"recompute.keep"})
        assert all(0 <= i < len(axis.values) for i, axis in zip(near, space.axes, strict=True))
        assert point in space.neighbours(near)


def test_points_are_as_many_as_the_size_and_all_different():
    space = small_space(an_evaluator())
    found = list(space.points())
    assert len(found) == len(set(found)) == space.size == 288


def test_a_number_between_two_values_takes_the_nearest():
    space = full_space(load_model("llama-3.1-8b"), WITH_DRIVE, Plan(model="llama-3.1-8b"))
    plan = space.plan(space.point({"micro_batch": 30, "optimizer_nvme": 0.45, "resident_layers": 0.0}))
    assert plan.micro_batch == 32
    assert plan.optimizer_nvme == 16


def test_restricting_leaves_the_other_axes():
    model = load_model("llama-3.1-8b")
    space = full_space(model, WITH_DRIVE, Plan(model=model.name))
    narrow = space.restricted(recompute__keep=(0.0,), micro_batch=(2, 4))
    assert {a.name: a.values for a in narrow.axes} == {
        **{a.name: a.values for a in space.axes},
        "recompute.keep": (0.0,),
        "micro_batch": (2, 4),
    }


def test_without_a_drive_nothing_goes_to_it():
    model = load_model("llama-3.1-8b")
    space = full_space(model, WITHOUT, Plan(model=model.name))
    plan = space.plan(tuple(len(axis.values) - 1 for axis in space.axes))
    assert (plan.optimizer_nvme, plan.weights_nvme, plan.activations.nvme) == (0, 0, 0)


@pytest.mark.parametrize("name", ["gpt2", "qwen3-0.6b", "llama-3.1-8b", "mistral-large-123b", "gpt-oss-120b"])
def test_chunks_are_powers_of_two_that_cut_a_layer_in_a_few(name):
    model = load_model(name)
    sizes = chunk_sizes(model)
    assert len(sizes) >= 2
    assert all(math.log2(size).is_integer() and 4 * MIB <= size <= 512 * MIB for size in sizes)
    assert list(sizes) == sorted(set(sizes))


@pytest.mark.parametrize("batch", [None, 12])
def test_the_coarse_space_is_part_of_the_full_one_and_small(batch):
    model = load_model("llama-3.1-8b")
    base = Plan(model=model.name)
    full = {a.name: set(a.values) for a in full_space(model, WITH_DRIVE, base, batch).axes}
    coarse = coarse_space(model, WITH_DRIVE, base, batch)
    assert all(set(axis.values) <= full[axis.name] and axis.values for axis in coarse.axes)
    assert 10 < coarse.size <= 3000
