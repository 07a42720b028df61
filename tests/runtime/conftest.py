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


@pytest.fixture
def no_threads_left():
    """Whatever the test does, no lane may outlive it."""
    yield
    assert [t.name for t in threading.enumerate() if t.name.startswith(("slidetune", "nvme"))] == []
