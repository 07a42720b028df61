"""Models by name: the offline catalog, a `config.json`, a directory holding one, or a hub id."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml

from slidetune.errors import BadFile, SlidetuneError, UnknownName
from slidetune.model import ModelSpec

CATALOG = Path(__file__).parent / "catalog" / "models.yaml"

# Fields of a catalog row that are not the config's own.
_ABOUT = ("hub", "params")


@lru_cache(maxsize=1)
def _rows() -> dict[str, str]:
    """The catalog's rows, unparsed: each is one line, and parsing all of them takes 40 times as long."""
    lines = CATALOG.read_text(encoding="utf-8").splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


@cache
def catalog_row(name: str) -> dict[str, Any]:
    """A catalog model's row: `hub` (its hub id), `params` (published count), and its config's fields."""
    return yaml.load(_rows()[name], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def model_names() -> list[str]:
    """Names in the offline catalog, in the catalog's order (family by family, small to large)."""
    return list(_rows())


def in_catalog(ref: str) -> bool:
    """Whether `ref` names a model of the offline catalog, by its name there or its hub id."""
    return _catalog_name(ref) is not None


def load_model(ref: str) -> ModelSpec:
    """The model that `ref` names.

    `ref` is a catalog name or its hub id (either in any case), the path of a `config.json` or of a directory
    holding one, or a hub id, which needs transformers and a reachable hub. Raises `UnknownName` for a name
    that is none of these, `BadFile` for an unreadable config, `SlidetuneError` for a hub that can't be asked.
    """
    ref = str(ref)
    name = _catalog_name(ref)
    if name is not None:
        return _catalog_model(name)
    path = Path(ref).expanduser()
    if path.exists():
        return _from_path(path)
    if path.suffix == ".json":
        raise BadFile(f"{ref}: no such file.", "Give a config.json, a directory holding one, or a name.")
    # Where the owner's folder is here, a path was meant: asking the hub for it takes minutes where there is none.
    if "/" in ref and path.parent.is_dir():
        raise BadFile(f"{ref}: no such directory.", "Give a config.json, a directory holding one, or a name.")
    if _looks_like_hub_id(ref):
        return _from_hub(ref)
    raise UnknownName("model", ref, model_names(), "`slidetune models` lists them all.")


def _catalog_name(ref: str) -> str | None:
    folded = ref.casefold()
    if folded in _rows():
        return folded
    # Only a hub id needs the rows' text.
    if "/" not in ref:
        return None
    wanted = f"{{hub: {folded},"
    return next((name for name, row in _rows().items() if row.casefold().startswith(wanted)), None)


@cache
def _catalog_model(name: str) -> ModelSpec:
    from slidetune.families import spec_from_config

    row = catalog_row(name)
    return spec_from_config({field: row[field] for field in row if field not in _ABOUT}, name)


def _from_path(path: Path) -> ModelSpec:
    from slidetune.families import spec_from_config

    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFile(f"{path}: no config.json in this directory.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFile(f"{file}: cannot be read ({error}).") from None
    except json.JSONDecodeError as error:
        raise BadFile(f"{file}: not JSON ({error}).") from None
    # A plan names its model by the spec's name, so that must lead back to the file.
    return spec_from_config(config, str(file))


def _looks_like_hub_id(ref: str) -> bool:
    owner, slash, rest = ref.partition("/")
    return bool(slash and owner and rest) and "/" not in rest and not owner.startswith((".", "~"))


def _from_hub(ref: str) -> ModelSpec:
    from slidetune.families import spec_from_config

    try:
        from transformers import AutoConfig
    except ImportError:
        raise SlidetuneError(
            f"{ref} is not in the offline catalog, and reading it from the hub needs transformers.",
            'pip install "slidetune[runtime]", or give the path of its config.json.',
        ) from None
    try:
        config = AutoConfig.from_pretrained(ref).to_dict()
    # The hub's client has an exception for every way to fail, not all of them OSError.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SlidetuneError(
            f"{ref} could not be read from the hub: {reason}",
            "Check the id and the connection, or give the path of its config.json, or a catalog name.",
        ) from None
    return spec_from_config(config, ref)
