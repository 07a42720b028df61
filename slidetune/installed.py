"""Which libraries are here, found out without loading them."""

from __future__ import annotations

import importlib.util

from slidetune.errors import SlidetuneError


def check_runtime(doing: str) -> None:
    """Raise SlidetuneError where the runtime's libraries, which `doing` needs, are not installed."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            raise SlidetuneError(f"{doing} needs {name}, which is not installed.", 'pip install "slidetune[runtime]"')
