"""YAML files of dataclasses: reading with errors that say what to change, writing, and their JSON schema.

The dataclasses stay plain: pydantic validates them from outside. The docstring under a field describes it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from slidetune.errors import BadFile

T = TypeVar("T")

_SHOWN_ERRORS = 5
_ORDER = {"unexpected_keyword_argument": 0, "missing": 2}


def read(path: str | Path, type: type[T]) -> T:
    """The dataclass `type` that a YAML file holds.

    Raises `BadFile`, which names the file, the field, what was found there and what is allowed, for a file
    that is missing, empty, no YAML, of another version, or has missing, unknown or wrong fields.
    """
    from pydantic import ValidationError

    data = _load_yaml(Path(path))
    try:
        return _adapter(type).validate_python([data])[0]
    except ValidationError as error:
        # A misspelt field is also a missing one: the spelling comes first.
        found = sorted(error.errors(include_url=False), key=lambda e: _ORDER.get(e["type"], 1))
        lines = [_explain(type, problem) for problem in found[:_SHOWN_ERRORS]]
        if len(found) > _SHOWN_ERRORS:
            lines.append(f"and {len(found) - _SHOWN_ERRORS} more")
        raise BadFile("\n".join(f"{path}: {line}" for line in lines)) from None


def write(path: str | Path, obj: Any) -> None:
    """Write a dataclass as YAML that `read` takes back. Raises `BadFile` where it can't be written."""
    import yaml

    fields = dump(obj)
    # YAML takes these for line ends inside plain text; escaped they stay what they are.
    readable = not any(end in str(fields) for end in ("\\x85", "\\u2028", "\\u2029"))
    text = yaml.safe_dump(fields, sort_keys=False, allow_unicode=readable, width=110)
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None


def dump(obj: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and values, without the fields that are None."""
    return _plain(dataclasses.asdict(obj))


def json_schema(type: type) -> dict[str, Any]:
    """JSON schema of the files that `read` takes for `type`, fields described by their docstrings."""
    schema = _adapter(type).json_schema()
    definitions = schema.get("$defs", {})
    top = definitions.pop(schema["items"]["$ref"].rsplit("/", 1)[1]) if "$ref" in schema["items"] else schema["items"]
    return top | ({"$defs": definitions} if definitions else {})


@cache
def _adapter(type: type) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    # pydantic takes a config for a plain dataclass only through something that contains it: hence the list.
    config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    return TypeAdapter(list[type], config=config)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _load_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except FileNotFoundError:
        raise BadFile(f"{path}: no such file.") from None
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise BadFile(f"{path}: not a text file in UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that isn't one
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise BadFile(f"{path}: {where}not YAML: {getattr(error, 'problem', None) or error}.") from None
    if data is None:
        raise BadFile(f"{path}: the file is empty.")
    if not isinstance(data, dict):
        raise BadFile(f"{path}: holds {_name(data)} where fields are expected (`name: value`).")
    return data


def _explain(type: type, problem: dict[str, Any]) -> str:
    """One line about one of pydantic's errors: the field, what was found, what is allowed."""
    loc = problem["loc"][1:]  # [0] is the place in the list of `_adapter`
    where, found = ".".join(map(str, loc)), problem["input"]
    match problem["type"]:
        case "unexpected_keyword_argument":
            fields = _fields_at(type, loc[:-1])
            near = difflib.get_close_matches(str(loc[-1]), fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"fields here: {', '.join(fields)}."
            return f"{where} is not a known field; {hint}"
        case "missing":
            return f"{where} is missing."
        case "literal_error" if loc == ("version",):
            return f"version is {found!r}; this slidetune reads version {problem['ctx']['expected']}."
        case "literal_error":
            return f"{where} is {found!r}; allowed: {problem['ctx']['expected']}."
        case "dataclass_type":
            return f"{where} is {found!r}; expected fields: {', '.join(_fields_at(type, loc))}."
        case "value_error":
            return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    return f"{where} is {_name(found)}; {problem['msg'].removeprefix('Input ')}."


def _name(value: Any) -> str:
    """A value as an error shows it: short ones as they are, others by their kind."""
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)


def _fields_at(kind: Any, loc: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the dataclass at `loc` inside `kind`; empty where there is none."""
    for part in loc:
        cls = _dataclass_in(kind)
        kind = typing.get_type_hints(cls).get(part) if cls and isinstance(part, str) else kind
    cls = _dataclass_in(kind)
    return [field.name for field in dataclasses.fields(cls)] if cls else []


def _dataclass_in(kind: Any) -> Any:
    """The dataclass in an annotation such as `X | None` or `tuple[X, ...]`."""
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(kind, types.GenericAlias):
        return kind
    return next((cls for arg in typing.get_args(kind) if (cls := _dataclass_in(arg))), None)
