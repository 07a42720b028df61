"""A checkpoint as a directory that transformers reads: parameter after parameter, with no trainer and little RAM."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from slidetune.errors import SlidetuneError
from slidetune.runtime.checkpoint.folder import chosen
from slidetune.runtime.checkpoint.manifest import MODEL, Manifest, read_file, read_manifest
from slidetune.runtime.checkpoint.tensor_files import TensorReader, TensorSpec, TensorWriter
from slidetune.runtime.checkpoint.units import tensor_name
from slidetune.runtime.saving import replace_model, unit_file, write_index
from slidetune.runtime.split import join

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Elements at a time.
_PIECE = 1 << 22


def export(checkpoint: str | Path, out: str | Path, dtype: str = "bf16") -> Path:
    """Write weights, config and tokenizer for `AutoModelForCausalLM.from_pretrained`; returns the checkpoint taken.

    Args:
        checkpoint: one, or a directory of them, of which the latest is taken. What is read of it is checked.
        out: made if it isn't there; weights that are in it are replaced once all is written.
        dtype: "bf16", or "fp32" for the masters as they are.

    Raises:
        BadFile: the checkpoint is damaged or there is none.
        SlidetuneError: `out` can't be written to, or `dtype` is another one.
    """
    if dtype not in _DTYPES:
        raise SlidetuneError(f"dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}.")
    checkpoint = chosen(checkpoint)
    manifest = read_manifest(checkpoint)
    replace_model(out, lambda folder: _write(folder, checkpoint, manifest, _DTYPES[dtype]))
    return checkpoint


def _write(folder: Path, checkpoint: Path, manifest: Manifest, dtype: torch.dtype) -> None:
    where: dict[str, str] = {}
    size = 0
    for number, (name, sums) in enumerate(manifest.shards.items(), start=1):
        with TensorReader(checkpoint / name, sums) as reader:
            specs = _weights(reader, manifest, dtype)
            with TensorWriter(folder / unit_file(number), specs, {"format": "pt"}) as writer:
                for parameter in specs:
                    _convert(reader, writer, parameter, dtype, manifest.parameters[parameter] is not None)
                writer.finish()
        where |= dict.fromkeys(specs, unit_file(number))
        size += sum(spec.nbytes for spec in specs.values())
    write_index(folder, where, size)
    for name in manifest.files:
        data = read_file(checkpoint, manifest, name)
        if name == f"{MODEL}/config.json":
            data = _config(data, dtype)
        (folder / Path(name).name).write_bytes(data)


def _weights(reader: TensorReader, manifest: Manifest, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The parameters in a file."""
    halves = {name: tensor_name(name, "master_high") for name in manifest.parameters}
    return {
        name: TensorSpec(dtype, reader.tensors[half].shape) for name, half in halves.items() if half in reader.tensors
    }


def _convert(reader: TensorReader, writer: TensorWriter, parameter: str, dtype: torch.dtype, trained: bool) -> None:
    count = torch.Size(reader.tensors[tensor_name(parameter, "master_high")].shape).numel()
    for start in range(0, count, _PIECE):
        size = min(_PIECE, count - start)
        piece = _read(reader, parameter, "master_high", torch.empty(size, dtype=torch.bfloat16))
        if dtype == torch.float32 and trained:
            low = _read(reader, parameter, "master_low", torch.empty(size, dtype=torch.int16))
            down = _read(reader, parameter, "exp_avg_sq", torch.empty(size, dtype=torch.float32)).signbit()
            piece = join(piece, low, down)
        writer.write(parameter, piece.to(dtype))


def _read(reader: TensorReader, parameter: str, part: str, into: torch.Tensor) -> torch.Tensor:
    reader.read(tensor_name(parameter, part), into)
    return into


def _config(data: bytes, dtype: torch.dtype) -> bytes:
    """The config with the type of the weights beside it, in which transformers then loads them."""
    return json.dumps({**json.loads(data), "dtype": str(dtype).removeprefix("torch.")}, indent=2).encode()
