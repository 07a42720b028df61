"""The planner as functions: what they return agrees with itself, and what they refuse is said clearly."""

import dataclasses
import json

import pytest

import slidetune
from slidetune import api
from slidetune.errors import BadFile, DoesNotFit, SlidetuneError, UnknownName
from slidetune.files import dump
from slidetune.machines import adapted, load_profile, machine
from slidetune.models import load_model
from slidetune.plans import Plan, knobs
from slidetune.schedule import NVME_WRITE, TIERS
from slidetune.tuner.evaluate import Evaluator

MODEL = "qwen3-0.6b"
FIELDS = {
    "tokens_per_s",
    "step_s",
    "bound_s",
    "limiter",
    "gpu_busy",
    "memory",
    "nvme_written_bytes_per_step",
    "trials",
    "plan",
    "whatif",
}


@pytest.fixture(scope="module")
def planned():
    return api.plan(MODEL, machine("rtx4090"), trials=20)


# --- plan


def test_a_plan_fits_and_its_figures_agree(planned):
    prediction = planned.prediction
    evaluator = Evaluator(load_model(MODEL), machine("rtx4090"))
    assert evaluator.fits(planned.plan)
    assert prediction.step_s == pytest.approx(planned.found.worth.step_s)
    assert prediction.tokens_per_s * prediction.step_s == pytest.approx(planned.plan.tokens)
    assert prediction.bound_s <= prediction.step_s * (1 + 1e-9)
    assert planned.interval.low_s <= prediction.step_s <= planned.interval.high_s
    assert {tier: memory.peak_bytes for tier, memory in prediction.memory.items()} == evaluator.needs(planned.plan)


def test_everything_for_programs(planned):
    found = json.loads(json.dumps(planned.as_dict(), allow_nan=False))
    assert set(found) >= FIELDS
    assert found["plan"] == dump(planned.plan)
    assert found["trials"] == planned.found.simulated >= 20
    assert set(found["memory"]) == set(TIERS)
    for tier in TIERS:
        memory = found["memory"][tier]
        assert 0 <= memory["peak_bytes"] <= memory["capacity_bytes"] == planned.profile.capacity_bytes(tier)
        assert sum(memory["owners_bytes"].values()) == memory["peak_bytes"]
    assert 0 < found["gpu_busy"] <= 1
    assert found["bound_s"] == max(found["bounds_s"].values())
    assert found["limiter"]
    assert all({"change", "tokens_per_s", "gain", "plan"} == set(row) for row in found["whatif"])
    assert set(found["reasons"]) <= set(knobs(planned.plan))


def test_defaults_are_the_documented_ones(monkeypatch):
    asked = {}

    def instead(space, evaluator, workers, **options):
        asked.update(options, model=evaluator.model.name, profile=evaluator.profile, plan=space.base)
        raise SlidetuneError("enough")

    monkeypatch.setattr(api, "search", instead)
    with pytest.raises(SlidetuneError, match="enough"):
        slidetune.plan()
    assert (asked["model"], asked["plan"].seq_len) == ("llama-3.1-8b", 1024)
    assert asked["profile"] == machine("rtx4090", "workstation")
    assert (asked["trials"], asked["objective"], asked["seed"], asked["storage"]) == (300, "throughput", 0, None)


def test_what_is_asked_for_is_in_the_plan():
    profile = adapted(machine("rtx4090"), gpu_memory_gib=10)
    planned = api.plan(MODEL, profile, seq_len=512, batch=6, clip_norm=0.5, trials=6)
    plan = planned.plan
    assert (plan.seq_len, plan.batch, plan.clip_norm, plan.update, plan.gpu_memory_gib) == (512, 6, 0.5, "forward", 10)
    assert planned.prediction.memory["gpu"].peak_bytes <= profile.capacity_bytes("gpu") < 10 * 2**30


