"""Where a model's weights come from: tensor by tensor, so that loading needs no more memory than training does."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from slidetune.errors import BadFile, SlidetuneError
from slidetune.runtime.layout import Entry

if TYPE_CHECKING:
    from slidetune.runtime.unit_layouts import UnitLayout

Piece = tuple[int, Tensor]
"""First element and values (flat, any float dtype) of a part of a parameter."""
# Elements at a time: bounds what a piece takes on its way into the split master.
PIECE = 1 << 24
_NO_WEIGHTS = "Give the directory that holds its safetensors files, or train random weights (--random-weights)."

# How files name the parts of one expert, by the tensor in which transformers holds all of them: Qwen, Mixtral.
_EXPERTS = {
    "gate_up_proj": (
        ("mlp.experts.{}.gate_proj.weight", "mlp.experts.{}.up_proj.weight"),
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    ),
    "down_proj": (("mlp.experts.{}.down_proj.weight",), ("block_sparse_moe.experts.{}.w2.weight",)),
}


class Source(Protocol):
    """Gives the values of the parameters of one unit after the other."""

    def unit(self, unit: UnitLayout) -> Iterator[tuple[Entry, Iterator[Piece]]]:
        """Every entry that the unit owns, with its pieces."""
        ...


def pieces(values: Tensor) -> Iterator[Piece]:
    """A tensor's pieces."""
    flat = values.detach().reshape(-1)
    for start in range(0, flat.numel(), PIECE):
        yield start, flat[start : start + PIECE]


