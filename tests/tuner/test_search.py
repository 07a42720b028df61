"""The study: as good as trying everything, the same again, and open to several processes at once."""

import json
import subprocess
import sys
import textwrap
from functools import cache

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidetune.errors import SlidetuneError
from slidetune.machines import machine
from slidetune.models import load_model
from slidetune.plans import Plan
from slidetune.tuner import search as searching
from slidetune.tuner.evaluate import Evaluator, Worth
from slidetune.tuner.search import BATCH_TOLERANCE, KEPT_THROUGHPUT, Trial, choose, enumerate_all, open_storage, search

from .small_spaces import MACHINES, alone, an_evaluator, small_space, whole_space


def found_by_search(evaluator, space=None, **options):
    return search(space or whole_space(evaluator), evaluator, alone(evaluator), **{"trials": 40} | options)


def fastest(found) -> float:
    return max(trial.worth.tokens_per_s for trial in found.trials if trial.worth)


# --- As good as trying everything


@cache
def everything(model, name):
    evaluator = an_evaluator(model, name)
    return enumerate_all(small_space(evaluator), evaluator, alone(evaluator))


@pytest.mark.parametrize("name", MACHINES)
@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-4b"])
def test_within_1_percent_of_exhaustive_search(model, name):
    whole = everything(model, name)
    evaluator = an_evaluator(model, name)
    found = found_by_search(evaluator, small_space(evaluator), trials=60)
    assert whole.simulated > 50
    assert fastest(found) >= 0.99 * fastest(whole)
    # And the plan chosen is as good as the best of its batch, which is no larger than it must be.
    of_its_batch = whole.best_by_batch()[found.plan.batch]
    assert found.worth.tokens_per_s >= 0.99 * of_its_batch.worth.tokens_per_s
    assert found.worth.tokens_per_s >= 0.99 * (1 - BATCH_TOLERANCE) * fastest(whole)
    assert found.plan.batch <= whole.plan.batch or found.worth.tokens_per_s > whole.worth.tokens_per_s


def test_exhaustive_search_tries_every_plan_once():
    evaluator = an_evaluator("qwen3-4b", "desktop")
    space = small_space(evaluator)
    whole = everything("qwen3-4b", "desktop")
    plans = {space.plan(point) for point in space.points()}
    assert {trial.plan for trial in whole.trials} == plans
    assert len(whole.trials) == len(plans)
    assert {trial.plan for trial in whole.trials if trial.worth} == {plan for plan in plans if evaluator.fits(plan)}


# --- What is simulated, and what the study is told


def test_what_does_not_fit_is_a_constraint_and_never_simulated(monkeypatch):
    evaluator = an_evaluator("llama-3.1-8b", "desktop")
    simulated = []
    reckon = Evaluator.simulate

    def noted(self, plan):
        simulated.append((self is evaluator, plan))
        return reckon(self, plan)

    monkeypatch.setattr(Evaluator, "simulate", noted)
    found = found_by_search(evaluator, trials=60)
    # Some once more, on the machine at a slower moment.
    assert len(simulated) == len(set(simulated))
    assert sum(here for here, _ in simulated) >= 60
    assert all(evaluator.fits(plan) for _, plan in simulated)

    states = {trial.state for trial in found.study.trials}
    assert states == {optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED}
    for trial in found.study.trials:
        assert set(trial.constraints) == {"gpu overflow", "ram overflow", "nvme overflow"}
        fits = max(trial.constraints.values()) <= 0
        assert fits == (trial.state is optuna.trial.TrialState.COMPLETE)
    told = {trial.value for trial in found.study.trials if trial.value is not None}
    # Refined plans have no point that the study could be told.
    assert told == {trial.worth.tokens_per_s for trial in found.trials if trial.worth and trial.origin != "refined"}
    assert {trial.origin for trial in found.trials} == {"expert", "sampler", "neighbour", "refined"}


