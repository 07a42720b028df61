"""A saved model takes the place of the weights that were in its folder."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM

from slidetune.errors import SlidetuneError
from slidetune.plans import Plan
from slidetune.runtime.adam import AdamW
from slidetune.runtime.saving import save_units
from slidetune.runtime.trainer import SlidingTrainer

from ..slidetune.reference import SMALL_CONFIGS
from .reference import DEVICE, make_model, random_batches


@pytest.mark.parametrize("shard", ["10GB", "100KB"])
def test_saving_to_the_models_own_folder(tmp_path, shard):
    config = SMALL_CONFIGS["llama"]
    make_model(config).save_pretrained(tmp_path, max_shard_size=shard)
    plan = Plan(model=str(tmp_path), seq_len=16, chunk_bytes=8192, adam_threads=1)
    with SlidingTrainer(str(tmp_path), plan, device=DEVICE, optimizer=AdamW(lr=1e-2)) as trainer:
        for batch in random_batches(config, plan, 2):
            trainer.step(batch)
        trainer.save(tmp_path)
        weights = trainer.state_dict(torch.bfloat16)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {
        f"model-unit-{number:05d}.safetensors" for number in range(1, config["num_hidden_layers"] + 3)
    }
    assert not (tmp_path / ".saving").exists()
    # Whoever may read one may read all.
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path):
    model = make_model(SMALL_CONFIGS["llama"])
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def units():
        yield {"a": torch.zeros(3)}
        raise OSError("disk full")

    with pytest.raises(SlidetuneError, match="disk full"):
        save_units(tmp_path, model, units())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
