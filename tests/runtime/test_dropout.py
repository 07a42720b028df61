"""Dropout: the same random numbers in the forward pass and its recomputation, whatever the plan does in between."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from slidetune.plans import Activations, Plan, Recompute
from slidetune.runtime.adam import AdamW
from slidetune.runtime.randomness import draws_random_numbers, seed_of
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, PlainLoop, assert_same_losses, assert_same_weights, make_model, random_batches

GPT2 = SMALL_CONFIGS["gpt2, own MLP width, untied"] | {
    "resid_pdrop": 0.2,
    # It drops rows on the host, whose generator gives other numbers than a GPU's.
    "embd_pdrop": 0.3 if DEVICE == "cpu" else 0.0,
    "attn_pdrop": 0.1,
    "attn_implementation": "eager",
}
SIZES = {"seq_len": 16, "micro_batch": 2, "chunk_bytes": 8192, "adam_threads": 1}
SEED = 11
KNOBS = {
    "default": {},
    "update forward": {"update": "forward"},
    "kept and offloaded": {"recompute": Recompute(keep=1, offload=1), "activations": Activations(gpu=1)},
    "accumulation": {"accumulation": 2},
}


class SeededLoop(PlainLoop):
    """The plain loop with each unit's forward pass seeded as the runtime seeds it."""

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.now = (0, 0)
        transformer = model.transformer
        for unit, module in enumerate([transformer.wte, *transformer.h]):
            module.register_forward_pre_hook(self.seeding(unit))

    def seeding(self, unit):
        def hook(*_):
            torch.manual_seed(seed_of(SEED, self.now[0], unit, self.now[1]))

        return hook

    def step(self, batch):
        number = self.updates + 1

        def begin(m):
            self.now = (number, m)

        return super().step(batch, begin)


@pytest.mark.parametrize("knobs", KNOBS)
def test_dropout(knobs):
    plan = Plan(model="small gpt2", **SIZES, **KNOBS[knobs])
    optimizer = AdamW(lr=1e-2)
    loop = SeededLoop(make_model(GPT2), optimizer=optimizer, accumulation=plan.accumulation)
    with SlidingTrainer(make_model(GPT2), plan, optimizer=optimizer, device=DEVICE, seed=SEED) as trainer:
        losses = [trainer.step(batch) for batch in random_batches(GPT2, plan, 3)]
        weights = trainer.state_dict()
    # Only now: on the CPU both draw from the one generator of the process.
    assert_same_losses(losses, [loop.step(batch) for batch in random_batches(GPT2, plan, 3)])
    assert_same_weights(weights, loop.state_dict())


def test_the_users_random_numbers_are_left_alone():
    plan = Plan(model="small gpt2", **SIZES)
    model = make_model(GPT2)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with SlidingTrainer(model, plan, device=DEVICE) as trainer:
        trainer.step(next(random_batches(GPT2, plan, 1)))
    assert torch.equal(torch.rand(4), expected)


def test_which_models_draw():
    assert draws_random_numbers(make_model(GPT2))
    assert draws_random_numbers(make_model(SMALL_CONFIGS["llama"] | {"attention_dropout": 0.1}))
    assert not draws_random_numbers(make_model(SMALL_CONFIGS["llama"]))


def test_seeds_differ():
    seeds = {seed_of(0, step, unit, m) for step in range(1, 9) for unit in range(90) for m in range(8)}
    assert len(seeds) == 8 * 90 * 8
