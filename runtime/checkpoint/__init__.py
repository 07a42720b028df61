"""Checkpoints: all that training goes on from, saved so that a crash at any moment leaves a whole one.

with Checkpoints("run") as checkpoints:
    saved = checkpoints.save(trainer, extra={"schedule": ..., "data": ...})

A checkpoint is a folder of safetensors files, one a unit, whose tensors are named after the model's parameters, and of
`checkpoint.json`. Nothing in it depends on the plan, and nothing is pickled.
"""

from slidetune.runtime.checkpoint.exporting import export
from slidetune.runtime.checkpoint.folder import checkpoints, latest
from slidetune.runtime.checkpoint.lock import DirectoryLock
from slidetune.runtime.checkpoint.manifest import Manifest, read_manifest, verify
from slidetune.runtime.checkpoint.resuming import load_into
from slidetune.runtime.checkpoint.saver import CheckpointFailed, Checkpoints, Saved

__all__ = [
    "CheckpointFailed",
    "Checkpoints",
    "DirectoryLock",
    "Manifest",
    "Saved",
    "checkpoints",
    "export",
    "latest",
    "load_into",
    "read_manifest",
    "verify",
]