def test_as_many_plans_as_asked_for():
    evaluator = an_evaluator()
    seen = []
    found = found_by_search(evaluator, trials=70, progress=lambda done, of, best: seen.append((done, of, best)))
    assert found.simulated >= 70
    assert found.simulated == evaluator.simulated
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1] == (70, 70, pytest.approx(fastest(found)))
    assert [trial.number for trial in found.trials] == list(range(len(found.trials)))


def test_a_space_smaller_than_the_budget_ends_the_search():
    evaluator = an_evaluator()
    space = small_space(evaluator).restricted(
        micro_batch=(1, 2), accumulation=(1,), resident_layers=(0.0,), recompute__keep=(0.0,)
    )
    found = found_by_search(evaluator, space, trials=200)
    assert found.simulated == len({space.plan(point) for point in space.points()})


def test_a_space_of_one_point():
    evaluator = an_evaluator()
    space = small_space(evaluator)
    one = space.restricted(**{axis.name.replace(".", "__"): axis.values[:1] for axis in space.axes})
    found = found_by_search(evaluator, one)
    assert found.plan == one.plan((0,) * len(one.axes))


def test_nothing_fits():
    evaluator = Evaluator(load_model("llama-3.1-70b"), machine("rtx4090", nvme=None))
    space = small_space(evaluator).restricted(micro_batch=(8,), recompute__keep=(0.0,))
    assert found_by_search(evaluator, space, trials=5) is None
    assert evaluator.simulated == 0


# --- The same again


def test_the_same_seed_gives_the_same_trials():
    first, second = (found_by_search(an_evaluator(), seed=7) for _ in range(2))
    assert first.trials == second.trials
    assert first.best == second.best
    other = found_by_search(an_evaluator(), seed=8)
    assert [trial.plan for trial in other.trials] != [trial.plan for trial in first.trials]


IN_PROCESSES = """
    import sys
    from slidetune.models import load_model
    from slidetune.machines import machine
    from slidetune.plans import Plan
    from slidetune.tuner.evaluate import Evaluator
    from slidetune.tuner.search import search
    from slidetune.tuner.space import full_space
    from slidetune.tuner.workers import Workers

    evaluator = Evaluator(load_model("qwen3-0.6b"), machine("rtx4090"))
    space = full_space(evaluator.model, evaluator.profile, Plan(model="qwen3-0.6b"))
    with Workers(evaluator, count=int(sys.argv[1])) as workers:
        found = search(space, evaluator, workers, trials=40, seed=3)
    for trial in found.trials:
        print(trial.number, trial.origin, trial.point, trial.worth)
    print(found.best)
"""


def python(script, *arguments):
    return [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]


def test_the_result_does_not_depend_on_the_number_of_processes():
    runs = [
        subprocess.run(python(IN_PROCESSES, count), capture_output=True, text=True, check=True).stdout
        for count in (1, 2)
    ]
    assert runs[0] == runs[1]
    assert runs[0].count("\n") > 40


# --- Objectives


def trials_of(worths):
    """Trials with the given (batch, tokens/s, RAM, bytes written a token), None for what doesn't fit."""
    return [
        Trial(i, "sampler", (i,), Plan(model="m", micro_batch=batch, seq_len=i + 1), worth and Worth(1.0, *worth, 1))
        for i, (batch, worth) in enumerate(worths)
    ]


some_trials = st.lists(
    st.tuples(
        st.integers(1, 8),
        st.one_of(st.none(), st.tuples(st.floats(50, 100), st.integers(1, 50), st.sampled_from((0.0, 1.0, 5.0)))),
    ),
    max_size=12,
).map(trials_of)


@given(some_trials)
def test_throughput_takes_the_smallest_batch_that_is_fast_enough(trials):
    fitting = [trial for trial in trials if trial.worth]
    found = choose(trials, "throughput", None)
    if not fitting:
        assert found is None
        return
    top = max(t.worth.tokens_per_s for t in fitting)
    enough = [t for t in fitting if t.worth.tokens_per_s >= 0.97 * top]
    assert found.best in enough
    assert found.plan.batch == min(t.plan.batch for t in enough)
    of_its_batch = max(t.worth.tokens_per_s for t in enough if t.plan.batch == found.plan.batch)
    assert found.worth.tokens_per_s >= 0.9975 * of_its_batch


