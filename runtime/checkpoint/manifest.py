"""`checkpoint.json`: what a checkpoint holds beside tensors, and what each of its files must be. Written last."""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slidetune.errors import BadFile, SlidetuneError
from slidetune.runtime.checkpoint.tensor_files import FileSums, TensorReader

FILE = "checkpoint.json"
MODEL = "model"
"""Folder of the model's config and tokenizer."""
FORMAT = 1


@dataclass(slots=True, kw_only=True)
class Manifest:
    """All of a checkpoint but its tensors."""

    step: int
    """Steps made, refused ones included."""
    updates: int
    seed: int
    """Of dropout."""
    model: str
    """As the plan names it."""
    config_sha256: str
    plan: dict[str, Any]
    """By which it was trained, for information: any plan can go on from it."""
    kernels: str
    device: str
    groups: list[dict[str, float]]
    """Sets of the optimizer's hyper-parameters."""
    parameters: dict[str, int | None]
    """By parameter, which of `groups` it is updated with; None: frozen."""
    random: dict[str, Any]
    extra: dict[str, Any]
    """The caller's: learning-rate schedule, place in the data, what it likes."""
    slidetune: str
    saved_at: str
    serial: int = 0
    """Counts the saves in a directory. The latest is the one with the highest, whatever its step."""
    shards: dict[str, FileSums] = field(default_factory=dict)
    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Other files: bytes and CRC-32."""

    def text(self) -> str:
        """The file's text. Raises SlidetuneError if `extra` holds what JSON has no word for."""
        try:
            # As it will be read: tuples have become lists, keys strings.
            body = json.loads(json.dumps({"format": FORMAT, **asdict(self)}))
            body["crc32"] = _checksum(body)
        except (TypeError, ValueError) as error:
            raise SlidetuneError(f"extra can't be written as JSON ({error}).") from None
        return json.dumps(body, indent=1)


def read_manifest(checkpoint: Path) -> Manifest:
    """What a checkpoint's directory says of itself. Raises BadFile if it is none, damaged or of another format."""
    path = checkpoint / FILE
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        expected, version = body.pop("crc32"), body["format"]
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}: no checkpoint is here.") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise BadFile(f"{path}: no checkpoint's description.") from None
    if version != FORMAT:
        raise BadFile(f"{path}: of format {version}; this slidetune reads format {FORMAT}.")
    if _checksum(body) != expected:
        raise BadFile(f"{path} is damaged: it is not what was written.", "Take another checkpoint, if there is one.")
    del body["format"]
    body["shards"] = {name: FileSums(**sums) for name, sums in body["shards"].items()}
    body["files"] = {name: tuple(pair) for name, pair in body["files"].items()}
    return Manifest(**body)


def verify(checkpoint: str | Path) -> Manifest:
    """Read all of a checkpoint and compare it with its checksums. Raises BadFile, naming the damaged file."""
    checkpoint = Path(checkpoint)
    manifest = read_manifest(checkpoint)
    for name in manifest.files:
        read_file(checkpoint, manifest, name)
    for name, sums in manifest.shards.items():
        with TensorReader(checkpoint / name, sums) as reader:
            for tensor in reader.tensors:
                reader.skim(tensor)
    return manifest


def read_file(checkpoint: Path, manifest: Manifest, name: str) -> bytes:
    """One of the files beside the shards. Raises BadFile if it is damaged."""
    path = checkpoint / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None
    if (len(data), zlib.crc32(data)) != manifest.files[name]:
        raise BadFile(f"{path} is damaged: it is not what was written.", "Take another checkpoint, if there is one.")
    return data


def _checksum(body: dict[str, Any]) -> int:
    """Of the values, however they are laid out."""
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())
