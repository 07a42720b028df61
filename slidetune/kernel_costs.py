"""Memory, traffic and launches of a unit's kernels, in closed form from its structure.

Per token, in bytes, bf16 unless said otherwise. Two implementations: *eager*, transformers' own modules, and
*fused*, Liger's norm, rotary and gated-activation kernels in their place. The eager formulas follow what
autograd keeps; tests/slidetune/test_kernel_costs.py counts it in real layers, and they agree to a fraction of
a percent. Liger's were read from its source (0.8.5).

Attention is one fused kernel that keeps its operands, its output and one fp32 log-sum-exp a head, never a
score matrix. Gemma 2's soft-capped and gpt-oss's sink attention need such a kernel too (flex attention, or a
FlashAttention that has it); transformers' `eager` attention would add memory quadratic in the sequence.
Where a sliding window is shorter than the sequence, SDPA expands grouped keys and values; that is not counted
either. Dropout is off. Mixtures run as grouped products, transformers' default with torch >= 2.9.

**Checked against a published figure.** SlideFormer's Qwen3-8B (Liger, sequences of 1024) needs 194,872 B of
GPU memory a token in a layer's backward pass (slope of the peaks at batch 16, 32 and 64 of
qwen3_scaling_pr_head.csv, flagos-ai/Megatron-LM-FL PR 97). Counted here, with H the hidden size, Q and K all
heads' queries and keys, I the MLP's width:

    129,320  saved: norm outputs and the second norm's input 6H, queries and keys before their norm 2(Q + K),
             queries, keys, values, attention output 4(Q + K), gate, up and product 6I, fp32 statistics 296
     24,576  gradient of the product, 2I; the gradients of gate and up overwrite them
     40,960  `SLIDEFORMER_BOUNDARY_TENSORS` = 5 tensors of the hidden size
         16  int64 ids and labels
    -------
    194,872

The first two lines are `saved_bytes + backward_bytes` of `liger`. The third depends on the runtime: a layer's
input, its output and the output's gradient are alive in any; the other two were inferred from the fit (an
input ahead and the one just used, if inputs are double-buffered). They are buffers of a schedule, not of a
kernel, so no `KernelCosts` counts them.
"""

from __future__ import annotations

from slidetune.layer_shape import LayerShape, NormKind
from slidetune.model import KernelCosts

SLIDEFORMER_BOUNDARY_TENSORS = 5
"""Tensors of the hidden size on SlideFormer's GPU while a layer's backward pass is at its worst."""

STATISTIC = 4
"""A norm's or a softmax's fp32 statistic."""

# Reads and writes of one element by the kernels of a norm. rms: upcast 6, square 8, mean 4, scale 8, downcast
# 6, weight 4. With the weight in fp32 the last two are 8 and 6. LayerNorm is one kernel, as every fused norm.
NORM_TRAFFIC: dict[NormKind, int] = {"rms": 36, "rms_fp32": 40, "rms_offset": 40, "layer": 4}
NORM_LAUNCHES: dict[NormKind, int] = {"rms": 8, "rms_fp32": 8, "rms_offset": 10, "layer": 1}
# x * cos 4, negate one half 2, concatenate 4, * sin 4, add 6; "cat" puts the untouched part behind it.
ROTARY_TRAFFIC = {"": 0, "full": 20, "cat": 24, "fp32": 36}
ROTARY_LAUNCHES = {"": 0, "full": 10, "cat": 12, "fp32": 12}


def layer_costs(shape: LayerShape, *, fused: bool) -> KernelCosts:
    """A decoder layer's costs. Input and output, and their gradients, are left out."""
    return KernelCosts(
        saved_bytes=_attention_saved(shape, fused) + _norms_saved(shape, fused) + _mlp_saved(shape, fused),
        forward_bytes=_forward(shape, fused),
        backward_bytes=_backward(shape, fused),
        traffic_bytes=_traffic(shape, fused),
        launches=_launches(shape, fused),
    )


def embedding_costs(hidden: int, *, learned_positions: bool) -> KernelCosts:
    """Rows arrive gathered: nothing is computed but the sum with a learned position (two reads, a write)."""
    return KernelCosts(
        saved_bytes=0,
        forward_bytes=0,
        backward_bytes=0,
        traffic_bytes=6 * hidden if learned_positions else 0,
        launches=int(learned_positions),
    )


