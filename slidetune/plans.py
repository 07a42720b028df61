"""The decisions: what a person, or the tuner, may choose about a step. Every plan computes the same update.

A plan is a YAML file. The text under each field is the one place that says what the knob means: it becomes the
file's comments, the JSON schema and the CLI's explanations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from slidetune.errors import SlidetuneError
from slidetune.model import ModelSpec
from slidetune.units import GIB, MIB

PLAN_VERSION = 1
# Up to so many tokens a micro-batch, launching a layer's kernels takes about as long as running them on a fast GPU
# (H200 with Liger's kernels: level at 4096 with the host at rest, at 8192 beside CPU Adam).
CAPTURED_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Activations:
    """Where layers keep their saved input between the forward and the backward pass. The others use RAM."""

    gpu: int = 0
    """Layers, counted from the last, whose input stays on the GPU: they need it back the soonest."""
    nvme: int = 0
    """Layers, counted from the first, whose input goes to NVMe: they can wait the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recompute:
    """Layers that do not recompute their inner activations in the backward pass. The others do."""

    keep: int = 0
    """Layers, counted from the last, that keep their inner activations on the GPU."""
    offload: int = 0
    """Layers before those that send them to RAM and bring them back."""
    products: int = 0
    """Layers before those that recompute, but keep on the GPU the products that their MLP begins with (gate and up):
    most of what recomputing takes, for less than half of the memory."""
    middle: int = 0
    """Of the layers that recompute, and whose input is not on NVMe: so many, spread evenly, save the sum of their
    input and attention along with their input. The backward pass then need not make attention's last product again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One way to run an optimizer step of one model at one sequence length."""

    model: str
    """Catalog name, hub id, directory or config.json of the model the plan is for."""
    seq_len: int = 1024
    """Tokens a sequence."""
    micro_batch: int = 1
    """Sequences in one forward pass of one layer."""
    accumulation: int = 1
    """Micro-batches that visit a layer while its weights are on the GPU; the optimizer sees
    micro_batch * accumulation sequences a step, and weights cross the link no more often for it."""
    window: int = 2
    """Weight slots on the GPU that the layers slide through."""
    prefetch: int = 1
    """Units ahead of the computation whose upload is issued; at most window - 1."""
    resident_layers: int = 0
    """Layers, counted from the first, that live on the GPU whole: weights, master and moments. The GPU
    updates them."""
    resident_weights: int = 0
    """Further layers whose weights stay on the GPU while the CPU updates them: one upload a step, not two."""
    optimizer_nvme: int = 0
    """Layers, spread evenly, whose optimizer state lives on NVMe."""
    weights_nvme: int = 0
    """Of those, layers whose weights live on NVMe too."""
    activations: Activations = Activations()
    """Where the layers' saved inputs go."""
    recompute: Recompute = Recompute()
    """What layers keep, or save, in place of recomputing it."""
    chunk_bytes: int = 64 * MIB
    """Bytes of bf16 gradient that come down at a time; Adam follows chunk by chunk."""
    adam_threads: int = 8
    """CPU threads for Adam."""
    update: Literal["backward", "forward"] = "backward"
    """When Adam runs. backward: as each gradient arrives (fastest). forward: just before the layer's next
    forward pass, when the global gradient norm is known, so clipping is exact."""
    late_updates: int = 0
    """Layers, spread evenly over those the CPU updates, whose update waits for the next forward pass: Adam then
    works all through the step. For update: backward; costs their gradients in RAM."""
    gradient_ring: int = 1
    """Layers whose gradients may wait in RAM for Adam while the GPU goes on. For update: backward, where they come
    down through a ring of chunks."""
    clip_norm: float | None = None
    """Largest global gradient norm; needs update: forward. None leaves gradients as they are."""
    gpu_memory_gib: float | None = None
    """GPU memory the plan may use, enforced by the runtime; None for all there is."""
    version: Literal[1] = PLAN_VERSION
    """Version of this file format."""

    @property
    def batch(self) -> int:
        """Sequences an optimizer step."""
        return self.micro_batch * self.accumulation

    @property
    def tokens(self) -> int:
        """Tokens an optimizer step."""
        return self.batch * self.seq_len

    @property
    def gpu_memory_bytes(self) -> int | None:
        return None if self.gpu_memory_gib is None else int(self.gpu_memory_gib * GIB)


