"""Fields of a Hugging Face config, checked as they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from slidetune.errors import BadFile

REQUIRED: Any = object()


class Fields:
    """A config's fields, checked as they are read. `name` is what error messages call the config."""

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        self.config = config
        self.name = name

    def integer(self, field: str, default: Any = REQUIRED, *, least: int = 1) -> Any:
        """An integer of at least `least`; an absent field is `default`. Null is allowed where the default
        is None."""
        value = self._get(field, default)
        if value is None and default is None:
            return None
        if type(value) is not int or value < least:
            self.refuse(field, value, f"an integer >= {least}{' or null' if default is None else ''}")
        return value

    def optional(self, field: str, absent: int | None = None, *, least: int = 1) -> int | None:
        """An integer or null; `absent` where the config does not name the field."""
        return self.integer(field, None, least=least) if field in self.config else absent

    def flag(self, field: str, default: bool) -> bool:
        value = self._get(field, default)
        value = default if value is None else value
        return value if isinstance(value, bool) else self.refuse(field, value, "true or false")

    def text(self, field: str, default: str) -> str:
        value = self._get(field, default)
        value = default if value is None else value
        return value if isinstance(value, str) else self.refuse(field, value, "a string")

    def sequence(self, field: str, kind: type, allowed: str) -> list[Any] | None:
        """A list of `kind`, or None where absent or null."""
        value = self._get(field, None)
        if value is None or (isinstance(value, list) and all(type(item) is kind for item in value)):
            return value
        return self.refuse(field, value, allowed)

    def _get(self, field: str, default: Any) -> Any:
        value = self.config.get(field, default)
        if value is REQUIRED:
            raise BadFile(f"{self.name}: field {field!r} is missing.", "It must be an integer >= 1.")
        return value

    def refuse(self, field: str, value: Any, allowed: str) -> NoReturn:
        raise BadFile(f"{self.name}: field {field!r} is {value!r}.", f"Allowed: {allowed}.")
