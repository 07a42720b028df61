"""Of plans about as fast as each other, the one that a slower host harms least."""

from __future__ import annotations

import pytest

from slidetune.tuner.drift import DRIFT, Steadiness, drifted
from slidetune.tuner.search import search
from slidetune.tuner.workers import Workers
from tests.tuner.small_spaces import an_evaluator, small_space


def test_a_drifted_machine_has_slower_cores_and_ram_and_is_else_the_same():
    profile = an_evaluator().profile
    slower = drifted(profile)
    assert slower.host.dram_bytes_per_s == pytest.approx((1 - DRIFT) * profile.host.dram_bytes_per_s)
    changed = {
        name
        for (name, was), (_, now) in zip(profile.figures(), slower.figures(), strict=True)
        if float(was) != float(now)
    }
    assert changed == {"host.adam_gparams_per_core", "host.dram_efficiency"}


def test_the_plan_chosen_is_the_steadiest_of_the_fast_ones():
    evaluator = an_evaluator()
    with Workers(evaluator, 1) as workers:
        found = search(small_space(evaluator), evaluator, workers, trials=40)
    alike = [t for t in found.trials if t.worth and t.plan.batch == found.plan.batch]
    fastest = max(trial.worth.tokens_per_s for trial in alike)
    assert found.worth.tokens_per_s >= 0.98 * fastest
    steadiness = Steadiness(evaluator)
    fast = [t for t in alike if t.worth.tokens_per_s >= 0.995 * fastest]
    least = min(steadiness.mean_step_s(trial.plan) for trial in fast)
    assert steadiness.mean_step_s(found.plan) <= 1.005 * least
    slower = steadiness.slower.worth(found.plan).step_s
    assert slower >= found.worth.step_s
