"""Choosing kernels; what they compute is for a machine that has Liger and a GPU."""

from __future__ import annotations

import importlib.util

import pytest

torch = pytest.importorskip("torch")

from slidetune.errors import SlidetuneError
from slidetune.runtime.kernels import choose_kernels

from ..slidetune.reference import SMALL_CONFIGS, on_meta

MODEL = on_meta(SMALL_CONFIGS["llama"])
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_a_cpu_has_transformers_own():
    assert choose_kernels("auto", MODEL, CPU) == choose_kernels("eager", MODEL, CPU) == "eager"
    with pytest.raises(SlidetuneError, match="need a CUDA device"):
        choose_kernels("liger", MODEL, CPU)


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is not None, reason="Liger is installed")
def test_without_liger():
    assert choose_kernels("auto", MODEL, CUDA) == "eager"
    with pytest.raises(SlidetuneError, match="not installed"):
        choose_kernels("liger", MODEL, CUDA)


def test_an_unknown_name():
    with pytest.raises(SlidetuneError, match="auto, eager, liger"):
        choose_kernels("fast", MODEL, CPU)
