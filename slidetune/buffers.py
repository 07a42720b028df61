"""Every buffer of a plan, sized to the byte: arithmetic alone, so it is known before anything is simulated.

The builder hands out the slots of these pools; the runtime allocates them; the tuner asks only whether they fit.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from slidetune.model import (
    BF16_BYTES,
    FP32_BYTES,
    OPTIMIZER_BYTES_PER_PARAM,
    STATE_BYTES_PER_PARAM,
    ModelSpec,
    Unit,
)
from slidetune.plans import Plan, captured, late_units, place_layers
from slidetune.schedule import Pool

# Saved inputs on their way up: one in use, one arriving.
LOAD_SLOTS = 2
# One layer's gradient comes down while the next one's is computed.
GRADIENT_SLOTS = 2
# What cuBLAS takes for itself: 32 MiB a handle on Hopper, of which three are in use. Eleven runs on an H200 had 93 to
# 105 MiB more than their buffers; other GPUs take less.
WORKSPACES, WORKSPACE_BYTES = "workspaces", 96 * 2**20
# What autograd keeps of a layer from its forward to its backward pass, as far as it stays on the GPU.
KEPT = "kept activations"
# Of the products that an MLP begins with alone, where the rest is recomputed.
PRODUCTS = "kept products"
# Optimizer state between NVMe and Adam: read ahead, updated, written back, and one to spare.
STATE_STAGING_SLOTS = 4


def chunk_params(plan: Plan) -> int:
    """Parameters whose bf16 gradient makes one chunk."""
    return plan.chunk_bytes // BF16_BYTES


def gradient_bytes(plan: Plan) -> int:
    """Bytes a parameter of a layer's gradient on the GPU: fp32 where micro-batches add up, else bf16."""
    return FP32_BYTES if plan.accumulation > 1 else BF16_BYTES


