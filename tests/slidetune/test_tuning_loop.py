"""The tuning loop on machines that are known, because their runs are simulated."""

import pytest

from slidetune.builder import build
from slidetune.errors import SlidetuneError
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.simulator.predict import predict
from slidetune.traces.recorded import save_run
from slidetune.tuning_loop import Tuned, TuningLoop

from ..traces.runs import as_if_run

MODEL = load_model("qwen3-0.6b")
PROFILE = machine("rtx3060-12g")


class Simulated:
    """Runs plans on a machine that may differ from the one profiled."""

    def __init__(self, real=PROFILE, fails_from=99):
        self.real, self.plans, self.fails_from = real, [], fails_from

    def __call__(self, plan, kernels, profile, record):
        assert profile.exists()
        self.plans.append(plan)
        if len(self.plans) >= self.fails_from:
            return "exit code 1. out of memory"
        save_run(record, as_if_run(predict(build(MODEL, plan), self.real), plan), self.real, "profile")
        return ""


def loop(run, **request):
    return TuningLoop(MODEL, PROFILE, run, {"batch": 4, "trials": 15, **request})


def test_where_the_profile_was_right_one_run_is_enough():
    run = Simulated()
    tuning = loop(run)
    first = tuning.next_round()
    assert first.found.step.error == pytest.approx(0)
    assert first.lessons == ()
    assert tuning.next_round() is None
    assert len(run.plans) == 1
    assert tuning.result().best is first
    assert tuning.profile is PROFILE
    assert "the profile was right" in tuning.stopped


def test_rounds_learn_until_the_plan_stays_and_no_plan_runs_twice():
    real = PROFILE.scaled("host.dram_gbs", 0.25).scaled("link.h2d_gbs", 0.8)
    run = Simulated(real)
    tuning = loop(run)
    rounds = []
    while len(rounds) < 8 and (one := tuning.next_round()) is not None:
        rounds.append(one)
    assert abs(rounds[0].found.step.error) > 0.1
    assert rounds[0].lessons
    assert len(set(run.plans)) == len(run.plans) == len(rounds)
    # What the loop ends with predicts the machine: the plan it would choose takes what it says.
    last = rounds[-1].plan
    foreseen, true = (predict(build(MODEL, last), profile).step_s for profile in (tuning.profile, real))
    assert foreseen == pytest.approx(true, rel=0.02)
    assert "again" in tuning.stopped or "was right" in tuning.stopped


def test_the_best_plan_measured_is_kept_whatever_was_predicted():
    tuning = loop(Simulated())
    first = tuning.next_round()
    slower = type(first)(2, first.planned, slowed(first.found, 1.5), ())
    assert Tuned([first, slower], PROFILE, "", "throughput").best is first
    assert Tuned([slower, first], PROFILE, "", "throughput").best is first
    # Within a tenth of the best, another objective decides; here both are alike, and the first stays.
    near = type(first)(2, first.planned, slowed(first.found, 1.05), ())
    assert Tuned([near, first], PROFILE, "", "ram").best is near
    assert Tuned([near, first], PROFILE, "", "nvme-writes").best is near
    as_dict = Tuned([first, slower], PROFILE, "done", "throughput").as_dict()
    assert as_dict["best_round"] == 1
    assert [one["round"] for one in as_dict["rounds"]] == [1, 2]


def test_a_first_plan_that_cannot_be_run_is_an_error():
    with pytest.raises(SlidetuneError, match="out of memory"):
        loop(Simulated(fails_from=1)).next_round()


def test_a_later_one_ends_the_loop_with_what_there_is():
    tuning = loop(Simulated(PROFILE.scaled("host.dram_gbs", 0.25).scaled("link.h2d_gbs", 0.6), fails_from=2))
    while tuning.next_round() is not None:
        pass
    assert len(tuning.rounds) == 1
    assert tuning.result().best is tuning.rounds[0]
    assert tuning.stopped


def slowed(found, factor):
    """The same validation with a longer measured step."""
    import dataclasses

    from slidetune.traces.validation import Beside

    return dataclasses.replace(found, step=Beside(found.step.predicted, factor * found.step.measured))
