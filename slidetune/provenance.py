"""Where and with what something was measured: a result without them can't be repeated."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path

_PACKAGES = ("torch", "transformers", "liger-kernel", "slidetune")
_DRIVER = Path("/proc/driver/nvidia/version")


def today() -> str:
    """The date, as 2026-11-24."""
    return datetime.date.today().isoformat()


def machine(device: str) -> dict[str, str]:
    """CPU, cores that may be used, RAM, and, of a CUDA device, its name and its driver."""
    import psutil

    facts = {
        "cpu": _cpu_name(),
        "cores": str(len(psutil.Process().cpu_affinity())),
        "ram": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
    }
    if device.startswith("cuda"):
        import torch

        facts |= {"gpu": torch.cuda.get_device_name(device), "driver": _driver()}
    return facts


def versions() -> dict[str, str]:
    """Python and the packages that decide about speed, those that are there."""
    installed = {package: _version(package) for package in _PACKAGES}
    return {"python": platform.python_version()} | {name: found for name, found in installed.items() if found}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _driver() -> str:
    """The version in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ...`."""
    words = _DRIVER.read_text(encoding="utf-8").split() if _DRIVER.exists() else []
    return next((word for word in words if word.count(".") and word.replace(".", "").isdigit()), "unknown")
