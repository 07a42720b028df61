"""Models as transformers builds them, for tests that compare a `ModelSpec` with the real thing."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM

# Small and lopsided, so that no two sizes can be taken for each other.
_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 176,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"model_type": "gpt2", "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 64, "vocab_size": 320}
_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def _config(model_type: str, **fields: object) -> dict[str, object]:
    return {**_SIZES, "model_type": model_type, **fields}


SMALL_CONFIGS: dict[str, dict[str, object]] = {
    "gpt2": _GPT2,
    "gpt2, own MLP width, untied": {**_GPT2, "n_inner": 200, "tie_word_embeddings": False},
    "llama": _config("llama"),
    "llama, biases, tied": _config("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama, own head size": _config("llama", head_dim=24),
    "llama, no grouping": _config("llama", num_key_value_heads=None),
    "mistral": _config("mistral", sliding_window=32),
    "mistral, own head size": _config("mistral", head_dim=32, sliding_window=None),
    "mixtral": _config("mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _config("qwen2", tie_word_embeddings=True),
    "qwen2, windows": _config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
    "qwen3": _config("qwen3", head_dim=32),
    "qwen3, biases": _config("qwen3", attention_bias=True),
    "qwen3_moe": _config("qwen3_moe", head_dim=32, **_MOE),
    "qwen3_moe, dense layers": _config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3], **_MOE),
    "gemma2": _config("gemma2", head_dim=32, sliding_window=16),
    "gemma3_text": _config("gemma3_text", head_dim=32, sliding_window=16, sliding_window_pattern=3),
    "phi3": _config("phi3", sliding_window=16),
    "phi3, tied": _config("phi3", tie_word_embeddings=True, partial_rotary_factor=0.75),
    "phi": _config("phi"),
    "phi, norms, tied": _config("phi", qk_layernorm=True, tie_word_embeddings=True),
    "olmo2": _config("olmo2"),
    "olmo2, biases": _config("olmo2", attention_bias=True),
    "gpt_oss": _config("gpt_oss", head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "gpt_oss, no biases": _config("gpt_oss", attention_bias=False, num_local_experts=4, num_experts_per_tok=2),
}


def on_meta(config: dict[str, object]) -> torch.nn.Module:
    """The config's model with parameters that have shapes and no memory."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def layers_of(model: torch.nn.Module) -> torch.nn.ModuleList:
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


def count(module: torch.nn.Module) -> int:
    """Parameters, a tied one once."""
    return sum(parameter.numel() for parameter in module.parameters())


def unit_params(model: torch.nn.Module) -> list[int]:
    """Parameters of embedding (with learned positions), each layer, and the rest: final norm and head."""
    embedding = count(model.get_input_embeddings())
    if hasattr(model.base_model, "wpe"):
        embedding += count(model.base_model.wpe)
    layers = [count(layer) for layer in layers_of(model)]
    return [embedding, *layers, count(model) - embedding - sum(layers)]