def problems(plan: Plan, model: ModelSpec) -> list[str]:
    """What is wrong with a plan for this model, one sentence a fault; empty when it is sound."""
    layers = len(model.layers)
    # Not below 0: a count out of range is one fault, not one for each limit reckoned from it.
    sliding = max(0, layers - plan.resident_layers)
    named = plan.recompute.keep + plan.recompute.offload + plan.recompute.products
    found = [
        f"{name} must be at least {least}, not {value}."
        for name, value, least in (
            ("seq_len", plan.seq_len, 1),
            ("micro_batch", plan.micro_batch, 1),
            ("accumulation", plan.accumulation, 1),
            ("window", plan.window, 1),
            ("prefetch", plan.prefetch, 0),
            ("resident_layers", plan.resident_layers, 0),
            ("resident_weights", plan.resident_weights, 0),
            ("late_updates", plan.late_updates, 0),
            ("gradient_ring", plan.gradient_ring, 1),
            ("optimizer_nvme", plan.optimizer_nvme, 0),
            ("weights_nvme", plan.weights_nvme, 0),
            ("activations.gpu", plan.activations.gpu, 0),
            ("activations.nvme", plan.activations.nvme, 0),
            ("recompute.keep", plan.recompute.keep, 0),
            ("recompute.offload", plan.recompute.offload, 0),
            ("recompute.products", plan.recompute.products, 0),
            ("recompute.middle", plan.recompute.middle, 0),
            ("chunk_bytes", plan.chunk_bytes, 4096),
            ("adam_threads", plan.adam_threads, 1),
        )
        if value < least
    ]
    limits = (
        (
            plan.prefetch > max(0, plan.window - 1),
            f"prefetch ({plan.prefetch}) must be below window ({plan.window}).",
        ),
        (
            plan.resident_layers > layers,
            f"resident_layers ({plan.resident_layers}) exceeds the model's {layers} layers.",
        ),
        (
            plan.optimizer_nvme > sliding,
            f"optimizer_nvme ({plan.optimizer_nvme}) exceeds the {sliding} layers that are not resident.",
        ),
        (
            plan.weights_nvme > max(0, plan.optimizer_nvme),
            f"weights_nvme ({plan.weights_nvme}) exceeds optimizer_nvme ({plan.optimizer_nvme}), "
            "of which it is a part.",
        ),
        (
            plan.resident_weights > sliding - plan.weights_nvme,
            f"resident_weights ({plan.resident_weights}) exceeds the {sliding - plan.weights_nvme} layers "
            "that are neither resident nor on NVMe whole.",
        ),
        (
            plan.late_updates > sliding,
            f"late_updates ({plan.late_updates}) exceeds the {sliding} layers that are not resident.",
        ),
        (
            plan.late_updates > 0 and plan.update != "backward",
            "late_updates needs update: backward; with update: forward every update waits.",
        ),
        (
            plan.gradient_ring > 1 and plan.update != "backward",
            "gradient_ring needs update: backward; with update: forward every gradient has a place of its own.",
        ),
        (
            plan.gradient_ring > max(1, sliding - plan.late_updates),
            f"gradient_ring ({plan.gradient_ring}) exceeds the {max(0, sliding - plan.late_updates)} layers whose "
            "gradients come down through it.",
        ),
        (
            plan.activations.gpu + plan.activations.nvme > layers,
            f"activations place {plan.activations.gpu + plan.activations.nvme} layers, the model has {layers}.",
        ),
        (
            named > layers,
            f"recompute names {named} layers, the model has {layers}.",
        ),
        (
            plan.recompute.middle > sum(may_save_middle(plan, layers)),
            f"recompute.middle ({plan.recompute.middle}) exceeds the {sum(may_save_middle(plan, layers))} layers that "
            "recompute and whose input is not on NVMe.",
        ),
        (
            plan.recompute.products > 0 and not all(unit.product_elements for unit in model.layers),
            f"recompute.products must be 0: layers of {model.name} have no such products to keep by themselves.",
        ),
        (
            plan.recompute.middle > 0 and not all(unit.middle_elements for unit in model.layers),
            f"recompute.middle must be 0: layers of {model.name} have no sum of their input and attention alone.",
        ),
        (
            plan.seq_len > model.max_seq_len,
            f"seq_len ({plan.seq_len}) exceeds the model's {model.max_seq_len} positions.",
        ),
        (
            plan.clip_norm is not None and plan.update != "forward",
            "clip_norm needs update: forward; with update: backward, layers are updated before the norm of "
            "all gradients is known.",
        ),
        (plan.clip_norm is not None and not plan.clip_norm > 0, "clip_norm must be above 0."),
        (
            plan.gpu_memory_gib is not None and not (math.isfinite(plan.gpu_memory_gib) and plan.gpu_memory_gib > 0),
            "gpu_memory_gib must be above 0.",
        ),
    )
    return found + [text for wrong, text in limits if wrong]


