"""Every plan gives what a plain PyTorch loop gives, bit for bit where the arithmetic's order is the same."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from slidetune.families import spec_from_config
from slidetune.plans import Activations, Plan, Recompute
from slidetune.runtime.adam import AdamW
from slidetune.runtime.trainer import SlidingTrainer, decay_where_it_belongs
from slidetune.schedule import LANES

from ..slidetune.reference import SMALL_CONFIGS
from ..strategies import plans
from .reference import (
    DEVICE,
    PlainLoop,
    assert_close,
    assert_equal,
    assert_same_losses,
    make_model,
    random_batches,
    run_both,
)

WITHOUT_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CONFIGS = {
    name: config | (WITHOUT_DROPOUT if config["model_type"] == "gpt2" else {}) for name, config in SMALL_CONFIGS.items()
}
SIZES = {"seq_len": 24, "micro_batch": 2, "chunk_bytes": 8192, "adam_threads": 1}

KNOBS = {
    "default": {},
    "a wide window": {"window": 5, "prefetch": 4},
    "one slot": {"window": 1, "prefetch": 0},
    "one chunk": {"chunk_bytes": 1 << 26},
    "threads": {"adam_threads": 2},
    "update forward": {"update": "forward"},
    "clipping": {"update": "forward", "clip_norm": 0.5},
    "resident weights": {"resident_weights": 2},
    "optimizer on NVMe": {"optimizer_nvme": 2},
    "layers on NVMe": {"optimizer_nvme": 3, "weights_nvme": 2},
    "layers on NVMe, update forward": {"optimizer_nvme": 3, "weights_nvme": 2, "update": "forward"},
    "inputs on every tier": {"activations": Activations(gpu=1, nvme=1)},
    "inputs on the GPU": {"activations": Activations(gpu=3)},
    "inputs on NVMe": {"activations": Activations(nvme=3)},
    "kept activations": {"recompute": Recompute(keep=2)},
    "offloaded activations": {"recompute": Recompute(offload=2)},
    "sums in the middle": {"recompute": Recompute(middle=2)},
    "sums in the middle, inputs on the GPU": {"recompute": Recompute(middle=3), "activations": Activations(gpu=2)},
    "kept products": {"recompute": Recompute(products=2)},
    "kept products and sums in the middle": {"recompute": Recompute(products=2, middle=3)},
    "all four": {"recompute": Recompute(keep=1, offload=1, products=1, middle=1), "activations": Activations(gpu=1)},
}


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_family(name, padded):
    plan = Plan(model=f"small {name}", **SIZES)
    assert_equal(run_both(CONFIGS[name], plan, padded=padded, steps=2))


@pytest.mark.parametrize("model", ["llama", "phi3, tied"])
@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob(knob, model, tmp_path):
    plan = Plan(model=model, **(SIZES | KNOBS[knob]))
    assert_equal(run_both(CONFIGS[model], plan, folder=tmp_path))


@pytest.mark.parametrize("update", ["backward", "forward"])
def test_accumulation(update):
    plan = Plan(model="llama", accumulation=3, update=update, **SIZES)
    assert_equal(run_both(CONFIGS["llama"], plan, padded=True))


@pytest.mark.parametrize("update", ["backward", "forward"])
def test_accumulation_of_a_tied_matrix_adds_in_another_order(update):
    """Head's and rows' gradients are summed over the micro-batches apart, then together."""
    plan = Plan(model="qwen2", accumulation=2, update=update, **SIZES)
    assert_close(run_both(CONFIGS["qwen2"], plan), 0.03)


def test_plans_agree_on_every_device():
    """One arithmetic, wherever things lie and in whatever order they move: the same bits, on a GPU too."""
    layers = CONFIGS["llama"]["num_hidden_layers"]
    ways = (
        {"window": 1, "prefetch": 0},
        {"window": 3, "prefetch": 2, "chunk_bytes": 4096},
        {"resident_layers": layers, "activations": Activations(gpu=layers)},
        {"resident_weights": layers, "recompute": Recompute(keep=1, offload=1)},
        {"update": "forward", "resident_layers": 1},
    )
    found = []
    for way in ways:
        plan = Plan(model="llama", **(SIZES | way))
        with SlidingTrainer(make_model(CONFIGS["llama"]), plan, device=DEVICE) as trainer:
            losses = [trainer.step(batch) for batch in random_batches(CONFIGS["llama"], plan, 4)]
            found.append((losses, trainer.state_dict()))
    for losses, weights in found[1:]:
        assert losses == found[0][0]
        assert [name for name, value in found[0][1].items() if not torch.equal(weights[name], value)] == []


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resident_layers(accumulation):
    plan = Plan(model="llama", resident_layers=2, accumulation=accumulation, **SIZES)
    assert_equal(run_both(CONFIGS["llama"], plan))


def test_resident_layers_with_clipping():
    plan = Plan(model="llama", resident_layers=2, update="forward", clip_norm=0.5, **SIZES)
    assert_equal(run_both(CONFIGS["llama"], plan))


def test_a_loss_in_chunks_agrees_to_bf16_rounding():
    plan = Plan(model="llama", **SIZES)
    assert_close(run_both(CONFIGS["llama"], plan, loss_chunk_tokens=7), 0.03)


def test_shorter_sequences_than_planned():
    plan = Plan(model="llama", **SIZES)
    short = Plan(model="llama", **(SIZES | {"seq_len": 9}))
    loop = PlainLoop(make_model(CONFIGS["llama"]))
    with SlidingTrainer(make_model(CONFIGS["llama"]), plan, device=DEVICE) as trainer:
        for batch in [*random_batches(CONFIGS["llama"], short, 2), *random_batches(CONFIGS["llama"], plan, 1)]:
            assert_same_losses([trainer.step(batch)], [loop.step(batch)])


DRAWN = {
    "llama": CONFIGS["llama"],
    "gemma3_text": CONFIGS["gemma3_text"] | {"tie_word_embeddings": False},
    "qwen3_moe, dense layers": CONFIGS["qwen3_moe, dense layers"],
    "gpt2, own MLP width, untied": CONFIGS["gpt2, own MLP width, untied"],
}


@st.composite
def drawn(draw):
    name = draw(st.sampled_from(sorted(DRAWN)))
    config = DRAWN[name]
    plan = draw(plans(spec_from_config(config, name), max_accumulation=2))
    changes = {
        "seq_len": draw(st.integers(2, 20)),
        "micro_batch": draw(st.integers(1, 2)),
        "chunk_bytes": draw(st.sampled_from([4096, 12288, 1 << 20])),
        "adam_threads": draw(st.integers(1, 2)),
        "gpu_memory_gib": None,
        "clip_norm": draw(st.sampled_from([None, 0.3])) if plan.update == "forward" else None,
    }
    return config, replace(plan, model=f"small {name}", **changes)


@given(drawn())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
def test_any_plan(tmp_path_factory, case):
    config, plan = case
    assert_equal(run_both(config, plan, steps=2, padded=plan.seq_len > 10, folder=tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize("slow", LANES)
@pytest.mark.parametrize("update", ["backward", "forward"])
def test_whichever_lane_is_slow(update, slow, tmp_path):
    """Tasks of one lane are late, now and then: a dependency that the schedule lacks would show in the weights."""
    plan = Plan(
        model="llama",
        update=update,
        window=3,
        prefetch=2,
        resident_weights=1,
        optimizer_nvme=3,
        weights_nvme=1,
        activations=Activations(gpu=1, nvme=2),
        recompute=Recompute(keep=1, offload=2),
        **(SIZES | {"seq_len": 8, "accumulation": 2}),
    )
    config, late = CONFIGS["llama"], random.Random(slow)
    rule = decay_where_it_belongs(AdamW(lr=1e-2, weight_decay=0.1))
    batches = list(random_batches(config, plan, 3))
    with SlidingTrainer(make_model(config), plan, rule=rule, device=DEVICE, nvme_folder=tmp_path) as trainer:
        operations = trainer._operations.run
        for index, task in enumerate(trainer.schedule.tasks):
            if task.work.lane == slow:
                operations[index] = delayed(operations[index], late)
        losses = [trainer.step(batch) for batch in batches]
        weights = trainer.state_dict()
    loop = PlainLoop(make_model(config), rule=rule, accumulation=2)
    assert_equal((losses, weights, [loop.step(batch) for batch in batches], loop.state_dict()))


def delayed(operation, late):
    def run(step):
        time.sleep(late.choice((0.0, 0.0, 0.004)))
        operation(step)

    return run
