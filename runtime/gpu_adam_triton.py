"""The Triton kernel of `gpu_adam`. The arithmetic is defined in `adam`: each operation is rounded once, so the compiler
may not fuse what isn't written as fma."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slidetune.runtime.adam import Coefficients

_BLOCK = 2048


@triton.jit
def _quiet(x):
    """Every NaN as 0x7FC00000, as bits."""
    return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _adam(
    high,
    low,
    exp_avg,
    exp_avg_sq,
    grad,
    count,
    grad_scale,
    lerp,
    beta2,
    one_minus_beta2,
    sqrt_correction2,
    eps,
    step_size,
    decay,
    lerp_from_grad: tl.constexpr,
    block: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    g = tl.load(grad + at, inside).to(tl.bfloat16).to(tl.float32) * grad_scale
    m = tl.load(exp_avg + at, inside)
    signed = tl.load(exp_avg_sq + at, inside).to(tl.int32, bitcast=True)
    v = (signed & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    upper = (tl.load(high + at, inside).to(tl.int32) + tl.where(signed < 0, 1, 0)) << 16
    p = (upper + tl.load(low + at, inside).to(tl.int32)).to(tl.float32, bitcast=True)
    start = g if lerp_from_grad else m
    m = tl.fma(tl.full((block,), 1.0, tl.float32) * lerp, g - m, start)
    v = tl.fma(g * one_minus_beta2, g, v * beta2)
    denominator = tl.div_rn(tl.sqrt_rn(v), tl.full((block,), 1.0, tl.float32) * sqrt_correction2) + eps
    p = p * decay - tl.div_rn(m * step_size, denominator)
    bits = _quiet(p)
    tl.store(exp_avg + at, _quiet(m).to(tl.float32, bitcast=True), inside)
    # A tie that goes down to even is marked by the sign of the second moment.
    down = tl.where((bits & 0x1FFFF) == 0x8000, 1, 0) << 31
    tl.store(exp_avg_sq + at, (_quiet(v) | down).to(tl.float32, bitcast=True), inside)
    tl.store(high + at, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16), inside)
    tl.store(low + at, bits.to(tl.int16), inside)


def launch(high: Tensor, low: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, grad: Tensor, c: Coefficients) -> None:
    """One update in place on the current stream; arguments as `gpu_adam.adam_step_gpu` has checked them."""
    if not high.numel():
        return
    with torch.cuda.device(high.device):
        _adam[triton.cdiv(high.numel(), _BLOCK),](
            high.view(torch.int16),
            low,
            exp_avg,
            exp_avg_sq,
            grad,
            high.numel(),
            c.grad_scale,
            c.lerp,
            c.beta2,
            c.one_minus_beta2,
            c.sqrt_correction2,
            c.eps,
            c.step_size,
            c.decay,
            lerp_from_grad=c.lerp_from_grad,
            block=_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
