"""Which kernels a model's layers run with: transformers' own, or Liger's fused ones where they are installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Literal

import torch
from torch import nn

from slidetune.errors import SlidetuneError

Kernels = Literal["eager", "liger"]


def choose_kernels(wanted: str, model: nn.Module, device: torch.device) -> Kernels:
    """ "auto" is Liger's where it can be: on CUDA, installed, and with kernels for this family.

    Raises SlidetuneError for "liger" where it can't be, saying why, and for any other name.
    """
    if wanted == "eager":
        return "eager"
    if wanted not in ("auto", "liger"):
        raise SlidetuneError(f"kernels {wanted!r} are not known.", "Known: auto, eager, liger.")
    why = _why_not(model, device)
    if why and wanted == "liger":
        raise SlidetuneError(f"Liger's kernels can't be used: {why}.")
    return "eager" if why else "liger"


def apply_kernels(kernels: Kernels, model: nn.Module) -> None:
    """Patch this model's modules. Its loss stays ours: it exists in chunks already."""
    if kernels == "liger":
        from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

        family = sys.modules[type(model).__module__]
        classes = {name: value for name, value in vars(family).items() if isinstance(value, type)}
        _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
        # It exchanges the family's classes too, so that models made later would differ: a biased MLP loses its bias.
        for name, value in classes.items():
            setattr(family, name, value)


def _why_not(model: nn.Module, device: torch.device) -> str:
    if device.type != "cuda":
        return "they need a CUDA device"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    family = model.config.model_type
    if getattr(model.config, "mlp_only_layers", None) or getattr(model.config, "mlp_bias", False):
        return f"they don't know {family} with dense layers among mixtures, or with biased MLPs"
    return "" if family in MODEL_TYPE_TO_APPLY_LIGER_FN else f"there are none for {family}"
