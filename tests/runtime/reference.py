"""The plain PyTorch loop that every plan must equal: no slots, no lanes, no schedule.

bf16 forward and backward of the same transformers module by its own forward; fp32 masters, updated by torch's own fused
AdamW and copied to the bf16 parameters. Gradients of several micro-batches add up in fp32 and are rounded to bf16, in
which they travel. Nothing of slidetune's arithmetic is used.

SLIDETUNE_TEST_DEVICE=cuda runs the same tests on a GPU. There both sides use kernels that add in whatever order (the
embedding's gradient, attention's), so equality is to a tolerance: losses to bf16's rounding, weights on average,
since Adam turns the sign of a gradient near zero into a whole step. Where a parameter's gradient is little but
rounding (a key's bias has none in exact arithmetic) or steps are many, the measure is what rounding does to the plain
loop itself: the largest distance of a parameter between the GPU and the CPU. Which parameters drift is chance.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slidetune.runtime.adam import AdamW
from slidetune.runtime.trainer import decay_where_it_belongs

DEVICE = os.environ.get("SLIDETUNE_TEST_DEVICE", "cpu")
_CUDA_LOSS, _CUDA_WEIGHTS = 0.05, 3e-3
# How much farther than the plain loop on another device.
_CUDA_ROUNDING = 1.5


def make_model(config: dict[str, object], seed: int = 0) -> torch.nn.Module:
    """A bf16 model of a config, with its random weights blown up a little: all of it must matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


class PlainLoop:
    """Trains a model the plain way. `step` returns the loss."""

    def __init__(self, model, *, optimizer=None, rule=None, accumulation=1, clip_norm=None, device=DEVICE):
        self.device = device
        self.model = model.train().to(device)
        self.accumulation, self.clip_norm = accumulation, clip_norm
        rule = rule or decay_where_it_belongs(optimizer or AdamW())
        self.hyper = {name: rule(name, p) for name, p in model.named_parameters()}
        # Flat, and of whole vectors: torch's kernel computes the elements behind the last one in fp64.
        self.master = {name: _padded(p.detach().float().cpu()) for name, p in model.named_parameters()}
        self.first = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.second = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.updates = 0
        self.norm = None

    def step(self, batch, before_micro_batch=lambda m: None) -> float:
        batch = {name: value.to(self.device) for name, value in batch.items()}
        labels = batch.get("labels")
        if labels is None:
            labels = batch["input_ids"].clone()
            if batch.get("attention_mask") is not None:
                labels[batch["attention_mask"] == 0] = -100
        items = int((labels[:, 1:] != -100).sum())
        size = labels.shape[0] // self.accumulation
        total, sums = 0.0, {}
        for m in range(self.accumulation):
            span = slice(m * size, (m + 1) * size)
            inputs = {name: value[span] for name, value in batch.items() if name != "labels" and value is not None}
            before_micro_batch(m)
            loss = self.model(**inputs, labels=labels[span], num_items_in_batch=items, use_cache=False).loss
            loss.backward()
            total += loss.detach()
            for name, parameter in self.model.named_parameters():
                if parameter.grad is None or self.hyper[name] is None:
                    parameter.grad = None
                    continue
                gradient = parameter.grad.float()
                sums[name] = sums[name] + gradient if name in sums else gradient
                parameter.grad = None
        self._update({name: value.to(torch.bfloat16).cpu() for name, value in sums.items()})
        return float(total)

    def _update(self, gradients) -> None:
        self.updates += 1
        scale = 1.0
        self.norm = float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())
        if self.clip_norm is not None:
            scale = float(torch.clamp(self.clip_norm / (torch.tensor(self.norm) + 1e-6), max=1.0))
        with torch.no_grad(), _one_thread():
            for name, parameter in self.model.named_parameters():
                hyper = self.hyper[name]
                if hyper is None:
                    continue
                gradient = gradients.get(name, torch.zeros_like(parameter, device="cpu")).float() * scale
                torch._fused_adamw_(
                    [self.master[name]],
                    [_padded(gradient)],
                    [self.first[name]],
                    [self.second[name]],
                    [],
                    [torch.tensor(float(self.updates))],
                    lr=hyper.lr,
                    beta1=hyper.beta1,
                    beta2=hyper.beta2,
                    weight_decay=hyper.weight_decay,
                    eps=hyper.eps,
                    amsgrad=False,
                    maximize=False,
                )
                parameter.copy_(self._weights(name, parameter))

    def _weights(self, name, parameter) -> torch.Tensor:
        return self.master[name][: parameter.numel()].view(parameter.shape)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {name: self._weights(name, p) for name, p in self.model.named_parameters()}


