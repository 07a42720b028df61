"""What hypothesis draws: models of real widths and few layers, every sound plan for them, and machines."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st

from slidetune.families import spec_from_config
from slidetune.hardware import HardwareProfile
from slidetune.machines import load_profile, machine
from slidetune.model import ModelSpec
from slidetune.plans import Activations, Plan, Recompute

# Widths of real small models: matrices then take longer than launching kernels, so every resource can matter.
_SIZES = {
    "hidden_size": 1536,
    "intermediate_size": 4608,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
}
_CONFIGS = {
    "untied": {**_SIZES, "model_type": "llama"},
    "tied": {**_SIZES, "model_type": "qwen2", "tie_word_embeddings": True},
    "mixed attention": {**_SIZES, "model_type": "gemma3_text", "sliding_window": 256, "sliding_window_pattern": 3},
    "layers of two sizes": {
        **_SIZES,
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 1024,
        "decoder_sparse_step": 2,
    },
    "learned positions": {
        "model_type": "gpt2",
        "n_embd": 1280,
        "n_head": 20,
        "n_positions": 2048,
        "vocab_size": 50257,
    },
}
MODEL_KINDS = tuple(_CONFIGS)


@cache
def small_model(kind: str = "untied", layers: int = 4) -> ModelSpec:
    """A model of one kind with so many layers."""
    depth = "n_layer" if kind == "learned positions" else "num_hidden_layers"
    return spec_from_config({**_CONFIGS[kind], depth: layers}, f"{kind}, {layers} layers")


def small_models(max_layers: int = 5) -> st.SearchStrategy[ModelSpec]:
    return st.builds(small_model, st.sampled_from(MODEL_KINDS), st.integers(1, max_layers))


@st.composite
def plans(draw: st.DrawFn, model: ModelSpec, *, nvme: bool = True, max_accumulation: int = 3) -> Plan:
    """Any sound plan for the model: each count up to what the others leave room for."""

    def up_to(most: int, least: int = 0) -> int:
        return draw(st.integers(least, most))

    layers = len(model.layers)
    resident = up_to(layers)
    sliding = layers - resident
    optimizer_nvme = up_to(sliding) if nvme else 0
    weights_nvme = up_to(optimizer_nvme)
    window = up_to(layers + 1, least=1)
    inputs_on_gpu = up_to(layers)
    keep = up_to(layers)
    offload = up_to(layers - keep)
    inputs_on_nvme = up_to(layers - inputs_on_gpu) if nvme else 0
    with_products = layers - keep - offload if all(u.product_elements for u in model.layers) else 0
    with_middle = layers - keep - offload - inputs_on_nvme if all(u.middle_elements for u in model.layers) else 0
    update = draw(st.sampled_from(("backward", "forward")))
    late = up_to(sliding) if update == "backward" else 0
    # From several chunks a layer, of a size that divides nothing, to one for everything.
    layer_bytes = 2 * max(unit.params for unit in model.layers)
    chunk_bytes = draw(st.sampled_from((layer_bytes // 3 + 1, layer_bytes // 2, layer_bytes, 40 * layer_bytes)))
    return Plan(
        model=model.name,
        seq_len=draw(st.sampled_from((96, 512, 1024, 2048))),
        micro_batch=draw(st.sampled_from((1, 2, 3, 8))),
        accumulation=up_to(max_accumulation, least=1),
        window=window,
        prefetch=up_to(window - 1),
        resident_layers=resident,
        resident_weights=up_to(sliding - weights_nvme),
        optimizer_nvme=optimizer_nvme,
        weights_nvme=weights_nvme,
        activations=Activations(gpu=inputs_on_gpu, nvme=inputs_on_nvme),
        recompute=Recompute(
            keep=keep, offload=offload, products=up_to(with_products), middle=up_to(max(0, with_middle))
        ),
        chunk_bytes=chunk_bytes,
        adam_threads=draw(st.sampled_from((1, 4, 8, 64))),
        update=update,
        late_updates=late,
        gradient_ring=draw(st.integers(1, max(1, min(3, sliding - late)))) if update == "backward" else 1,
        clip_norm=draw(st.sampled_from((None, 1.0))) if update == "forward" else None,
    )


@st.composite
def models_and_plans(draw: st.DrawFn, max_layers: int = 5, **options: object) -> tuple[ModelSpec, Plan]:
    model = draw(small_models(max_layers))
    return model, draw(plans(model, **options))


@cache
def _catalog_machine(name: str) -> HardwareProfile:
    return load_profile("h200-16c") if name == "h200-16c" else machine(name, "desktop", nvme="2TB:7/5")


# What makes one resource or another the busiest.
RATES = (
    "gpu.bf16_tflops",
    "gpu.memory_gbs",
    "link.h2d_gbs",
    "link.d2h_gbs",
    "link.duplex_gbs",
    "host.dram_gbs",
    "host.cores",
    "host.adam_gparams_per_core",
    "host.gather_gbs",
    "host.sum_rows_gbs",
    "nvme.read_gbs",
    "nvme.write_gbs",
)


@st.composite
def machines(draw: st.DrawFn) -> HardwareProfile:
    """A machine of the catalog, some of its rates a few times higher or lower."""
    profile = _catalog_machine(draw(st.sampled_from(("rtx4090", "l4", "h200-16c"))))
    for path in draw(st.lists(st.sampled_from(RATES), max_size=3, unique=True)):
        profile = profile.scaled(path, draw(st.sampled_from((0.2, 0.5, 2.0, 5.0))))
    return profile
