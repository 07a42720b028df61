"""Weights from safetensors files, from a seed and from a model; and back to files."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slidetune.errors import BadFile, SlidetuneError, UnknownName
from slidetune.plans import Plan
from slidetune.runtime.skeleton import skeleton
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches

SIZES = {"seq_len": 16, "micro_batch": 1, "chunk_bytes": 8192, "adam_threads": 1}
FAMILIES = ["llama", "gpt2", "mixtral", "qwen3_moe", "gemma3_text", "phi3, tied", "phi", "olmo2", "gpt_oss"]


def weights_of(model):
    return {name: p.detach().float() for name, p in model.named_parameters()}


def same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture
def saved(tmp_path):
    make_model(SMALL_CONFIGS["llama"]).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", FAMILIES)
def test_what_transformers_saves_is_read(name, tmp_path):
    model = make_model(SMALL_CONFIGS[name])
    model.save_pretrained(tmp_path)
    with SlidingTrainer(tmp_path, Plan(model=f"small {name}", **SIZES), device=DEVICE) as trainer:
        same(trainer.state_dict(), weights_of(model))


def test_shards_and_nvme(tmp_path):
    model = make_model(SMALL_CONFIGS["llama"])
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    plan = Plan(model="llama", optimizer_nvme=3, weights_nvme=2, resident_layers=1, **SIZES)
    with SlidingTrainer(str(tmp_path / "model"), plan, device=DEVICE, nvme_folder=tmp_path) as trainer:
        same(trainer.state_dict(), weights_of(model))


def test_fp32_weights_keep_every_bit(tmp_path):
    model = make_model(SMALL_CONFIGS["llama"]).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=1e-4)
    model.save_pretrained(tmp_path)
    with SlidingTrainer(tmp_path, Plan(model="llama", **SIZES), device=DEVICE) as trainer:
        same(trainer.state_dict(), weights_of(model))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_transformers_reads(name, tmp_path):
    plan = Plan(model=f"small {name}", **SIZES)
    with SlidingTrainer(make_model(SMALL_CONFIGS[name]), plan, device=DEVICE) as trainer:
        trainer.step(next(random_batches(SMALL_CONFIGS[name], plan, 1)))
        trainer.save(tmp_path / "out", dtype=torch.float32)
        expected = trainer.state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    same(weights_of(model), expected)


def test_random_weights_are_the_models_own_initialisation(tmp_path):
    config = SMALL_CONFIGS["llama"] | {"hidden_size": 192, "initializer_range": 0.05}
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = Plan(model="llama", **SIZES)
    found = []
    for seed in (1, 1, 2):
        with SlidingTrainer(tmp_path, plan, random_weights=True, seed=seed, device=DEVICE) as trainer:
            assert trainer.step(next(random_batches(config, plan, 1))) == pytest.approx(5.9, abs=0.7)
            trainer.close()
        with SlidingTrainer(tmp_path / "config.json", plan, random_weights=True, seed=seed, device=DEVICE) as trainer:
            found.append(trainer.state_dict())
    same(found[0], found[1])
    assert not torch.equal(found[0]["model.layers.1.mlp.up_proj.weight"], found[2]["model.layers.1.mlp.up_proj.weight"])
    for name, value in found[0].items():
        if "norm" in name:
            assert bool((value == 1).all())
        else:
            assert float(value.std()) == pytest.approx(0.05, rel=0.05), name
    layers = [found[0][f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)]
    assert not torch.equal(*layers)


def test_a_skeleton_has_buffers_and_no_weights(tmp_path):
    make_model(SMALL_CONFIGS["gemma3_text"]).save_pretrained(tmp_path)
    model = skeleton(tmp_path)
    real = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    for (name, found), (_, expected) in zip(model.named_buffers(), real.named_buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_the_loss_of_a_causal_model_is_not_warned_of(monkeypatch):
    from transformers import modeling_utils

    monkeypatch.setattr(modeling_utils.logger, "warning_once", pytest.fail)
    model = skeleton("gpt2")
    assert model.loss_function.__name__ == "ForCausalLMLoss"
    assert "loss_type" not in model.config.to_dict()


@pytest.mark.parametrize("name", [".", "config.json"])
def test_the_tokenizer_goes_with_the_weights(saved, tmp_path, name):
    taken = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
    taken += ("added_tokens.json", "chat_template.jinja", "generation_config.json")
    for file in (*taken, "README.md", "optimizer.pt"):
        (saved / file).write_text(file)
    out = tmp_path / "out"
    with SlidingTrainer(saved / name, Plan(model="llama", **SIZES), device=DEVICE) as trainer:
        trainer.save(out)
        # Into the model's own folder there is nothing to copy.
        trainer.save(saved)
        (out / "merges.txt").unlink()
        (out / "merges.txt").mkdir()
        with pytest.raises(SlidetuneError, match="the tokenizer could not be copied"):
            trainer.save(out)
    assert {path.name for path in out.iterdir() if not path.name.startswith("model")} == {*taken, "config.json"}
    assert (saved / "merges.txt").read_text() == "merges.txt"


def test_a_catalog_model_by_name():
    model = skeleton("qwen2.5-0.5b")
    assert type(model).__name__ == "Qwen2ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(494e6, rel=0.01)


def test_no_such_model():
    with pytest.raises(UnknownName):
        skeleton("lama-9b")


def refused(folder, match):
    with pytest.raises((BadFile, SlidetuneError), match=match):
        SlidingTrainer(folder, Plan(model="llama", **SIZES), device=DEVICE)


def test_no_weights(saved):
    (saved / "model.safetensors").unlink()
    refused(saved, "no safetensors files")


def test_a_broken_file(saved):
    (saved / "model.safetensors").write_bytes(b"no tensors here")
    refused(saved, "not a safetensors file")


def test_a_missing_tensor(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, saved / "model.safetensors")
    refused(saved, r"no tensor model\.layers\.2\.mlp\.up_proj\.weight")


def test_a_tensor_of_another_shape(saved):
    tensors = load_file(saved / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(5)
    save_file(tensors, saved / "model.safetensors")
    refused(saved, r"model\.norm\.weight is \(5,\)")


def test_quantized_weights(saved):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.experts.down_proj_scales": torch.ones(1)}, saved / "model.safetensors")
    refused(saved, "quantized")


def test_an_index_that_names_a_missing_file(saved):
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "b.safetensors"}}))
    refused(saved, r"b\.safetensors, which is not there")