def pools(model: ModelSpec, plan: Plan, kernels: str = "eager") -> list[Pool]:
    """All pools of all tiers, empty ones left out. What never changes hands is a pool of one slot."""
    held = _held_params(model, plan)
    micro_batches = plan.accumulation
    hidden = model.hidden_bytes(plan.micro_batch, plan.seq_len)
    inner = max(u.kernels(kernels).saved_bytes for u in model.layers) * plan.micro_batch * plan.seq_len
    products = max(u.product_bytes(plan.micro_batch, plan.seq_len) for u in model.layers)
    largest = max(u.params for u in model.layers)
    chunk = max(1, min(chunk_params(plan), max(largest, model.head_gradient_elements)))
    vocab = model.embedding.params + model.head.params
    frozen = model.embedding.frozen + model.head.frozen
    middles = Counter(place.saved_input for place in place_layers(plan, len(model.layers)) if place.middle)
    saved_in_ram = len(model.layers) - plan.activations.gpu - plan.activations.nvme
    deferred = plan.update == "forward"
    late = late_units(plan, model)
    in_chunks = model.units[plan.resident_layers + 1 :]
    waiting = sum(unit.params for unit in (model.embedding, *in_chunks) if unit.index in late)
    at_once = [unit for unit in in_chunks if unit.params and unit.index not in late]
    state_bytes = STATE_BYTES_PER_PARAM if held.whole_on_nvme else OPTIMIZER_BYTES_PER_PARAM

    gpu = [
        ("weights", min(plan.window, held.sliding_layers), BF16_BYTES * held.largest_sliding),
        ("gradients", min(GRADIENT_SLOTS, len(model.layers)), gradient_bytes(plan) * largest),
        ("head weights", 1, BF16_BYTES * model.head.weight_elements),
        # The chunked loss adds the head's gradient up over token chunks: always fp32.
        ("head gradient", 1, FP32_BYTES * model.head_gradient_elements),
        ("hidden states", micro_batches + LOAD_SLOTS, hidden),
        ("saved inputs", plan.activations.gpu * micro_batches, hidden),
        ("middles", LOAD_SLOTS if middles["ram"] else 0, hidden),
        ("saved middles", middles["gpu"] * micro_batches, hidden),
        (KEPT, plan.recompute.keep * micro_batches, inner),
        (PRODUCTS, plan.recompute.products * micro_batches, products),
        ("activations in transit", LOAD_SLOTS if plan.recompute.offload else 0, inner),
        ("resident layers", 1, STATE_BYTES_PER_PARAM * held.resident + BF16_BYTES * held.resident_frozen),
        ("resident weights", 1, BF16_BYTES * held.staying),
        ("resident gradients", 1 if deferred else 0, BF16_BYTES * held.resident),
        (WORKSPACES, 1, WORKSPACE_BYTES),
    ]
    row_gradients = ("row gradients", 1, gradient_bytes(plan) * model.hidden_size * _most_rows(model, plan))
    page_locked = [
        ("weights (bf16)", 1, BF16_BYTES * (held.in_ram + vocab + frozen)),
        ("waiting gradients", 1, BF16_BYTES * waiting),
        ("gradient ring", plan.gradient_ring * -(-largest // chunk) + 2 if at_once else 0, BF16_BYTES * chunk),
        # A tied matrix gets its gradient twice, from the head and from the rows: it waits here in between.
        ("tied gradient", 0 if deferred or not model.tied else 1, BF16_BYTES * model.embedding.params),
        ("embedding rows", 2, micro_batches * hidden),
        ("saved inputs (RAM)", saved_in_ram * micro_batches, hidden),
        ("saved middles (RAM)", middles["ram"] * micro_batches, hidden),
        ("inner activations (RAM)", plan.recompute.offload * micro_batches, inner),
        ("weight staging", 2 if held.whole_on_nvme else 0, BF16_BYTES * max(u.owned for u in model.layers)),
        ("input staging", micro_batches + 2 if plan.activations.nvme else 0, hidden),
    ]
    pageable = [
        ("optimizer state", 1, OPTIMIZER_BYTES_PER_PARAM * (held.by_cpu - held.on_nvme + vocab)),
        ("state staging", STATE_STAGING_SLOTS if held.on_nvme else 0, state_bytes * min(chunk, largest)),
    ]
    # Summed on the device they come over the link; those of several micro-batches are added up here.
    (pageable if plan.accumulation > 1 else page_locked).append(row_gradients)
    nvme = [
        ("optimizer state (NVMe)", 1, OPTIMIZER_BYTES_PER_PARAM * held.on_nvme),
        ("weights (NVMe)", 1, BF16_BYTES * held.whole_on_nvme),
        ("saved inputs (NVMe)", plan.activations.nvme * micro_batches, hidden),
    ]
    # Memory that replays write to is theirs for good.
    transient = () if captured(plan, model) else (KEPT, PRODUCTS)
    return [
        Pool(name=name, tier=tier, slots=slots, slot_bytes=slot_bytes, page_locked=locked, transient=name in transient)
        for tier, locked, rows in (
            ("gpu", False, gpu),
            ("ram", True, page_locked),
            ("ram", False, pageable),
            ("nvme", False, nvme),
        )
        for name, slots, slot_bytes in rows
        if slots > 0 and slot_bytes > 0
    ]


def forward_working_bytes(unit: Unit, plan: Plan, kernels: str, *, kept: bool, products: bool = False) -> int:
    """GPU memory a layer's forward pass of one micro-batch needs beside its pools. Where its inner activations are
    kept, or offloaded, they have a pool: no more is needed beside it than by the backward pass. So have its MLP's
    first products, where those are kept alone."""
    costs = unit.kernels(kernels)
    working = (costs.backward_bytes if kept else costs.forward_bytes) * plan.micro_batch * plan.seq_len
    return max(0, working - _products_held(unit, plan, products))


def recompute_working_bytes(unit: Unit, plan: Plan, kernels: str, *, products: bool = False) -> int:
    """The same where autograd keeps what the backward pass will need."""
    saved = unit.kernels(kernels).saved_bytes * plan.micro_batch * plan.seq_len
    return saved - _products_held(unit, plan, products)


def backward_working_bytes(unit: Unit, plan: Plan, kernels: str, *, recomputed: bool, products: bool = False) -> int:
    """The same of a layer's backward pass: inner gradients, one weight's gradient on its way to the
    accumulator, and what was recomputed."""
    working = unit.kernels(kernels).backward_bytes * plan.micro_batch * plan.seq_len
    if recomputed:
        working += recompute_working_bytes(unit, plan, kernels, products=products)
    return working + BF16_BYTES * unit.largest_tensor


def _products_held(unit: Unit, plan: Plan, products: bool) -> int:
    return unit.product_bytes(plan.micro_batch, plan.seq_len) if products else 0


def head_working_bytes(model: ModelSpec, plan: Plan, kernels: str) -> int:
    """The same of final norm, head and chunked loss, forward and backward."""
    tokens = plan.micro_batch * plan.seq_len
    costs = model.head.kernels(kernels)
    # Norm, head and loss of one chunk; the gradient of its hidden states is made beside them.
    per_token = costs.saved_bytes + costs.backward_bytes + BF16_BYTES * model.hidden_size
    return model.loss_working_bytes(tokens) + per_token * model.loss_chunk_tokens(tokens)


def loss_working_bytes(model: ModelSpec, plan: Plan, kernels: str) -> int:
    """The same of final norm, head and chunked loss where no backward pass follows."""
    tokens = plan.micro_batch * plan.seq_len
    return model.loss_working_bytes(tokens) + model.head.kernels(kernels).forward_bytes * model.loss_chunk_tokens(
        tokens
    )


def working_bytes(model: ModelSpec, plan: Plan, kernels: str = "eager") -> int:
    """The largest working set of any GPU task of the plan."""
    return max(_working_sets(model, plan, kernels))


def _working_sets(model: ModelSpec, plan: Plan, kernels: str) -> tuple[int, int, int]:
    """The largest working sets: of tasks beside which kept activations lie; of layers that keep products and recompute
    the rest; and of those that recompute all. The last come first in the forward pass, and in the backward pass when
    what was kept is used up."""
    recomputing = len(model.layers) - plan.recompute.keep - plan.recompute.offload
    # Layers of one kind share a figure; a dictionary keeps the arithmetic short for deep models.
    kinds = {
        (id(u.kernels(kernels)), u.largest_tensor, which): (u, which)
        for i, u in enumerate(model.layers)
        for which in [
            "kept" if i >= recomputing else "products" if i >= recomputing - plan.recompute.products else "all"
        ]
    }
    most = {"kept": head_working_bytes(model, plan, kernels), "products": 0, "all": 0}
    for unit, which in kinds.values():
        kept, products = which == "kept", which == "products"
        most[which] = max(
            most[which],
            forward_working_bytes(unit, plan, kernels, kept=kept, products=products),
            backward_working_bytes(unit, plan, kernels, recomputed=not kept, products=products),
        )
    return most["kept"], most["products"], most["all"]


def peak_bytes(model: ModelSpec, plan: Plan, kernels: str = "eager") -> dict[str, int]:
    """What each tier must hold at most: its pools, and on the GPU working sets beside them."""
    total = {"gpu": 0, "ram": 0, "nvme": 0}
    kept = {KEPT: 0, PRODUCTS: 0}
    for pool in pools(model, plan, kernels):
        if pool.transient:
            kept[pool.name] = pool.bytes
        else:
            total[pool.tier] += pool.bytes
    beside, with_products, apart = _working_sets(model, plan, kernels)
    total["gpu"] += max(kept[KEPT] + kept[PRODUCTS] + beside, kept[PRODUCTS] + with_products, apart)
    return total


def _most_rows(model: ModelSpec, plan: Plan) -> int:
    """Rows of the embedding that one step may read: of the vocabulary, and of a table of positions if there is one."""
    if not model.embedding.params:
        return 0
    further = model.embedding.params // model.hidden_size - model.vocab_size
    return min(plan.tokens, model.vocab_size) + min(plan.tokens, further)


@dataclass(slots=True)
class _HeldParams:
    """Parameters of the layers by where a plan keeps them: trained ones, and all where weights are counted."""

    resident: int = 0
    resident_frozen: int = 0
    by_cpu: int = 0
    on_nvme: int = 0
    staying: int = 0
    """Frozen ones too, as in all that follow."""
    in_ram: int = 0
    whole_on_nvme: int = 0
    sliding_layers: int = 0
    largest_sliding: int = 0


def _held_params(model: ModelSpec, plan: Plan) -> _HeldParams:
    held = _HeldParams()
    for unit, place in zip(model.layers, place_layers(plan, len(model.layers)), strict=True):
        if place.resident:
            held.resident += unit.params
            held.resident_frozen += unit.frozen
            continue
        held.by_cpu += unit.params
        if place.weights == "gpu":
            held.staying += unit.owned
        else:
            held.sliding_layers += 1
            held.largest_sliding = max(held.largest_sliding, unit.owned)
        if place.optimizer == "nvme":
            held.on_nvme += unit.params
        if place.weights == "nvme":
            held.whole_on_nvme += unit.owned
        else:
            held.in_ram += unit.owned
    return held
