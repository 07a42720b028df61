"""The interval is what the step takes when uncertain figures are moved to the ends of their spread."""

import dataclasses
import math

import pytest
from hypothesis import given, settings

from slidetune.hardware import RELATIVE_SPREAD
from slidetune.plans import Plan
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.sensitivity import interval

from ..strategies import machines, models_and_plans
from .small_spaces import alone, an_evaluator


def of(evaluator, plan):
    return interval(plan, evaluator.profile, evaluator.worth(plan).step_s, alone(evaluator))


def with_all(profile, kind):
    for path, figure in profile.figures():
        profile = profile.replaced(path, dataclasses.replace(figure, kind=kind))
    return profile


@given(models_and_plans(max_layers=2), machines())
@settings(max_examples=15, deadline=None)
def test_the_step_lies_inside_and_effects_add_up_in_quadrature(case, profile):
    model, plan = case
    evaluator = Evaluator(model, profile)
    step_s, found = evaluator.worth(plan).step_s, of(evaluator, plan)
    assert 0 <= found.low_s <= step_s <= found.high_s
    assert found.high_s - step_s == pytest.approx(math.hypot(*(e.slower_s for e in found.effects)))
    assert [e.slower_s for e in found.effects] == sorted((e.slower_s for e in found.effects), reverse=True)
    figures = dict(profile.figures())
    for effect in found.effects:
        assert effect.spread == RELATIVE_SPREAD[figures[effect.figure].kind] > 0
        assert effect.kind == figures[effect.figure].kind
    assert set(found.guessed) == {e for e in found.effects if e.kind == "guess"}


def test_an_effect_is_a_simulation_of_the_changed_machine():
    evaluator = an_evaluator()
    plan = Plan(model="qwen3-0.6b", micro_batch=8)
    effect = next(e for e in of(evaluator, plan).effects if e.figure == "gpu.bf16_tflops")
    step_s = evaluator.worth(plan).step_s
    slower, faster = (
        Evaluator(evaluator.model, evaluator.profile.scaled("gpu.bf16_tflops", factor)).worth(plan).step_s
        for factor in (0.95, 1.05)
    )
    assert (effect.slower_s, effect.faster_s) == pytest.approx((slower - step_s, step_s - faster))
    assert effect.slower_s > 0


def test_what_is_given_leaves_no_doubt_and_guesses_leave_more_than_measurements():
    plan = Plan(model="qwen3-0.6b", micro_batch=2)
    widths = {}
    for kind in ("given", "measured", "guess"):
        here = an_evaluator()
        evaluator = Evaluator(here.model, with_all(here.profile, kind))
        found = of(evaluator, plan)
        widths[kind] = found.high_s - found.low_s
        assert bool(found.guessed) == (kind == "guess")
    assert widths["given"] == 0
    assert 0 < widths["measured"] < widths["guess"]


def test_sizes_decide_only_whether_a_plan_fits():
    found = of(an_evaluator(), Plan(model="qwen3-0.6b", micro_batch=2))
    assert not {e.figure for e in found.effects} & {"gpu.memory_gib", "gpu.context_gib", "host.ram_gib"}
