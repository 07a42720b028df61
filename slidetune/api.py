"""What the command line does, as functions for notebooks and other tools.

    planned = plan("llama-3.1-8b", machine("rtx4090", ram_gib=64), batch=32)
    priced = simulate(planned.plan, machine("rtx3090"))
    rows = fit(machine("rtx3060-12g"))

`plan` searches, `simulate` prices a given plan, `fit` asks which models a machine can train; `reporting.report`
draws what they return. All raise `SlidetuneError` (`DoesNotFit`, `UnknownName`, `BadFile`) with a message that
says what to do next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slidetune.errors import BadFile, SlidetuneError
from slidetune.files import dump
from slidetune.hardware import HardwareProfile
from slidetune.machines import capped, guessed, machine, memory_cap_gib
from slidetune.model import ModelSpec
from slidetune.models import catalog_row, load_model, model_names
from slidetune.plan_file import read_plan
from slidetune.plans import Plan, check
from slidetune.schedule import TIERS, Schedule
from slidetune.simulator.predict import Prediction, predict
from slidetune.slideformer import build_slideformer
from slidetune.tuner.evaluate import Evaluator
from slidetune.tuner.heuristics import smallest
from slidetune.tuner.reasons import reasons
from slidetune.tuner.remedies import does_not_fit, machine_that_holds, overflow_error
from slidetune.tuner.search import OBJECTIVES, Found, Objective, enumerate_all, search
from slidetune.tuner.sensitivity import Interval, interval
from slidetune.tuner.space import Space, coarse_space, full_space
from slidetune.tuner.whatif import WhatIf, whatif
from slidetune.tuner.workers import Workers

DEFAULT_MODEL = "llama-3.1-8b"
DEFAULT_SEQ_LEN = 1024
DEFAULT_TRIALS = 300
# Enough for the expert plans and a look around them: `fit` does this for every model.
FIT_TRIALS = 40
POLICIES = ("slideformer",)

Progress = Callable[[int, int, float], None]
"""Called with plans simulated, plans to simulate, and the best tokens/s so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """A schedule priced on a machine."""

    model: ModelSpec
    profile: HardwareProfile
    prediction: Prediction
    plan: Plan | None = None
    """None for a published system's policy, which has no plan."""
    interval: Interval | None = None
    whatif: Sequence[WhatIf] = ()

    def as_dict(self) -> dict[str, object]:
        """Everything a program may want, in plain values. Times in seconds, sizes in bytes."""
        prediction = self.prediction
        return {
            "model": {"name": self.model.name, "params": self.model.params, "layers": len(self.model.layers)},
            "machine": self.profile.name,
            "gpu": self.profile.gpu.name,
            "tokens_per_s": prediction.tokens_per_s,
            "tokens_per_step": prediction.schedule.tokens,
            "step_s": prediction.step_s,
            "step_interval_s": [self.interval.low_s, self.interval.high_s] if self.interval else None,
            "bound_s": prediction.bound_s,
            "bounds_s": prediction.bounds_s,
            "limiter": prediction.limiter,
            "gpu_busy": prediction.gpu_busy,
            "lanes": {lane: dataclasses.asdict(share) for lane, share in prediction.lanes.items()},
            "memory": {
                tier: {
                    "peak_bytes": memory.peak_bytes,
                    "capacity_bytes": memory.capacity_bytes,
                    "peak_at": memory.peak_task,
                    "owners_bytes": memory.peak_owners,
                }
                for tier, memory in prediction.memory.items()
            },
            "nvme_written_bytes_per_step": prediction.nvme_written_bytes,
            "plan": dump(self.plan) if self.plan else None,
            "whatif": [
                {"change": row.change, "tokens_per_s": row.tokens_per_s, "gain": row.gain, "plan": dump(row.plan)}
                for row in self.whatif
            ],
            "uncertain": [dataclasses.asdict(effect) for effect in self.interval.effects] if self.interval else [],
            "guessed": guessed(self.profile),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(Priced):
    """The plan a search chose, and how it was found."""

    found: Found
    space: Space
    objective: Objective
    reasons: dict[str, str]
    """Why each knob has its value, by the knob's name."""

    def as_dict(self) -> dict[str, object]:
        here = Priced.as_dict(self)
        return here | {
            "objective": self.objective,
            "trials": self.found.simulated,
            "trials_not_fitting": sum(trial.worth is None for trial in self.found.trials),
            "reasons": self.reasons,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Whether a model can be trained on a machine, and how."""

    model: str
    params: int
    seq_len: int
    """As asked for, or all positions the model has."""
    planned: Found | None
    """None where no plan fits."""
    lacking: str = ""
    """What is too small, where none does."""


def plan(
    model: str | ModelSpec = DEFAULT_MODEL,
    profile: HardwareProfile | None = None,
    *,
    seq_len: int = DEFAULT_SEQ_LEN,
    batch: int | None = None,
    clip_norm: float | None = None,
    objective: Objective = "throughput",
    trials: int = DEFAULT_TRIALS,
    seed: int = 0,
    exhaustive: bool = False,
    storage: str | None = None,
    study_name: str = "slidetune",
    progress: Progress | None = None,
) -> Planned:
    """The best plan for a model on a machine.

    `profile` defaults to an RTX 4090 workstation. `batch` fixes the sequences of an optimizer step; without it
    the smallest batch within 3 % of the best throughput is chosen. `clip_norm` asks for exact clipping to that
    global norm. `exhaustive` tries every plan of a coarse space in place of `trials` of the full one. `storage`
    is an Optuna storage (a database URL or journal:FILE) that several machines may share.
    """
    model = load_model(model) if isinstance(model, str) else model
    profile = profile or machine()
    _check_request(model, seq_len, batch, clip_norm, objective, trials)
    base = Plan(
        model=model.name,
        seq_len=seq_len,
        clip_norm=clip_norm,
        update="forward" if clip_norm is not None else "backward",
        gpu_memory_gib=memory_cap_gib(profile),
    )
    everything = full_space(model, profile, base, batch)
    space = coarse_space(model, profile, base, batch) if exhaustive else everything
    evaluator = Evaluator(model, profile)
    least = everything.plan(smallest(everything, evaluator))
    if not evaluator.fits(least):
        raise does_not_fit(model, profile, least, f"even the plan for {model.name} that needs least on {profile.name}")
    with Workers(evaluator) as workers:
        if exhaustive:
            found = enumerate_all(space, evaluator, workers, objective=objective, progress=progress)
        else:
            found = search(
                space,
                evaluator,
                workers,
                trials=trials,
                objective=objective,
                seed=seed,
                storage=storage,
                study_name=study_name,
                progress=progress,
            )
        if found is None:
            raise SlidetuneError(
                "none of the coarse space's plans fits, though there are some that do.", "Leave out --exhaustive."
            )
        chosen = found.best
        prediction = predict(evaluator.schedule(chosen.plan), profile, evaluator.prices)
        return Planned(
            model=model,
            profile=profile,
            prediction=prediction,
            plan=chosen.plan,
            interval=interval(chosen.plan, profile, chosen.worth.step_s, workers),
            whatif=whatif(profile, chosen.plan, workers),
            found=found,
            space=space,
            objective=objective,
            reasons=reasons(space, evaluator, chosen.point),
        )


def simulate(plan: Plan | str | Path, profile: HardwareProfile | None = None, *, more: bool = True) -> Priced:
    """Price a plan, given or read from a file, on a machine. Raises `DoesNotFit` where it doesn't fit.

    Without `more`, interval and what-ifs are left out.
    """
    path, plan = (None, plan) if isinstance(plan, Plan) else (plan, read_plan(plan))
    profile = profile or machine()
    try:
        model = load_model(plan.model)
        check(plan, model)
        profile = within_cap(profile, plan)
    except SlidetuneError as error:
        if path is None:
            raise
        raise BadFile(f"{path}: {error.message}", error.hint) from None
    evaluator = Evaluator(model, profile)
    if not evaluator.fits(plan):
        raise does_not_fit(model, profile, plan, f"this plan for {model.name} on {profile.name}")
    prediction = predict(evaluator.schedule(plan), profile, evaluator.prices)
    if not more:
        return Priced(model=model, profile=profile, prediction=prediction, plan=plan)
    with Workers(evaluator) as workers:
        return Priced(
            model=model,
            profile=profile,
            prediction=prediction,
            plan=plan,
            interval=interval(plan, profile, prediction.step_s, workers),
            whatif=whatif(profile, plan, workers),
        )


def within_cap(profile: HardwareProfile, plan: Plan) -> HardwareProfile:
    """The machine with no more GPU memory than the plan allows itself."""
    if plan.gpu_memory_gib is None or plan.gpu_memory_gib >= profile.gpu.memory_gib.value:
        return profile
    return dataclasses.replace(profile, gpu=capped(profile.gpu, plan.gpu_memory_gib))


def simulate_policy(
    policy: str,
    model: str | ModelSpec = DEFAULT_MODEL,
    profile: HardwareProfile | None = None,
    *,
    batch: int = 1,
    seq_len: int = DEFAULT_SEQ_LEN,
) -> Priced:
    """Price a published system's own policy ("slideformer") for a batch of sequences."""
    if policy not in POLICIES:
        raise SlidetuneError(f"unknown policy {policy!r}.", f"Known: {', '.join(POLICIES)}.")
    model = load_model(model) if isinstance(model, str) else model
    profile = profile or machine()

    def built(sequences: int) -> Schedule:
        return build_slideformer(
            model,
            batch=sequences,
            seq_len=seq_len,
            adam_threads=int(profile.host.cores.value),
            kernels=profile.gpu.kernels,
        )

    schedule = built(batch)
    needs = _peaks(schedule)
    if not _fits(needs, profile):
        halves = (batch >> k for k in range(1, batch.bit_length()))
        smaller = next((half for half in halves if _fits(_peaks(built(half)), profile)), None)
        remedies = [*([f"--batch {smaller}"] if smaller else []), machine_that_holds(profile, needs)]
        what = f"{policy}'s step of {batch} sequences for {model.name}"
        raise overflow_error(what, profile, schedule.pools, schedule.working_bytes(), remedies)
    return Priced(model=model, profile=profile, prediction=predict(schedule, profile))


def fit(
    profile: HardwareProfile | None = None,
    models: Sequence[str] | None = None,
    *,
    seq_len: int = DEFAULT_SEQ_LEN,
    trials: int = FIT_TRIALS,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Fit]:
    """Which models (default: the whole catalog) the machine can train, smallest first, and how fast.

    `progress` is called with models done, models to do, and the name of the next.
    """
    profile = profile or machine()
    if seq_len < 1:
        raise SlidetuneError(f"--seq-len {seq_len}: must be at least 1.")
    _check_trials(trials)
    names = sorted(models or model_names(), key=_published_params)
    rows = []
    for done, name in enumerate(names):
        if progress:
            progress(done, len(names), name)
        rows.append(_fit_one(load_model(name), profile, seq_len, trials))
    if progress:
        progress(len(names), len(names), "")
    return rows


def _fit_one(model: ModelSpec, profile: HardwareProfile, seq_len: int, trials: int) -> Fit:
    base = Plan(model=model.name, seq_len=min(seq_len, model.max_seq_len), gpu_memory_gib=memory_cap_gib(profile))
    space = full_space(model, profile, base)
    evaluator = Evaluator(model, profile)
    overflow = evaluator.overflow(space.plan(smallest(space, evaluator)))
    lacking = max(overflow, key=lambda tier: overflow[tier])
    if overflow[lacking] > 0:
        return Fit(model=model.name, params=model.params, seq_len=base.seq_len, planned=None, lacking=lacking)
    with Workers(evaluator) as workers:
        found = search(space, evaluator, workers, trials=trials)
    return Fit(model=model.name, params=model.params, seq_len=base.seq_len, planned=found)


def _published_params(name: str) -> int:
    return catalog_row(name)["params"] if name in model_names() else load_model(name).params


def _check_request(
    model: ModelSpec, seq_len: int, batch: int | None, clip_norm: float | None, objective: str, trials: int
) -> None:
    if objective not in OBJECTIVES:
        raise SlidetuneError(f"unknown objective {objective!r}.", f"Known: {', '.join(OBJECTIVES)}.")
    if not 1 <= seq_len <= model.max_seq_len:
        raise SlidetuneError(
            f"--seq-len {seq_len} is not between 1 and the {model.max_seq_len} positions of {model.name}."
        )
    if batch is not None and batch < 1:
        raise SlidetuneError(f"--batch {batch}: must be at least 1.")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise SlidetuneError(f"--clip {clip_norm:g}: must be a number above 0.")
    _check_trials(trials)


def _check_trials(trials: int) -> None:
    if trials < 1:
        raise SlidetuneError(f"--trials {trials}: must be at least 1.")


def _peaks(schedule: Schedule) -> dict[str, int]:
    return {tier: schedule.peak_bytes(tier) for tier in TIERS}


def _fits(needs: Mapping[str, int], profile: HardwareProfile) -> bool:
    return all(size <= profile.capacity_bytes(tier) for tier, size in needs.items())
