"""Hugging Face decoder-only configs read into `ModelSpec`s, without torch or transformers.

Each family is one function from the config's fields to the shapes of its layers. A field a config leaves out
has the default transformers gives it in that family (5.x, `models/<family>/configuration_<family>.py`); the
sizes that name the model (width, depth, heads, vocabulary) must be there, since a default would silently
describe another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from slidetune.config_fields import REQUIRED, Fields
from slidetune.errors import BadFile, SlidetuneError
from slidetune.layer_shape import LayerShape
from slidetune.model import ModelSpec
from slidetune.skeleton import Skeleton, assemble


def _core(f: Fields, **defaults: int) -> dict[str, int]:
    """The sizes every Llama-like family names alike."""
    hidden = f.integer("hidden_size")
    heads = f.integer("num_attention_heads", defaults.get("heads", REQUIRED))
    kv_heads = f.optional("num_key_value_heads", defaults.get("kv_heads")) or heads
    head_dim = f.optional("head_dim", defaults.get("head_dim"))
    if heads % kv_heads:
        f.refuse("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads ({heads})")
    if head_dim is None and hidden % heads:
        f.refuse("num_attention_heads", heads, f"a divisor of hidden_size ({hidden}), or head_dim given")
    return {
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "inner": f.integer("intermediate_size"),
    }


def _skeleton(
    f: Fields,
    layers: LayerShape | list[LayerShape],
    *,
    positions: int,
    tied: bool = False,
    vocab: int = REQUIRED,
    **rest: Any,
) -> Skeleton:
    if isinstance(layers, LayerShape):
        layers = [layers] * f.integer("num_hidden_layers")
    return Skeleton(
        layers=layers,
        vocab=f.integer("vocab_size", vocab),
        tied=f.flag("tie_word_embeddings", tied),
        max_seq_len=f.integer("max_position_embeddings", positions),
        **rest,
    )


def _windowed(f: Fields, shape: LayerShape, window: int | None, sliding: Callable[[int], bool]) -> list[LayerShape]:
    """One shape a layer: `window` holds in the layers `layer_types` names, else in those `sliding` names."""
    depth = f.integer("num_hidden_layers")
    types = f.sequence("layer_types", str, "a list of 'full_attention' and 'sliding_attention', one a layer")
    if types is not None and (len(types) != depth or set(types) - {"full_attention", "sliding_attention"}):
        f.refuse("layer_types", types, f"{depth} of 'full_attention' and 'sliding_attention'")
    slides = [sliding(i) if types is None else types[i] == "sliding_attention" for i in range(depth)]
    windowed = replace(shape, span=window)
    return [windowed if slide else shape for slide in slides]


def _llama(f: Fields) -> Skeleton:
    bias = f.flag("attention_bias", False)
    shape = LayerShape(
        **_core(f),
        activation=f.text("hidden_act", "silu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=f.flag("mlp_bias", False),
    )
    return _skeleton(f, shape, positions=2048)


def _mistral(f: Fields) -> Skeleton:
    shape = LayerShape(
        **_core(f, kv_heads=8),
        activation=f.text("hidden_act", "silu"),
        span=f.optional("sliding_window", 4096),
    )
    return _skeleton(f, shape, positions=131072)


def _mixtral(f: Fields) -> Skeleton:
    shape = LayerShape(
        **_core(f, kv_heads=8),
        activation=f.text("hidden_act", "silu"),
        span=f.optional("sliding_window"),
        experts=_experts(f, 8),
        active=f.integer("num_experts_per_tok", 2),
    )
    return _skeleton(f, _routed(f, shape), positions=131072)


def _qwen2(f: Fields) -> Skeleton:
    shape = LayerShape(**_core(f, kv_heads=32), activation=f.text("hidden_act", "silu"), qkv_bias=True)
    return _skeleton(f, _qwen_layers(f, shape), positions=32768)


def _qwen3(f: Fields) -> Skeleton:
    bias = f.flag("attention_bias", False)
    shape = LayerShape(
        **_core(f, kv_heads=32, head_dim=128),
        activation=f.text("hidden_act", "silu"),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
    )
    return _skeleton(f, _qwen_layers(f, shape), positions=32768)


def _qwen_layers(f: Fields, shape: LayerShape) -> list[LayerShape]:
    window = f.optional("sliding_window", 4096) if f.flag("use_sliding_window", False) else None
    first = f.integer("max_window_layers", 28, least=0)
    return _windowed(f, shape, window, lambda i: i >= first)


def _qwen3_moe(f: Fields) -> Skeleton:
    bias = f.flag("attention_bias", False)
    dense = LayerShape(
        **_core(f, kv_heads=4),
        activation=f.text("hidden_act", "silu"),
        qk_norm="head",
        qkv_bias=bias,
        out_bias=bias,
        span=f.optional("sliding_window", 4096) if f.flag("use_sliding_window", False) else None,
    )
    experts = _experts(f, 128, least=0)
    sparse = replace(
        dense,
        inner=f.integer("moe_intermediate_size", 768),
        experts=experts,
        active=f.integer("num_experts_per_tok", 8),
    )
    step = f.integer("decoder_sparse_step", 1)
    dense_only = f.sequence("mlp_only_layers", int, "a list of layer numbers") or []
    if experts:
        _routed(f, sparse)
    return _skeleton(
        f,
        [
            sparse if experts and i not in dense_only and (i + 1) % step == 0 else dense
            for i in range(f.integer("num_hidden_layers"))
        ],
        positions=32768,
    )


def _experts(f: Fields, default: int, least: int = 1) -> int:
    """The number of experts has two names: a config's own and the one transformers 5 writes when it saves."""
    name = "num_local_experts" if "num_local_experts" in f.config else "num_experts"
    return f.integer(name, default, least=least)


