"""What a recorded result must name: the machine and the versions it was measured with."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import psutil


def describe() -> dict[str, str]:
    """CPU, cores, RAM, kernel, page size setting, and versions of Python, torch and our kernel."""
    import torch

    from slidetune.runtime.adam import adam_implementation

    return host() | {
        "torch": torch.__version__,
        "torch CPU capability": torch.backends.cpu.get_cpu_capability(),
        "adam": adam_implementation(),
    }


def host(*packages: str) -> dict[str, str]:
    """The same without torch, and the versions of some packages."""
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": _cpu_name(),
        "cores": str(len(psutil.Process().cpu_affinity())),
        "ram": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "kernel": platform.release().split("-")[0],
        "transparent hugepages": pages.read_text().split("[")[-1].split("]")[0] if pages.exists() else "none",
        "python": platform.python_version(),
    } | {package: importlib.metadata.version(package) for package in packages}


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()
