"""Every sentence about a knob is a comparison that anyone can make again."""

import pytest

from slidetune.plans import knobs
from slidetune.schedule import TIERS
from slidetune.tuner.reasons import neighbours, reasons
from slidetune.units import format_bytes

from .small_spaces import MACHINES, an_evaluator, small_space, whole_space

KNOBS = {"spare_slots": "window"}


def a_feasible_point(space, evaluator):
    return next(point for point in space.points() if evaluator.fits(space.plan(point)))


@pytest.mark.parametrize("name", MACHINES)
def test_neighbours_change_one_axis(name):
    evaluator = an_evaluator("llama-3.2-1b", name)
    space = whole_space(evaluator)
    point = space.point({"micro_batch": 4, "optimizer_nvme": 0.5})
    found = neighbours(space, point)
    assert set(found) == {axis.name for axis in space.axes}
    for i, axis in enumerate(space.axes):
        beside = [(*point[:i], j, *point[i + 1 :]) for j in (point[i] - 1, point[i] + 1) if 0 <= j < len(axis.values)]
        assert found[axis.name] == [p for p in map(space.plan, beside) if p != space.plan(point)]
    assert len(found["micro_batch"]) == 2


@pytest.mark.parametrize("name", MACHINES)
def test_every_sentence_can_be_checked(name):
    evaluator = an_evaluator("llama-3.2-1b", name)
    space = small_space(evaluator)
    point = a_feasible_point(space, evaluator)
    chosen, worth = space.plan(point), evaluator.worth(space.plan(point))
    texts = reasons(space, evaluator, point)
    assert set(texts) <= set(knobs(chosen))
    for axis, plans in neighbours(space, point).items():
        knob = KNOBS.get(axis, axis)
        assert (knob in texts) == bool(plans)
        for plan in plans:
            said = next(p for p in texts[knob].rstrip(".").split("; ") if p.startswith(f"{knobs(plan)[knob]} "))
            if not evaluator.fits(plan):
                lacking = {t: evaluator.needs(plan)[t] - evaluator.capacity[t] for t in TIERS}
                assert any(format_bytes(lacks) in said for lacks in lacking.values() if lacks > 0)
            elif plan.batch != chosen.batch:
                gain = evaluator.worth(plan).tokens_per_s / worth.tokens_per_s - 1
                assert f"{gain:+.1%} tokens/s at {plan.batch} sequences" in said
            else:
                slower = evaluator.worth(plan).step_s / worth.step_s - 1
                word = "slower" if slower > 0.0005 else "faster"
                assert ("no faster" in said) == (abs(slower) <= 0.0005)
                assert "no faster" in said or f"{abs(slower):.1%} {word}" in said


def test_a_value_that_is_a_size_is_written_as_one():
    evaluator = an_evaluator()
    space = whole_space(evaluator)
    text = reasons(space, evaluator, space.point({"micro_batch": 2}))["chunk_bytes"]
    assert "MiB" in text.split()[1]
