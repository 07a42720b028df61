"""Fluid sharing against shares worked out by hand, and against what makes a sharing max-min fair."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.simulator.sharing import ADAM, DOWNLOAD, UPLOAD, Demand, fair_speeds


def on(weight=1.0, role="", duplex_weight=None, **shares):
    return Demand(tuple(shares.items()), weight, role, duplex_weight)


# --- by hand


def test_a_task_alone_runs_at_its_top_speed():
    assert fair_speeds([on(dram=0.7)]) == [1.0]


def test_a_task_that_asks_for_more_than_there_is_runs_at_what_there_is():
    assert fair_speeds([on(dram=4.0)]) == pytest.approx([0.25])


def test_a_task_that_shares_nothing_is_held_back_by_nothing():
    assert fair_speeds([Demand(()), on(dram=2.0)]) == pytest.approx([1.0, 0.5])


def test_two_equal_tasks_halve_a_resource_that_each_could_fill():
    assert fair_speeds([on(dram=1.0), on(dram=1.0)]) == pytest.approx([0.5, 0.5])


def test_two_tasks_that_fit_together_both_run_at_top_speed():
    assert fair_speeds([on(dram=0.4), on(dram=0.6)]) == pytest.approx([1.0, 1.0])


def test_equal_speeds_not_equal_shares():
    # 1.0 v + 0.25 v = 1.
    assert fair_speeds([on(dram=1.0), on(dram=0.25)]) == pytest.approx([0.8, 0.8])


def test_weights_set_the_ratio_of_speeds():
    # v + 3 v = 1.
    assert fair_speeds([on(dram=1.0), on(dram=1.0, weight=3.0)]) == pytest.approx([0.25, 0.75])


def test_what_one_task_at_its_top_speed_leaves_the_other_gets():
    # At weights 1 and 3 the second reaches its top speed when the first is at a third; 0.8 are left for that.
    assert fair_speeds([on(dram=1.0), on(dram=0.2, weight=3.0)]) == pytest.approx([0.8, 1.0])


def test_three_tasks_on_a_chain_of_two_resources():
    # The link is full first, at half speed of a and b; c then takes what b leaves of the DRAM.
    a, b, c = on(link=1.0), on(link=1.0, dram=0.8), on(dram=1.0)
    assert fair_speeds([a, b, c]) == pytest.approx([0.5, 0.5, 0.6])


def test_three_tasks_of_three_weights():
    # 1 v + 2 v + 5 v = 1.
    speeds = fair_speeds([on(dram=1.0), on(dram=1.0, weight=2.0), on(dram=1.0, weight=5.0)])
    assert speeds == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_adam_between_two_transfers():
    # DRAM: 1.0 v + 0.3 v + 0.4 v = 1; the link, with 0.55 each, isn't full before that.
    speeds = fair_speeds([on(dram=1.0), on(dram=0.3, link=0.55), on(dram=0.4, link=0.55)])
    assert speeds == pytest.approx([1 / 1.7] * 3)


def test_a_given_capacity_replaces_one():
    assert fair_speeds([on(dram=1.0), on(dram=1.0)], {"dram": 1.5, "unused": 0.1}) == pytest.approx([0.75, 0.75])


def test_copies_have_another_say_where_copies_run_the_other_way_too():
    adam = on(dram=1.0, role=ADAM)
    up = on(dram=1.0, weight=3.0, role=UPLOAD, duplex_weight=1.0)
    down = on(dram=1.0, weight=7.0, role=DOWNLOAD, duplex_weight=2.0)
    assert fair_speeds([adam, up]) == pytest.approx([1 / 4, 3 / 4])
    assert fair_speeds([adam, up, up]) == pytest.approx([1 / 7, 3 / 7, 3 / 7])
    assert fair_speeds([adam, down]) == pytest.approx([1 / 8, 7 / 8])
    assert fair_speeds([adam, up, down]) == pytest.approx([1 / 4, 1 / 4, 2 / 4])


def test_without_adam_the_link_favours_neither_way():
    up = on(link=0.6, weight=3.0, role=UPLOAD, duplex_weight=1.0)
    down = on(link=0.6, weight=7.0, role=DOWNLOAD, duplex_weight=2.0)
    assert fair_speeds([up, down]) == pytest.approx([1 / 1.2] * 2)
    # Beside a drive, of weight 1, both have the lesser say.
    drive, up, down = on(dram=1.0), on(2.0, UPLOAD, 3.0, dram=1.0), on(2.0, DOWNLOAD, 4.0, dram=1.0)
    assert fair_speeds([drive, up, down]) == pytest.approx([1 / 7, 3 / 7, 3 / 7])


def test_a_copy_without_a_say_both_ways_keeps_its_own():
    adam, up, down = on(role=ADAM, dram=1.0), on(2.0, UPLOAD, dram=1.0), on(5.0, DOWNLOAD, dram=1.0)
    assert fair_speeds([adam, up, down]) == pytest.approx([1 / 8, 2 / 8, 5 / 8])


def test_nobody_runs():
    assert fair_speeds([]) == []


# --- any mix

RESOURCES = ("up", "down", "link", "dram", "cores")

demands = st.builds(
    Demand,
    st.dictionaries(st.sampled_from(RESOURCES), st.floats(0.01, 3.0), max_size=4).map(lambda d: tuple(d.items())),
    st.floats(0.1, 20.0),
    st.sampled_from(("", ADAM, UPLOAD, DOWNLOAD)),
    st.none() | st.floats(0.1, 20.0),
)
mixes = st.lists(demands, min_size=1, max_size=6)


def use(mix, speeds):
    return {
        name: sum(share * speed for d, speed in zip(mix, speeds, strict=True) for r, share in d.shares if r == name)
        for name in RESOURCES
    }


def weights(mix):
    roles = {d.role for d in mix}
    if not (UPLOAD in roles and DOWNLOAD in roles):
        return [d.weight for d in mix]
    say = [d.duplex_weight or d.weight for d in mix]
    least = min(w for w, d in zip(say, mix, strict=True) if d.role in (UPLOAD, DOWNLOAD))
    return [least if ADAM not in roles and d.role in (UPLOAD, DOWNLOAD) else w for w, d in zip(say, mix, strict=True)]


@settings(max_examples=300, deadline=None)
@given(mixes)
def test_speeds_are_positive_and_never_above_top_speed(mix):
    assert all(0.0 < speed <= 1.0 for speed in fair_speeds(mix))


@settings(max_examples=300, deadline=None)
@given(mixes)
def test_no_resource_gives_more_than_it_has(mix):
    assert max(use(mix, fair_speeds(mix)).values()) <= 1.0 + 1e-9


@settings(max_examples=300, deadline=None)
@given(mixes)
def test_sharing_is_max_min_fair(mix):
    """A task below its top speed uses a full resource on which no task runs at a higher level: going faster, it
    would slow one that has, by weight, no more than itself (Bertsekas and Gallager's bottleneck condition)."""
    speeds = fair_speeds(mix)
    used = use(mix, speeds)
    level = [speed / weight for speed, weight in zip(speeds, weights(mix), strict=True)]
    for i, demand in enumerate(mix):
        if speeds[i] >= 1.0 - 1e-9:
            continue
        held_by = [
            name
            for name, _ in demand.shares
            if used[name] >= 1.0 - 1e-9
            and all(level[i] >= level[j] * (1 - 1e-9) for j, other in enumerate(mix) if name in dict(other.shares))
        ]
        assert held_by, (demand, speeds, used)


@settings(max_examples=100, deadline=None)
@given(mixes, st.randoms(use_true_random=False))
def test_the_order_of_tasks_does_not_matter(mix, random):
    order = list(range(len(mix)))
    random.shuffle(order)
    speeds = fair_speeds(mix)
    assert fair_speeds([mix[i] for i in order]) == pytest.approx([speeds[i] for i in order])


@settings(max_examples=100, deadline=None)
@given(mixes, st.sampled_from(RESOURCES), st.floats(1.0, 4.0))
def test_more_of_a_resource_never_lowers_the_slowest_level(mix, name, capacity):
    """Single tasks may lose where a resource grows; the worst off never does: that is what max-min means."""

    def lowest(speeds):
        return min(min(s / w, 1.0 / w) for s, w in zip(speeds, weights(mix), strict=True))

    before, after = fair_speeds(mix), fair_speeds(mix, {name: capacity})
    assert lowest(after) >= lowest(before) * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(mixes, st.floats(0.1, 20.0))
def test_copies_of_one_say_both_ways_share_as_tasks_of_that_weight(mix, weight):
    """With one weight for both ways the roles are no more than that weight: who runs beside them doesn't matter."""
    copies = [
        Demand((("up", 1.0), ("dram", 0.5)), 3.0, UPLOAD, weight),
        Demand((("dram", 0.7),), 7.0, DOWNLOAD, weight),
    ]
    others = [Demand(d.shares, d.weight, ADAM if d.role == ADAM else "") for d in mix]
    plain = [Demand(d.shares, weight) for d in copies] + [Demand(d.shares, d.weight) for d in mix]
    assert fair_speeds(copies + others) == pytest.approx(fair_speeds(plain))


@settings(max_examples=50, deadline=None)
@given(mixes, st.floats(1.0, 1e6))
def test_kernels_of_a_task_change_no_share(mix, kernels_per_s):
    with_kernels = [dataclasses.replace(d, kernels_per_s=kernels_per_s) for d in mix]
    assert fair_speeds(with_kernels) == fair_speeds(mix)