def _padded(values: torch.Tensor) -> torch.Tensor:
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, -flat.numel() % 16))


@contextlib.contextmanager
def _one_thread():
    """torch's threads cut a tensor into shares, each with a last few elements."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_batches(config, plan, count, *, seed=1, padded=False):
    """Batches of random ids; padded ones with gaps at both ends and labels left out."""
    generator = torch.Generator().manual_seed(seed)
    shape = (plan.batch, plan.seq_len)
    for number in range(count):
        batch = {"input_ids": torch.randint(3, config["vocab_size"], shape, generator=generator)}
        if padded:
            mask = torch.ones(shape, dtype=torch.long)
            mask[0, -plan.seq_len // 3 :] = 0
            mask[-1, : plan.seq_len // 5] = 0
            batch["attention_mask"] = mask
            if number % 2:
                drop = torch.rand(shape, generator=generator) < 0.3
                batch["labels"] = torch.where(drop | (mask == 0), -100, batch["input_ids"])
        yield batch


class Result(NamedTuple):
    """What a plan and the plain loop made of the same model and batches."""

    losses: list[float]
    weights: dict[str, torch.Tensor]
    plain_losses: list[float]
    plain_weights: dict[str, torch.Tensor]
    on_cpu: Callable[[], dict[str, torch.Tensor]]
    """Weights of the plain loop on the CPU."""


def run_both(config, plan, *, steps=3, padded=False, folder=None, **options) -> Result:
    """Train a model by a plan and the plain way. `options`: the trainer's."""
    from slidetune.runtime.trainer import SlidingTrainer

    rule = options.pop("rule", None) or decay_where_it_belongs(AdamW(lr=1e-2, weight_decay=0.1))
    how = {"rule": rule, "accumulation": plan.accumulation, "clip_norm": plan.clip_norm}
    loop = PlainLoop(make_model(config), **how)
    with SlidingTrainer(make_model(config), plan, rule=rule, device=DEVICE, nvme_folder=folder, **options) as trainer:
        batches = list(random_batches(config, plan, steps, padded=padded))
        losses = [(trainer.step(batch), loop.step(batch)) for batch in batches]
        weights = trainer.state_dict()
    return Result(
        [a for a, _ in losses],
        weights,
        [b for _, b in losses],
        loop.state_dict(),
        lambda: weights_on_cpu(make_model(config), batches, **how),
    )


def weights_on_cpu(model, batches, **how) -> dict[str, torch.Tensor]:
    """What the plain loop makes of a model on the CPU."""
    loop = PlainLoop(model, device="cpu", **how)
    for batch in batches:
        loop.step(batch)
    return loop.state_dict()


def assert_equal(result) -> None:
    """Losses and weights are the same, bit for bit (on a GPU: as above)."""
    losses, weights, plain_losses, plain_weights, *on_cpu = result
    assert_same_losses(losses, plain_losses)
    assert_same_weights(weights, plain_weights, *on_cpu)


def assert_same_losses(losses, plain_losses) -> None:
    if DEVICE == "cpu":
        assert losses == plain_losses
    else:
        assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) < _CUDA_LOSS


def assert_same_weights(weights, plain_weights, on_cpu=None) -> None:
    """`on_cpu`: see `Result`; without it a GPU's weights must agree to the tolerance alone."""
    assert weights.keys() == plain_weights.keys()
    if DEVICE == "cpu":
        assert [name for name, value in plain_weights.items() if not torch.equal(weights[name], value)] == []
    else:
        far = _distances(weights, plain_weights)
        if max(far.values()) < _CUDA_WEIGHTS:
            return
        rounding = 0.0 if on_cpu is None else max(_distances(on_cpu(), plain_weights).values())
        wrong = {
            name: distance
            for name, distance in far.items()
            if not distance < max(_CUDA_WEIGHTS, _CUDA_ROUNDING * rounding)
        }
        assert not wrong, f"mean distances, where rounding makes {rounding}: {wrong}"


def _distances(one, other) -> dict[str, float]:
    return {name: float((one[name] - value).abs().mean()) for name, value in other.items()}


def assert_close(result, tolerance: float) -> None:
    """Losses and weights agree to an absolute tolerance."""
    losses, weights, plain_losses, plain_weights, _ = result
    if DEVICE != "cpu":
        assert_equal(result)
        return
    assert max(abs(a - b) for a, b in zip(losses, plain_losses, strict=True)) < tolerance
    assert max(float((weights[n] - v).abs().max()) for n, v in plain_weights.items()) < tolerance
