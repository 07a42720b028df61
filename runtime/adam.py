"""AdamW over a split master on the CPU.

**The arithmetic**, the same for every implementation and every element. All in fp32, each operation rounded once to
nearest even; fma(a, b, c) is a * b + c rounded once; the coefficients are computed in fp64 and rounded once to fp32
(`Coefficients`):

    g  = fp32(grad) * grad_scale
    m' = fma(1 - beta1, g - m, m)                    if 1 - beta1 < 0.5, else fma((1 - beta1) - 1, g - m, g)
    v' = fma((1 - beta2) * g, g, v * beta2)
    d  = sqrt(v') / sqrt(1 - beta2**step) + eps
    p' = p * (1 - lr * weight_decay) - (lr / (1 - beta1**step) * m') / d

A NaN among m', v', p' is stored as 0x7FC00000 (`split` says why). The sign of v, which has none, keeps the master's
`down` bit: v is read as its absolute value.

This is what the vectorised loop of `torch._fused_adamw_` computes on an fp32 master with AVX2 or AVX-512, bit for
bit. torch itself departs from it in the last `numel % 16` elements of each thread's share, which it computes in fp64,
so that its result depends on where a tensor is cut; ours does not. torch's single-tensor AdamW
(`foreach=False, fused=False`) has the same m and v; its square root is MKL's, which is not correctly rounded, so its
parameters may differ by a last bit and with the vendor of the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from slidetune.runtime import adam_native, adam_torch


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamW:
    """The hyper-parameters of one call."""

    lr: float = 1e-5
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled: a step multiplies the parameter by 1 - lr * weight_decay."""


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What the arithmetic needs of the hyper-parameters and the step, in fp64; each is rounded to fp32 once."""

    grad_scale: float
    lerp: float
    lerp_from_grad: bool
    beta2: float
    one_minus_beta2: float
    sqrt_correction2: float
    eps: float
    step_size: float
    decay: float

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, hyper: AdamW, step: int, grad_scale: float) -> Coefficients:
        """Those of step number `step`, the first being 1."""
        weight = 1 - hyper.beta1
        # torch compares, and subtracts one, in fp32.
        weight32 = np.float32(weight)
        far = bool(abs(weight32) >= 0.5)
        return cls(
            grad_scale=grad_scale,
            lerp=float(weight32 - np.float32(1)) if far else weight,
            lerp_from_grad=far,
            beta2=hyper.beta2,
            one_minus_beta2=1 - hyper.beta2,
            sqrt_correction2=(1 - hyper.beta2**step) ** 0.5,
            eps=hyper.eps,
            step_size=hyper.lr / (1 - hyper.beta1**step),
            decay=1 - hyper.lr * hyper.weight_decay,
        )


def adam_implementation() -> str:
    """What `adam_step` runs on this machine: "avx512", "avx2", "scalar" or, without the native kernel, "torch"."""
    return adam_implementations()[0]


def adam_implementations() -> tuple[str, ...]:
    """All that can run on this machine, best first; the last is always "torch"."""
    return (*adam_native.paths(), "torch")


def adam_step(
    high: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    *,
    hyper: AdamW,
    step: int,
    grad_scale: float = 1.0,
    threads: int = 1,
    implementation: str | None = None,
) -> None:
    """One AdamW step, in place, over contiguous 1-D CPU tensors of one length.

    The result does not depend on `threads`, on the implementation, or on how a tensor is cut into calls. The GIL is
    released while it runs. Calls from several threads run one after the other.

    Args:
        high: bf16 halves of the master (see `split`).
        low: int16 remainders of the master.
        exp_avg: fp32 first moment.
        exp_avg_sq: fp32 second moment, its sign the master's `down` bit (see `split`).
        grad: bf16 or fp32 gradient; read only.
        hyper: hyper-parameters of this call.
        step: number of this optimizer step, the first being 1.
        grad_scale: the gradient is multiplied by it first (clipping, averaging).
        threads: CPU threads, the calling one included. "torch" uses torch's own (`torch.set_num_threads`).
        implementation: one of `adam_implementations()`; the best when None.

    Raises:
        TypeError, ValueError: naming the tensor that has another dtype, device, layout or length.
    """
    _check(high=high, low=low, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=grad)
    chosen = _chosen(implementation, step, threads)
    coefficients = Coefficients.of(hyper, step, grad_scale)
    if chosen == "torch":
        adam_torch.step(high, low, exp_avg, exp_avg_sq, grad, coefficients)
    else:
        adam_native.step(high, low, exp_avg, exp_avg_sq, grad, coefficients, threads, chosen)


def adam_rows(
    high: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    width: int,
    rows: Tensor,
    places: Tensor,
    values: Tensor,
    dense: Tensor | None = None,
    hyper: AdamW,
    step: int,
    grad_scale: float = 1.0,
    threads: int = 1,
    implementation: str | None = None,
) -> None:
    """`adam_step` of some rows of a matrix in place, without copying them out and back.

    Args:
        high, low, exp_avg, exp_avg_sq: the whole matrix, flat, as for `adam_step`.
        width: elements of a row.
        rows: int64 [n], each row once.
        places: int64 [n]: which row of `values` is this one's gradient; none where negative.
        values: bf16 [any number, width].
        dense: bf16, flat, as long as the matrix: another part of the gradient of every row. The sum is rounded to bf16.
        hyper, step, grad_scale, threads, implementation: as for `adam_step`.

    Raises:
        TypeError, ValueError: as `adam_step`, or for rows and places that are not int64 and of one length.
        IndexError: for rows or places outside their matrices.
    """
    _check(high=high, low=low, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, grad=high if dense is None else dense)
    for name, tensor in (("rows", rows), ("places", places)):
        if tensor.dtype != torch.int64 or tensor.shape != (rows.numel(),) or not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous int64 of one length, not {tensor.dtype} {tuple(tensor.shape)}")
    if values.dtype != torch.bfloat16 or not values.is_contiguous() or values.dim() != 2 or values.shape[1] != width:
        raise ValueError(f"values must be contiguous bf16 [any, {width}], not {values.dtype} {tuple(values.shape)}")
    chosen = _chosen(implementation, step, threads)
    if not rows.numel():
        return
    # numpy's minimum and maximum start no threads.
    if rows.numpy().min() < 0 or (rows.numpy().max() + 1) * width > high.numel() or places.numpy().max() >= len(values):
        raise IndexError("a row or place lies outside its matrix")
    state = (high, low, exp_avg, exp_avg_sq)
    coefficients = Coefficients.of(hyper, step, grad_scale)
    if chosen == "torch":
        adam_torch.rows_step(state, width, rows, places, values, dense, coefficients)
    else:
        adam_native.rows_step(state, width, rows, places, values, dense, coefficients, threads, chosen)


_DTYPES = {
    "high": (torch.bfloat16,),
    "low": (torch.int16,),
    "exp_avg": (torch.float32,),
    "exp_avg_sq": (torch.float32,),
    "grad": (torch.bfloat16, torch.float32),
}


def _chosen(implementation: str | None, step: int, threads: int) -> str:
    """The implementation to run, after a look at the numbers that all of them take."""
    if step < 1:
        raise ValueError(f"step counts from 1, not {step}")
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    available = adam_implementations()
    chosen = available[0] if implementation is None else implementation
    if chosen not in available:
        raise ValueError(f"Adam implementation {chosen!r} is not available here; there are {', '.join(available)}")
    return chosen


def _check(**tensors: Tensor) -> None:
    length = tensors["high"].numel()
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES[name]:
            raise TypeError(f"{name} must be {' or '.join(map(str, _DTYPES[name]))}, not {tensor.dtype}")
        if tensor.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, not on {tensor.device}")
        if tensor.dim() != 1 or not tensor.is_contiguous():
            raise ValueError(f"{name} must be a contiguous 1-D tensor, not {tuple(tensor.shape)}")
        if tensor.numel() != length:
            raise ValueError(f"{name} has {tensor.numel()} elements, high has {length}")
