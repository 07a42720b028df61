"""Faults of plans, each by its name, and where a plan puts every layer."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.errors import SlidetuneError
from slidetune.plans import Activations, Plan, Recompute, check, knobs, place_layers, problems, spread
from slidetune.units import GIB

from ..strategies import models_and_plans, plans, small_model

MODEL = small_model("untied", 6)
GOOD = Plan(model=MODEL.name)

# What is wrong, and the words that must name it.
FAULTS = {
    "no tokens": ({"seq_len": 0}, "seq_len must be at least 1, not 0"),
    "no sequences": ({"micro_batch": 0}, "micro_batch must be at least 1, not 0"),
    "no micro-batches": ({"accumulation": -1}, "accumulation must be at least 1, not -1"),
    "no slot": ({"window": 0, "prefetch": 0}, "window must be at least 1, not 0"),
    "negative prefetch": ({"prefetch": -1}, "prefetch must be at least 0, not -1"),
    "prefetch beyond the window": ({"window": 2, "prefetch": 2}, "prefetch (2) must be below window (2)"),
    "negative residents": ({"resident_layers": -1}, "resident_layers must be at least 0"),
    "more residents than layers": ({"resident_layers": 7}, "resident_layers (7) exceeds the model's 6 layers"),
    "negative resident weights": ({"resident_weights": -1}, "resident_weights must be at least 0"),
    "more resident weights than are left": (
        {"resident_layers": 2, "optimizer_nvme": 2, "weights_nvme": 1, "resident_weights": 4},
        "resident_weights (4) exceeds the 3 layers",
    ),
    "negative optimizer_nvme": ({"optimizer_nvme": -2}, "optimizer_nvme must be at least 0"),
    "more states on NVMe than are left": (
        {"resident_layers": 4, "optimizer_nvme": 3},
        "optimizer_nvme (3) exceeds the 2 layers that are not resident",
    ),
    "negative weights_nvme": ({"weights_nvme": -1}, "weights_nvme must be at least 0"),
    "weights on NVMe without their state": (
        {"optimizer_nvme": 1, "weights_nvme": 2},
        "weights_nvme (2) exceeds optimizer_nvme (1)",
    ),
    "negative inputs on the GPU": ({"activations": Activations(gpu=-1)}, "activations.gpu must be at least 0"),
    "negative inputs on NVMe": ({"activations": Activations(nvme=-1)}, "activations.nvme must be at least 0"),
    "inputs of more layers than there are": (
        {"activations": Activations(gpu=4, nvme=3)},
        "activations place 7 layers, the model has 6",
    ),
    "negative keep": ({"recompute": Recompute(keep=-1)}, "recompute.keep must be at least 0"),
    "negative offload": ({"recompute": Recompute(offload=-1)}, "recompute.offload must be at least 0"),
    "negative products": ({"recompute": Recompute(products=-1)}, "recompute.products must be at least 0"),
    "negative middle": ({"recompute": Recompute(middle=-1)}, "recompute.middle must be at least 0"),
    "more sums saved than layers recompute": (
        {"recompute": Recompute(keep=2, middle=4), "activations": Activations(nvme=1)},
        "recompute.middle (4) exceeds the 3 layers that recompute and whose input is not on NVMe",
    ),
    "more layers kept than there are": (
        {"recompute": Recompute(keep=5, offload=2)},
        "recompute names 7 layers, the model has 6",
    ),
    "chunks too small": ({"chunk_bytes": 100}, "chunk_bytes must be at least 4096, not 100"),
    "no threads": ({"adam_threads": 0}, "adam_threads must be at least 1, not 0"),
    "more positions than the model has": ({"seq_len": 4097}, "seq_len (4097) exceeds the model's 4096 positions"),
    "clipping before the norm is known": ({"clip_norm": 1.0}, "clip_norm needs update: forward"),
    "clipping to nothing": ({"clip_norm": 0.0, "update": "forward"}, "clip_norm must be above 0"),
    "clipping to no number": ({"clip_norm": math.nan, "update": "forward"}, "clip_norm must be above 0"),
    "late updates of more layers than the CPU updates": (
        {"late_updates": 7},
        "late_updates (7) exceeds the 6 layers that are not resident",
    ),
    "late updates where all are": (
        {"late_updates": 1, "update": "forward"},
        "late_updates needs update: backward",
    ),
    "a ring where each gradient has its place": (
        {"gradient_ring": 2, "update": "forward"},
        "gradient_ring needs update: backward",
    ),
    "a ring for more layers than use it": (
        {"gradient_ring": 4, "late_updates": 3},
        "gradient_ring (4) exceeds the 3 layers whose gradients come down through it",
    ),
    "no GPU memory": ({"gpu_memory_gib": 0.0}, "gpu_memory_gib must be above 0"),
    "endless GPU memory": ({"gpu_memory_gib": math.inf}, "gpu_memory_gib must be above 0"),
}


def test_the_defaults_are_sound():
    assert problems(GOOD, MODEL) == []
    check(GOOD, MODEL)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_the_only_one_and_named(fault):
    changes, words = FAULTS[fault]
    (found,) = problems(dataclasses.replace(GOOD, **changes), MODEL)
    assert words in found


def test_every_limited_knob_has_a_fault_here():
    named = {knob for knob in knobs(GOOD) if any(words.startswith(knob) for _, words in FAULTS.values())}
    # A name, one of two words and one of one: none has a least or a most.
    assert set(knobs(GOOD)) - named == {"model", "update", "version"}


@pytest.mark.parametrize("kind", ["mixed attention", "learned positions"])
def test_layers_without_a_sum_in_their_middle_cannot_save_it_or_what_follows(kind):
    model = small_model(kind)
    for knob in ("middle", "products"):
        (found,) = problems(Plan(model=model.name, recompute=Recompute(**{knob: 1})), model)
        assert found.startswith(f"recompute.{knob} must be 0")


def test_all_faults_are_named_at_once():
    plan = dataclasses.replace(GOOD, window=0, clip_norm=-1.0, resident_layers=9)
    with pytest.raises(SlidetuneError) as refused:
        check(plan, MODEL)
    for words in (MODEL.name, "window must", "clip_norm needs", "clip_norm must", "resident_layers (9)"):
        assert words in str(refused.value)


@settings(max_examples=100, deadline=None)
@given(models_and_plans())
def test_plans_within_all_limits_are_sound(drawn):
    model, plan = drawn
    assert problems(plan, model) == []


@settings(max_examples=100, deadline=None)
@given(models_and_plans(), st.data())
def test_one_knob_beyond_its_limit_is_a_fault(drawn, data):
    model, plan = drawn
    knob = data.draw(st.sampled_from([name for name, value in knobs(plan).items() if isinstance(value, int)]))
    if knob == "version":
        return
    outer, _, inner = knob.partition(".")
    value = dataclasses.replace(getattr(plan, outer), **{inner: -1}) if inner else -1
    assert any(knob in text for text in problems(dataclasses.replace(plan, **{outer: value}), model))


def test_sequences_tokens_and_bytes_follow():
    plan = dataclasses.replace(GOOD, micro_batch=3, accumulation=4, seq_len=100, gpu_memory_gib=1.5)
    assert (plan.batch, plan.tokens, plan.gpu_memory_bytes) == (12, 1200, 3 * GIB // 2)
    assert GOOD.gpu_memory_bytes is None


def test_knobs_are_flat_and_complete():
    flat = knobs(dataclasses.replace(GOOD, recompute=Recompute(keep=2)))
    assert flat["recompute.keep"] == 2
    assert flat["window"] == GOOD.window
    nested = {"activations": 2, "recompute": 4}
    assert len(flat) == sum(nested.get(field.name, 1) for field in dataclasses.fields(Plan))


# --- spreading


def test_spread_by_hand():
    assert spread(2, 4) == [False, True, False, True]
    assert spread(1, 3) == [False, False, True]
    assert spread(0, 2) == [False, False]
    assert spread(0, 0) == []


@given(st.integers(0, 60), st.integers(0, 60))
def test_spread_chooses_as_many_as_asked_and_evenly(chosen, of):
    chosen = min(chosen, of)
    places = spread(chosen, of)
    assert len(places) == of
    assert sum(places) == chosen
    # Any run of places holds its share, rounded down or up.
    for length in range(1, of + 1):
        counts = [sum(places[start : start + length]) for start in range(of - length + 1)]
        assert min(counts) >= math.floor(length * chosen / of)
        assert max(counts) <= math.ceil(length * chosen / of)


# --- placement


def test_placement_by_hand():
    plan = dataclasses.replace(
        GOOD,
        resident_layers=1,
        optimizer_nvme=2,
        weights_nvme=1,
        resident_weights=1,
        activations=Activations(gpu=2, nvme=1),
        recompute=Recompute(keep=1, offload=2),
    )
    places = place_layers(plan, 6)
    assert [p.resident for p in places] == [True] + [False] * 5
    # Two of the five sliding layers, spread: the third and the fifth; of these the last.
    assert [p.optimizer for p in places] == ["gpu", "ram", "ram", "nvme", "ram", "nvme"]
    # One of the four that are neither resident nor whole on NVMe: the last of them.
    assert [p.weights for p in places] == ["gpu", "ram", "ram", "ram", "gpu", "nvme"]
    assert [p.saved_input for p in places] == ["nvme", "ram", "ram", "ram", "gpu", "gpu"]
    assert [p.inner for p in places] == ["recompute"] * 3 + ["offload"] * 2 + ["keep"]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), plans(small_model("untied", n)))))
def test_every_knob_counts_the_layers_it_names(drawn):
    layers, plan = drawn
    places = place_layers(plan, layers)
    assert len(places) == layers
    assert [p.resident for p in places] == [i < plan.resident_layers for i in range(layers)]
    assert sum(p.optimizer == "nvme" for p in places) == plan.optimizer_nvme
    assert sum(p.weights == "nvme" for p in places) == plan.weights_nvme
    assert sum(p.weights == "gpu" for p in places) == plan.resident_layers + plan.resident_weights
    assert sum(p.saved_input == "gpu" for p in places) == plan.activations.gpu
    assert sum(p.saved_input == "nvme" for p in places) == plan.activations.nvme
    assert sum(p.inner == "keep" for p in places) == plan.recompute.keep
    assert sum(p.inner == "offload" for p in places) == plan.recompute.offload
    assert sum(p.products for p in places) == plan.recompute.products
    assert all(p.inner == "recompute" for p in places if p.products)
    assert sum(p.middle for p in places) == plan.recompute.middle
    assert all(p.inner == "recompute" and p.saved_input != "nvme" for p in places if p.middle)
    for place in places:
        # Weights on NVMe have their state there; what is resident is so whole, and nothing else's state is.
        assert place.weights != "nvme" or place.optimizer == "nvme"
        assert (place.optimizer == "gpu") == place.resident
        assert not place.resident or place.weights == "gpu"
