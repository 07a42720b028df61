"""Hugging Face decoder-only configs read into `ModelSpec`s, without torch or transformers.

Each family is one function from the config's fields to the shapes of its layers. A field a config leaves out
has the default transformers gives it in that family (5.x, `models/<family>/configuration_<family>.py`); the
sizes that name the model (width, depth, heads, vocabulary) must be there, since a default would silently
describe another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from slidetune.errors import BadFile, SlidetuneError
from slidetune.kernel_costs import embedding_costs, head_costs, layer_costs
from slidetune.layer_shape import LayerShape, NormKind, norm_params
from slidetune.model import ModelSpec, Unit

_REQUIRED: Any = object()


class Fields:
    """A config's fields, checked as they are read. `name` is what error messages call the config."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def integer(self, field: str, default: Any = _REQUIRED, *, least: int = 1) -> Any:
        """An integer of at least `least`; an absent field is `default`. Null is allowed where the default
        is None."""
        value = self._get(field, default)
        if value is None and default is None:
            return None
        if type(value) is not int or value < least:
            self.refuse(field, value, f"an integer >= {least}{' or null' if default is None else ''}")
        return value

    def optional(self, field: str, absent: int | None = None, *, least: int = 1) -> int | None:
        """An integer or null; `absent` where the config does not name the field."""
        return self.integer(field, None, least=least) if field in self.config else absent

    def flag(self, field: str, default: bool) -> bool:
        value = self._get(field, default)
        value = default if value is None else value
        return value if isinstance(value, bool) else self.refuse(field, value, "true or false")

    def text(self, field: str, default: str) -> str:
        value = self._get(field, default)
        value = default if value is None else value
        return value if isinstance(value, str) else self.refuse(field, value, "a string")

    def sequence(self, field: str, kind: type, allowed: str) -> list[Any] | None:
        """A list of `kind`, or None where absent or null."""
        value = self._get(field, None)
        if value is None or (isinstance(value, list) and all(type(item) is kind for item in value)):
            return value
        return self.refuse(field, value, allowed)

    def _get(self, field: str, default: Any) -> Any:
        value = self.config.get(field, default)
        if value is _REQUIRED:
            raise BadFile(f"{self.name}: field {field!r} is missing.", "It must be an integer >= 1.")
        return value

    def refuse(self, field: str, value: Any, allowed: str) -> NoReturn:
        raise BadFile(f"{self.name}: field {field!r} is {value!r}.", f"Allowed: {allowed}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Skeleton:
    """What a family function returns: the layers' shapes and how the model begins and ends."""

    layers: list[LayerShape]
    vocab: int
    tied: bool
    max_seq_len: int
    learned_positions: int = 0
    head_bias: bool = False


def _core(f: Fields, **defaults: int) -> dict[str, int]:
    """The sizes every Llama-like family names alike."""
    hidden = f.integer("hidden_size")
    heads = f.integer("num_attention_heads", defaults.get("heads", _REQUIRED))
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
    vocab: int = _REQUIRED,
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


def _windowed(
    f: Fields, shape: LayerShape, window: int | None, sliding: Callable[[int], bool]
) -> list[LayerShape]:
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
    return _skeleton(
        f, _windowed(f, _routed(f, shape), window, lambda i: bool((i + 1) % 2)), positions=131072
    )


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
    return _spec(FAMILIES[family](Fields(config, name)), name, family)


def _text_config(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if config.get("model_type") != "gemma3":
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise BadFile(f"{name}: field 'text_config' is {text!r}.", "Allowed: the text tower's config.")
    # The outer config decides whether the head is tied; 'tie_word_embeddings' of the tower is not consulted.
    tied = config.get("tie_word_embeddings", True)
    return {**text, "model_type": "gemma3_text", "tie_word_embeddings": tied}


def _spec(skeleton: Skeleton, name: str, family: str) -> ModelSpec:
    first = skeleton.layers[0]
    hidden, vocab, norm = first.hidden, skeleton.vocab, first.norm
    costs = {shape: _layer_figures(shape) for shape in set(skeleton.layers)}
    layers = [Unit(index=i, **costs[shape]) for i, shape in enumerate(skeleton.layers, start=1)]
    head = _head(len(layers) + 1, skeleton, hidden, norm, fused=first.fused_kernels)
    return ModelSpec(
        name=name,
        family=family,
        hidden_size=hidden,
        vocab_size=vocab,
        tied=skeleton.tied,
        max_seq_len=skeleton.max_seq_len,
        units=(_embedding(skeleton, hidden), *layers, head),
    )


def _layer_figures(shape: LayerShape) -> dict[str, Any]:
    return {
        "kind": "layer",
        "params": shape.params,
        "weight_elements": shape.params,
        "largest_tensor": shape.largest_tensor,
        "matmul_elements": shape.matmul_elements,
        "attention_width": shape.query,
        "attention_span": shape.span,
        "eager": layer_costs(shape, fused=False),
        "liger": layer_costs(shape, fused=shape.fused_kernels),
    }


def _embedding(skeleton: Skeleton, hidden: int) -> Unit:
    costs = embedding_costs(hidden, learned_positions=bool(skeleton.learned_positions))
    return Unit(
        index=0,
        kind="embedding",
        params=(skeleton.vocab + skeleton.learned_positions) * hidden,
        weight_elements=0,
        largest_tensor=skeleton.vocab * hidden,
        matmul_elements=0,
        eager=costs,
        liger=costs,
    )


def _head(index: int, skeleton: Skeleton, hidden: int, norm: NormKind, *, fused: bool) -> Unit:
    matrix = skeleton.vocab * hidden
    own = norm_params(norm, hidden) + skeleton.vocab * skeleton.head_bias
    return Unit(
        index=index,
        kind="head",
        params=own + matrix * (not skeleton.tied),
        weight_elements=own + matrix,
        largest_tensor=matrix,
        matmul_elements=matrix,
        eager=head_costs(norm, hidden, fused=False),
        liger=head_costs(norm, hidden, fused=fused),
    )
