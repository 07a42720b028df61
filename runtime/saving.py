"""A trained model written as transformers reads it: config, safetensors files, and their index."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from slidetune.errors import SlidetuneError


def save_units(folder: str | Path, model: nn.Module, units: Iterable[dict[str, Tensor]]) -> None:
    """Write the weights of one unit after the other, each to a file of its own, then config and index.

    Raises SlidetuneError if the folder can't be written to.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    where: dict[str, str] = {}
    size = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, weights in enumerate(units, start=1):
            if not weights:
                continue
            file = f"model-unit-{number:05d}.safetensors"
            save_file(weights, folder / file, metadata={"format": "pt"})
            where |= dict.fromkeys(weights, file)
            size += sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
        model.config.save_pretrained(folder)
    except OSError as error:
        raise SlidetuneError(f"{folder}: the model could not be written ({error}).") from error