def _routed(f: Fields, shape: LayerShape) -> LayerShape:
    if shape.active > shape.experts:
        f.refuse("num_experts_per_tok", shape.active, f"an integer from 1 to the {shape.experts} experts")
    return shape


def _gemma2(f: Fields) -> Skeleton:
    shape = _gemma_shape(f, head_defaults={})
    layers = _windowed(f, shape, f.optional("sliding_window", 4096), lambda i: bool((i + 1) % 2))
    return _skeleton(f, layers, positions=8192, tied=True)


def _gemma3(f: Fields) -> Skeleton:
    # Published configs of the larger models leave heads and vocabulary out: here the defaults are the model.
    shape = replace(_gemma_shape(f, head_defaults={"heads": 8}), qk_norm="head")
    pattern = f.integer("sliding_window_pattern", 6)
    layers = _windowed(f, shape, f.optional("sliding_window", 4096), lambda i: bool((i + 1) % pattern))
    return _skeleton(f, layers, positions=131072, tied=True, vocab=262208)


def _gemma_shape(f: Fields, head_defaults: dict[str, int]) -> LayerShape:
    bias = f.flag("attention_bias", False)
    return LayerShape(
        **_core(f, kv_heads=4, head_dim=256, **head_defaults),
        activation=f.text("hidden_activation", "gelu_pytorch_tanh"),
        norm="rms_offset",
        post_norms=2,
        qkv_bias=bias,
        out_bias=bias,
    )


def _phi3(f: Fields) -> Skeleton:
    shape = LayerShape(
        **_core(f),
        activation=f.text("hidden_act", "silu"),
        fused_qkv=True,
        rotary="cat",
        span=f.optional("sliding_window"),
    )
    return _skeleton(f, shape, positions=4096)


def _phi(f: Fields) -> Skeleton:
    shape = LayerShape(
        **_core(f),
        activation=f.text("hidden_act", "gelu_new"),
        gated=False,
        norm="layer",
        pre_norms=1,
        rotary="cat",
        qk_norm="head" if f.flag("qk_layernorm", False) else "",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        fused_kernels=False,
    )
    return _skeleton(f, shape, positions=2048, head_bias=True)