def check(plan: Plan, model: ModelSpec) -> None:
    """Raise SlidetuneError, naming every fault, unless the plan is sound for this model."""
    found = problems(plan, model)
    if found:
        raise SlidetuneError(f"this plan cannot be built for {model.name}: " + " ".join(found))


class Placement(NamedTuple):
    """What a plan decides about one layer. Tiers are "gpu", "ram" or "nvme"."""

    resident: bool
    """Whole on the GPU, updated by it."""
    weights: str
    """Tier the weights live in between uses: gpu where they stay, else ram or nvme."""
    optimizer: str
    """Tier of master remainder and moments."""
    saved_input: str
    """Tier of the layer's input between forward and backward; "none" where no backward pass follows."""
    inner: Literal["recompute", "keep", "offload"]
    """What happens to the inner activations."""
    products: bool
    """The products that the MLP begins with are kept, though the layer recomputes."""
    middle: bool
    """The sum in the layer's middle is saved with its input, so that recomputation need not make it."""


def spread(chosen: int, of: int) -> list[bool]:
    """`chosen` of `of` places, as evenly as whole numbers allow: spread(2, 4) is F, T, F, T."""
    return [(i + 1) * chosen // of > i * chosen // of for i in range(of)]


def place_layers(plan: Plan, layers: int) -> list[Placement]:
    """Every layer's placement, first to last.

    Layers on NVMe are spread evenly so that the drive works all through the step; residents come first,
    since theirs are the gradients the CPU would otherwise get last and owe soonest.
    """
    sliding = layers - plan.resident_layers
    resident = [True] * plan.resident_layers + [False] * sliding
    lead = [False] * plan.resident_layers
    optimizer_nvme = lead + spread(plan.optimizer_nvme, sliding)
    weights_nvme = _spread_within(optimizer_nvme, plan.weights_nvme)
    stays = _spread_within(
        [not r and not w for r, w in zip(resident, weights_nvme, strict=True)], plan.resident_weights
    )
    last_kept = layers - plan.recompute.keep
    last_offloaded = last_kept - plan.recompute.offload
    middle = _spread_within(may_save_middle(plan, layers), plan.recompute.middle)
    return [
        Placement(
            resident=resident[i],
            weights="gpu" if resident[i] or stays[i] else "nvme" if weights_nvme[i] else "ram",
            optimizer="gpu" if resident[i] else "nvme" if optimizer_nvme[i] else "ram",
            saved_input="gpu" if i >= layers - plan.activations.gpu else "nvme" if i < plan.activations.nvme else "ram",
            inner="keep" if i >= last_kept else "offload" if i >= last_offloaded else "recompute",
            products=last_offloaded - plan.recompute.products <= i < last_offloaded,
            middle=middle[i],
        )
        for i in range(layers)
    ]


def kept_nothing(placements: Sequence[Placement]) -> list[Placement]:
    """The placements of a forward pass that no backward pass follows: weights where they are, nothing saved."""
    return [place._replace(saved_input="none", inner="recompute", products=False, middle=False) for place in placements]


def late_units(plan: Plan, model: ModelSpec) -> frozenset[int]:
    """Units whose update on the CPU waits for the next step's forward pass."""
    if plan.update == "forward":
        return frozenset(unit.index for unit in model.units)
    sliding = model.layers[plan.resident_layers :]
    chosen = spread(plan.late_updates, len(sliding)) if sliding else []
    return frozenset(unit.index for unit, late in zip(sliding, chosen, strict=True) if late)


def captured(plan: Plan, model: ModelSpec) -> bool:
    """Whether passes of layers run as CUDA graphs, which are launched as one kernel is: those of small micro-batches.

    Their kernels have to be the same in every step: a mixture's are not, nor are passes with dropout, or those whose
    inner activations leave the GPU, since they come back elsewhere.
    """
    small = plan.micro_batch * plan.seq_len <= CAPTURED_TOKENS
    return small and model.same_kernels and not plan.recompute.offload


def may_save_middle(plan: Plan, layers: int) -> list[bool]:
    """The layers that may save the sum in their middle."""
    recomputing = layers - plan.recompute.keep - plan.recompute.offload
    return [plan.activations.nvme <= i < recomputing for i in range(layers)]


def _spread_within(eligible: list[bool], chosen: int) -> list[bool]:
    """Spread `chosen` evenly over the eligible places."""
    picks = iter(spread(chosen, sum(eligible)))
    return [ok and next(picks) for ok in eligible]


def knobs(plan: Plan) -> dict[str, object]:
    """The plan flattened: {"window": 2, "activations.gpu": 0, ...}, in the order of its fields."""
    flat: dict[str, object] = {}
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{field.name}.{k}": v for k, v in dataclasses.asdict(value).items()}
        else:
            flat[field.name] = value
    return flat
