"""What a model is to a planner: units that slide through the GPU, and what each costs.

A `ModelSpec` is a list of units: the embedding, every decoder layer, and final norm + head. Layers may
differ (sliding and full attention, dense and mixture-of-experts), so every figure belongs to a unit and none
to "a layer". This module holds the vocabulary and the arithmetic; `slidetune.families` fills it in from a
Hugging Face config.

Not here: time. What a FLOP or a byte costs is the `HardwareProfile`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

BF16_BYTES = 2
FP32_BYTES = 4

# Master and two moments in fp32. The master is stored as its bf16 half and a 16-bit remainder.
STATE_BYTES_PER_PARAM = 12
# What of those 12 is not the bf16 weights themselves: remainder and moments.
OPTIMIZER_BYTES_PER_PARAM = STATE_BYTES_PER_PARAM - BF16_BYTES

# The chunked loss keeps about this many bytes of logits alive at a time, however long the sequence. Every chunk passes
# over the head's matrix and its gradient: smaller ones cost time.
LOSS_CHUNK_BYTES = 512 * 2**20

UnitKind = Literal["embedding", "layer", "head"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelCosts:
    """What one token costs inside a unit under one implementation of norms, rotary embedding and activation.

    All figures are per token of one forward pass; bytes, except `launches` (per forward, any batch).
    """

    saved_bytes: int
    """Tensors autograd keeps from forward to backward; the unit's input is not among them."""
    forward_bytes: int
    """Largest live set of a forward pass without autograd, input and output excluded."""
    backward_bytes: int
    """Gradients of inner tensors live at the backward pass's worst moment, on top of what was saved. The
    unit's input and output and their gradients are not among them: those are buffers of the schedule."""
    traffic_bytes: int
    """Device-memory traffic of the memory-bound kernels (norms, rotary, activation, residual)."""
    launches: int
    """Kernels launched by one forward pass: the floor of a small batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One unit of the sliding window. Sizes are counts of elements unless named otherwise."""

    index: int
    """Position in the model: 0 is the embedding, 1..n the layers, n+1 the head."""
    kind: UnitKind
    params: int
    """Parameters the unit owns and trains. A tied head owns only its norm: the embedding owns the matrix."""
    frozen: int = 0
    """Parameters the unit owns and leaves as they are: no gradient, no optimizer state."""
    weight_elements: int
    """Elements that must be on the GPU to compute: all of a layer, a head's matrix even when tied, and none
    of the embedding, whose rows are gathered on the host."""
    largest_tensor: int
    """Elements of the unit's largest single weight: the transient gradient autograd makes before it is
    added to the accumulator."""
    matmul_elements: int
    """Weight elements one token is multiplied with (of a mixture, the active experts only)."""
    left_out_elements: int = 0
    """Of these, those of a layer's last product where it is only added to the residual: a gradient needs no term of a
    sum, so recomputation leaves it out."""
    middle_elements: int = 0
    """Those of attention's last product, where a saved sum of it and the residual can take its place: recomputation
    then leaves it out too. 0 where layers have no such sum."""
    product_elements: int = 0
    """Those of the products that the MLP begins with (gate and up), where what came of them can be kept and
    recomputation goes without. 0 where layers aren't made so."""
    product_width: int = 0
    """Elements a token of what comes of them."""
    attention_width: int = 0
    """Query heads times head size; 0 where there is no attention."""
    attention_span: int | None = None
    """Tokens a query may look back on, itself included (sliding window); None for all before it."""
    eager: KernelCosts
    """With transformers' own modules."""
    liger: KernelCosts
    """With Liger's fused norm, rotary and gated-activation kernels."""

    @property
    def owned(self) -> int:
        """Parameters the unit owns, trained or not."""
        return self.params + self.frozen

    def kernels(self, name: str) -> KernelCosts:
        """The costs under `name`, "eager" or "liger"."""
        return self.liger if name == "liger" else self.eager

    def mean_context(self, seq_len: int) -> float:
        """Mean number of keys a query attends to in a causal sequence of `seq_len` tokens."""
        span = min(self.attention_span or seq_len, seq_len)
        # The first `span` queries see 1..span keys, the others exactly `span`.
        return (span * (span + 1) / 2 + (seq_len - span) * span) / seq_len

    def attention_flops(self, sequences: int, seq_len: int) -> float:
        """FLOPs of the two attention products of a forward pass (2 per multiply-add)."""
        return 4.0 * self.attention_width * self.mean_context(seq_len) * sequences * seq_len

    def matmul_flops(self, sequences: int, seq_len: int) -> float:
        """FLOPs of a forward pass in weight products (2 per multiply-add)."""
        return 2.0 * self.matmul_elements * sequences * seq_len

    def forward_flops(self, sequences: int, seq_len: int) -> float:
        """FLOPs of a forward pass of `sequences` sequences of `seq_len` tokens."""
        return self.matmul_flops(sequences, seq_len) + self.attention_flops(sequences, seq_len)

    def recompute_flops(self, sequences: int, seq_len: int, *, middle: bool = False, products: bool = False) -> float:
        """FLOPs of a forward pass that only a backward pass needs. `middle`: the sum in its middle was saved;
        `products`: those that the MLP begins with were."""
        left_out = self.left_out_elements + self.middle_elements * middle + self.product_elements * products
        return self.forward_flops(sequences, seq_len) - 2.0 * left_out * sequences * seq_len

    def product_bytes(self, sequences: int, seq_len: int) -> int:
        """Bytes of what comes of the products that the MLP begins with, in bf16."""
        return BF16_BYTES * self.product_width * sequences * seq_len

    def backward_flops(self, sequences: int, seq_len: int) -> float:
        """FLOPs of a backward pass: twice the weight products, or once for frozen weights; attention 2.5 times,
        since FlashAttention's backward recomputes the scores (five products for the forward's two; arXiv
        2307.08691)."""
        trained = self.params / self.owned if self.frozen else 1.0
        return (1.0 + trained) * self.matmul_flops(sequences, seq_len) + 2.5 * self.attention_flops(sequences, seq_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder-only model as units. `units[0]` is the embedding, `units[-1]` final norm + head."""

    name: str
    family: str
    """The config's `model_type`."""
    hidden_size: int
    vocab_size: int
    tied: bool
    """The head reads the embedding's matrix."""
    max_seq_len: int
    units: tuple[Unit, ...]
    same_kernels: bool = False
    """Every step's passes launch the same kernels with the same arguments: there are no experts and no dropout, and
    the family is known."""

    @property
    def layers(self) -> tuple[Unit, ...]:
        return self.units[1:-1]

    @property
    def embedding(self) -> Unit:
        return self.units[0]

    @property
    def head(self) -> Unit:
        return self.units[-1]

    @property
    def params(self) -> int:
        return sum(unit.params for unit in self.units)

    @property
    def active_params(self) -> int:
        """Parameters a token is multiplied with, the embedding's row lookup excluded."""
        return sum(unit.matmul_elements for unit in self.units)

    @property
    def head_gradient_elements(self) -> int:
        """Elements whose gradient the head computes: its own, and a tied matrix."""
        return self.head.params + (self.vocab_size * self.hidden_size if self.tied and self.embedding.params else 0)

    def hidden_bytes(self, sequences: int, seq_len: int) -> int:
        """Bytes of one unit boundary's activations in bf16: [sequences, seq_len, hidden_size]."""
        return BF16_BYTES * self.hidden_size * sequences * seq_len

    def loss_chunk_tokens(self, tokens: int) -> int:
        """Tokens whose logits exist at a time in the head's chunked loss."""
        # A power of two divides most batches into equal chunks, and matrix kernels like it: on an H100 a Qwen3-4B
        # takes 6 % longer in chunks of 1,664 tokens than of 2,048.
        about = max(1, round(math.log2(LOSS_CHUNK_BYTES / (BF16_BYTES * self.vocab_size))))
        return min(tokens, 2**about)

    def loss_working_bytes(self, tokens: int) -> int:
        """Bytes alive in the chunked loss: logits in bf16, whose place their gradient takes."""
        return self.loss_chunk_tokens(tokens) * self.vocab_size * BF16_BYTES


def recomputed_whole(model: ModelSpec) -> ModelSpec:
    """The model if recomputation left nothing out."""
    return replace(model, units=tuple(replace(unit, left_out_elements=0) for unit in model.units))


def untrained(model: ModelSpec) -> ModelSpec:
    """The model with all of its parameters frozen."""
    return replace(model, units=tuple(replace(unit, params=0, frozen=unit.owned) for unit in model.units))


def with_frozen(model: ModelSpec, frozen: Sequence[int]) -> ModelSpec:
    """The model with so many parameters of each unit frozen; an embedding is frozen whole or not at all."""
    units = tuple(
        replace(unit, params=unit.params - count, frozen=count) if count else unit
        for unit, count in zip(model.units, frozen, strict=True)
    )
    return replace(model, units=units)