class FromModel:
    """A model that holds its weights."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        empty = next((name for name, p in self._parameters.items() if p.is_meta), None)
        if empty is not None:
            raise SlidetuneError(f"the model has no weights ({empty} is on the meta device).")

    def unit(self, unit: UnitLayout) -> Iterator[tuple[Entry, Iterator[Piece]]]:
        for entry in unit.owned.entries:
            yield entry, pieces(self._parameters[entry.name])


class RandomWeights:
    """The model's own initialisation, unit by unit, from a seed.

    Numbers are drawn on `device`, where that is hundreds of times as fast as on the CPU; the same seed gives other
    weights on another kind of device. Parameters of more than `room_bytes` are drawn on the CPU all the same.
    """

    def __init__(self, model: nn.Module, seed: int, device: torch.device, room_bytes: int) -> None:
        self._model, self._seed, self._units = model, seed, 0
        self._device, self._room_bytes = device, room_bytes
        self._homes: dict[str, tuple[nn.Module, str]] = {}
        for path, module in model.named_modules():
            for name in module._parameters:
                self._homes.setdefault(f"{path}.{name}" if path else name, (module, name))

    def unit(self, unit: UnitLayout) -> Iterator[tuple[Entry, Iterator[Piece]]]:
        self._units += 1
        homes = [self._homes[entry.name] for entry in unit.owned.entries]
        # A module's parameters are drawn together; one module at a time keeps what that takes small.
        for module in dict.fromkeys(module for module, _ in homes):
            entries = [(name, e) for (m, name), e in zip(homes, unit.owned.entries, strict=True) if m is module]
            self._draw(module, entries)
            for name, entry in entries:
                yield entry, pieces(module._parameters[name])
                module._parameters[name] = None

    def _draw(self, module: nn.Module, entries: list[tuple[str, Entry]]) -> None:
        size = sum(torch.bfloat16.itemsize * math.prod(entry.shape) for _, entry in entries)
        device = self._device if size <= self._room_bytes else torch.device("cpu")
        for name, entry in entries:
            values = torch.zeros(entry.shape, dtype=torch.bfloat16, device=device)
            module._parameters[name] = nn.Parameter(values, requires_grad=False)
        names = ".".join([str(self._units), *(entry.name for _, entry in entries)])
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            # By name, so that a module's weights don't depend on where those before it were drawn.
            torch.manual_seed(self._seed + zlib.crc32(names.encode()))
            self._model._init_weights(module)


class FromSafetensors:
    """The safetensors files of a directory as transformers or the hub has them, read tensor by tensor.

    Raises BadFile for files that are missing, quantized or don't fit the model.
    """

    def __init__(self, folder: str | Path, model: nn.Module) -> None:
        from safetensors import safe_open

        self._folder, self._open = Path(folder).expanduser(), safe_open
        if self._folder.name == "config.json":
            self._folder = self._folder.parent
        if not self._folder.is_dir():
            raise BadFile(f"{folder}: no directory with a model's weights.", _NO_WEIGHTS)
        self._files: dict[Path, Any] = {}
        self._where = self._index()
        self._prefix = model.base_model_prefix + "."
        quantized = next((n for n in self._where if n.endswith(("_scales", ".qweight", ".weight_scale_inv"))), None)
        if quantized is not None:
            raise BadFile(f"{folder}: holds quantized weights ({quantized}).", "Training needs them in bf16 or fp32.")

    def unit(self, unit: UnitLayout) -> Iterator[tuple[Entry, Iterator[Piece]]]:
        for entry in unit.owned.entries:
            yield entry, self._read(entry)
        # Pages of a file that is done are let go of with it.
        self._files.clear()

    def _index(self) -> dict[str, Path]:
        index = self._folder / "model.safetensors.index.json"
        if index.exists():
            try:
                weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError) as error:
                raise BadFile(f"{index}: not an index of safetensors files ({error!r}).") from None
            missing = [file for file in sorted(set(weight_map.values())) if not (self._folder / file).exists()]
            if missing:
                raise BadFile(f"{index}: names {missing[0]}, which is not there.")
            return {name: self._folder / file for name, file in weight_map.items()}
        files = sorted(self._folder.glob("*.safetensors"))
        if not files:
            raise BadFile(f"{self._folder}: no safetensors files.", _NO_WEIGHTS)
        return {name: file for file in files for name in self._file(file).keys()}  # noqa: SIM118

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = self._open(path, framework="pt")
            except Exception as error:  # safetensors' own, which is no OSError
                raise BadFile(f"{path}: not a safetensors file ({error}).") from None
        return self._files[path]

    def _read(self, entry: Entry) -> Iterator[Piece]:
        name = self._name(entry.name)
        if name is None:
            yield from self._read_experts(entry)
            return
        yield from self._slices(name, entry.shape, entry.name)

    def _slices(self, name: str, shape: tuple[int, ...], wanted: str) -> Iterator[Piece]:
        found = self._file(self._where[name]).get_slice(name)
        if tuple(found.get_shape()) != shape:
            raise BadFile(f"{self._folder}: {name} is {tuple(found.get_shape())}; {wanted} is {shape}.")
        row = 1
        for size in shape[1:]:
            row *= size
        rows = max(1, PIECE // max(1, row))
        for start in range(0, shape[0], rows):
            yield start * row, found[start : start + rows].reshape(-1)

    def _name(self, name: str) -> str | None:
        """A parameter's name in the files, where a base model's or a text tower's may have another prefix."""
        bare = name.removeprefix(self._prefix)
        for candidate in (name, bare, f"language_model.{name}", f"model.language_model.{bare}"):
            if candidate in self._where:
                return candidate
        return None

    def _read_experts(self, entry: Entry) -> Iterator[Piece]:
        """Experts that the files hold one by one and transformers in one tensor: gate and up, or down."""
        match = re.match(r"(.*\.)mlp\.experts\.(gate_up_proj|down_proj)$", entry.name)
        for parts in _EXPERTS[match[2]] if match else ():
            if self._name(match[1] + parts[0].format(0)) is not None:
                yield from self._stacked(entry, match[1], parts)
                return
        router = self._name(entry.name.replace(".mlp.gate.", ".block_sparse_moe.gate."))
        if router is None:
            raise BadFile(f"{self._folder}: no tensor {entry.name} in its safetensors files.")
        yield from self._slices(router, entry.shape, entry.name)

    def _stacked(self, entry: Entry, prefix: str, parts: tuple[str, ...]) -> Iterator[Piece]:
        experts, rows, width = entry.shape
        shape = (rows // len(parts), width)
        at = 0
        for expert in range(experts):
            for part in parts:
                name = self._name(prefix + part.format(expert))
                if name is None:
                    raise BadFile(f"{self._folder}: no tensor {prefix + part.format(expert)}.")
                for start, values in self._slices(name, shape, entry.name):
                    yield at + start, values
                at += shape[0] * shape[1]
