"""What doesn't fit says by how much, to the byte, and names changes that really make it fit."""

import dataclasses
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from slidetune import buffers
from slidetune.errors import DoesNotFit
from slidetune.machines import adapted, machine
from slidetune.models import load_model
from slidetune.plans import Activations, Plan, Recompute, knobs, problems
from slidetune.schedule import TIERS
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.remedies import does_not_fit
from slidetune.units import format_bytes

SMALL = machine("rtx3060-12g", "desktop", ram_gib=32, nvme="100GB:3/3")
NO_DRIVE = machine("rtx3060-12g", "desktop", ram_gib=24)
MODELS = ("llama-3.2-1b", "qwen3-4b", "llama-3.1-8b")


def changed(plan: Plan, assignments: list[tuple[str, str]]) -> Plan:
    """The plan with "recompute.keep: 3" and the like applied."""
    for knob, value in assignments:
        outer, _, inner = knob.partition(".")
        if inner:
            part = dataclasses.replace(getattr(plan, outer), **{inner: int(value)})
            plan = dataclasses.replace(plan, **{outer: part})
        else:
            plan = dataclasses.replace(plan, **{outer: int(value)})
    return plan


def remedied(text: str, plan: Plan, profile):
    """Plan and machine after one remedy, read as a person would."""
    new_plan = changed(plan, re.findall(r"([a-z_.]+): (\d+)", text))
    if match := re.search(r"GPU of (\d+) GiB", text):
        profile = profile.replaced("gpu.memory_gib", dataclasses.replace(profile.gpu.memory_gib, value=int(match[1])))
    ram, nvme = re.search(r"--ram (\d+)", text), re.search(r"--nvme ([\d.]+TB)", text)
    return new_plan, adapted(profile, ram_gib=ram and float(ram[1]), nvme=nvme and f"{nvme[1]}:7/5")


def remedies(error: DoesNotFit) -> list[str]:
    assert error.hint.startswith("Nearest changes that fit: ")
    return error.hint.removeprefix("Nearest changes that fit: ").rstrip(".").split("; ")


@st.composite
def too_large(draw: st.DrawFn):
    """Sound plans that overflow a small machine."""
    model = load_model(draw(st.sampled_from(MODELS)))
    profile = draw(st.sampled_from((SMALL, NO_DRIVE)))
    layers = len(model.layers)

    def some(most: int) -> int:
        return draw(st.one_of(st.just(0), st.integers(0, most)))

    resident, keep, inputs = some(layers), some(layers), some(layers)
    on_nvme = some(layers - resident)
    whole = some(on_nvme)
    plan = Plan(
        model=model.name,
        seq_len=draw(st.sampled_from((256, 1024, 4096))),
        micro_batch=draw(st.integers(1, 32)),
        accumulation=draw(st.integers(1, 8)),
        window=draw(st.integers(2, 6)),
        resident_layers=resident,
        resident_weights=some(layers - resident - whole),
        optimizer_nvme=on_nvme,
        weights_nvme=whole,
        activations=Activations(gpu=inputs, nvme=some(layers - inputs)),
        recompute=Recompute(keep=keep, offload=some(layers - keep)),
        update=draw(st.sampled_from(("backward", "forward"))),
    )
    assert problems(plan, model) == []
    assume(not Evaluator(model, profile).fits(plan))
    return model, profile, plan


@given(too_large())
@settings(max_examples=80, deadline=None)
def test_every_remedy_fits(case):
    model, profile, plan = case
    found = remedies(does_not_fit(model, profile, plan, "it"))
    for text in found:
        new_plan, new_profile = remedied(text, plan, profile)
        assert (new_plan, new_profile) != (plan, profile), text
        assert problems(new_plan, model) == [], text
        assert Evaluator(model, new_profile).fits(new_plan), text
    # There is always a machine on which it fits as it is.
    assert any(text.startswith("a machine with ") for text in found)


@given(too_large())
@settings(max_examples=80, deadline=None)
def test_the_message_has_the_real_figures(case):
    model, profile, plan = case
    message = does_not_fit(model, profile, plan, "this plan").message
    assert message.startswith("this plan overflows ")
    needs = buffers.peak_bytes(model, plan, profile.gpu.kernels)
    over = {tier: needs[tier] - profile.capacity_bytes(tier) for tier in TIERS}
    stated = {
        name: int(n.replace(",", "")) for name, n in re.findall(r"(GPU memory|RAM|NVMe) by .*?\(([\d,]+) b", message)
    }
    names = {"gpu": "GPU memory", "ram": "RAM", "nvme": "NVMe"}
    assert stated == {names[tier]: lacks for tier, lacks in over.items() if lacks > 0}
    held = {pool.name: pool for pool in buffers.pools(model, plan, profile.gpu.kernels)}
    for tier in TIERS:
        owners = {name: pool.bytes for name, pool in held.items() if pool.tier == tier and not pool.transient}
        if tier == "gpu":
            owners["working set"] = needs["gpu"] - sum(owners.values())
        if over[tier] > 0:
            largest = max(owners, key=owners.get)
            assert f"most of it {largest} {format_bytes(owners[largest])}" in message


@pytest.mark.parametrize(
    ("knob", "change"),
    [
        ("recompute.keep", {"recompute": Recompute(keep=20)}),
        ("resident_layers", {"resident_layers": 16}),
        ("activations.gpu", {"micro_batch": 16, "accumulation": 4, "activations": Activations(gpu=16)}),
    ],
)
def test_the_nearest_change_is_named(knob, change):
    model = load_model("llama-3.2-1b" if knob != "recompute.keep" else "qwen3-4b")
    profile = adapted(SMALL, ram_gib=96)
    plan = Plan(model=model.name, **{"micro_batch": 4} | change)
    text = next(t for t in remedies(does_not_fit(model, profile, plan, "it")) if t.startswith(f"{knob}: "))
    value = int(text.split(": ")[1])
    assert value < knobs(plan)[knob]
    one_more = changed(plan, [(knob, str(value + 1))])
    assert one_more == plan or not Evaluator(model, profile).fits(one_more)


def test_too_little_ram_offers_the_gpu_or_a_drive():
    model = load_model("qwen3-4b")
    found = remedies(
        does_not_fit(model, machine("h100-sxm", "server", ram_gib=32, nvme=None), Plan(model=model.name), "it")
    )
    assert any(text.startswith("resident_layers: ") for text in found)
    assert any("an NVMe drive (--nvme " in text for text in found)


def test_a_plan_for_a_drive_that_is_not_there_offers_ram():
    model = load_model("llama-3.2-1b")
    found = remedies(does_not_fit(model, machine("rtx4090", "desktop"), Plan(model=model.name, optimizer_nvme=4), "it"))
    assert "optimizer_nvme: 0" in found
