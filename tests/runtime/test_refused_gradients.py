"""Gradients that are not finite, under a loss that is: with clipping their norm shows them, and no update is made."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from slidetune.plans import Plan
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches

SIZES = {"seq_len": 16, "micro_batch": 2, "chunk_bytes": 8192, "adam_threads": 1}


def trained(plan, bad_step=None, **options):
    """Weights after three steps, of which one may have gradients that are NaN."""
    config = SMALL_CONFIGS["llama"]
    model = make_model(config)
    bad = [False]
    model.model.layers[1].mlp.register_full_backward_hook(
        lambda module, grad_input, grad_output: tuple(g * float("nan") for g in grad_input) if bad[0] else None
    )
    with SlidingTrainer(model, plan, device=DEVICE, kernels="eager", **options) as trainer:
        for number, batch in enumerate(random_batches(config, plan, 3)):
            bad[0] = number == bad_step
            trainer.step(batch)
            trainer._lanes.drain()
        return trainer.state_dict()


@pytest.mark.parametrize("resident", [0, 2])
def test_an_update_of_gradients_that_are_nan_is_refused(resident):
    plan = Plan(model="llama", update="forward", clip_norm=1.0, resident_layers=resident, **SIZES)
    with pytest.warns(UserWarning, match="step 2: its gradients are not finite"):
        weights = trained(plan, bad_step=1)
    assert all(value.isfinite().all() for value in weights.values())
    good = trained(plan)
    assert any(not torch.equal(weights[name], value) for name, value in good.items())


def test_unless_told_otherwise():
    plan = Plan(model="llama", update="forward", clip_norm=1.0, **SIZES)
    weights = trained(plan, bad_step=1, accept_non_finite=True)
    assert any(value.isnan().any() for value in weights.values())
