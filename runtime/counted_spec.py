"""A ModelSpec for families that `slidetune.families` doesn't know: parameters counted on the modules themselves.

What a layer costs is taken from a Llama layer of the same sizes: near enough to plan with, and said to be so by the
spec's family name, "<type> (as llama)".
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from slidetune.errors import SlidetuneError
from slidetune.families import FAMILIES, spec_from_config
from slidetune.model import ModelSpec, Unit


def spec_of(model: nn.Module, name: str) -> ModelSpec:
    """The spec of a transformers causal language model, by its config or, for other families, by its modules.

    Raises SlidetuneError for a model that has no list of layers on a base model, or no sizes in its config.
    """
    config = model.config.to_dict()
    if config.get("model_type") in (*FAMILIES, "gemma3"):
        return spec_from_config(config, name)
    return _counted(model, name)


def _counted(model: nn.Module, name: str) -> ModelSpec:
    base = getattr(model, model.base_model_prefix, model)
    config = model.config.get_text_config()
    depth = getattr(config, "num_hidden_layers", 0)
    lists = [child for child in base.children() if isinstance(child, nn.ModuleList) and len(child) == depth]
    head = model.get_output_embeddings()
    kind = type(model).__name__
    if base is model or head is None or len(lists) != 1:
        raise SlidetuneError(
            f"{kind} ({config.model_type}) cannot be trained by sliding: embedding, one list of layers and a head on "
            "a base model are needed.",
            f"Families that are known: {', '.join(FAMILIES)}.",
        )
    tokens = base.get_input_embeddings().weight
    heads = config.num_attention_heads
    like = spec_from_config(
        {
            "model_type": "llama",
            "hidden_size": tokens.shape[1],
            "intermediate_size": getattr(config, "intermediate_size", None) or 4 * tokens.shape[1],
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
            "head_dim": getattr(config, "head_dim", None) or max(1, tokens.shape[1] // heads),
            "vocab_size": tokens.shape[0],
            "max_position_embeddings": getattr(config, "max_position_embeddings", None) or 1 << 20,
        },
        name,
    )
    tied = head.weight is tokens
    embeddings = [child.weight for child in base.children() if isinstance(child, nn.Embedding)]
    in_layers = sum(p.numel() for p in lists[0].parameters())
    embedded = sum(weight.numel() for weight in embeddings)
    own = sum(p.numel() for p in model.parameters()) - in_layers - embedded
    layers = [_layer(unit, module) for unit, module in zip(like.layers, lists[0], strict=True)]
    return replace(
        like,
        family=f"{config.model_type} (as llama)",
        tied=tied,
        # What its layers do is not known here.
        same_kernels=False,
        units=(
            replace(like.embedding, params=embedded, largest_tensor=tokens.numel()),
            *layers,
            replace(like.head, params=own, weight_elements=own + tokens.numel() * tied),
        ),
    )


def _layer(unit: Unit, module: nn.Module) -> Unit:
    sizes = [p.numel() for p in module.parameters()]
    matrices = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    return replace(
        unit,
        params=sum(sizes),
        weight_elements=sum(sizes),
        largest_tensor=max(sizes),
        # Of experts, which are in one tensor of three dimensions, the router's choice is not known here.
        matmul_elements=matrices or sum(sizes),
        # The runtime finds out; a prediction errs on the long side.
        left_out_elements=0,
    )
