"""Recorded passes give what the passes themselves give. On the CPU, where nothing is recorded, a recording stands for
running its pass once more with what it was recorded with: that finds whatever a pass has of another step."""

from __future__ import annotations

from collections import Counter

import pytest

torch = pytest.importorskip("torch")

from slidetune.families import spec_from_config
from slidetune.plans import CAPTURED_TOKENS, Plan, Recompute, captured, problems
from slidetune.runtime.captured import Arguments, Passes
from slidetune.runtime.trainer import SlidingTrainer

from ..strategies import small_model
from .reference import DEVICE, PlainLoop, assert_equal, make_model, random_batches, run_both
from .test_exactness import CONFIGS, KNOBS, SIZES

STEPS = 5


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """Trainers record passes, as they do on CUDA; how many are recorded and replayed."""
    found = Counter()
    record = Passes._recorded

    def counted(self, body):
        found["recorded"] += 1
        replay = record(self, body)

        def run():
            found["replayed"] += 1
            replay()

        return run

    monkeypatch.setattr(Passes, "_recorded", counted)
    if DEVICE == "cpu":
        monkeypatch.setattr("slidetune.runtime.trainer.cuda_passes", lambda device: Passes(lambda body: body))
        monkeypatch.setattr("slidetune.runtime.trainer._records", lambda device: True)
    return found


def recorded_cases():
    """Every knob that can be recorded, with every model that has it."""
    for model in ("llama", "gemma2", "gpt2"):
        spec = spec_from_config(CONFIGS[model], model)
        for name, knobs in KNOBS.items():
            plan = Plan(model=f"small {model}", **(SIZES | knobs))
            if not plan.recompute.offload and not problems(plan, spec):
                yield pytest.param(model, plan, id=f"{name}-{model}")


@pytest.mark.parametrize(("model", "plan"), list(recorded_cases()))
def test_every_knob(model, plan, counts, tmp_path):
    assert_equal(run_both(CONFIGS[model], plan, folder=tmp_path, steps=STEPS))
    # Each layer's pass forward, often another one forward, and one back; all steps but the first replay them.
    layers = len(spec_from_config(CONFIGS[model], model).layers)
    assert counts["recorded"] == 3 * layers - plan.recompute.keep
    assert counts["replayed"] == (STEPS - 1) * counts["recorded"]


@pytest.mark.parametrize("keep", [0, 2])
def test_accumulation(keep, counts):
    plan = Plan(model="llama", accumulation=3, recompute=Recompute(keep=keep), **SIZES)
    assert_equal(run_both(CONFIGS["llama"], plan, steps=STEPS))
    assert counts["replayed"] == (STEPS - 1) * counts["recorded"] > 0


@pytest.mark.parametrize("keep", [0, 2])
def test_batches_of_other_lengths(keep, counts):
    """A batch of another form runs as it is, and what was recorded is recorded anew when its form comes twice."""
    config, plan = CONFIGS["llama"], Plan(model="llama", recompute=Recompute(keep=keep), **SIZES)
    lengths = (24, 24, 24, 7, 7, 24, 24, 7)
    batches = [
        {name: tensor[:, :length] for name, tensor in batch.items()}
        for batch, length in zip(random_batches(config, plan, len(lengths)), lengths, strict=True)
    ]
    loop = PlainLoop(make_model(config))
    with SlidingTrainer(make_model(config), plan, device=DEVICE) as trainer:
        losses = [(trainer.step(batch), loop.step(batch)) for batch in batches]
        weights = trainer.state_dict()
    ours, plain = zip(*losses, strict=True)
    assert_equal((list(ours), weights, list(plain), loop.state_dict()))
    passes = 3 * len(spec_from_config(config, "").layers) - keep
    assert counts["recorded"] == 3 * passes
    assert counts["replayed"] == 4 * passes


def test_masks_that_come_and_go(counts):
    """Where a batch is padded, layers get a mask; where none is, they may get none."""
    config, plan = CONFIGS["llama"], Plan(model="llama", **SIZES)
    batches = list(random_batches(config, plan, 3)) + list(random_batches(config, plan, 3, padded=True))
    loop = PlainLoop(make_model(config))
    with SlidingTrainer(make_model(config), plan, device=DEVICE) as trainer:
        losses = [(trainer.step(batch), loop.step(batch)) for batch in batches]
        weights = trainer.state_dict()
    ours, plain = zip(*losses, strict=True)
    assert_equal((list(ours), weights, list(plain), loop.state_dict()))
    assert counts["replayed"] > 0