@given(some_trials, st.sampled_from((("ram", "ram_bytes"), ("nvme-writes", "nvme_written_bytes_per_token"))))
def test_other_objectives_take_the_least_at_90_percent(trials, objective):
    name, amount = objective
    fitting = [trial for trial in trials if trial.worth]
    found = choose(trials, name, None)
    if not fitting:
        assert found is None
        return
    top = max(t.worth.tokens_per_s for t in fitting)
    enough = [t for t in fitting if t.worth.tokens_per_s >= KEPT_THROUGHPUT * top]
    assert found.best in enough
    assert getattr(found.worth, amount) == min(getattr(t.worth, amount) for t in enough)


def test_each_objective_gets_what_it_asks_for():
    found = {
        objective: found_by_search(an_evaluator("llama-3.1-8b"), trials=60, objective=objective)
        for objective in searching.OBJECTIVES
    }
    assert found["ram"].worth.ram_bytes < found["throughput"].worth.ram_bytes
    assert found["nvme-writes"].worth.nvme_written_bytes_per_token == 0
    for result in found.values():
        assert result.worth.tokens_per_s >= KEPT_THROUGHPUT * fastest(result)


def test_a_fixed_batch_is_kept():
    evaluator = an_evaluator()
    found = found_by_search(evaluator, whole_space(evaluator, batch=12))
    assert {trial.plan.batch for trial in found.trials} == {12}
    assert len({trial.plan.micro_batch for trial in found.trials}) > 1


def test_clipping_leaves_only_the_late_update():
    evaluator = an_evaluator()
    found = found_by_search(evaluator, whole_space(evaluator, clip_norm=1.0, update="forward"))
    assert {(trial.plan.update, trial.plan.clip_norm) for trial in found.trials} == {("forward", 1.0)}


def test_the_fastest_of_each_batch():
    best = everything("llama-3.2-1b", "workstation").best_by_batch()
    assert list(best) == sorted(best)
    for batch, trial in best.items():
        assert trial.plan.batch == batch
        same = [t for t in everything("llama-3.2-1b", "workstation").trials if t.worth and t.plan.batch == batch]
        assert trial.worth.tokens_per_s == max(t.worth.tokens_per_s for t in same)


# --- A study that several processes share


SHARING = """
    import sys
    from slidetune.models import load_model
    from slidetune.machines import machine
    from slidetune.plans import Plan
    from slidetune.tuner.evaluate import Evaluator
    from slidetune.tuner.search import search
    from slidetune.tuner.space import full_space
    from slidetune.tuner.workers import Workers

    evaluator = Evaluator(load_model("qwen3-0.6b"), machine("rtx4090"))
    space = full_space(evaluator.model, evaluator.profile, Plan(model="qwen3-0.6b")).restricted(
        micro_batch=(1, 2, 4, 8), activations__gpu=(0.0,), recompute__keep=(0.0,), recompute__offload=(0.0,),
        resident_weights=(0.0,), optimizer_nvme=(0.0,), weights_nvme=(0.0,), activations__nvme=(0.0,)
    )
    with Workers(evaluator, count=1) as workers:
        found = search(space, evaluator, workers, trials=40, seed=int(sys.argv[2]), storage=sys.argv[1])
    print(evaluator.simulated, found.worth.tokens_per_s)
"""


