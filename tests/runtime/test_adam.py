"""Every path of the Adam kernel against the others, torch's fused kernel, its optimizer and a float64 reference."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from slidetune.runtime import adam_native
from slidetune.runtime.adam import AdamW, adam_implementation, adam_implementations, adam_step
from slidetune.runtime.gpu_adam import adam_step_gpu
from slidetune.runtime.split import join, set_down, split

IMPLEMENTATIONS = adam_implementations()
HYPERS = {
    "default": AdamW(),
    "decay": AdamW(lr=3e-4, weight_decay=0.1),
    "heavy": AdamW(lr=0.1, beta1=0.95, beta2=0.99, eps=1e-6, weight_decay=0.5),
    # 1 - beta1 >= 0.5: torch's lerp starts from the other end.
    "short memory": AdamW(lr=1e-2, beta1=0.3, beta2=0.5),
    "no memory": AdamW(lr=1e-2, beta1=0.0, beta2=0.0),
}
KINDS = ("usual", "tiny", "denormal", "huge", "special")


@dataclass
class State:
    """One optimizer's state over fp32 parameters, and a gradient."""

    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    grad: torch.Tensor

    def copy(self) -> State:
        return State(*(tensor.clone() for tensor in (self.master, self.exp_avg, self.exp_avg_sq, self.grad)))

    def bits(self) -> list[torch.Tensor]:
        return [tensor.view(torch.int32) for tensor in (self.master, self.exp_avg, self.exp_avg_sq)]

    def __getitem__(self, part: slice) -> State:
        return State(self.master[part], self.exp_avg[part], self.exp_avg_sq[part], self.grad[part])