def head_costs(norm: NormKind, hidden: int, *, fused: bool) -> KernelCosts:
    """The final norm and its output; logits and loss are `ModelSpec.loss_working_bytes`."""
    fused = fused or norm == "layer"
    return KernelCosts(
        saved_bytes=_norm_saved(norm, hidden, 1, fused) + 2 * hidden,
        # The fp32 input and one fp32 result of it.
        forward_bytes=2 * hidden if fused else 8 * hidden,
        # The gradient of the norm's output; the eager norm's backward pass works in fp32.
        backward_bytes=2 * hidden if fused else 16 * hidden,
        traffic_bytes=4 * hidden if fused else NORM_TRAFFIC[norm] * hidden,
        launches=(1 if fused else NORM_LAUNCHES[norm]) + 1,
    )


def _norm_saved(kind: NormKind, width: int, statistics: int, fused: bool) -> int:
    """What a norm keeps beside its input and its output. A fused one: its statistics. RMSNorm: the fp32 input
    and the normalised tensor, in bf16 or (weight in fp32) fp32."""
    if kind == "layer":
        return 2 * STATISTIC * statistics
    if fused:
        return STATISTIC * statistics
    return (6 if kind == "rms" else 8) * width + STATISTIC * statistics


def _norms_saved(shape: LayerShape, fused: bool) -> int:
    """Norms and the tensors between the sub-blocks."""
    h, keeps_input = shape.hidden, fused or shape.norm == "layer"
    count = shape.pre_norms + shape.post_norms
    saved = count * _norm_saved(shape.norm, h, 1, fused) + shape.pre_norms * 2 * h
    # The residual stream between attention and MLP: the input of a norm that keeps its input, or of the MLP.
    if shape.pre_norms != 1 and (keeps_input or shape.pre_norms == 0):
        saved += 2 * h
    # A sub-block's output, as the input of the norm behind it.
    return saved + shape.post_norms * 2 * h * keeps_input


def _attention_saved(shape: LayerShape, fused: bool) -> int:
    q, k = shape.query, shape.key
    # Queries, keys and values as attention reads them, its output, and a log-sum-exp a head.
    saved = 2 * (q + 2 * k) + 2 * q + STATISTIC * shape.heads
    if shape.qk_norm:
        rows = shape.heads + shape.kv_heads if shape.qk_norm == "head" else 2
        saved += _norm_saved(shape.norm, q + k, rows, fused)
        # A norm that keeps its input keeps the projections; the rotary embedding then works in place.
        saved += 2 * (q + k) * (fused or shape.norm == "layer")
    if shape.fused_qkv and shape.rotary:
        # Values are a view of the whole projection, which stays; queries and keys were copied out of it.
        saved += 2 * (q + k)
    # Concatenated queries are laid out head by head, and so is attention's output: joining the heads copies.
    return saved + 2 * q * (shape.rotary == "cat" and not fused)


def _mlp_saved(shape: LayerShape, fused: bool) -> int:
    i, fused = shape.inner, fused and not shape.clamped_glu
    if shape.clamped_glu:
        # Gate and up together, both clamped, sigmoid, gated gate, up + 1, product.
        inner = 14 * i
    elif shape.gated:
        # Gate, up, product; and the activation between gate and product where that is a kernel of its own.
        inner = 6 * i if fused else 4 * i + _activation_saved(shape.activation, i) + 2 * i
    else:
        inner = _activation_saved(shape.activation, i) + 2 * i
    if not shape.experts:
        return inner
    # Each active expert's copy of the token and its result; routing: fp32 probabilities and 8-byte indices.
    per_expert = inner + 4 * shape.hidden + 40
    return shape.active * per_expert + STATISTIC * (shape.experts + 1)


def _activation_saved(name: str, width: int) -> int:
    """An activation's input; `gelu_new` is written out in Python: x, x/2, tanh, 1 + tanh."""
    return 8 * width if name == "gelu_new" else 2 * width


