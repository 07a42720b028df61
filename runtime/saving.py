"""A trained model written as transformers reads it: config, safetensors files, and their index."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from slidetune.errors import SlidetuneError

# What other saves leave of weights; transformers prefers a single file to an index.
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json", "pytorch_model.bin.index.json")

# What goes with the weights without being trained: text to tokens and back, and how to generate.
_EXTRAS = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)


def save_extras(source: Path, target: str | Path) -> None:
    """Copy a model directory's tokenizer and generation config, so that what is saved beside them can be used at once.

    Raises SlidetuneError if that fails.
    """
    target = Path(target)
    if source.resolve() == target.resolve():
        return
    try:
        for path in sorted({path for pattern in _EXTRAS for path in source.glob(pattern) if path.is_file()}):
            shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise SlidetuneError(f"{target}: the tokenizer could not be copied ({error}).") from error


def save_units(folder: str | Path, model: nn.Module, units: Iterable[dict[str, Tensor]]) -> None:
    """Write the weights of one unit after the other, each to a file of its own, then config and index.

    What was in the folder is replaced as `replace_model` does it; raises as that does.
    """
    replace_model(folder, lambda staging: _write(staging, model, units))


def replace_model(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Have `write` put a model's files into an empty folder, and move them to where they belong.

    All is written beside the folder's files first, so that they stay what they were if that fails; then weights that
    were there are replaced. Raises SlidetuneError if the folder can't be written to.
    """
    folder = Path(folder)
    staging = folder / ".saving"
    if folder.exists() and not folder.is_dir():
        raise SlidetuneError(f"{folder}: is a file.", "Give a directory; it is made if it is not there.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        write(staging)
        stale = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
        for path in sorted(staging.iterdir()):
            path.replace(folder / path.name)
            stale.discard(folder / path.name)
        for path in stale:
            path.unlink()
        staging.rmdir()
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise SlidetuneError(f"{folder}: the model could not be written ({error}).") from error


def unit_file(number: int) -> str:
    """The name of a unit's file of weights; units count from 1."""
    return f"model-unit-{number:05d}.safetensors"


def write_index(folder: Path, files: Mapping[str, str], nbytes: int) -> None:
    """Write which file each parameter is in; `nbytes`: of all weights."""
    index = {"metadata": {"total_size": nbytes}, "weight_map": dict(files)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write(folder: Path, model: nn.Module, units: Iterable[dict[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    where: dict[str, str] = {}
    size = 0
    for number, weights in enumerate(units, start=1):
        if not weights:
            continue
        file = unit_file(number)
        save_file(weights, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(weights, file)
        size += sum(tensor.nbytes for tensor in weights.values())
    write_index(folder, where, size)
    model.config.save_pretrained(folder)
    # safetensors' files are their owner's alone. Not every filesystem has modes.
    with contextlib.suppress(OSError):
        for file in set(where.values()):
            shutil.copymode(folder / "config.json", folder / file)
