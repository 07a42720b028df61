"""Every family's units against transformers' own modules, and what a config may not say."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from slidetune.errors import BadFile, SlidetuneError
from slidetune.families import FAMILIES, spec_from_config
from slidetune.model import Unit

from .reference import SMALL_CONFIGS, layers_of, on_meta, unit_params

LLAMA = SMALL_CONFIGS["llama"]


def without(config, *fields):
    return {field: value for field, value in config.items() if field not in fields}


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS)
def test_units_have_the_parameters_of_the_real_modules(config):
    model = on_meta(config)
    spec = spec_from_config(config, "small")
    assert [unit.params for unit in spec.units] == unit_params(model)
    assert spec.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    assert [unit.kind for unit in spec.units] == ["embedding", *["layer"] * len(spec.layers), "head"]
    assert [unit.index for unit in spec.units] == list(range(len(spec.units)))


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS)
def test_largest_tensor_is_the_largest_parameter(config):
    spec = spec_from_config(config, "small")
    for unit, layer in zip(spec.layers, layers_of(on_meta(config)), strict=True):
        assert unit.largest_tensor == max(parameter.numel() for parameter in layer.parameters())
        assert unit.weight_elements == unit.params


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS)
def test_windows_are_those_transformers_would_use(config):
    real = AutoConfig.for_model(**config)
    window = getattr(real, "sliding_window", None)
    types = getattr(real, "layer_types", None) or ["sliding_attention"] * real.num_hidden_layers
    expected = [window if kind == "sliding_attention" else None for kind in types]
    assert [unit.attention_span for unit in spec_from_config(config, "small").layers] == expected


@pytest.mark.parametrize("config", SMALL_CONFIGS.values(), ids=SMALL_CONFIGS)
def test_a_config_filled_in_by_transformers_says_the_same(config):
    """What `AutoConfig` gives back for a hub id has every default written out."""
    filled_in = json.loads(AutoConfig.for_model(**config).to_json_string(use_diff=False))
    assert spec_from_config(filled_in, "small") == spec_from_config(config, "small")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_absent_fields_have_the_defaults_of_transformers(family):
    if family == "gpt2":
        bare = without(SMALL_CONFIGS["gpt2"], "n_positions")
    else:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        sizes = (256, 96, 7, 32, 320)
        bare = {"model_type": family, "pad_token_id": 0, **dict(zip(names, sizes, strict=True))}
    spec = spec_from_config(bare, "bare")
    assert [unit.params for unit in spec.units] == unit_params(on_meta(bare))
    assert spec.max_seq_len == AutoConfig.for_model(**bare).max_position_embeddings


def test_gemma_3_leaves_sizes_to_defaults_as_its_published_configs_do():
    published = {
        "model_type": "gemma3",
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "sliding_window": 1024,
        },
        "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
    }
    spec = spec_from_config(published, "gemma-3-4b")
    assert spec.params == 3_880_263_168
    assert spec.family == "gemma3_text"
    assert [unit.attention_span for unit in spec.layers[:7]] == [1024] * 5 + [None, 1024]


def test_a_tied_head_owns_its_norm_but_needs_the_matrix():
    spec = spec_from_config({**LLAMA, "tie_word_embeddings": True}, "tied")
    assert spec.head.params == 96
    assert spec.head.weight_elements == 96 + 96 * 320
    assert spec.head.matmul_elements == 96 * 320
    assert spec.embedding.weight_elements == 0


def test_a_mixture_multiplies_a_token_with_the_active_experts_only():
    spec = spec_from_config(SMALL_CONFIGS["qwen3_moe, dense layers"], "moe")
    attention = 96 * (6 + 2 + 2) * 16 + 6 * 16 * 96
    router, expert, dense = 96 * 8, 3 * 96 * 40, 3 * 96 * 176
    sparse = attention + router + 2 * expert
    # Layers 2 and 4 are the sparse ones by step; 4 (number 3 from zero) is dense by name.
    assert [unit.matmul_elements for unit in spec.layers] == [
        attention + dense,
        sparse,
        *[attention + dense] * 3,
    ]


def test_every_multiplied_weight_is_a_matrix_of_the_model():
    """Of a dense model, FLOPs count each matrix once a token and nothing else."""
    for name in ("llama", "qwen3", "gemma2", "olmo2", "phi3", "gpt2"):
        spec = spec_from_config(SMALL_CONFIGS[name], name)
        for unit, layer in zip(spec.layers, layers_of(on_meta(SMALL_CONFIGS[name])), strict=True):
            assert unit.matmul_elements == sum(p.numel() for p in layer.parameters() if p.ndim == 2)


@given(span=st.none() | st.integers(1, 80), seq_len=st.integers(1, 64))
def test_mean_context_counts_the_keys_of_every_query(span, seq_len):
    unit = _attention(span)
    keys = [sum(1 for key in range(query + 1) if span is None or key > query - span) for query in range(seq_len)]
    assert unit.mean_context(seq_len) == pytest.approx(sum(keys) / seq_len)


@given(span=st.none() | st.integers(1, 80), sequences=st.integers(1, 4), seq_len=st.integers(1, 64))
def test_flops_of_attention_are_two_products_over_the_visible_keys(span, sequences, seq_len):
    unit = _attention(span)
    visible = sum(min(query + 1, span or seq_len) for query in range(seq_len))
    assert unit.attention_flops(sequences, seq_len) == pytest.approx(2 * 2 * 96 * visible * sequences)
    assert unit.matmul_flops(sequences, seq_len) == 2 * unit.matmul_elements * sequences * seq_len


def _attention(span: int | None) -> Unit:
    return spec_from_config({**LLAMA, "model_type": "mistral", "sliding_window": span}, "w").layers[0]


def test_importing_families_loads_neither_torch_nor_transformers():
    code = "import sys, slidetune.families; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("model_type", ["mamba", None, ["llama"]])
def test_an_unknown_family_is_named_with_the_supported_ones(model_type):
    with pytest.raises(SlidetuneError) as caught:
        spec_from_config({**LLAMA, "model_type": model_type}, "this.json")
    assert "this.json" in str(caught.value)
    assert repr(model_type) in str(caught.value)
    assert "llama" in str(caught.value)
    assert "gemma3" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("hidden_size", "big", "an integer >= 1"),
        ("hidden_size", 0, "an integer >= 1"),
        ("hidden_size", None, "an integer >= 1"),
        ("num_hidden_layers", True, "an integer >= 1"),
        ("vocab_size", 3.5, "an integer >= 1"),
        ("head_dim", "wide", "an integer >= 1 or null"),
        ("num_key_value_heads", 4, "a divisor of num_attention_heads (6)"),
        ("num_attention_heads", 10, "a divisor"),
        ("tie_word_embeddings", "yes", "true or false"),
        ("hidden_act", 7, "a string"),
    ],
)
def test_a_bad_field_is_named_with_what_is_allowed(field, value, allowed):
    with pytest.raises(BadFile) as caught:
        spec_from_config({**LLAMA, "num_key_value_heads": 2, field: value}, "this.json")
    assert "this.json" in caught.value.message
    assert repr(field) in caught.value.message
    assert allowed in caught.value.hint


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("qwen2", "layer_types", ["full_attention"]),
        ("qwen2", "layer_types", ["full_attention"] * 4 + ["linear_attention"]),
        ("qwen2", "layer_types", "full_attention"),
        ("qwen3_moe", "mlp_only_layers", ["one"]),
        ("qwen3_moe", "num_experts_per_tok", 9),
        ("mixtral", "num_experts_per_tok", 5),
        ("mistral", "sliding_window", -1),
        ("gpt2", "n_head", 7),
        ("gpt2", "add_cross_attention", True),
    ],
)
def test_a_bad_field_of_a_family_is_named(name, field, value):
    with pytest.raises(BadFile, match=field):
        spec_from_config({**SMALL_CONFIGS[name], field: value}, "this.json")


@pytest.mark.parametrize(
    "field", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
def test_a_missing_size_is_not_guessed(field):
    with pytest.raises(BadFile, match=f"{field}.*missing"):
        spec_from_config(without(LLAMA, field), "this.json")


@pytest.mark.parametrize("config", [[], "llama", None, {"model_type": "gemma3"}])
def test_what_is_no_config_is_refused(config):
    with pytest.raises(BadFile, match=r"this\.json"):
        spec_from_config(config, "this.json")