def _forward(shape: LayerShape, fused: bool) -> int:
    """The larger of the moments a forward pass without autograd goes through."""
    h, q, k, i = shape.hidden, shape.query, shape.key, shape.inner
    # Residual stream and normed input; GPT-2's block holds on to attention's output as well.
    beside_mlp = (2 if shape.pre_norms == 0 else 4) * h + 2 * h * (not shape.rotary)
    if shape.experts:
        # Gathered tokens and everything up to the product, or four copies of the results being put in order.
        moment = 4 * h + 18 * i if shape.clamped_glu else 2 * h + (6 if fused else 8) * i
        mlp = shape.active * max(moment, 8 * h)
    elif shape.gated:
        # Gate, up and product, or gate and up in one tensor with activation and product.
        mlp = (8 if shape.fused_qkv and not fused else 6) * i
    else:
        mlp = 8 * i if shape.activation == "gelu_new" else 4 * i
    rotated = 2 * q if fused or not shape.rotary else 6 * q
    attention = 2 * h * (shape.pre_norms > 0) + 2 * (q + 2 * k) + rotated
    # The fp32 input and one fp32 result of it, beside the residual stream.
    norm = 4 * h if fused or shape.norm == "layer" else 10 * h
    return max(beside_mlp + mlp, attention, norm)


def _backward(shape: LayerShape, fused: bool) -> int:
    """Inner gradients where saved tensors and gradients together are at their most."""
    h, i, active = shape.hidden, shape.inner, max(1, shape.active)
    fused_glu = fused and shape.gated and not shape.clamped_glu
    # The product's gradient and both factors', while the saved product is gone already. Fused: the product's.
    mlp = (2 if fused_glu else 4) * i
    if shape.experts:
        mlp = max(mlp + 2 * h, 6 * h)
    # An eager norm works in fp32: the gradients of its two products and of the upcast input.
    post_norm = (2 if fused else 16) * h if shape.post_norms else 0
    # By the time attention is reached the MLP's tensors are gone.
    width = shape.query * (4 if fused else 16 if shape.qk_norm else 10)
    return max(active * mlp, post_norm, width - _mlp_saved(shape, fused))


def _traffic(shape: LayerShape, fused: bool) -> int:
    h, rotated = shape.hidden, shape.query + shape.key
    norm = 4 if fused else NORM_TRAFFIC[shape.norm]
    traffic = norm * (shape.pre_norms + shape.post_norms) * h + norm * rotated * bool(shape.qk_norm)
    traffic += (4 * bool(shape.rotary) if fused else ROTARY_TRAFFIC[shape.rotary]) * rotated
    traffic += 4 * shape.query * (shape.rotary == "cat" and not fused)
    # Two residual additions, each reading two tensors and writing one.
    return traffic + 12 * h + _mlp_traffic(shape, fused)


def _mlp_traffic(shape: LayerShape, fused: bool) -> int:
    activation = 36 if shape.activation == "gelu_new" else 4
    if shape.clamped_glu:
        # Bias rows gathered and added 20, clamps 8, then five products, sums and a sigmoid 24.
        inner = 52 * shape.inner
    elif shape.gated:
        inner = (6 if fused else activation + 6) * shape.inner
    else:
        inner = activation * shape.inner
    if not shape.experts:
        return inner
    # Gather 4, routing weight 4, back in order 4, sum 2; a biased down projection gathers and adds 10 more.
    return shape.active * (inner + (24 if shape.clamped_glu else 14) * shape.hidden)


def _launches(shape: LayerShape, fused: bool) -> int:
    norm = 1 if fused else NORM_LAUNCHES[shape.norm]
    norms = (shape.pre_norms + shape.post_norms + 2 * bool(shape.qk_norm)) * norm
    rotary = bool(shape.rotary) if fused else ROTARY_LAUNCHES[shape.rotary]
    joining_heads = shape.rotary == "cat" and not fused
    projections = 2 if shape.fused_qkv else 4
    # Attention and the two residual additions.
    return norms + rotary + joining_heads + projections + 3 + _mlp_launches(shape, fused)


def _mlp_launches(shape: LayerShape, fused: bool) -> int:
    if shape.experts:
        # As counted in real layers: routing, sorting, two grouped products, the activation, putting in order.
        return (34 if shape.clamped_glu else 22) - (fused and not shape.clamped_glu)
    activation = 8 if shape.activation == "gelu_new" else 1
    if not shape.gated:
        return 2 + activation
    return (2 if shape.fused_qkv else 3) + (1 if fused else activation + 1)
