"""Plans as YAML files whose comments say what each knob does and why it has its value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from slidetune import files
from slidetune.commented import commented, write_text
from slidetune.plans import Plan


def read_plan(path: str | Path) -> Plan:
    """The plan a YAML file holds. Raises `BadFile`, naming file, field and what is allowed."""
    return files.read(path, Plan)


def write_plan(
    path: str | Path, plan: Plan, *, reasons: Mapping[str, str] | None = None, heading: Sequence[str] = ()
) -> Path:
    """Write a plan, commented. `reasons` says why, by knob ("window", "activations.gpu"); `heading` comes first.

    Raises `BadFile` where the file can't be written.
    """
    return write_text(path, plan_text(plan, reasons=reasons, heading=heading))


def plan_text(plan: Plan, *, reasons: Mapping[str, str] | None = None, heading: Sequence[str] = ()) -> str:
    """The file's text, which `read_plan` takes back."""
    return commented(plan, reasons=reasons, heading=heading)
