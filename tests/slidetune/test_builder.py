"""A step does what model and plan imply, once, in an order in which nothing is read too early or overwritten too
soon: for any sound plan.

Orders are proven on two steps written out: one task is *before* another when a chain of dependencies and lane
orders leads from its end to the other's start, whatever the durations.
"""

import dataclasses
from collections import defaultdict
from itertools import pairwise, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.builder import build, build_forward, distinct_rows
from slidetune.errors import SlidetuneError
from slidetune.models import load_model
from slidetune.plans import Activations, Plan, Recompute, late_units, place_layers
from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, LANES, NVME_READ, NVME_WRITE, TIERS

from ..strategies import models_and_plans, small_model

any_step = given(models_and_plans(max_layers=7))
many = settings(max_examples=80, deadline=None)


class Orders:
    """Which task of two successive steps ends before which one starts."""

    def __init__(self, schedule):
        self.schedule, self.count = schedule, len(schedule.tasks)
        self._before = []
        last_on_lane = {}
        for step in (0, 1):
            for index, task in enumerate(schedule.tasks):
                direct = {step * self.count + dep for dep in task.after}
                direct |= {dep for dep in task.after_previous if step}
                if task.work.lane in last_on_lane:
                    direct.add(last_on_lane[task.work.lane])
                before = 0
                for dep in direct:
                    before |= self._before[dep] | 1 << dep
                self._before.append(before)
                last_on_lane[task.work.lane] = step * self.count + index

    def before(self, first, then, *, across=False):
        """Whether `first` ends before `then` of the same step starts, or, `across`, before that of the next."""
        return bool(self._before[self.count + then] >> (first + self.count * (not across)) & 1)


EMBEDDING_ADAM = ("adam rows", "adam other rows", "adam rest")


def tasks_by_op(schedule):
    """(op, unit) -> task indices in order."""
    found = defaultdict(list)
    for index, task in enumerate(schedule.tasks):
        found[task.work.op, task.unit].append(index)
    return found


def total(schedule, amount, *, op=None, lane=None, unit=None):
    return sum(
        getattr(task.work, amount)
        for task in schedule.tasks
        if op in (None, task.work.op) and lane in (None, task.work.lane) and unit in (None, task.unit)
    )


# --- conservation


def crossings(model, plan):
    """Per layer, how often its weights go up in a step: for both passes, but for what is still or stays there."""
    places = place_layers(plan, len(model.layers))
    sliding = [i for i, place in enumerate(places) if place.weights != "gpu"]
    still_there = sliding[-plan.window :]
    return [0 if p.resident else 1 if p.weights == "gpu" or i in still_there else 2 for i, p in enumerate(places)]


