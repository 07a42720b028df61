"""Expert plans fit, and "nothing fits" is said only when nothing does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.heuristics import smallest, starting_points
from slidetune.tuner.space import full_space

from ..strategies import MODEL_KINDS, small_model
from .small_spaces import MACHINES, an_evaluator, whole_space


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b", "qwen3-30b-a3b"])
def test_starting_points_fit_and_differ(name, model):
    evaluator = an_evaluator(model, name)
    space = whole_space(evaluator)
    found = list(starting_points(space, evaluator))
    assert len(found) >= 3
    assert len(set(found)) == len(found)
    assert all(evaluator.fits(space.plan(point)) for point in found)


def test_the_first_uses_no_tier_it_need_not():
    for model, drive in (("llama-3.2-1b", False), ("llama-3.1-70b", True)):
        evaluator = an_evaluator(model)
        space = whole_space(evaluator)
        plan = space.plan(next(starting_points(space, evaluator)))
        assert (plan.optimizer_nvme > 0) == drive
        assert plan.activations.nvme == 0


def test_spare_gpu_memory_is_put_to_use():
    evaluator = an_evaluator("llama-3.2-1b", "server")
    space = whole_space(evaluator)
    plans = [space.plan(point) for point in starting_points(space, evaluator)]
    assert any(plan.resident_layers == 16 for plan in plans)
    assert any(plan.recompute.keep > 0 for plan in plans)
    assert any(plan.activations.gpu > 0 for plan in plans)


def test_a_model_that_fits_only_on_the_gpu_fits():
    # Its state is 48 GiB: too much for this RAM, and there is no drive, but the GPU has 80.
    evaluator = Evaluator(load_model("qwen3-4b"), machine("h100-sxm", "server", ram_gib=32, nvme=None))
    space = whole_space(evaluator)
    assert evaluator.fits(space.plan(smallest(space, evaluator)))
    plans = [space.plan(point) for point in starting_points(space, evaluator)]
    assert plans
    assert all(evaluator.fits(plan) and plan.resident_layers > 0 for plan in plans)


def test_where_nothing_fits_nothing_is_proposed_and_the_least_overflow_is_named():
    evaluator = Evaluator(load_model("llama-3.1-70b"), machine("rtx4090", nvme=None))
    space = whole_space(evaluator)
    assert list(starting_points(space, evaluator)) == []
    over = evaluator.overflow(space.plan(smallest(space, evaluator)))
    # What could be done about it is RAM alone: no layers are on a GPU that can't hold them.
    assert over["gpu"] <= 0 < over["ram"]


@st.composite
def just_enough(draw: st.DrawFn):
    """A plan of a space, and a machine that holds that plan and a little more."""
    model = small_model(draw(st.sampled_from(MODEL_KINDS)), draw(st.integers(8, 24)))
    profile = machine("rtx4090", "desktop", nvme=draw(st.sampled_from((None, "1TB:3/3"))))
    space = full_space(model, profile, Plan(model=model.name, seq_len=512), draw(st.sampled_from((None, 6, 16))))
    # Inputs are all in one place: those in two are not among what `smallest` tries.
    ends = {axis.name: (0, len(axis.values) - 1) for axis in space.axes if axis.name.startswith("activations")}
    plan = space.plan(
        tuple(
            draw(st.sampled_from(ends[axis.name]) if axis.name in ends else st.integers(0, len(axis.values) - 1))
            for axis in space.axes
        )
    )
    evaluator = Evaluator(model, profile)
    evaluator.capacity = {tier: int(1.02 * size) for tier, size in evaluator.needs(plan).items()}
    return evaluator, space


@given(just_enough())
@settings(max_examples=100, deadline=None)
def test_if_any_point_fits_the_smallest_does(case):
    evaluator, space = case
    assert evaluator.fits(space.plan(smallest(space, evaluator)))
    # And the study has something to begin with.
    assert evaluator.fits(space.plan(next(starting_points(space, evaluator))))
