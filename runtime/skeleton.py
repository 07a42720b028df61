"""A model as transformers builds it, without memory for its parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slidetune.errors import SlidetuneError


def skeleton(ref: str | Path) -> nn.Module:
    """The causal language model that `ref` names: buffers are real, parameters have shapes only (meta device).

    `ref`: a directory with a config.json, that file, a hub id, or a name of the offline catalog. Raises
    SlidetuneError (or UnknownName, BadFile) for one that is none of these, or that transformers can't build.
    """
    from transformers import AutoModelForCausalLM

    config = config_of(ref)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (ValueError, KeyError) as error:
        raise SlidetuneError(f"{ref}: transformers builds no causal language model of it ({error}).") from None
    # The loss of causal models; transformers warns where a class's name (GPT2LMHeadModel) doesn't say so.
    if getattr(model, "loss_type", None) is None:
        model.loss_type = "ForCausalLM"
    _make_buffers(model)
    return model


def config_of(ref: str | Path) -> Any:
    """The transformers config that `ref` names; a multimodal Gemma 3 gives its text tower's."""
    from transformers import AutoConfig

    from slidetune.models import catalog_row, load_model, model_names

    # Errors that say what to do, and only families that are known; a catalog model by its name.
    name = load_model(str(ref)).name
    name = name if name in model_names() else None
    if name is not None:
        row = catalog_row(name)
        fields = {field: value for field, value in row.items() if field not in ("hub", "params", "model_type")}
        config = AutoConfig.for_model(row["model_type"], **fields)
    else:
        path = Path(ref).expanduser()
        config = AutoConfig.from_pretrained(path.parent if path.name == "config.json" else ref)
    if config.model_type == "gemma3":
        text = config.text_config
        text.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        return text
    return config


def _make_buffers(model: nn.Module) -> None:
    """Give each buffer memory and have the model's own initialisation fill it."""
    for path, module in model.named_modules():
        waiting = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        for name in waiting:
            buffer = module._buffers[name]
            filling = math.nan if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full_like(buffer, filling, device="cpu")
        if waiting:
            with torch.no_grad():
                model._init_weights(module)
        empty = [n for n in waiting if module._buffers[n].is_floating_point() and module._buffers[n].isnan().any()]
        if empty:
            raise SlidetuneError(f"{type(model).__name__}: nothing fills the buffer {path}.{empty[0]}.")
