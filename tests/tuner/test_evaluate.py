"""Whether a plan fits is the arithmetic of its buffers; what it is worth is one simulation."""

import pytest
from hypothesis import given, settings

from slidetune import buffers
from slidetune.plans import Plan
from slidetune.schedule import TIERS
from slidetune.simulator.engine import simulate
from slidetune.simulator.pricing import PriceList
from slidetune.tuner.evaluate import Evaluator

from ..strategies import machines, models_and_plans, small_model
from .small_spaces import alone, an_evaluator


@given(models_and_plans(), machines())
@settings(max_examples=60)
def test_overflow_is_what_buffers_need_beyond_what_there_is(case, profile):
    model, plan = case
    evaluator = Evaluator(model, profile)
    needs = buffers.peak_bytes(model, plan, profile.gpu.kernels)
    over = evaluator.overflow(plan)
    for tier in TIERS:
        size = profile.capacity_bytes(tier)
        assert over[tier] * max(size, 1) == pytest.approx(needs[tier] - size)
        assert (over[tier] <= 0) == (needs[tier] <= size)
    assert evaluator.fits(plan) == all(needs[tier] <= profile.capacity_bytes(tier) for tier in TIERS)
    assert evaluator.needs(plan) == needs


@given(models_and_plans(max_layers=3))
@settings(max_examples=30, deadline=None)
def test_what_arithmetic_says_is_what_the_schedule_holds(case):
    model, plan = case
    evaluator = an_evaluator()
    evaluator = Evaluator(model, evaluator.profile)
    schedule = evaluator.schedule(plan)
    exact = {tier: schedule.peak_bytes(tier) for tier in TIERS}
    # Kept activations are bounded as if all of them were there together.
    assert all(evaluator.needs(plan)[tier] >= exact[tier] for tier in TIERS)
    assert plan.recompute.keep or evaluator.needs(plan) == exact


def test_a_tier_that_is_full_to_the_byte_is_enough():
    evaluator = an_evaluator()
    plan = Plan(model=evaluator.model.name)
    evaluator.capacity = evaluator.needs(plan)
    assert evaluator.fits(plan)
    evaluator.capacity = evaluator.capacity | {"ram": evaluator.needs(plan)["ram"] - 1}
    assert not evaluator.fits(plan)
    assert evaluator.overflow(plan)["ram"] > 0


def test_worth_is_the_simulated_step():
    model = small_model()
    evaluator = Evaluator(model, an_evaluator().profile)
    plan = Plan(model=model.name, micro_batch=2, accumulation=3, optimizer_nvme=2)
    worth = evaluator.worth(plan)
    schedule = evaluator.schedule(plan)
    assert worth.step_s == simulate(schedule, PriceList(evaluator.profile)).step_s
    assert worth.tokens_per_s * worth.step_s == pytest.approx(6 * 1024)
    assert worth.ram_bytes == evaluator.needs(plan)["ram"]
    # Ten bytes a parameter of two layers go back to the drive.
    assert worth.nvme_written_bytes_per_token * plan.tokens == pytest.approx(2 * 10 * model.layers[0].params)
    assert worth.tasks == len(schedule.tasks)


def test_each_plan_is_simulated_once(monkeypatch):
    evaluator = an_evaluator()
    plans = [Plan(model=evaluator.model.name, micro_batch=n) for n in (1, 2, 1, 4, 2)]
    simulated = []
    reckon = Evaluator.simulate
    monkeypatch.setattr(Evaluator, "simulate", lambda self, plan: simulated.append(plan) or reckon(self, plan))
    worths = evaluator.worths(plans, alone(evaluator))
    assert [w.tokens_per_s * w.step_s for w in worths] == pytest.approx([1024 * n for n in (1, 2, 1, 4, 2)])
    assert evaluator.worth(plans[0]) is worths[0]
    assert sorted(p.micro_batch for p in simulated) == [1, 2, 4]
    assert evaluator.simulated == 3
    assert evaluator.tasks == sum(w.tasks for w in {id(w): w for w in worths}.values())
