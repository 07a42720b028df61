"""Models taken apart: what each layer is called with, and what is refused by name."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from torch import nn

from slidetune.errors import SlidetuneError
from slidetune.families import spec_from_config
from slidetune.plans import Plan
from slidetune.runtime.binding import Parts
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import assert_equal, make_model, run_both

CPU = torch.device("cpu")


def parts_of(name):
    return Parts(make_model(SMALL_CONFIGS[name]), spec_from_config(SMALL_CONFIGS[name], name))


@pytest.mark.parametrize("name", SMALL_CONFIGS)
def test_parts_run_one_after_the_other_are_the_model(name):
    parts = parts_of(name)
    model = parts.model.eval()
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    calls, asked = parts.record_calls(CPU, inputs)
    rows, numbers = [], []
    for table, table_ids in zip(parts.tables, asked, strict=True):
        known, number = torch.unique(table_ids, return_inverse=True)
        rows.append(getattr(parts.base, table.name).weight.detach()[known])
        numbers.append(number)
    with torch.no_grad():
        hidden = parts.prelude()(rows, numbers, inputs)
        for layer, (args, kwargs) in zip(parts.layers, calls, strict=True):
            hidden = layer(hidden, *args, **kwargs)
        logits = parts.head()(hidden.reshape(1, -1, hidden.shape[-1])).view(*ids.shape, -1)
        assert torch.equal(logits, model(**inputs).logits)


def test_layers_with_windows_get_their_own_masks():
    parts = parts_of("gemma3_text")
    ids = torch.ones(1, 40, dtype=torch.long)
    calls, _ = parts.record_calls(CPU, {"input_ids": ids})
    masks = [kwargs["attention_mask"] for _, kwargs in calls]
    # Every third layer sees all, the others 16 tokens.
    windowed = [mask is not None and int(mask[0, 0, -1].sum()) == 16 for mask in masks]
    assert windowed == [True, True, False, True, True]


def test_recording_leaves_the_model_as_it_was():
    parts = parts_of("llama")
    children = {name: id(child) for name, child in parts.model.named_modules()}
    parts.record_calls(CPU, {"input_ids": torch.ones(1, 4, dtype=torch.long)})
    assert {name: id(child) for name, child in parts.model.named_modules()} == children


def refusal(model, name="llama"):
    with pytest.raises(SlidetuneError) as caught:
        Parts(model, spec_from_config(SMALL_CONFIGS[name], name))
    return str(caught.value)


def test_a_router_loss_is_refused():
    model = make_model(SMALL_CONFIGS["qwen3_moe"] | {"output_router_logits": True})
    assert "output_router_logits" in refusal(model, "qwen3_moe")


def test_a_base_model_has_no_head():
    assert "language model with a head" in refusal(make_model(SMALL_CONFIGS["llama"]).model)


def test_parameters_outside_the_structure():
    model = make_model(SMALL_CONFIGS["llama"])
    model.value_head = nn.Linear(4, 1)
    assert "outside embedding, layers and head: value_head" in refusal(model)


def test_a_layer_of_another_size():
    model = make_model(SMALL_CONFIGS["llama"])
    model.model.layers[2].adapter = nn.Linear(2, 2)
    assert "unit 3 (layer) has" in refusal(model)


def test_an_embedding_that_renormalises():
    model = make_model(SMALL_CONFIGS["llama"])
    model.model.embed_tokens.max_norm = 1.0
    assert "max_norm" in refusal(model)


def test_two_modules_between_layers_and_head():
    model = make_model(SMALL_CONFIGS["llama"])
    forward = type(model.model).forward

    class Twice(type(model.model)):
        def forward(self, **inputs):
            output = forward(self, **inputs)
            output.last_hidden_state = self.norm2(output.last_hidden_state)
            return output

    model.model.__class__ = Twice
    model.model.norm2 = nn.LayerNorm(96)
    assert "norm and norm2" in refusal(model)


def test_a_module_that_is_never_called():
    model = make_model(SMALL_CONFIGS["llama"])
    model.model.extra = nn.LayerNorm(96)
    assert "extra has parameters" in refusal(model)


def test_a_tied_head_that_the_config_denies():
    model = make_model(SMALL_CONFIGS["llama"])
    model.lm_head.weight = model.model.embed_tokens.weight
    assert "its head is tied" in refusal(model)


def small(model_type, **sizes):
    return {
        "model_type": model_type,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **sizes,
    }


OTHERS = {
    "stablelm": small("stablelm"),
    "granite": small("granite", embedding_multiplier=3.0, logits_scaling=2.0),
    "starcoder2": small("starcoder2", residual_dropout=0.0, embedding_dropout=0.0),
    "cohere": small("cohere", logit_scale=0.5),
    "olmo": small("olmo"),
    "glm4": small("glm4", head_dim=16),
    "gpt_neox": small("gpt_neox", hidden_dropout=0.0),
    "qwen2_moe": small("qwen2_moe", num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32),
    "smollm3": small("smollm3"),
    "ministral": small("ministral", head_dim=16),
}


@pytest.mark.parametrize("name", OTHERS)
def test_families_of_the_same_structure_need_no_code(name):
    plan = Plan(model=f"small {name}", seq_len=16, micro_batch=2, chunk_bytes=8192, adam_threads=1)
    assert_equal(run_both(OTHERS[name], plan, steps=2, padded=True))


def test_a_family_of_another_structure():
    model = make_model({"model_type": "opt", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2})
    with pytest.raises(SlidetuneError, match=r"OPTForCausalLM \(opt\) cannot be trained by sliding"):
        SlidingTrainer(model, Plan(model="an opt"), device="cpu")
