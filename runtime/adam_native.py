"""The native Adam kernel (native/adam.cpp), loaded through ctypes, which releases the GIL during a call.

It is built when the package is installed, if there is a compiler. Without it `paths()` is empty.
"""

from __future__ import annotations

import ctypes
import sysconfig
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from slidetune.runtime.adam import Coefficients

# In the order of the C side's numbers.
_PATHS = ("scalar", "avx2", "avx512")


class _Coefficients(ctypes.Structure):
    """The C side's struct; ctypes rounds each fp64 to the nearest fp32."""

    _fields_ = (
        ("grad_scale", ctypes.c_float),
        ("lerp", ctypes.c_float),
        ("beta2", ctypes.c_float),
        ("one_minus_beta2", ctypes.c_float),
        ("sqrt_correction2", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("step_size", ctypes.c_float),
        ("decay", ctypes.c_float),
        ("lerp_from_grad", ctypes.c_int32),
    )


@cache
def paths() -> tuple[str, ...]:
    """The kernel's paths that this CPU can run, best first."""
    found = library()
    if found is None:
        return ()
    return _PATHS[: found.slidetune_adam_best_path() + 1][::-1]


def step(
    high: Tensor,
    low: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    coefficients: Coefficients,
    threads: int,
    path: str,
) -> None:
    """One update in place; arguments as `adam.adam_step` has checked them."""
    library().slidetune_adam_step(
        _PATHS.index(path),
        threads,
        high.numel(),
        high.data_ptr(),
        low.data_ptr(),
        exp_avg.data_ptr(),
        exp_avg_sq.data_ptr(),
        grad.data_ptr(),
        grad.dtype == torch.bfloat16,
        _struct_of(coefficients),
    )


def rows_step(
    state: Sequence[Tensor],
    width: int,
    rows: Tensor,
    places: Tensor,
    values: Tensor,
    dense: Tensor | None,
    coefficients: Coefficients,
    threads: int,
    path: str,
) -> None:
    """One update of rows in place; arguments as `adam.adam_rows` has checked them."""
    library().slidetune_adam_rows(
        _PATHS.index(path),
        threads,
        width,
        rows.numel(),
        rows.data_ptr(),
        places.data_ptr(),
        *(part.data_ptr() for part in state),
        values.data_ptr(),
        None if dense is None else dense.data_ptr(),
        _struct_of(coefficients),
    )


@lru_cache(maxsize=64)
def _struct_of(coefficients: Coefficients) -> _Coefficients:
    return _Coefficients(*(getattr(coefficients, name) for name, _ in _Coefficients._fields_))


@cache
def library() -> ctypes.CDLL | None:
    """The native kernels of the CPU, None where they were not built."""
    file = Path(__file__).with_name("_adam" + sysconfig.get_config_var("EXT_SUFFIX"))
    if not file.exists():
        return None
    found = ctypes.CDLL(str(file))
    found.slidetune_adam_best_path.restype = ctypes.c_int
    found.slidetune_adam_best_path.argtypes = ()
    found.slidetune_adam_step.restype = None
    found.slidetune_adam_step.argtypes = (
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int64,
        *(ctypes.c_void_p,) * 5,
        ctypes.c_int,
        ctypes.POINTER(_Coefficients),
    )
    found.slidetune_adam_rows.restype = None
    found.slidetune_adam_rows.argtypes = (
        ctypes.c_int,
        ctypes.c_int,
        *(ctypes.c_int64,) * 2,
        *(ctypes.c_void_p,) * 8,
        ctypes.POINTER(_Coefficients),
    )
    found.slidetune_gather_rows.restype = None
    found.slidetune_gather_rows.argtypes = (ctypes.c_int, *(ctypes.c_int64,) * 2, *(ctypes.c_void_p,) * 3)
    found.slidetune_sum_rows.restype = None
    found.slidetune_sum_rows.argtypes = (
        ctypes.c_int,
        *(ctypes.c_int64,) * 2,
        *(ctypes.c_void_p,) * 4,
        *(ctypes.c_int,) * 2,
    )
    found.slidetune_row_growths.restype = None
    found.slidetune_row_growths.argtypes = (ctypes.c_int, *(ctypes.c_int64,) * 2, *(ctypes.c_void_p,) * 4)
    return found
