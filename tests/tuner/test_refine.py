"""Plans around one, by whole layers."""

from __future__ import annotations

from hypothesis import given, settings

from slidetune.plans import problems
from slidetune.tuner.refine import refined
from slidetune.tuner.search import search
from slidetune.tuner.space import full_space
from slidetune.tuner.workers import Workers
from tests.strategies import models_and_plans
from tests.tuner.small_spaces import an_evaluator, small_space


@given(models_and_plans(max_layers=8))
@settings(max_examples=60, deadline=None)
def test_all_are_valid_and_others(case):
    model, plan = case
    found = refined(plan, full_space(model, an_evaluator().profile, plan), model)
    assert plan not in found
    assert len(found) == len(set(found))
    assert not any(problems(each, model) for each in found)


def test_what_the_space_holds_fast_stays():
    evaluator = an_evaluator()
    space = small_space(evaluator).restricted(recompute__keep=(0.0,))
    plan = space.plan((0,) * len(space.axes))
    found = refined(plan, space, evaluator.model)
    assert found
    assert {each.recompute for each in found} == {plan.recompute}
    assert {each.late_updates for each in found} == {plan.late_updates}
    assert max(each.resident_layers for each in found) <= len(evaluator.model.layers) // 2


def test_a_search_ends_where_no_plan_around_is_faster():
    evaluator = an_evaluator()
    space = small_space(evaluator)
    with Workers(evaluator, 1) as workers:
        found = search(space, evaluator, workers, trials=40)
    around = [plan for plan in refined(found.plan, space, evaluator.model) if evaluator.fits(plan)]
    assert around
    best = max(evaluator.worth(plan).tokens_per_s for plan in around)
    # Of plans as fast as each other another virtue may decide.
    assert best <= found.worth.tokens_per_s * 1.0025
