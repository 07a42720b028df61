"""What things are called, the same in every picture, page and trace."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from slidetune.schedule import CPU_ADAM, D2H, GPU, H2D, NVME_READ, NVME_WRITE

if TYPE_CHECKING:
    from slidetune.schedule import Schedule

LANE_LABELS = {
    GPU: "GPU",
    H2D: "uploads",
    D2H: "downloads",
    CPU_ADAM: "CPU",
    NVME_READ: "NVMe reads",
    NVME_WRITE: "NVMe writes",
}

TIER_LABELS = {"gpu": "GPU memory", "ram": "RAM", "nvme": "NVMe"}

MEMORY_LABELS = {
    "gpu": "GPU memory, peak",
    "page_locked": "page-locked RAM",
    "ram": "RAM, process peak",
    "nvme_written": "written to NVMe a step",
}
"""What a validation compares of memory."""


def lane_label(lane: str) -> str:
    return LANE_LABELS.get(lane, lane)


def head_unit(schedule: Schedule) -> int:
    """Index of the unit after the last layer."""
    return max((task.unit for task in schedule.tasks), default=0)


def unit_label(unit: int, head: int) -> str:
    """embedding, layer 12, head."""
    if unit < 0:
        return ""
    return "embedding" if unit == 0 else "head" if unit == head else f"layer {unit}"


def in_words(text: str, head: int) -> str:
    """A sentence that names units by number, with their names: "backward of unit 12", "... of layer 12"."""
    words = re.sub(r"\bunit (\d+)", lambda match: unit_label(int(match[1]), head), text)
    return "head" if words == "head of head" else words


def task_label(op: str, unit: int, micro_batch: int, chunk: int, head: int) -> str:
    """One task in words: "backward layer 12 mb 3", "adam layer 5 chunk 2", "head mb 0"."""
    where = unit_label(unit, head)
    words = [op] if where == op else [op, where]
    if micro_batch >= 0:
        words.append(f"mb {micro_batch}")
    if chunk >= 0:
        words.append(f"chunk {chunk}")
    return " ".join(word for word in words if word)


def percent(share: float) -> str:
    """37%, and <1% for the little that would round to nothing."""
    return "<1%" if 0 < share < 0.005 else f"{share:.0%}"