@pytest.mark.parametrize("url", ["journal:{}/study.journal", "sqlite:///{}/study.db"])
def test_two_processes_share_a_study(tmp_path, url):
    url = url.format(tmp_path)
    processes = [
        subprocess.Popen(python(SHARING, url, seed), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for seed in (1, 1)
    ]
    outputs = [process.communicate(timeout=90) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    simulated, best = zip(*(map(float, out.split()) for out, _ in outputs), strict=True)
    assert min(simulated) >= 40

    # Optuna, and so its dashboard, opens it; both processes' trials are there, each told in full.
    study = optuna.load_study(study_name="slidetune", storage=open_storage(url))
    trials = study.get_trials()
    assert all(trial.state.is_finished() for trial in trials)
    assert len([trial for trial in trials if trial.value is not None]) >= sum(simulated)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    # The work is divided: what one has told, the other doesn't try again.
    simulated_plans = [str(trial.user_attrs["plan"]) for trial in trials if trial.value is not None]
    assert len(set(simulated_plans)) > max(simulated)
    # Whoever came last knew of all trials.
    top = max(trial.value for trial in trials if trial.value is not None)
    assert max(best) >= (1 - BATCH_TOLERANCE) * top
    for trial in trials:
        assert (trial.user_attrs["worth"] is None) == (trial.value is None)


def test_a_study_can_be_taken_up_again(tmp_path):
    url = f"journal:{tmp_path}/study.journal"
    first = found_by_search(an_evaluator(), trials=10, storage=url)
    second = found_by_search(an_evaluator(), trials=10, storage=url, seed=1)
    assert len(second.trials) > len(first.trials)
    assert second.trials[: len(first.trials)] == first.trials
    before, after = first.trials, second.trials[len(first.trials) :]
    repeated = {trial.plan for trial in before} & {trial.plan for trial in after if trial.origin != "sampler"}
    assert not repeated, "what was tried is not tried again"
    assert fastest(second) >= fastest(first)


CHANGES = {
    "model": ({"model": "gpt2"}, {}, "model: qwen3-0.6b there, gpt2 here"),
    "GPU": ({"profile": machine("rtx3090")}, {}, "gpu.bf16_tflops: 165.2 there, 71.0 here"),
    "RAM": ({"profile": machine("rtx4090", ram_gib=64)}, {}, "host.ram_gib: 128.0 there, 64.0 here"),
    "drive": ({"profile": machine("rtx4090", nvme=None)}, {}, "nvme.size_gb: 2000.0 there, None here"),
    "seq_len": ({}, {"seq_len": 512}, "seq_len: 1024 there, 512 here"),
    "clipping": ({}, {"clip_norm": 1.0, "update": "forward"}, "clip_norm: None there, 1.0 here"),
    "batch": ({}, {"batch": 8}, "choices of micro_batch"),
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    url = f"journal:{tmp_path_factory.mktemp('shared')}/study.journal"
    found_by_search(an_evaluator(), trials=3, storage=url)
    return url


@pytest.mark.parametrize("change", CHANGES)
def test_a_study_of_something_else_is_refused(shared, change):
    there, knobs, message = CHANGES[change]
    profile = there.get("profile", machine("rtx4090"))
    evaluator = Evaluator(load_model(there.get("model", "qwen3-0.6b")), profile)
    with pytest.raises(SlidetuneError, match="study 'slidetune' in this storage is of something else") as caught:
        found_by_search(evaluator, whole_space(evaluator, **knobs), storage=shared)
    assert message in caught.value.message
    assert "--study" in caught.value.hint
    assert evaluator.simulated == 0
    # Under another name there is room in the same storage.
    found = found_by_search(
        evaluator, whole_space(evaluator, **knobs), trials=1, storage=shared, study_name=f"of another {change}"
    )
    assert found.simulated >= 1


def test_a_study_that_is_not_ours_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="mine", storage=url, direction="maximize")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(SlidetuneError, match="not made by slidetune"):
        found_by_search(an_evaluator(), storage=url, study_name="mine")


@pytest.mark.parametrize(
    "url", ["foo://bar", "sqlite:////no/such/directory/study.db", "journal:/no/such/directory/x", "nonsense"]
)
def test_storage_that_cannot_be_opened(url):
    with pytest.raises(SlidetuneError, match="cannot be opened") as caught:
        open_storage(url)
    assert url in caught.value.message
    assert "sqlite:///" in caught.value.hint


@pytest.mark.parametrize("form", ["journal:{}", "journal://{}", "{}"])
def test_ways_to_name_a_journal(tmp_path, form):
    path = tmp_path / "study.journal"
    found_by_search(an_evaluator(), trials=1, storage=form.format(path))
    assert json.loads(path.read_text().splitlines()[0])