def _olmo2(f: Fields) -> Skeleton:
    bias = f.flag("attention_bias", False)
    shape = LayerShape(
        **_core(f),
        activation=f.text("hidden_act", "silu"),
        norm="rms_fp32",
        pre_norms=0,
        post_norms=2,
        qk_norm="full",
        rotary="fp32",
        qkv_bias=bias,
        out_bias=bias,
    )
    return _skeleton(f, shape, positions=2048)


def _gpt_oss(f: Fields) -> Skeleton:
    bias = f.flag("attention_bias", True)
    shape = LayerShape(
        **_core(f, kv_heads=8, head_dim=64),
        norm="rms_fp32",
        experts=_experts(f, 128),
        active=f.integer("num_experts_per_tok", 4),
        clamped_glu=True,
        sinks=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        router_bias=True,
    )
    window = f.optional("sliding_window", 128)
    return _skeleton(f, _windowed(f, _routed(f, shape), window, lambda i: bool((i + 1) % 2)), positions=131072)


def _gpt2(f: Fields) -> Skeleton:
    hidden, heads, positions = f.integer("n_embd"), f.integer("n_head"), f.integer("n_positions", 1024)
    if hidden % heads:
        f.refuse("n_head", heads, f"a divisor of n_embd ({hidden})")
    if f.flag("add_cross_attention", False):
        f.refuse("add_cross_attention", True, "false; a decoder alone has nothing to attend across to")
    shape = LayerShape(
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        inner=f.optional("n_inner") or 4 * hidden,
        activation=f.text("activation_function", "gelu_new"),
        gated=False,
        norm="layer",
        rotary="",
        fused_qkv=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        # Its products are a module of transformers' own, with dropout behind the last.
        linear_modules=False,
        fused_kernels=False,
    )
    return Skeleton(
        layers=[shape] * f.integer("n_layer"),
        vocab=f.integer("vocab_size"),
        tied=f.flag("tie_word_embeddings", True),
        max_seq_len=positions,
        learned_positions=positions,
    )


FAMILIES: dict[str, Callable[[Fields], Skeleton]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_oss": _gpt_oss,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "phi": _phi,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


_RANDOM = ("dropout", "pdrop", "jitter")
# What a config that leaves them out has.
_GPT2_DROPOUT = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def spec_from_config(config: Mapping[str, Any], name: str) -> ModelSpec:
    """The `ModelSpec` of a Hugging Face decoder-only config.

    `config` is the parsed `config.json`; `name` becomes the spec's name and is what errors call the config.
    A multimodal `gemma3` config gives its text tower. Raises `SlidetuneError` for a `model_type` that is not
    in `FAMILIES`, `BadFile` for a missing or impossible field.
    """
    if not isinstance(config, Mapping):
        raise BadFile(f"{name}: not a config.", "A Hugging Face config is a JSON object with a 'model_type'.")
    config = _text_config(config, name)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        supported = ", ".join([*FAMILIES, "gemma3 (its text tower)"])
        raise SlidetuneError(f"{name}: model_type {family!r} is not supported.", f"Supported: {supported}.")
    return assemble(FAMILIES[family](Fields(config, name)), name, family, draws=draws_random_numbers(config))


def draws_random_numbers(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config has dropout or routing noise in training."""
    defaults = dict.fromkeys(_GPT2_DROPOUT, 0.1) if config.get("model_type") == "gpt2" else {}
    return any(
        # A summary is what models with another head make.
        isinstance(value, float) and value > 0 and any(word in name for word in _RANDOM) and "summary" not in name
        for name, value in (defaults | dict(config)).items()
    )


def _text_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if config.get("model_type") != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise BadFile(f"{name}: field 'text_config' is {text!r}.", "Allowed: the text tower's config.")
    # The outer config decides whether the head is tied; 'tie_word_embeddings' of the tower is not consulted.
    tied = config.get("tie_word_embeddings", True)
    return {**text, "model_type": "gemma3_text", "tie_word_embeddings": tied}