def test_exhaustive_tries_the_whole_coarse_space(monkeypatch):
    def fewer(*args, **kwargs):
        axes = {axis.name: axis.values for axis in coarse_space(*args, **kwargs).axes}
        values = {name.replace(".", "__"): held[:2] for name, held in axes.items()}
        return coarse_space(*args, **kwargs).restricted(**values)

    coarse_space = api.coarse_space
    monkeypatch.setattr(api, "coarse_space", fewer)
    planned = api.plan("gpt2", exhaustive=True)
    assert {trial.origin for trial in planned.found.trials} == {"exhaustive"}
    assert planned.found.study is None
    assert planned.as_dict()["trials"] + planned.as_dict()["trials_not_fitting"] == len(planned.found.trials)


def test_a_coarse_space_without_a_fitting_plan_says_so():
    # RAM for so few layers that more than half must live on the GPU: the coarse space stops at half.
    profile = machine("h100-sxm", "server", ram_gib=20, nvme=None)
    with pytest.raises(SlidetuneError, match="coarse space's plans fits") as caught:
        api.plan("qwen3-4b", profile, exhaustive=True)
    assert "Leave out --exhaustive" in caught.value.hint
    assert api.plan("qwen3-4b", profile, trials=3).plan.resident_layers > 18


def test_nothing_fits():
    with pytest.raises(DoesNotFit, match=r"even the plan for llama-3\.1-70b that needs least") as caught:
        api.plan("llama-3.1-70b", machine("rtx4090", nvme=None))
    assert "overflows RAM by" in caught.value.message
    assert "--ram" in caught.value.hint
    assert "--nvme" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 0}, "--seq-len 0 is not between 1 and the 40960 positions"),
        ({"seq_len": 50000}, "--seq-len 50000 is not between 1 and the 40960 positions"),
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"clip_norm": 0.0}, "--clip 0: must be a number above 0"),
        ({"clip_norm": float("nan")}, "--clip nan"),
        ({"clip_norm": float("inf")}, "--clip inf"),
        ({"objective": "fast"}, "unknown objective 'fast'"),
        ({"trials": 0}, "--trials 0: must be at least 1"),
    ],
)
def test_requests_that_make_no_sense(options, message):
    with pytest.raises(SlidetuneError, match=message):
        api.plan(MODEL, **options)


def test_progress_is_told():
    seen = []
    api.plan("gpt2", trials=5, progress=lambda *args: seen.append(args))
    assert seen
    assert seen[-1][:2] == (5, 5)
    assert [best for *_, best in seen] == sorted(best for *_, best in seen)


# --- simulate


def test_simulating_the_plan_gives_the_same_step(planned, tmp_path):
    path = slidetune.write_plan(tmp_path / "plan.yaml", planned.plan, reasons=planned.reasons)
    for plan in (planned.plan, path, str(path)):
        priced = api.simulate(plan, machine("rtx4090"), more=False)
        assert priced.prediction.step_s == planned.prediction.step_s
        assert priced.plan == planned.plan
        assert priced.interval is None
        assert priced.whatif == ()
    assert "trials" not in priced.as_dict()


def test_more_is_interval_and_what_ifs(planned):
    priced = api.simulate(planned.plan, machine("rtx4090"))
    assert (priced.interval.low_s, priced.interval.high_s) == pytest.approx(
        (planned.interval.low_s, planned.interval.high_s)
    )
    assert [row.change for row in priced.whatif] == [row.change for row in planned.whatif]


def test_a_plans_own_cap_counts():
    plan = Plan(model=MODEL, micro_batch=2, gpu_memory_gib=5.0)
    priced = api.simulate(plan, machine("rtx4090"), more=False)
    assert priced.profile.gpu.memory_gib.value == 5.0
    with pytest.raises(DoesNotFit, match="GPU memory by"):
        api.simulate(dataclasses.replace(plan, micro_batch=64), machine("rtx4090"))
    # A smaller machine isn't made larger by it.
    small = adapted(machine("rtx4090"), gpu_memory_gib=4)
    assert api.simulate(plan, small, more=False).profile.gpu.memory_gib.value == 4.0


