"""Bytes of every pool: by hand for single plans, as sums for any."""

import dataclasses

import pytest
from hypothesis import given, settings

from slidetune import buffers
from slidetune.builder import build
from slidetune.models import load_model
from slidetune.plans import Activations, Plan, Recompute, place_layers
from slidetune.units import GIB, MIB

from ..strategies import models_and_plans, small_model

LLAMA = load_model("llama-3.1-8b")
# Parameters from the published sizes: hidden 4096, inner 14336, 8 of 32 heads of 128 for keys and values, two norms.
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096
MATRIX = 128256 * 4096
NORM = 4096


def by_name(model, plan):
    return {pool.name: pool for pool in buffers.pools(model, plan)}


def sizes(model, plan):
    return {pool.name: (pool.tier, pool.slots, pool.slot_bytes) for pool in buffers.pools(model, plan)}


def test_pools_of_llama_8b_by_hand():
    plan = Plan(model=LLAMA.name, seq_len=1024, micro_batch=4, window=3, chunk_bytes=64 * MIB)
    hidden = 2 * 4096 * 4 * 1024
    chunks = -(-LAYER * 2 // (64 * MIB))
    assert sizes(LLAMA, plan) == {
        "weights": ("gpu", 3, 2 * LAYER),
        "gradients": ("gpu", 2, 2 * LAYER),
        "head weights": ("gpu", 1, 2 * (MATRIX + NORM)),
        "head gradient": ("gpu", 1, 4 * (MATRIX + NORM)),
        "hidden states": ("gpu", 3, hidden),
        "workspaces": ("gpu", 1, 96 * MIB),
        "weights (bf16)": ("ram", 1, 2 * LLAMA.params),
        "gradient ring": ("ram", chunks + 2, 64 * MIB),
        "embedding rows": ("ram", 2, hidden),
        "saved inputs (RAM)": ("ram", 32, hidden),
        "optimizer state": ("ram", 1, 10 * LLAMA.params),
        # Of as many rows as a step has tokens.
        "row gradients": ("ram", 1, hidden),
    }


def test_residents_nvme_and_kept_activations_by_hand():
    plan = Plan(
        model=LLAMA.name,
        accumulation=2,
        resident_layers=3,
        resident_weights=4,
        optimizer_nvme=6,
        weights_nvme=2,
        activations=Activations(gpu=5, nvme=7),
        # Of 22 layers, evenly: the two nearest the last have their input on the GPU.
        recompute=Recompute(keep=1, offload=2, middle=11),
        chunk_bytes=64 * MIB,
    )
    hidden = 2 * 4096 * 1024
    inner = LLAMA.layers[0].eager.saved_bytes * 1024
    expected = {
        "resident layers": ("gpu", 1, 12 * 3 * LAYER),
        "resident weights": ("gpu", 1, 2 * 4 * LAYER),
        # Two micro-batches add up in fp32.
        "gradients": ("gpu", 2, 4 * LAYER),
        "hidden states": ("gpu", 2 + 2, hidden),
        "saved inputs": ("gpu", 5 * 2, hidden),
        "saved inputs (RAM)": ("ram", 20 * 2, hidden),
        "saved inputs (NVMe)": ("nvme", 7 * 2, hidden),
        "middles": ("gpu", 2, hidden),
        "saved middles": ("gpu", 1 * 2, hidden),
        "saved middles (RAM)": ("ram", 10 * 2, hidden),
        "kept activations": ("gpu", 1 * 2, inner),
        "inner activations (RAM)": ("ram", 2 * 2, inner),
        "optimizer state": ("ram", 1, 10 * (LLAMA.params - (3 + 6) * LAYER)),
        "optimizer state (NVMe)": ("nvme", 1, 10 * 6 * LAYER),
        "weights (bf16)": ("ram", 1, 2 * (LLAMA.params - (3 + 2) * LAYER)),
        "weights (NVMe)": ("nvme", 1, 2 * 2 * LAYER),
        # Whole layers on NVMe bring their weights along with their state.
        "state staging": ("ram", 4, 12 * 32 * MIB),
    }
    assert {name: size for name, size in sizes(LLAMA, plan).items() if name in expected} == expected


def test_what_a_plan_does_without_is_no_pool():
    resident = Plan(model=LLAMA.name, resident_layers=32)
    names = by_name(LLAMA, resident)
    assert not {"weights", "resident weights", "state staging", "tied gradient"} & names.keys()
    assert {pool.tier for pool in names.values()} == {"gpu", "ram"}


def test_a_deferred_update_keeps_every_gradient_in_place_of_a_ring():
    plan = Plan(model=LLAMA.name, resident_layers=2, update="forward", clip_norm=1.0)
    names = by_name(LLAMA, plan)
    assert "gradient ring" not in names
    assert names["waiting gradients"].bytes == 2 * (LLAMA.params - 2 * LAYER)
    assert names["resident gradients"].bytes == 2 * 2 * LAYER


def test_slots_fit_the_largest_layer_that_slides():
    model = small_model("layers of two sizes", 4)
    assert model.layers[0].params < model.layers[1].params
    for resident, largest in ((0, 1), (2, 3), (3, 3)):
        plan = Plan(model=model.name, resident_layers=resident)
        assert by_name(model, plan)["weights"].slot_bytes == 2 * model.layers[largest].params
    # The small third layer alone slides when the fourth's weights stay.
    plan = Plan(model=model.name, resident_layers=2, resident_weights=1)
    assert by_name(model, plan)["weights"].slot_bytes == 2 * model.layers[2].params


def test_a_chunk_is_never_larger_than_what_it_is_cut_from():
    model = small_model("untied", 2)
    plan = Plan(model=model.name, chunk_bytes=64 * GIB)
    assert by_name(model, plan)["gradient ring"].slot_bytes == 2 * model.head.weight_elements


# Each parameter's bf16 half, remainder and moments, wherever they live.
MASTER_POOLS = (
    "resident layers",
    "weights (bf16)",
    "optimizer state",
    "optimizer state (NVMe)",
    "weights (NVMe)",
)


@settings(max_examples=200, deadline=None)
@given(models_and_plans(max_layers=9))
def test_twelve_bytes_a_parameter_are_held_exactly_once(drawn):
    model, plan = drawn
    pools = by_name(model, plan)
    assert sum(pools[name].bytes for name in MASTER_POOLS if name in pools) == 12 * model.params


@settings(max_examples=200, deadline=None)
@given(models_and_plans(max_layers=9))
def test_every_layers_input_has_a_place_in_every_micro_batch(drawn):
    model, plan = drawn
    pools = by_name(model, plan)
    kinds = ("saved inputs", "saved inputs (RAM)", "saved inputs (NVMe)")
    slots = sum(pools[name].slots for name in kinds if name in pools)
    assert slots == len(model.layers) * plan.accumulation


@settings(max_examples=200, deadline=None)
@given(models_and_plans(max_layers=9))
def test_pools_have_names_of_their_own_and_bytes(drawn):
    pools = buffers.pools(*drawn)
    assert len({pool.name for pool in pools}) == len(pools)
    assert all(pool.bytes > 0 for pool in pools)
    # What the link reads or writes must be page-locked; nothing else can be.
    assert all(pool.tier == "ram" for pool in pools if pool.page_locked)


@settings(max_examples=200, deadline=None)
@given(models_and_plans(max_layers=9))
def test_peaks_known_beforehand_are_those_of_the_schedule(drawn):
    model, plan = drawn
    for kernels in ("eager", "liger"):
        schedule = build(model, plan, kernels)
        assert buffers.working_bytes(model, plan, kernels) == schedule.working_bytes()
        peaks = buffers.peak_bytes(model, plan, kernels)
        exact = {tier: schedule.peak_bytes(tier) for tier in ("gpu", "ram", "nvme")}
        # What is kept is taken to be there all along with the largest working set beside it: a bound.
        assert exact["gpu"] <= peaks["gpu"] <= exact["gpu"] + (plan.recompute.keep > 0) * schedule.working_bytes()
        assert (exact["ram"], exact["nvme"]) == (peaks["ram"], peaks["nvme"])
        assert peaks["gpu"] > schedule.working_bytes()


@settings(max_examples=100, deadline=None)
@given(models_and_plans(max_layers=9))
def test_working_sets_grow_with_sequences_not_with_their_number(drawn):
    model, plan = drawn
    more = dataclasses.replace(plan, micro_batch=plan.micro_batch + 1)
    again = dataclasses.replace(plan, accumulation=plan.accumulation + 1)
    # The head's is of one chunk of tokens, however many there are.
    head = buffers.head_working_bytes(model, plan, "eager")
    assert buffers.working_bytes(model, more) > buffers.working_bytes(model, plan) or (
        buffers.working_bytes(model, more) == head
    )
    assert buffers.working_bytes(model, again) == buffers.working_bytes(model, plan)


def test_working_sets_by_hand():
    plan = Plan(model=LLAMA.name, seq_len=512, micro_batch=3)
    layer, tokens = LLAMA.layers[0], 3 * 512
    costs = layer.liger
    assert buffers.forward_working_bytes(layer, plan, "liger", kept=False) == costs.forward_bytes * tokens
    assert buffers.forward_working_bytes(layer, plan, "liger", kept=True) == costs.backward_bytes * tokens
    assert buffers.recompute_working_bytes(layer, plan, "liger") == costs.saved_bytes * tokens
    # The largest single gradient is that of an MLP matrix.
    kept = costs.backward_bytes * tokens + 2 * 4096 * 14336
    assert buffers.backward_working_bytes(layer, plan, "liger", recomputed=False) == kept
    assert buffers.backward_working_bytes(layer, plan, "liger", recomputed=True) == kept + costs.saved_bytes * tokens


@pytest.mark.parametrize("tokens", [1, 100, 10_000, 1_000_000])
def test_the_heads_loss_is_chunked(tokens):
    vocab = LLAMA.vocab_size
    # 512 MiB hold bf16 logits of 2093 tokens, of which matrix kernels like 2048.
    assert LLAMA.loss_chunk_tokens(tokens) == min(tokens, 2048)
    assert LLAMA.loss_working_bytes(tokens) == min(tokens, 2048) * vocab * 2


@settings(max_examples=100, deadline=None)
@given(models_and_plans(max_layers=9))
def test_nvme_holds_something_only_where_the_plan_says_so(drawn):
    model, plan = drawn
    uses = plan.optimizer_nvme or plan.activations.nvme
    assert bool(buffers.peak_bytes(model, plan)["nvme"]) == bool(uses)
    places = place_layers(plan, len(model.layers))
    on_nvme = sum(u.params for u, p in zip(model.layers, places, strict=True) if p.optimizer == "nvme")
    assert buffers.peak_bytes(model, plan)["nvme"] >= 10 * on_nvme
