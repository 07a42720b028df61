"""An exported checkpoint is what transformers loads, and what the trainer itself would have saved."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")

from safetensors import safe_open
from transformers import AutoModelForCausalLM

from slidetune.errors import BadFile, SlidetuneError
from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW
from slidetune.runtime.checkpoint import Checkpoints, export, latest
from slidetune.runtime.trainer import SlidingTrainer, decay_where_it_belongs

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIMIZER = AdamW(lr=1e-2)


def freeze_first_layer(name, parameter):
    return None if ".0." in name else decay_where_it_belongs(OPTIMIZER)(name, parameter)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe, dense layers", "gpt2", "gemma3_text"])
def test_exported_is_what_the_trainer_has(tmp_path, name):
    config = SMALL_CONFIGS[name]
    home, out = tmp_path / "model", tmp_path / "out"
    make_model(config).save_pretrained(home)
    (home / "tokenizer_config.json").write_text('{"a": 1}')
    plan = Plan(model=str(home), seq_len=12, chunk_bytes=8192, adam_threads=1)
    with (
        SlidingTrainer(home, plan, rule=freeze_first_layer, device=DEVICE) as trainer,
        Checkpoints(tmp_path / "run") as checkpoints,
    ):
        for batch in random_batches(config, plan, 2):
            trainer.step(batch)
        checkpoints.save(trainer)
        checkpoints.wait()
        expected = {dtype: trainer.state_dict(DTYPES[dtype]) for dtype in DTYPES}
        trainer.save(tmp_path / "saved")
    # One after the other into one directory: the later takes the place of the earlier.
    for dtype in ("fp32", "bf16"):
        assert export(tmp_path / "run", out, dtype) == latest(tmp_path / "run")
        model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert model.dtype == DTYPES[dtype]
        loaded = dict(model.named_parameters())
        assert loaded.keys() == expected[dtype].keys()
        assert all(torch.equal(loaded[key], value) for key, value in expected[dtype].items())
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "saved").iterdir()}
    assert (out / "tokenizer_config.json").read_text() == '{"a": 1}'
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((tmp_path / "saved" / index).read_text())


def test_shards_are_plain_safetensors(tmp_path):
    config = SMALL_CONFIGS["llama"]
    plan = Plan(model="llama", seq_len=12, chunk_bytes=8192, adam_threads=1)
    with SlidingTrainer(make_model(config), plan, device=DEVICE) as trainer, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(trainer)
        halves = trainer.state_dict(torch.bfloat16)
    found = {}
    for path in latest(tmp_path).glob("state-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert len(found) == 4 * len(halves)
    assert all(torch.equal(found[f"{key}.master_high"], value) for key, value in halves.items())
    assert not any(value.any() for key, value in found.items() if key.endswith("exp_avg"))


def test_what_can_not_be_exported(tmp_path):
    with pytest.raises(BadFile, match="no checkpoint is here"):
        export(tmp_path, tmp_path / "out")
    with pytest.raises(SlidetuneError, match="dtype must be one of bf16, fp32"):
        export(tmp_path, tmp_path / "out", "fp16")
