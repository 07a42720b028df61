"""slidetune: plan, predict and run full-parameter fine-tuning on one GPU that cannot hold the model.

    import slidetune
    planned = slidetune.plan("llama-3.1-8b", slidetune.machine("rtx4090", ram_gib=64))
    print(planned.prediction.tokens_per_s, planned.plan)

Everything the command line does is one of these functions. Names load when they are first used, so that
importing slidetune costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "plan": "slidetune.api",
    "simulate": "slidetune.api",
    "simulate_policy": "slidetune.api",
    "fit": "slidetune.api",
    "validate": "slidetune.validating",
    "validate_grid": "slidetune.grid",
    "validate_recorded": "slidetune.validating",
    "tune_loop": "slidetune.tuning_loop",
    "report": "slidetune.reporting",
    "validation_report": "slidetune.reporting",
    "machine": "slidetune.machines",
    "load_profile": "slidetune.machines",
    "load_model": "slidetune.models",
    "read_plan": "slidetune.plan_file",
    "write_plan": "slidetune.plan_file",
    "Plan": "slidetune.plans",
    "SlidetuneError": "slidetune.errors",
    "Trainer": "slidetune.training",
    "Callback": "slidetune.runtime.training.callbacks",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'slidetune' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