@many
@any_step
def test_link_bytes_are_what_model_and_plan_imply(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    places = place_layers(plan, len(model.layers))
    hidden, times = model.hidden_bytes(plan.micro_batch, plan.seq_len), plan.accumulation
    tokens = plan.micro_batch * plan.seq_len
    weights = sum(2 * unit.params * n for unit, n in zip(model.layers, crossings(model, plan), strict=True))
    # With the sum in a layer's middle, where that is saved too.
    moved_inputs = sum(1 + place.middle for place in places if place.saved_input != "gpu") * times * hidden
    inner = (
        times
        * tokens
        * sum(unit.eager.saved_bytes for unit, p in zip(model.layers, places, strict=True) if p.inner == "offload")
    )
    # Up go the rows of the embedding as each token reads them.
    rows = times * hidden
    head = 2 * model.head.weight_elements
    assert schedule.total("bytes", H2D) == weights + moved_inputs + inner + rows + head
    gradients = sum(2 * unit.params for unit, place in zip(model.layers, places, strict=True) if not place.resident)
    # Down comes their gradient: each row's, or where micro-batches are added up, each token's.
    if times == 1:
        rows = 2 * model.hidden_size * distinct_rows(tokens, model.vocab_size)
    assert schedule.total("bytes", D2H) == gradients + moved_inputs + inner + rows + head


@many
@any_step
def test_nvme_bytes_are_what_model_and_plan_imply(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    places = list(zip(model.layers, place_layers(plan, len(model.layers)), strict=True))
    # A whole layer's state comes and goes with its weights.
    state = sum(unit.params * (12 if p.weights == "nvme" else 10) for unit, p in places if p.optimizer == "nvme")
    inputs = plan.activations.nvme * plan.accumulation * model.hidden_bytes(plan.micro_batch, plan.seq_len)
    weights = sum(
        2 * unit.params * n for (unit, p), n in zip(places, crossings(model, plan), strict=True) if p.weights == "nvme"
    )
    assert schedule.total("bytes", NVME_READ) == state + inputs + weights
    assert schedule.total("bytes", NVME_WRITE) == state + inputs


@many
@any_step
def test_every_parameter_is_updated_exactly_once_and_where_it_lives(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    for unit in model.units[1:]:
        resident = unit.kind == "layer" and unit.index <= plan.resident_layers
        assert total(schedule, "params", op="adam", lane=GPU, unit=unit.index) == unit.params * resident
        assert total(schedule, "params", op="adam", lane=CPU_ADAM, unit=unit.index) == unit.params * (not resident)
    # The embedding in two parts, each of at least a row, since which rows a step reads is an expectation.
    embedding = sum(total(schedule, "params", op=op, lane=CPU_ADAM) for op in EMBEDDING_ADAM)
    assert 0 <= embedding - model.embedding.params <= model.hidden_size
    assert schedule.total("params") == embedding + sum(unit.params for unit in model.units[1:])


@many
@any_step
def test_flops_are_what_model_and_plan_imply(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    places = place_layers(plan, len(model.layers))
    again = {i + 1 for i, p in enumerate(places) if p.inner == "recompute"}
    with_products = {i + 1 for i, p in enumerate(places) if p.products}
    with_middle = {i + 1 for i, p in enumerate(places) if p.middle}
    for unit in model.units:
        forward, backward, recompute = (
            plan.accumulation * flops(plan.micro_batch, plan.seq_len)
            for flops in (unit.forward_flops, unit.backward_flops, unit.recompute_flops)
        )
        assert 0.5 * forward <= recompute <= forward
        if unit.index in with_middle:
            recompute -= 2.0 * unit.middle_elements * plan.tokens
        if unit.index in with_products:
            recompute -= 2.0 * unit.product_elements * plan.tokens
        expected = forward + backward + recompute * (unit.index in again)
        assert total(schedule, "flops", unit=unit.index) == pytest.approx(expected)
    assert schedule.total("flops") == schedule.total("flops", GPU)


@many
@any_step
def test_weights_cross_no_more_often_for_more_micro_batches(drawn):
    model, plan = drawn
    once = build(model, plan)
    thrice = build(model, dataclasses.replace(plan, accumulation=3 * plan.accumulation))
    for unit in model.units[1:]:
        for op in ("fetch", "store"):
            moved = total(once, "bytes", op=op, unit=unit.index)
            assert moved == total(thrice, "bytes", op=op, unit=unit.index)
    rows = total(once, "bytes", op="gather", unit=0)
    assert total(thrice, "bytes", op="gather", unit=0) == 3 * rows
    assert total(thrice, "bytes", op="store rows", unit=0) == 3 * rows
    assert total(once, "bytes", op="store rows", unit=0) <= rows * plan.accumulation


# --- order


@many
@any_step
def test_dependencies_point_backwards_and_lanes_are_known(drawn):
    schedule = build(*drawn)
    for index, task in enumerate(schedule.tasks):
        assert all(0 <= dep < index for dep in task.after)
        assert all(0 <= dep < len(schedule.tasks) for dep in task.after_previous)
        assert task.work.lane in LANES
        assert 0 <= task.unit < len(drawn[0].units)


@many
@any_step
def test_visits_are_one_a_layer_and_micro_batch_each_way(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    visits = schedule.visits
    assert visits[0] == 0
    assert all(a < b < len(schedule.tasks) for a, b in pairwise(visits))
    # Beside them the embedding's start and end, and the head.
    assert len(visits) == 2 * len(model.layers) * plan.accumulation + 3


@pytest.mark.parametrize("of", [build, build_forward])
@many
@any_step
def test_a_slot_is_taken_only_after_its_last_readers(of, drawn):
    """The holds of every slot, one after the other and into the next step: whoever takes it depends on those that
    had it last. No durations can make two of them meet."""
    schedule = of(*drawn)
    orders = Orders(schedule)
    of_slot = defaultdict(list)
    for hold in schedule.holds:
        assert 0 <= hold.slot < schedule.pools[hold.pool].slots
        assert hold.last
        assert all(task == hold.first or orders.before(hold.first, task) for task in hold.last)
        of_slot[hold.pool, hold.slot].append(hold)
    for holds in of_slot.values():
        holds.sort(key=lambda hold: hold.first)
        for hold, taker in pairwise(holds):
            assert all(orders.before(task, taker.first) for task in hold.last)
        assert all(orders.before(task, holds[0].first, across=True) for task in holds[-1].last)


@many
@any_step
def test_hidden_states_are_held_until_all_that_read_them_are_done(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    hidden = {i for i, pool in enumerate(schedule.pools) if pool.name in ("hidden states", "saved inputs")}
    until = {hold.first: hold.last for hold in schedule.holds if hold.pool in hidden}
    makers = ops["gather", 0]
    for unit, place in zip(model.layers, place_layers(plan, len(model.layers)), strict=True):
        i = unit.index
        again = ops["recompute", i] or ops["backward", i]
        for m, maker in enumerate(makers):
            readers = [ops["forward", i][m]]
            if place.saved_input == "gpu":
                readers += [again[m], ops["backward", i][m]]
            else:
                readers.append(ops["save", i][m])
                # The copy that comes back is the backward pass's.
                assert ops["backward", i][m] in until[ops["load", i][m]]
            assert all(reader in until[maker] or orders.before(reader, until[maker][-1]) for reader in readers)
        makers = ops["forward", i]
    # The head turns its input into a gradient in place; it comes down at last as that of the embedding's rows.
    assert all(store in until[maker] for maker, store in zip(makers, ops["store rows", 0], strict=True))


@many
@any_step
def test_every_task_that_computes_finds_its_inputs(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    places = place_layers(plan, len(model.layers))
    before = ops["gather", 0]
    for unit in model.layers:
        assert len(ops["forward", unit.index]) == plan.accumulation
        for m, task in enumerate(ops["forward", unit.index]):
            assert schedule.tasks[task].micro_batch == m
            assert orders.before(before[m], task)
            if not places[unit.index - 1].resident:
                assert orders.before(ops["fetch", unit.index][0], task)
        before = ops["forward", unit.index]
    head = model.head.index
    for m, task in enumerate(ops["head", head]):
        assert orders.before(before[m], task)
        assert orders.before(ops["fetch", head][0], task)
    before = ops["head", head]
    for unit, place in reversed(list(zip(model.layers, places, strict=True))):
        i = unit.index
        for m, task in enumerate(ops["backward", i]):
            # A recomputation begins with the weights and the input, else the backward pass does.
            start = ops["recompute", i][m] if place.inner == "recompute" else task
            assert orders.before(start, task) or start == task
            assert orders.before(before[m], task)
            if not place.resident:
                assert orders.before(ops["fetch", i][-1], start)
            if place.saved_input != "gpu":
                path = [ops["save", i][m], ops["load", i][m], task]
                if place.saved_input == "nvme":
                    path[1:1] = [ops["write input", i][m], ops["read input", i][m]]
                assert all(orders.before(a, b) for a, b in pairwise(path))
            if place.inner == "offload":
                path = [ops["forward", i][m], ops["save inner", i][m], ops["load inner", i][m], task]
                assert all(orders.before(a, b) for a, b in pairwise(path))
            if place.middle and place.saved_input != "gpu":
                path = [ops["forward", i][m], ops["save middle", i][m], ops["load middle", i][m], start]
                assert all(orders.before(a, b) for a, b in pairwise(path))
        before = ops["backward", i]
    for m, task in enumerate(ops["store rows", 0]):
        assert orders.before(before[m], task)


@many
@any_step
def test_a_gradient_leaves_when_all_micro_batches_have_added_to_it(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    for unit in model.units[1:]:
        made = ops["head" if unit.kind == "head" else "backward", unit.index]
        assert len(made) == plan.accumulation
        resident = unit.kind == "layer" and unit.index <= plan.resident_layers
        leaves = ops["adam" if resident else "store", unit.index]
        across = resident and plan.update == "forward"
        for task in leaves:
            assert all(orders.before(done, task, across=across) for done in made)


@many
@any_step
def test_adam_follows_the_gradient_or_waits_for_the_norm(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    stores = [i for i, task in enumerate(schedule.tasks) if task.work.op == "store"]
    backward = [i for i, task in enumerate(schedule.tasks) if task.work.op == "backward"]
    if plan.update == "forward":
        # The norm is known once every gradient is down, and those that stay on the GPU are there.
        for index, task in enumerate(schedule.tasks):
            if task.work.op.startswith("adam"):
                assert all(orders.before(done, index, across=True) for done in stores + backward)
        return
    late = late_units(plan, model)
    assert len(late) == plan.late_updates
    for unit in model.layers:
        for store, adam in zip(ops["store", unit.index], ops["adam", unit.index], strict=False):
            assert schedule.tasks[store].chunk == schedule.tasks[adam].chunk
            assert orders.before(store, adam, across=unit.index in late)
    last_of_head = ops["store", model.head.index][-1]
    for task in ops["adam", model.head.index]:
        assert orders.before(ops["store", model.head.index][schedule.tasks[task].chunk], task) or model.tied
        assert orders.before(last_of_head, task) or not model.tied
    # A tied matrix has two gradients: the head's is all that rows no token read will get.
    for task in ops["adam rest", 0]:
        assert orders.before(last_of_head if model.tied else ops["store rows", 0][-1], task, across=not model.tied)
    for task in ops["adam rows", 0] + ops["adam other rows", 0]:
        assert orders.before(ops["store rows", 0][-1], task, across=True)


@many
@any_step
def test_weights_are_read_after_their_update_and_not_overwritten_while_read(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    places = place_layers(plan, len(model.layers))
    for unit in model.units[1:]:
        deferred = unit.index in late_units(plan, model)
        if unit.kind == "layer" and places[unit.index - 1].resident:
            updates, reads = ops["adam", unit.index], ops["forward", unit.index] + ops["backward", unit.index]
        else:
            updates, reads = ops["adam", unit.index], ops["fetch", unit.index]
        if unit.kind == "head" and model.tied:
            # The embedding owns the matrix; its rows wait for their own gradient too.
            updates = updates + ops["adam rows", 0] + ops["adam other rows", 0]
            if plan.update == "backward":
                # Those of the rows that no token read are made in the step before.
                for update, read in product(ops["adam rest", 0], reads):
                    assert orders.before(update, read, across=True)
                    assert orders.before(read, update)
            else:
                updates += ops["adam rest", 0]
                assert not ops["adam other rows", 0]
        assert updates
        assert reads
        for update in updates:
            for read in reads:
                within = deferred or schedule.tasks[update].unit == 0
                assert orders.before(update, read, across=not within)
                assert orders.before(read, update, across=within)


@many
@any_step
def test_rows_are_gathered_after_their_update_and_not_while_others_are_updated(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    rows, rest = ops["adam rows", 0], ops["adam other rows", 0] + ops["adam rest", 0]
    assert bool(ops["adam other rows", 0]) == (model.tied and plan.update == "backward")
    for gather in ops["gather", 0]:
        assert all(orders.before(update, gather) for update in rows)
        assert all(orders.before(update, gather, across=True) for update in rest)
        assert all(orders.before(gather, update) for update in rest)


@many
@any_step
def test_state_on_nvme_is_read_updated_written_and_only_then_read_again(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    for unit, place in zip(model.layers, place_layers(plan, len(model.layers)), strict=True):
        reads, adams, writes = (ops[op, unit.index] for op in ("read state", "adam", "write state"))
        if place.optimizer != "nvme":
            assert not reads + writes
            continue
        for read, adam, write in zip(reads, adams, writes, strict=True):
            assert orders.before(read, adam)
            assert orders.before(adam, write)
            assert orders.before(write, read, across=True)
        if place.weights == "nvme":
            for read, fetch in zip(ops["read weights", unit.index], ops["fetch", unit.index], strict=True):
                assert orders.before(read, fetch)
                across = unit.index not in late_units(plan, model)
                assert all(orders.before(write, read, across=across) for write in writes)
                assert all(orders.before(read, write, across=not across) for write in writes)


@many
@any_step
def test_a_gradient_that_waits_for_its_update_is_not_overwritten(drawn):
    model, plan = drawn
    schedule = build(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    for unit in model.units[1:]:
        if unit.index in late_units(plan, model):
            for store in ops["store", unit.index]:
                assert all(orders.before(update, store) for update in ops["adam", unit.index])
    within = model.tied and plan.update == "backward"
    for store in ops["store rows", 0] + ops["store", model.head.index] * model.tied:
        for update in ops["adam rows", 0] + ops["adam other rows", 0]:
            assert orders.before(update, store)
        for update in ops["adam rest", 0]:
            assert orders.before(update, store, across=within)


# --- forward passes alone


@many
@any_step
def test_a_forward_pass_alone_only_brings_and_computes(drawn):
    model, plan = drawn
    schedule = build_forward(model, plan)
    ops = {task.work.op for task in schedule.tasks}
    assert ops <= {"gather", "read weights", "fetch", "forward", "loss"}
    assert {task.work.lane for task in schedule.tasks} <= {GPU, H2D, NVME_READ}
    assert schedule.tokens == plan.tokens
    tokens = sum(unit.forward_flops(plan.batch, plan.seq_len) for unit in model.units)
    assert schedule.total("flops") == pytest.approx(tokens)
    assert schedule.total("params") == 0


@many
@any_step
def test_a_forward_pass_alone_loads_every_layer_once_unless_it_is_resident(drawn):
    model, plan = drawn
    schedule = build_forward(model, plan)
    ops = tasks_by_op(schedule)
    for unit, place in zip(model.layers, place_layers(plan, len(model.layers)), strict=True):
        assert len(ops["fetch", unit.index]) == (not place.resident)
        assert len(ops["read weights", unit.index]) == (place.weights == "nvme")
        assert total(schedule, "bytes", op="fetch", unit=unit.index) == 2 * unit.owned * (not place.resident)
    rows = plan.accumulation * model.hidden_bytes(plan.micro_batch, plan.seq_len)
    assert total(schedule, "bytes", op="gather") == rows
    assert total(schedule, "bytes", op="fetch", unit=model.head.index) == 2 * model.head.weight_elements


@many
@any_step
def test_a_forward_pass_alone_computes_with_what_is_there_and_waits_for_the_loss_before(drawn):
    model, plan = drawn
    schedule = build_forward(model, plan)
    orders, ops = Orders(schedule), tasks_by_op(schedule)
    places = place_layers(plan, len(model.layers))
    until = {(schedule.pools[hold.pool].name, hold.first): hold.last for hold in schedule.holds}
    makers = ops["gather", 0]
    for unit, op in [*((unit, "forward") for unit in model.layers), (model.head, "loss")]:
        tasks = ops[op, unit.index]
        assert [schedule.tasks[task].micro_batch for task in tasks] == list(range(plan.accumulation))
        for maker, task in zip(makers, tasks, strict=True):
            assert orders.before(maker, task)
            assert until["hidden states", maker] == (task,)
        for fetch in ops["fetch", unit.index]:
            assert all(orders.before(fetch, task) for task in tasks)
            if unit is model.head or places[unit.index - 1].weights != "gpu":
                assert until["head weights" if unit is model.head else "weights", fetch] == (tasks[-1],)
        for read in ops["read weights", unit.index]:
            assert orders.before(read, ops["fetch", unit.index][0])
        makers = tasks
    # Nothing of the next one begins before: there is no batch for it.
    assert all(orders.before(makers[-1], task, across=True) for task in range(len(schedule.tasks)))
    assert all(orders.before(task, makers[-1]) for task in range(len(schedule.tasks)) if task != makers[-1])


@many
@any_step
def test_a_forward_pass_alone_needs_no_memory_that_the_step_does_not(drawn):
    step, forward = build(*drawn), build_forward(*drawn)
    assert {pool.name for pool in forward.pools} <= {pool.name for pool in step.pools}
    assert all(forward.peak_bytes(tier) <= step.peak_bytes(tier) for tier in TIERS)


def test_a_forward_pass_of_one_layer_by_hand():
    model = small_model("untied", 1)
    schedule = build_forward(model, Plan(model=model.name, window=1, prefetch=0, accumulation=2))
    assert [(task.work.op, task.unit, task.micro_batch) for task in schedule.tasks] == [
        ("gather", 0, 0),
        ("gather", 0, 1),
        ("fetch", 1, -1),
        ("forward", 1, 0),
        ("forward", 1, 1),
        ("fetch", 2, -1),
        ("loss", 2, 0),
        ("loss", 2, 1),
    ]
    assert len(schedule.visits) == 4


# --- examples


def test_one_layer_step_by_hand():
    model = small_model("untied", 1)
    plan = Plan(model=model.name, window=1, prefetch=0, chunk_bytes=2**30)
    schedule = build(model, plan)
    assert [(task.work.op, task.unit) for task in schedule.tasks if task.work.lane != CPU_ADAM] == [
        ("gather", 0),
        ("fetch", 1),
        ("forward", 1),
        ("save", 1),
        ("fetch", 2),
        ("head", 2),
        ("store", 2),
        ("load", 1),
        ("recompute", 1),
        ("backward", 1),
        ("store", 1),
        ("store rows", 0),
    ]
    # The embedding as the last step left it to do; then each unit as its gradient arrives.
    assert [(task.work.op, task.unit) for task in schedule.tasks if task.work.lane == CPU_ADAM] == [
        ("adam rows", 0),
        ("adam rest", 0),
        ("adam", 2),
        ("adam", 1),
    ]
    assert schedule.tokens == 1024


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 8), st.integers(1, 8), st.data())
def test_uploads_are_issued_as_far_ahead_as_prefetch_says(layers, window, data):
    prefetch = data.draw(st.integers(0, window - 1))
    model = small_model("untied", layers)
    schedule = build(model, Plan(model=model.name, window=window, prefetch=prefetch))
    ops = tasks_by_op(schedule)
    for unit in model.layers[: max(0, layers - prefetch)]:
        ahead = unit.index + prefetch
        # Emitted before this layer's forward pass, and not before the one before it.
        assert ops["fetch", ahead][0] < ops["forward", unit.index][0]
        if unit.index > 1:
            assert ops["fetch", ahead][0] > ops["forward", unit.index - 1][0]


def test_the_last_layers_stay_for_the_turnaround():
    model = small_model("untied", 6)
    ops = tasks_by_op(build(model, Plan(model=model.name, window=2)))
    assert [len(ops["fetch", unit.index]) for unit in model.layers] == [2, 2, 2, 2, 1, 1]


def test_all_that_can_be_placed_elsewhere_at_once():
    model = load_model("gemma-3-1b")
    plan = Plan(
        model=model.name,
        accumulation=3,
        window=4,
        prefetch=3,
        resident_layers=2,
        resident_weights=5,
        optimizer_nvme=10,
        weights_nvme=6,
        activations=Activations(gpu=8, nvme=9),
        recompute=Recompute(keep=4, offload=6),
        update="forward",
        clip_norm=1.0,
    )
    schedule = build(model, plan)
    assert {task.work.lane for task in schedule.tasks} == set(LANES)
    assert {hold.pool for hold in schedule.holds} <= set(range(len(schedule.pools)))


def test_a_faulty_plan_is_refused_and_named():
    model = small_model("untied", 3)
    for of in (build, build_forward):
        with pytest.raises(SlidetuneError, match=r"resident_layers \(4\) exceeds"):
            of(model, Plan(model=model.name, resident_layers=4))


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 300_000))
def test_distinct_rows_are_never_more_than_tokens_or_rows(tokens, vocab):
    rows = distinct_rows(tokens, vocab)
    assert 0 <= rows <= min(tokens, vocab)
    assert distinct_rows(tokens + 1, vocab) >= rows


def test_distinct_rows_by_hand():
    assert distinct_rows(0, 100) == 0
    assert distinct_rows(1, 100) == 1
    # Two throws of two: one or two faces, 1.5 on average; rounded to the even 2.
    assert distinct_rows(2, 2) == 2
    # After as many draws as there are, all but one in e have been drawn.
    assert distinct_rows(100_000, 100_000) == pytest.approx(100_000 * (1 - 0.36788), rel=1e-4)