def test_a_plan_that_does_not_fit():
    with pytest.raises(DoesNotFit, match=f"this plan for {MODEL} on rtx4090-workstation overflows GPU memory by"):
        api.simulate(Plan(model=MODEL, micro_batch=512))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: qwen3-0.9b", "unknown model 'qwen3-0.9b'"),
        ("{model: gpt2, prefetch: 4}", r"prefetch \(4\) must be below window \(2\)"),
        ("{model: gpt2, seq_len: 4096}", r"seq_len \(4096\) exceeds"),
        ("{model: gpt2, gpu_memory_gib: -1}", "gpu_memory_gib must be above 0"),
        ("{model: gpt2, micro_batch: many}", "micro_batch is 'many'"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(BadFile, match=message) as caught:
        api.simulate(path)
    assert caught.value.message.startswith(str(path))


def test_a_plan_in_memory_that_is_wrong_names_no_file():
    with pytest.raises(UnknownName, match="unknown model"):
        api.simulate(Plan(model="qwen3-0.9b"))


# --- policies


def test_a_published_systems_step():
    priced = api.simulate_policy("slideformer", "qwen3-8b", load_profile("slideformer-rtx4090"), batch=8, seq_len=1024)
    assert priced.plan is None
    assert priced.prediction.schedule.tokens == 8192
    assert priced.as_dict()["plan"] is None
    assert json.dumps(priced.as_dict(), allow_nan=False)


def test_a_policy_that_does_not_fit_names_a_batch_that_does():
    profile = machine("rtx4090")
    with pytest.raises(DoesNotFit, match="slideformer's step of 1000 sequences") as caught:
        api.simulate_policy("slideformer", "qwen3-4b", profile, batch=1000)
    batch = int(caught.value.hint.split("--batch ")[1].split(";")[0])
    assert api.simulate_policy("slideformer", "qwen3-4b", profile, batch=batch).prediction.step_s > 0
    assert "a machine with a GPU of" in caught.value.hint


def test_an_unknown_policy():
    with pytest.raises(SlidetuneError, match="unknown policy 'zero'"):
        api.simulate_policy("zero")


# --- fit


def test_fit_says_for_each_model_whether_and_how():
    seen = []
    rows = api.fit(
        machine("rtx3060-12g", "desktop"),
        ["llama-3.1-70b", "gpt2", MODEL],
        seq_len=2048,
        trials=5,
        progress=lambda *args: seen.append(args),
    )
    assert [row.model for row in rows] == ["gpt2", MODEL, "llama-3.1-70b"]
    assert [row.params for row in rows] == sorted(row.params for row in rows)
    # GPT-2 has 1024 positions.
    assert [row.seq_len for row in rows] == [1024, 2048, 2048]
    assert [row.planned is not None for row in rows] == [True, True, False]
    assert rows[2].lacking == "ram"
    assert rows[0].planned.plan.seq_len == 1024
    assert seen == [(0, 3, "gpt2"), (1, 3, MODEL), (2, 3, "llama-3.1-70b"), (3, 3, "")]


def test_fit_keeps_the_cap_on_gpu_memory():
    (row,) = api.fit(adapted(machine("rtx4090"), gpu_memory_gib=6), [MODEL], trials=3)
    assert row.planned.plan.gpu_memory_gib == 6


@pytest.mark.parametrize("options", [{"trials": 0}, {"seq_len": 0}])
def test_fit_refuses_what_makes_no_sense(options):
    with pytest.raises(SlidetuneError, match="must be at least 1"):
        api.fit(models=["gpt2"], **options)


# --- report


def test_a_report_of_a_search_has_its_pictures(planned, tmp_path):
    page = slidetune.report(tmp_path / "report", planned, assumptions=["a desk"])
    text = page.read_text()
    assert "a desk" in text
    assert f"{planned.prediction.tokens_per_s:,.0f}" in text
    assert len(list(page.parent.glob("*.png"))) >= 5
    written = int(planned.prediction.schedule.total("bytes", NVME_WRITE))
    assert ("TB per 1000 steps" in text) == (written > 0)


def test_a_report_of_a_priced_plan_has_no_search(tmp_path):
    priced = api.simulate(Plan(model=MODEL, optimizer_nvme=4), machine("rtx4090"), more=False)
    page = slidetune.report(tmp_path, priced)
    assert "TB per 1000 steps" in page.read_text()
    assert len(list(tmp_path.glob("*.png"))) == 3