def test_within_a_step_all_passes_are_replayed_or_none(counts):
    """A replay writes to memory that the allocator takes to be free: what another micro-batch keeps may lie there."""
    config = CONFIGS["llama"]
    plan = Plan(model="llama", accumulation=2, recompute=Recompute(keep=2), **SIZES)
    batches = list(random_batches(config, plan, 8))
    for batch in batches[4:6]:
        # Only the first micro-batch is padded: it gets a mask and the second none.
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, -3:] = 0
    loop = PlainLoop(make_model(config), accumulation=2)
    replayed = []
    with SlidingTrainer(make_model(config), plan, device=DEVICE) as trainer:
        losses = []
        for batch in batches:
            before = counts["replayed"]
            losses.append((trainer.step(batch), loop.step(batch)))
            trainer.finish()
            replayed.append(counts["replayed"] - before)
        weights = trainer.state_dict()
    ours, plain = zip(*losses, strict=True)
    assert_equal((list(ours), weights, list(plain), loop.state_dict()))
    passes = 2 * (3 * len(spec_from_config(config, "").layers) - 2)
    assert replayed == [0, passes, passes, passes, 0, passes, 0, passes]


def test_what_never_ran_as_it_is_is_not_recorded(counts):
    """An evaluation before the first step has met the form of its arguments, but not the backward passes."""
    config, plan = CONFIGS["llama"], Plan(model="llama", **SIZES)
    (batch,) = random_batches(config, plan, 1)
    with SlidingTrainer(make_model(config), plan, device=DEVICE) as trainer:
        assert trainer.evaluate(batch) == trainer.evaluate(batch)
        evaluated = counts["replayed"]
        trainer.step(batch)
        trainer.finish()
        assert counts["replayed"] == evaluated > 0
        trainer.step(batch)
        trainer.finish()
        assert counts["replayed"] > evaluated


def test_nothing_is_recorded_of_a_model_with_dropout(counts):
    config, plan = CONFIGS["gpt2"] | {"resid_pdrop": 0.1}, Plan(model="small gpt2", **SIZES)
    with SlidingTrainer(make_model(config), plan, device=DEVICE) as trainer:
        for batch in random_batches(config, plan, STEPS):
            trainer.step(batch)
    assert not counts


def test_nothing_is_recorded_of_a_model_with_hooks(counts):
    """They want to be called."""
    model, called = make_model(CONFIGS["llama"]), []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: called.append(1))
    plan = Plan(model="llama", **SIZES)
    with SlidingTrainer(model, plan, device=DEVICE) as trainer:
        for batch in random_batches(CONFIGS["llama"], plan, STEPS):
            trainer.step(batch)
    # Forward, and again for the backward pass.
    assert len(called) == 2 * STEPS


def test_which_plans_are_captured():
    dense, mixture = small_model("untied"), small_model("layers of two sizes")
    fits = Plan(model="", seq_len=1024, micro_batch=CAPTURED_TOKENS // 1024)
    assert captured(fits, dense)
    assert not captured(fits, mixture)
    assert not captured(Plan(model="", seq_len=1024, micro_batch=fits.micro_batch + 1), dense)
    assert not captured(Plan(model="", recompute=Recompute(offload=1)), dense)


def arguments(**values):
    return Arguments.of([((), values)])


def test_the_form_of_arguments():
    mask, rotary = torch.ones(2, 1, 4, 4, dtype=torch.bool), torch.randn(2, 4, 8)
    form = arguments(mask=mask.expand(2, 3, 4, 4), rotary=(rotary, rotary[:1]), scale=0.5, cache=None)
    same = rotary.clone()
    assert form.form == arguments(mask=(~mask).expand(2, 3, 4, 4), rotary=(same, same[:1]), scale=0.5, cache=None).form
    assert len(form.storages) == 2
    for other in (
        {"mask": None, "rotary": (rotary, rotary[:1]), "scale": 0.5, "cache": None},
        {"mask": mask.expand(2, 3, 4, 4), "rotary": (rotary, rotary[1:]), "scale": 0.5, "cache": None},
        {"mask": mask.expand(2, 3, 4, 4), "rotary": (rotary, rotary[:1]), "scale": 0.25, "cache": None},
        {"mask": mask.float().expand(2, 3, 4, 4), "rotary": (rotary, rotary[:1]), "scale": 0.5, "cache": None},
    ):
        assert form.form != arguments(**other).form


def test_arguments_that_could_hide_a_change_have_no_form():
    assert arguments(cache=object()) is None
