"""Errors a user can act on. The CLI prints them without a traceback and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SlidetuneError(Exception):
    """A mistake or a limit the user can do something about. `hint` says what."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class UnknownName(SlidetuneError):
    """A name that is not in a catalog; suggests near ones."""

    def __init__(self, what: str, name: str, known: Iterable[str], see: str = "") -> None:
        known = sorted(known)
        folded = {k.casefold(): k for k in known}
        near = [folded[k] for k in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
        near = near or [k for k in known if name and name.casefold() in k.casefold()][:3]
        some = ", ".join(known[:12]) + (", ..." if len(known) > 12 else ".")
        hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {some}"
        super().__init__(f"unknown {what} {name!r}.", f"{hint} {see}".strip())


class BadFile(SlidetuneError):
    """A file that cannot be read as what it should be; names the file, the field and the allowed values."""


class DoesNotFit(SlidetuneError):
    """No plan fits the machine, or a given plan does not; says which tier overflows, by how much and why."""