def state(kind: str, count: int, grad_dtype: torch.dtype = torch.float32, seed: int = 0) -> State:
    random = torch.Generator().manual_seed(seed)
    scale = {"usual": 1e-3, "tiny": 1e-18, "denormal": 1e-39, "huge": 1e25, "special": 1e-3}[kind]
    normal = [torch.randn(count, generator=random) for _ in range(3)]
    master = normal[0] * (1e-39 if kind == "denormal" else 1e30 if kind == "huge" else 0.02)
    exp_avg, grad = normal[1] * scale, normal[2] * scale
    exp_avg_sq = torch.rand(count, generator=random) * scale * scale
    if kind == "special":
        for tensor in (master, exp_avg, exp_avg_sq, grad):
            for value in (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3.4e38):
                chosen = torch.randint(count, (max(1, count // 50),), generator=random)
                tensor[chosen] = value
        exp_avg_sq.abs_()
    return State(master, exp_avg, exp_avg_sq, grad.to(grad_dtype))


def ours(before: State, hyper: AdamW, step: int = 7, grad_scale: float = 1.0, threads: int = 1, **how: str) -> State:
    high, low, down = split(before.master)
    after = before.copy()
    set_down(after.exp_avg_sq, down)
    adam_step(
        high, low, after.exp_avg, after.exp_avg_sq, after.grad,
        hyper=hyper, step=step, grad_scale=grad_scale, threads=threads, **how,
    )  # fmt: skip
    return joined(high, low, after)


def joined(high: torch.Tensor, low: torch.Tensor, after: State) -> State:
    """The state that split master and moments stand for; the half must be what torch rounds the master to."""
    master = join(high, low, after.exp_avg_sq.signbit())
    numbers = ~master.isnan()
    assert torch.equal(high[numbers], master[numbers].bfloat16())
    return replace(after, master=master, exp_avg_sq=after.exp_avg_sq.abs())


def torch_fused(before: State, hyper: AdamW, step: int = 7, grad_scale: float = 1.0) -> State:
    """torch's fused kernel over whole vectors: the last ones of a length that is none it computes otherwise."""
    count = before.master.numel()
    padded = [torch.nn.functional.pad(t, (0, -count % 16)) for t in (before.master, before.exp_avg, before.exp_avg_sq)]
    grad = torch.nn.functional.pad(before.grad.float() * grad_scale, (0, -count % 16))
    master, exp_avg, exp_avg_sq = padded
    torch._fused_adamw_(
        [master], [grad], [exp_avg], [exp_avg_sq], [], [torch.tensor(float(step))],
        lr=hyper.lr, beta1=hyper.beta1, beta2=hyper.beta2, weight_decay=hyper.weight_decay, eps=hyper.eps,
        amsgrad=False, maximize=False,
    )  # fmt: skip
    return State(master, exp_avg, exp_avg_sq, grad)[:count]


def assert_same_bits(actual: State, expected: State, any_nan: bool = False) -> None:
    for got, want in zip(actual.bits(), expected.bits(), strict=True):
        if any_nan:
            both = got.view(torch.float32).isnan() & want.view(torch.float32).isnan()
            got, want = got.masked_fill(both, 0), want.masked_fill(both, 0)
        different = (got != want).nonzero().flatten()
        assert different.numel() == 0, f"{different.numel()} differ, first at {different[:5].tolist()}"


@pytest.fixture(autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """torch's fused kernel rounds by where its threads' shares end."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


fuses = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="torch does not fuse multiply-add here"
)


@fuses
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bits_are_those_of_torch_fused(implementation: str, hyper: AdamW, kind: str, grad_dtype: torch.dtype) -> None:
    before = state(kind, 1000, grad_dtype)
    for step in (1, 2, 1000):
        for grad_scale in (1.0, 0.37):
            after = ours(before, hyper, step, grad_scale, implementation=implementation)
            assert_same_bits(after, torch_fused(before, hyper, step, grad_scale), any_nan=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_steps_equal_torchs_plain_optimizer(implementation: str) -> None:
    """The moments bit for bit; the parameters to the last bit of MKL's square root in each of 50 updates."""
    hyper = HYPERS["decay"]
    now = state("usual", 501)
    now.exp_avg.zero_()
    now.exp_avg_sq.zero_()
    parameter = torch.nn.Parameter(now.master.clone())
    plain = torch.optim.AdamW(
        [parameter], lr=hyper.lr, weight_decay=hyper.weight_decay, betas=(hyper.beta1, hyper.beta2), foreach=False
    )
    for step in range(1, 51):
        now.grad = state("usual", 501, seed=step).grad
        now = ours(now, hyper, step, implementation=implementation)
        parameter.grad = now.grad.clone()
        plain.step()
    torch.testing.assert_close(now.master, parameter.detach(), rtol=50 * 2**-24, atol=50 * hyper.lr * 2**-22)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        memory = plain.state[parameter]
        assert torch.equal(now.exp_avg, memory["exp_avg"])
        assert torch.equal(now.exp_avg_sq, memory["exp_avg_sq"])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
@pytest.mark.parametrize("step", [1, 3, 100_000])
def test_one_step_is_within_rounding_of_float64(implementation: str, hyper: AdamW, step: int) -> None:
    """Half a unit in the last place (2**-24) an operation, relative to the terms; eight in the parameter's chain."""
    before = state("usual", 4096)
    after = ours(before, hyper, step, 0.5, implementation=implementation)
    p, m, v, g = (t.double().numpy() for t in (before.master, before.exp_avg, before.exp_avg_sq, before.grad))
    g = g * 0.5
    want_m = hyper.beta1 * m + (1 - hyper.beta1) * g
    want_v = hyper.beta2 * v + (1 - hyper.beta2) * g * g
    m_hat, v_hat = want_m / (1 - hyper.beta1**step), want_v / (1 - hyper.beta2**step)
    update = hyper.lr * m_hat / (np.sqrt(v_hat) + hyper.eps)
    want_p = p * (1 - hyper.lr * hyper.weight_decay) - update
    unit = 2.0**-24
    terms = np.abs(m) + np.abs(g)
    assert (np.abs(after.exp_avg.double().numpy() - want_m) <= 4 * unit * terms).all()
    assert (np.abs(after.exp_avg_sq.double().numpy() - want_v) <= 5 * unit * want_v).all()
    # m's error is relative to its terms, which may nearly cancel.
    of_m = 4 * unit * terms * np.abs(update / want_m)
    assert (np.abs(after.master.double().numpy() - want_p) <= of_m + 8 * unit * (np.abs(p) + np.abs(update))).all()


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 100), step=st.integers(1, 10_000), data=st.data())
@settings(max_examples=200, deadline=None)
def test_all_implementations_agree_on_any_bits(
    grad_dtype: torch.dtype, seed: int, count: int, step: int, data: st.DataObject
) -> None:
    """Every pattern, NaN with payloads, negative second moments and odd hyper-parameters included."""
    number = st.floats(0, 1, exclude_max=True)
    hyper = AdamW(
        lr=data.draw(st.floats(0, 10)),
        beta1=data.draw(number),
        beta2=data.draw(number),
        eps=data.draw(st.sampled_from([0.0, 1e-8, 1e-3])),
        weight_decay=data.draw(st.floats(0, 1)),
    )
    grad_scale = data.draw(st.sampled_from([1.0, 1e-3, 1e10, float("inf")]))
    random = np.random.default_rng(seed)
    words = [torch.from_numpy(random.integers(-(2**31), 2**31, count, dtype=np.int32)) for _ in range(4)]
    master, exp_avg, exp_avg_sq, grad = (word.view(torch.float32) for word in words)
    if grad_dtype == torch.bfloat16:
        grad = (words[3] >> 16).to(torch.int16).view(torch.bfloat16)
    before = State(master, exp_avg, exp_avg_sq, grad)
    expected = ours(before, hyper, step, grad_scale, implementation="torch")
    for implementation in IMPLEMENTATIONS[:-1]:
        assert_same_bits(ours(before, hyper, step, grad_scale, implementation=implementation), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_are_rounded_to_even_and_come_back(implementation: str) -> None:
    """A step that moves nothing, twice, over masters that lie half way between two bf16 numbers."""
    before = state("usual", 4099)
    before.master.view(torch.int32).bitwise_and_(-65536).bitwise_or_(0x8000)
    assert split(before.master)[2].sum() > 1000
    now = before
    for step in (1, 2):
        now = ours(now, AdamW(lr=0.0), step, implementation=implementation)
        assert torch.equal(now.master.view(torch.int32), before.master.view(torch.int32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nan_is_stored_so_that_the_half_shows_it(implementation: str) -> None:
    before = state("usual", 100)
    # CUDA's NaN: rounded to bf16 it would read -0.
    before.grad.view(torch.int32)[::3] = 0x7FFFFFFF
    high, low, _ = split(before.master)
    adam_step(
        high, low, before.exp_avg, before.exp_avg_sq, before.grad,
        hyper=AdamW(), step=1, implementation=implementation,
    )  # fmt: skip
    hit = torch.arange(100) % 3 == 0
    assert torch.equal(high.isnan(), hit)
    for tensor in (join(high, low, before.exp_avg_sq.signbit()), before.exp_avg, before.exp_avg_sq):
        assert (tensor.view(torch.int32)[hit] == 0x7FC00000).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("count", [0, 1, 7, 15, 16, 17, 31, 32, 33, 47, 63, 65, 1001])
def test_odd_lengths_at_odd_addresses_touch_nothing_else(
    implementation: str, grad_dtype: torch.dtype, count: int
) -> None:
    around = state("special", count + 9, grad_dtype)
    high, low, down = split(around.master)
    after = around.copy()
    set_down(after.exp_avg_sq, down)
    part = slice(3, 3 + count)
    adam_step(
        high[part], low[part], after.exp_avg[part], after.exp_avg_sq[part], after.grad[part],
        hyper=HYPERS["decay"], step=7, implementation=implementation,
    )  # fmt: skip
    after = joined(high, low, after)
    assert_same_bits(after[part], ours(around[part], HYPERS["decay"], implementation="torch"))
    for outside in (slice(0, 3), slice(3 + count, None)):
        assert_same_bits(after[outside], around[outside])
    assert torch.equal(after.grad.view(torch.uint8), around.grad.view(torch.uint8))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_threads_and_chunks_do_not_change_a_bit(implementation: str) -> None:
    # Several of the kernel's blocks, the last one partial.
    before = state("special", 5 * 32768 + 1237, torch.bfloat16)
    whole = ours(before, HYPERS["decay"], implementation=implementation)
    for threads in (2, 3, 16):
        assert_same_bits(ours(before, HYPERS["decay"], threads=threads, implementation=implementation), whole)
    cuts = [0, 1, 4097, 40_000, 40_001, 100_003, len(before.master)]
    pieces = [
        ours(before[slice(*cut)], HYPERS["decay"], threads=2, implementation=implementation)
        for cut in itertools.pairwise(cuts)
    ]
    for k, bits in enumerate(whole.bits()):
        assert torch.equal(torch.cat([piece.bits()[k] for piece in pieces]), bits)


def test_calls_from_several_threads_wait_for_each_other() -> None:
    before = state("usual", 100_000, torch.bfloat16)
    expected = ours(before, AdamW())
    with ThreadPoolExecutor(4) as pool:
        for after in pool.map(lambda threads: ours(before, AdamW(), threads=threads), [1, 2, 3, 4] * 10):
            assert_same_bits(after, expected)


@pytest.mark.skipif(adam_implementation() == "torch", reason="needs the native kernel")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[:-1])
def test_a_caller_that_flushes_denormals_gets_the_same_bits(implementation: str) -> None:
    before = state("denormal", 40_000)
    expected = ours(before, AdamW(), threads=2, implementation=implementation)
    assert torch.set_flush_denormal(True)
    try:
        after = ours(before, AdamW(), threads=2, implementation=implementation)
        # The mode is as it was.
        assert torch.tensor([1e-39]).mul(1.0).item() == 0
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(after, expected)


def run_python(script: str, **environment: str) -> None:
    code = textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=os.environ | environment, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()


def test_the_fallback_does_not_depend_on_how_torch_fuses() -> None:
    """torch without AVX does not fuse; the bits stay."""
    run_python(
        """
        import torch
        from slidetune.runtime.adam import AdamW, adam_implementations, adam_step
        from slidetune.runtime.split import split
        assert torch.backends.cpu.get_cpu_capability() == "DEFAULT"
        torch.manual_seed(0)
        start = [*split(torch.randn(4099))[:2], torch.randn(4099), torch.rand(4099), torch.randn(4099)]
        results = []
        for implementation in adam_implementations():
            tensors = [tensor.clone() for tensor in start]
            adam_step(*tensors, hyper=AdamW(lr=1e-2), step=3, implementation=implementation)
            results.append(tensors)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))
        """,
        ATEN_CPU_CAPABILITY="default",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_a_pool_of_its_own() -> None:
    run_python(
        """
        import os, torch
        from slidetune.runtime.adam import AdamW, adam_step
        from slidetune.runtime.split import split
        tensors = [*split(torch.ones(100_000))[:2], torch.zeros(100_000), torch.zeros(100_000), torch.ones(100_000)]
        torch.set_num_threads(1)
        adam_step(*tensors, hyper=AdamW(), step=1, threads=3)
        child = os.fork()
        adam_step(*tensors, hyper=AdamW(), step=2, threads=3)
        if child:
            assert os.waitpid(child, 0)[1] == 0
        else:
            os._exit(0)
        """
    )


def test_without_the_native_kernel_torch_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    before = state("usual", 100)
    expected = ours(before, AdamW())
    monkeypatch.setattr(adam_native, "paths", lambda: ())
    assert adam_implementation() == "torch"
    assert_same_bits(ours(before, AdamW()), expected)
    with pytest.raises(ValueError, match="'avx2' is not available here; there are torch"):
        ours(before, AdamW(), implementation="avx2")


def test_wrong_tensors_are_refused_by_name() -> None:
    def arguments(**other: torch.Tensor) -> list[torch.Tensor]:
        high, low, _ = split(torch.zeros(4))
        named = {"high": high, "low": low, "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
        return list((named | {"grad": torch.zeros(4)} | other).values())

    how = {"hyper": AdamW(), "step": 1}
    with pytest.raises(TypeError, match=r"grad must be torch\.bfloat16 or torch\.float32, not torch\.float64"):
        adam_step(*arguments(grad=torch.zeros(4).double()), **how)
    with pytest.raises(ValueError, match="exp_avg has 5 elements, high has 4"):
        adam_step(*arguments(exp_avg=torch.zeros(5)), **how)
    with pytest.raises(ValueError, match="exp_avg_sq must be a contiguous 1-D tensor"):
        adam_step(*arguments(exp_avg_sq=torch.zeros(8)[::2]), **how)
    with pytest.raises(ValueError, match="grad must be on the CPU, not on meta"):
        adam_step(*arguments(grad=torch.zeros(4, device="meta")), **how)
    with pytest.raises(ValueError, match="step counts from 1"):
        adam_step(*arguments(), hyper=AdamW(), step=0)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        adam_step(*arguments(), **how, threads=0)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))],
)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("kind", ["usual", "special"])
@pytest.mark.parametrize("hyper", HYPERS.values(), ids=HYPERS)
def test_resident_layers_take_the_same_step(device: str, grad_dtype: torch.dtype, kind: str, hyper: AdamW) -> None:
    before = state(kind, 5001, grad_dtype)
    expected = ours(replace(before, grad=before.grad.bfloat16()), hyper, 7, 0.37)
    halves = split(before.master)
    parts = (*halves[:2], before.exp_avg.clone(), before.exp_avg_sq.clone(), before.grad)
    set_down(parts[3], halves[2])
    high, low, exp_avg, exp_avg_sq, grad = (part.to(device) for part in parts)
    adam_step_gpu(high, low, exp_avg, exp_avg_sq, grad, hyper=hyper, step=7, grad_scale=0.37)
    found = joined(high.cpu(), low.cpu(), State(before.master, exp_avg.cpu(), exp_avg_sq.cpu(), before.grad))
    for got, want in zip(found.bits(), expected.bits(), strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(grad.cpu(), before.grad, rtol=0, atol=0, equal_nan=True)


def test_resident_layers_tensors_are_checked() -> None:
    parts = [torch.zeros(4, dtype=dtype) for dtype in (torch.bfloat16, torch.int16, *(torch.float32,) * 3)]
    with pytest.raises(ValueError, match="contiguous 1-D tensors of one length"):
        adam_step_gpu(parts[0][1:], *parts[1:], hyper=AdamW(), step=7)
