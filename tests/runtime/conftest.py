"""Small machines run these tests beside each other: one thread for torch, quiet transformers."""

from __future__ import annotations

import threading

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch):
    """The reference computes with transformers' own kernels: so does what is compared with it."""
    from slidetune.runtime import trainer

    def choose(wanted, model, device):
        return choose_kernels("eager" if wanted == "auto" else wanted, model, device)

    choose_kernels = trainer.choose_kernels
    monkeypatch.setattr(trainer, "choose_kernels", choose)


@pytest.fixture
def no_threads_left():
    """Whatever the test does, no lane may outlive it."""
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith(("slidetune", "nvme"))] == []
