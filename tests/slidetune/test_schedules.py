"""Schedules of the learning rate: their bounds, ends and shapes, and transformers' beside them."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.schedules import KINDS, decay_steps, factor, problems


@st.composite
def schedules(draw, kinds=KINDS, max_total=400):
    """The arguments of any sound schedule: kind, total, and the rest by name."""
    kind = draw(st.sampled_from(kinds))
    total = draw(st.integers(1, max_total))
    share = draw(st.floats(0, 1, exclude_min=True))
    room = total - decay_steps(total, share) if kind == "wsd" else total
    return kind, total, {"warm_up": draw(st.integers(0, room)), "decay_share": share}


def factors(case):
    """Of every step, the first at 0."""
    kind, total, how = case
    return [factor(kind, step, total, **how) for step in range(1, total + 1)]


@given(schedules())
def test_factors_are_above_0_and_at_most_1(case):
    assert all(0 < value <= 1 for value in factors(case))


@given(schedules())
def test_it_rises_in_equal_parts_to_1_and_never_after(case):
    values, warm_up = factors(case), case[2]["warm_up"]
    assert values[:warm_up] == [step / warm_up for step in range(1, warm_up + 1)]
    after = values[max(0, warm_up - 1) :]
    assert after[0] == 1.0
    assert after == sorted(after, reverse=True)


@given(schedules())
def test_the_step_after_the_warm_up_goes_on_where_it_ended(case):
    values, warm_up = factors(case), case[2]["warm_up"]
    assert values[warm_up : warm_up + 1] in ([1.0], [])


@given(schedules(), st.floats(0, 1, exclude_min=True))
def test_only_wsd_looks_at_the_share(case, share):
    kind, total, how = case
    if kind != "wsd":
        assert factors(case) == factors((kind, total, how | {"decay_share": share}))


@given(schedules())
def test_the_last_steps_value(case):
    kind, total, how = case
    decay = decay_steps(total, how["decay_share"]) if kind == "wsd" else total - how["warm_up"]
    last = {
        "constant": lambda: 1.0,
        "linear": lambda: 1 / decay,
        "cosine": lambda: math.sin(math.pi / 2 / decay) ** 2,
        "wsd": lambda: 1 - math.sqrt(1 - 1 / decay),
    }
    # A warm-up of all steps leaves no decay, and ends at 1.
    assert factors(case)[-1] == pytest.approx(last[kind]() if decay else 1.0)


@given(schedules(kinds=("wsd",)))
def test_wsd_is_flat_between_its_warm_up_and_its_decay(case):
    _, total, how = case
    values, decay = factors(case), decay_steps(total, how["decay_share"])
    flat = values[how["warm_up"] : total - decay + 1]
    assert set(flat) == {1.0}
    assert all(value < 1 for value in values[total - decay + 1 :])


@given(schedules(kinds=("linear", "cosine"), max_total=3000))
def test_decays_have_no_jump(case):
    values, warm_up = factors(case), case[2]["warm_up"]
    steepest = math.pi / 2 / max(1, len(values) - warm_up)
    decay = values[warm_up:]
    assert all(a - b <= steepest + 1e-12 for a, b in pairwise(decay))


def test_by_hand():
    assert factors(("linear", 6, {"warm_up": 2})) == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert factors(("cosine", 4, {})) == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert factors(("wsd", 8, {"warm_up": 2, "decay_share": 0.5})) == pytest.approx(
        [0.5, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    )


@given(schedules())
@settings(deadline=None)  # the first example imports torch
def test_after_the_warm_up_they_are_those_of_transformers(case):
    optimization = pytest.importorskip("transformers.optimization")
    torch = pytest.importorskip("torch")
    kind, total, how = case
    warm_up, decay = how["warm_up"], decay_steps(total, how["decay_share"])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = {
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warm_up),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warm_up, total),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warm_up, total),
        "wsd": lambda: optimization.get_wsd_schedule(
            optimizer, warm_up, decay, num_training_steps=total, decay_type="1-sqrt"
        ),
    }[kind]().lr_lambdas[0]
    assert factors(case)[warm_up:] == pytest.approx([theirs(step) for step in range(warm_up, total)])


@pytest.mark.parametrize(
    ("kind", "total", "how", "part"),
    [
        ("cosin", 10, {}, "schedule is 'cosin'; allowed: constant, linear, cosine, wsd"),
        ("linear", 0, {}, "steps must be at least 1, not 0"),
        ("linear", 10, {"warm_up": -1}, "warm_up_steps must be at least 0"),
        ("linear", 10, {"warm_up": 11}, r"warm_up_steps \(11\) exceeds the 10 steps"),
        ("wsd", 10, {"decay_share": 0.0}, "decay_share must be above 0"),
        ("wsd", 10, {"decay_share": math.nan}, "decay_share must be above 0"),
        ("wsd", 10, {"decay_share": 1.1}, "at most 1, not 1.1"),
        ("wsd", 10, {"warm_up": 9, "decay_share": 0.2}, "decay's 2 steps"),
    ],
)
def test_what_is_no_schedule(kind, total, how, part):
    with pytest.raises(ValueError, match=part):
        factor(kind, 1, total, **how)


def test_faults_come_together():
    assert len(problems("wsd", 0, warm_up=-1, decay_share=2.0)) == 3


@pytest.mark.parametrize("step", [0, -1, 11])
def test_steps_out_of_range(step):
    with pytest.raises(ValueError, match="step must be from 1 to 10"):
        factor("constant", step, 10)
