"""One small plan, made once, that many tests look at."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from .commands import slidetune


@dataclass(frozen=True)
class Planned:
    folder: Path
    """Holds plan.yaml and step.json."""
    json: dict


@pytest.fixture(scope="session")
def planned(tmp_path_factory) -> Planned:
    folder = tmp_path_factory.mktemp("planned")
    ran = slidetune(
        "plan",
        *("--model", "qwen3-0.6b", "--gpu", "rtx3060-12g", "--ram", "12", "--trials", "20", "--json"),
        *("--trace", "step.json"),
        cwd=folder,
    )
    assert ran.code == 0, ran.err
    return Planned(folder, json.loads(ran.out))
