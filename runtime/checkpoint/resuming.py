"""A trainer set to where a checkpoint was saved, whatever plan either has."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slidetune.errors import SlidetuneError
from slidetune.runtime.checkpoint import random_states
from slidetune.runtime.checkpoint.folder import chosen
from slidetune.runtime.checkpoint.manifest import Manifest, read_manifest
from slidetune.runtime.checkpoint.saver import config_digest
from slidetune.runtime.checkpoint.tensor_files import TensorReader
from slidetune.runtime.checkpoint.units import at_once, read_unit, tensor_specs
from slidetune.runtime.masters import Master

if TYPE_CHECKING:
    from slidetune.runtime.trainer import SlidingTrainer

_log = logging.getLogger(__name__)
# Knobs that change what is computed, not only where and when.
_ARITHMETIC = ("seq_len", "micro_batch", "accumulation", "clip_norm")


def load_into(trainer: SlidingTrainer, path: str | Path, *, same_optimizer: bool = True) -> dict[str, Any]:
    """Set masters, moments, counts, seed and random generators to what a checkpoint holds; returns its `extra`.

    Every byte is checked on its way. Losses and weights are then those of a run that never stopped, bit for bit, as
    long as device, kernels, batch and clipping are the same; what differs of these is logged as a warning.

    Args:
        trainer: of the same model, by any plan.
        path: a checkpoint, or a directory of them, of which the latest is taken.
        same_optimizer: refuse hyper-parameters other than those it was trained with; False takes the trainer's.

    Raises:
        SlidetuneError: the checkpoint is of another model, other parameters are trained, or other hyper-parameters
            used; the trainer is as it was.
        BadFile: the checkpoint is damaged; if that showed on the way, the trainer has been closed.
    """
    path = chosen(path)
    manifest = read_manifest(path)
    masters, slot = trainer.settled()
    with contextlib.ExitStack() as stack:
        readers: dict[str, TensorReader] = {}
        for name, sums in manifest.shards.items():
            reader = stack.enter_context(TensorReader(path / name, sums))
            readers |= dict.fromkeys(reader.tensors, reader)
        _check_same(trainer, path, manifest, masters, readers)
        if same_optimizer:
            _check_optimizer(path, manifest, masters)
        _warn_of_changes(trainer, path, manifest)
        try:
            at_once(lambda master: read_unit(readers, master, slot), masters)
            if trainer.device.type == "cuda":
                # What was copied must be there for the lanes' streams.
                torch.cuda.synchronize(trainer.device)
        except BaseException:
            trainer.close()
            raise
    trainer.count_from(steps=manifest.step, updates=manifest.updates, seed=manifest.seed)
    random_states.restore(manifest.random, trainer.device)
    return manifest.extra


def _check_same(
    trainer: SlidingTrainer, path: Path, manifest: Manifest, masters: list[Master], readers: dict[str, TensorReader]
) -> None:
    entries = [entry for master in masters for entry in master.layout.entries]
    odd = sorted({entry.name for entry in entries} ^ manifest.parameters.keys())
    if odd:
        raise SlidetuneError(
            f"{path}: a checkpoint of {manifest.model}; this model is another one ({odd[0]} is in one of them only)."
        )
    for entry in entries:
        trained = manifest.parameters[entry.name] is not None
        if trained != (entry.hyper is not None):
            raise SlidetuneError(
                f"{path}: {entry.name} was {'trained' if trained else 'frozen'} there, and here it is "
                f"{'frozen' if trained else 'trained'}.",
                "Freeze the same parameters.",
            )
    for master in masters:
        for name, spec in tensor_specs(master.layout).items():
            found = readers[name].tensors[name] if name in readers else None
            if found != spec:
                shape = "missing" if found is None else f"{found.dtype} {found.shape}"
                raise SlidetuneError(f"{path}: {name} is {shape}; this model's is {spec.dtype} {spec.shape}.")


def _check_optimizer(path: Path, manifest: Manifest, masters: list[Master]) -> None:
    for entry in (entry for master in masters for entry in master.layout.entries):
        group = manifest.parameters[entry.name]
        if group is not None and manifest.groups[group] != asdict(entry.hyper):
            saved, mine = manifest.groups[group], asdict(entry.hyper)
            changed = ", ".join(f"{key} {saved[key]}, here {mine[key]}" for key in mine if saved[key] != mine[key])
            raise SlidetuneError(
                f"{path}: {entry.name} was trained with other hyper-parameters: {changed}.",
                "Give those of the checkpoint, or say that new ones are meant (same_optimizer=False).",
            )


def _warn_of_changes(trainer: SlidingTrainer, path: Path, manifest: Manifest) -> None:
    plan = asdict(trainer.plan)
    pairs = {knob: (manifest.plan.get(knob), plan[knob]) for knob in _ARITHMETIC}
    pairs["kernels"] = (manifest.kernels, trainer.kernels)
    pairs["device"] = (manifest.device.partition(":")[0], trainer.device.type)
    pairs["the model's config"] = (manifest.config_sha256[:8], config_digest(trainer)[:8])
    changed = [f"{what} was {old} and is {new}" for what, (old, new) in pairs.items() if old != new]
    if changed:
        _log.warning("%s: training goes on otherwise than it would have: %s.", path, ", ".join(changed))
