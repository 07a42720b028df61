"""Dataclasses as YAML files whose comments say what each field does: the text under the field in its class."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slidetune.errors import BadFile
from slidetune.field_docs import field_docs

_WIDTH = 100


def write_text(path: str | Path, text: str) -> Path:
    """Write a file's text. Raises `BadFile` where it can't be written."""
    path = Path(path)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None
    return path


def commented(obj: Any, *, reasons: Mapping[str, str] | None = None, heading: Sequence[str] = ()) -> str:
    """The file's text, which `files.read` takes back. `reasons` says why a field has its value, by its name ("window",
    "activations.gpu"); `heading` comes first."""
    lines = [f"# {line}".rstrip() for line in heading]
    lines += ["", *_fields(obj, reasons or {}, "", 0)]
    return "\n".join(lines).strip() + "\n"


def _fields(obj: Any, reasons: Mapping[str, str], prefix: str, depth: int) -> list[str]:
    lines: list[str] = []
    docs, indent = field_docs(type(obj)), "  " * depth
    for field in dataclasses.fields(obj):
        value = getattr(obj, field.name)
        name = f"{prefix}{field.name}"
        if lines and not prefix:
            lines.append("")
        lines += _comment(docs.get(field.name, ""), indent)
        if name in reasons:
            lines += _comment(f"Here: {reasons[name]}", indent)
        if dataclasses.is_dataclass(value):
            lines += [f"{indent}{field.name}:", *_fields(value, reasons, f"{name}.", depth + 1)]
        else:
            lines.append(f"{indent}{field.name}: {_scalar(value)}")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ")


def _scalar(value: object) -> str:
    import yaml

    return yaml.safe_dump(value, default_flow_style=True, width=10_000).removesuffix("...\n").strip()
