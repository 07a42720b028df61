"""Hyper-parameters a parameter: groups, decay where it belongs, frozen parameters."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from slidetune.errors import SlidetuneError
from slidetune.plans import Activations, Plan, Recompute
from slidetune.runtime.adam import AdamW
from slidetune.runtime.trainer import SlidingTrainer, decay_where_it_belongs

from ..slidetune.reference import SMALL_CONFIGS
from .reference import (
    DEVICE,
    PlainLoop,
    assert_equal,
    assert_same_losses,
    assert_same_weights,
    make_model,
    random_batches,
    run_both,
)

SIZES = {"seq_len": 16, "micro_batch": 2, "chunk_bytes": 8192, "adam_threads": 1}
TRAINED = AdamW(lr=1e-2, weight_decay=0.1)

FREEZES = {
    "norms": lambda name: "norm" in name,
    "attention": lambda name: "self_attn" in name,
    "some layers": lambda name: ".layers.1." in name or ".layers.4." in name,
    "all layers": lambda name: ".layers." in name,
    "embedding": lambda name: "embed_tokens" in name,
    "head": lambda name: "lm_head" in name or name == "model.norm.weight",
    "head's matrix": lambda name: "lm_head" in name,
    "all but the last layer": lambda name: ".layers.4." not in name,
    "all but the head's norm": lambda name: name != "model.norm.weight",
}
KNOBS = {
    "backward": {},
    "forward": {"update": "forward", "clip_norm": 0.5, "accumulation": 2},
    "everywhere": {
        "optimizer_nvme": 3,
        "weights_nvme": 2,
        "resident_weights": 2,
        "activations": Activations(gpu=1, nvme=1),
        "recompute": Recompute(keep=1, offload=1),
    },
}


def freezing(frozen):
    return lambda name, parameter: None if frozen(name) else decay_where_it_belongs(TRAINED)(name, parameter)


@pytest.mark.parametrize("knobs", KNOBS)
@pytest.mark.parametrize("frozen", FREEZES)
def test_frozen_parameters_stay_as_they_are(frozen, knobs, tmp_path):
    plan = Plan(model="llama", **SIZES, **KNOBS[knobs])
    assert_equal(run_both(SMALL_CONFIGS["llama"], plan, rule=freezing(FREEZES[frozen]), folder=tmp_path))


@pytest.mark.parametrize("update", ["backward", "forward"])
@pytest.mark.parametrize("frozen", ["embedding", "norms", "all but the last layer"])
def test_frozen_with_a_tied_matrix(frozen, update):
    plan = Plan(model="qwen2", update=update, **SIZES)
    assert_equal(run_both(SMALL_CONFIGS["qwen2"], plan, rule=freezing(FREEZES[frozen])))


def test_frozen_resident_layers():
    plan = Plan(model="llama", resident_layers=2, **SIZES)
    rule = freezing(lambda name: ".layers.0." in name or "mlp" in name)
    losses, weights, plain_losses, plain, _ = run_both(SMALL_CONFIGS["llama"], plan, rule=rule)
    assert_same_losses(losses[:1], plain_losses[:1])
    for name, value in plain.items():
        assert (weights[name] - value).abs().mean() < 1e-3
        if ".layers.0." in name or "mlp" in name:
            assert torch.equal(weights[name], value)


def test_everything_frozen_is_refused():
    with pytest.raises(SlidetuneError, match="nothing to train"):
        SlidingTrainer(make_model(SMALL_CONFIGS["llama"]), Plan(model="llama"), rule=lambda *_: None, device=DEVICE)


def test_requires_grad_false_freezes():
    plan = Plan(model="llama", **SIZES)
    model = make_model(SMALL_CONFIGS["llama"])
    model.model.embed_tokens.weight.requires_grad_(False)
    before = model.model.embed_tokens.weight.detach().float().clone()
    with SlidingTrainer(model, plan, optimizer=TRAINED, device=DEVICE) as trainer:
        trainer.step(next(random_batches(SMALL_CONFIGS["llama"], plan, 1)))
        weights = trainer.state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], before)
    # No moments, no gradient: neither in the schedule nor in RAM.
    assert trainer.spec.embedding.params == 0


def test_a_learning_rate_a_parameter():
    plan = Plan(model="llama", **SIZES)

    def rule(name, parameter):
        return AdamW(lr=1e-2 if "mlp" in name else 1e-3, weight_decay=0.1 if "q_proj" in name else 0.0)

    assert_equal(run_both(SMALL_CONFIGS["llama"], plan, rule=rule))


def test_learning_rates_may_change_from_step_to_step():
    plan = Plan(model="llama", update="forward", **SIZES)
    config = SMALL_CONFIGS["llama"]
    optimizer = AdamW(lr=1e-2)
    loop = PlainLoop(make_model(config), optimizer=optimizer)
    with SlidingTrainer(make_model(config), plan, optimizer=optimizer, device=DEVICE) as trainer:
        for number, batch in enumerate(random_batches(config, plan, 3)):
            scale = (0.25, 1.0, 0.5)[number]
            rule = decay_where_it_belongs(AdamW(lr=1e-2 * scale))
            loop.hyper = {name: rule(name, p) for name, p in loop.model.named_parameters()}
            assert_same_losses([trainer.step(batch, lr_scale=scale)], [loop.step(batch)])
        weights = trainer.state_dict()
    assert_same_weights(weights, loop.state_dict())


def test_decay_belongs_to_matrices():
    rule = decay_where_it_belongs(AdamW(weight_decay=0.1))
    matrix, vector = torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))
    assert rule("q_proj.weight", matrix).weight_decay == 0.1
    assert rule("norm.weight", vector).weight_decay == 0.0
    assert rule("experts.gate_up_proj_bias", matrix).weight_decay == 0.0
    assert rule("q_proj.weight", matrix.requires_grad_(False)) is None
