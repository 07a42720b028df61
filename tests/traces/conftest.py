"""Predictions to draw: one that only uses GPU and RAM, one that uses every lane and tier."""

import pytest

from slidetune.builder import build
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Activations, Plan
from slidetune.simulator.predict import predict


def _predict(model, **knobs):
    return predict(build(load_model(model), Plan(model=model, **knobs)), machine("rtx4090"))


@pytest.fixture(scope="session")
def plain():
    return _predict("llama-3.1-8b", micro_batch=8)


@pytest.fixture(scope="session")
def spilled():
    return _predict(
        "llama-3.1-8b",
        accumulation=4,
        optimizer_nvme=8,
        weights_nvme=4,
        activations=Activations(gpu=2, nvme=2),
    )


@pytest.fixture(scope="session")
def deep():
    """88 layers: thousands of tasks."""
    return _predict("mistral-large-123b", micro_batch=2, accumulation=4, optimizer_nvme=60, chunk_bytes=2**28)
