"""The study: one Optuna study of expert plans, the sampler's own, and neighbours of the best so far.

Whether a plan fits is arithmetic; a plan that doesn't is told to the sampler as a violated constraint and never
simulated. TPE finds the region, neighbours finish the job: in a space of ordered knobs the last percent is a
matter of single steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slidetune import __version__
from slidetune.errors import SlidetuneError
from slidetune.plans import Plan, knobs
from slidetune.tuner.drift import Steadiness
from slidetune.tuner.evaluate import Evaluator, Worth
from slidetune.tuner.heuristics import starting_points
from slidetune.tuner.refine import refined
from slidetune.tuner.space import Point, Space
from slidetune.tuner.workers import Workers

if TYPE_CHECKING:
    import optuna

Objective = Literal["throughput", "ram", "nvme-writes"]
OBJECTIVES: tuple[Objective, ...] = ("throughput", "ram", "nvme-writes")

# Objectives other than throughput keep at least this share of the best throughput.
KEPT_THROUGHPUT = 0.90
# A larger batch isn't free for training: the smallest within this of the best throughput is chosen.
BATCH_TOLERANCE = 0.03
# Plans this close in throughput are as fast as each other: the one that wears the drive or fills RAM less is better.
_EQUAL = 0.0025
# Those about as fast, of which the one that minds least if the host is slower is better; so many of them are looked at.
_NEAR, _NEAREST, _AS_STEADY, _STEADY_ROUNDS = 0.01, 24, 0.001, 6
# Rounds of trying every neighbour of the plan chosen, after the budget is spent.
_POLISH_ROUNDS = 4
# Share of the budget that expert plans may take, and share of the rest that is the sampler's.
_EXPERT_SHARE = 1 / 3
_SAMPLER_SHARE = 1 / 3
# Trials told to the sampler together, so that several processes can simulate them.
_BATCH = 16
# Tasks in the schedules of all plans of a study. Deep models with many micro-batches have 10,000 tasks a plan;
# counting tasks keeps a search short without letting the clock decide what is found.
_TASK_BUDGET = 550_000
# The study's attribute that says what it is of.
_DESCRIPTION = "slidetune"
_SQLITE_PATIENCE_S = 60
# Waits before a database is opened again that another process is just setting up.
_OPENING_PAUSES_S = (0.1, 0.3, 1.0)
# Rounds in a row without a new plan after which the space is taken to be exhausted.
_PATIENCE = 60


@dataclass(frozen=True, slots=True)
class Trial:
    """One point tried. `worth` is None where the plan doesn't fit."""

    number: int
    origin: str
    """expert, sampler, neighbour, refined or exhaustive."""
    point: Point
    """Of a refined plan, that of the one it was made from."""
    plan: Plan
    worth: Worth | None


@dataclass(slots=True)
class Found:
    """A finished search."""

    best: Trial
    trials: list[Trial]
    study: optuna.Study | None

    @property
    def plan(self) -> Plan:
        return self.best.plan

    @property
    def worth(self) -> Worth:
        return self.best.worth

    @property
    def simulated(self) -> int:
        """Distinct plans simulated."""
        return len({trial.plan for trial in self.trials if trial.worth})

    def best_by_batch(self) -> dict[int, Trial]:
        """The fastest plan of every batch size tried, smallest batch first."""
        best: dict[int, Trial] = {}
        for trial in self.trials:
            held = best.get(trial.plan.batch)
            if trial.worth and (held is None or trial.worth.tokens_per_s > held.worth.tokens_per_s):
                best[trial.plan.batch] = trial
        return dict(sorted(best.items()))


def search(
    space: Space,
    evaluator: Evaluator,
    workers: Workers,
    *,
    trials: int = 300,
    objective: Objective = "throughput",
    seed: int = 0,
    storage: str | None = None,
    study_name: str = "slidetune",
    progress: Callable[[int, int, float], None] | None = None,
) -> Found | None:
    """The best plan of `trials` distinct simulated ones, or None if none of those tried fits.

    The same seed gives the same plan (without a shared storage, where others' trials count too: each process adds
    `trials` plans that none has tried). `progress` is
    called with plans simulated, plans to simulate and the best tokens/s.
    """
    return _Search(space, evaluator, workers, trials, objective, seed, storage, study_name, progress).run()


def enumerate_all(
    space: Space,
    evaluator: Evaluator,
    workers: Workers,
    *,
    objective: Objective = "throughput",
    progress: Callable[[int, int, float], None] | None = None,
) -> Found | None:
    """The same by trying every point of the space that fits."""
    # Several points may round to one plan.
    plans = {space.plan(point): point for point in space.points()}
    tried: list[Trial] = []
    best = 0.0
    for start in range(0, len(plans), _BATCH):
        batch = list(itertools.islice(plans.items(), start, start + _BATCH))
        fitting = [plan for plan, _ in batch if evaluator.fits(plan)]
        worth = dict(zip(fitting, evaluator.worths(fitting, workers), strict=True))
        for plan, point in batch:
            tried.append(Trial(len(tried), "exhaustive", point, plan, worth.get(plan)))
        best = max([best, *(w.tokens_per_s for w in worth.values())])
        if progress:
            progress(len(tried), len(plans), best)
    return choose(tried, objective, None)


def choose(tried: list[Trial], objective: Objective | Literal["fastest"], study: optuna.Study | None) -> Found | None:
    """The plan the objective prefers among those tried ("fastest": whatever its batch); None if none fits."""
    fitting = [trial for trial in tried if trial.worth]
    if not fitting:
        return None
    fastest = max(trial.worth.tokens_per_s for trial in fitting)
    if objective == "fastest":
        best = max(fitting, key=lambda t: (t.worth.tokens_per_s, -t.number))
    elif objective == "throughput":
        # Of the smallest batch that is fast enough, the fastest plan; of equals the one that costs least.
        enough = [t for t in fitting if t.worth.tokens_per_s >= (1.0 - BATCH_TOLERANCE) * fastest]
        least = min(t.plan.batch for t in enough)
        enough = [t for t in enough if t.plan.batch == least]
        top = max(t.worth.tokens_per_s for t in enough)
        equals = [t for t in enough if t.worth.tokens_per_s >= (1.0 - _EQUAL) * top]
        best = min(
            equals, key=lambda t: (t.worth.nvme_written_bytes_per_token, t.worth.ram_bytes, -t.worth.tokens_per_s)
        )
    else:
        enough = [t for t in fitting if t.worth.tokens_per_s >= KEPT_THROUGHPUT * fastest]
        best = min(enough, key=lambda t: (cost(objective, t.worth), -t.worth.tokens_per_s))
    return Found(best=best, trials=tried, study=study)


def cost(objective: Objective, worth: Worth) -> float:
    """What the objective wants least of."""
    if objective == "ram":
        return worth.ram_bytes
    if objective == "nvme-writes":
        return worth.nvme_written_bytes_per_token
    return -worth.tokens_per_s


def open_storage(url: str | None) -> object:
    """An Optuna storage: None (in memory), a database URL, or a journal file (journal:PATH or *.journal)."""
    import optuna

    if url is None:
        return None
    try:
        if url.startswith("journal:") or url.endswith((".journal", ".log")):
            from optuna.storages.journal import JournalFileBackend

            path = url.removeprefix("journal:")
            return optuna.storages.JournalStorage(JournalFileBackend(path if not path.startswith("///") else path[2:]))
        return _open_database(url)
    except Exception as error:
        raise SlidetuneError(
            f"--storage {url!r} cannot be opened: {error}",
            "Give a database URL such as sqlite:///study.db or postgresql://user@host/db, or journal:study.journal.",
        ) from error


def _open_database(url: str, pauses_s: Sequence[float] = _OPENING_PAUSES_S) -> object:
    import optuna

    # Several processes write to one SQLite file in turn: they wait for each other rather than give up.
    options = {"connect_args": {"timeout": _SQLITE_PATIENCE_S}} if url.startswith("sqlite:") else {}
    try:
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except Exception as error:
        # Two processes that find a database empty both make its tables; one of them is refused.
        being_made = any(word in str(error).casefold() for word in ("already exists", "unique", "locked"))
        if not (pauses_s and being_made):
            raise
    time.sleep(pauses_s[0])
    return _open_database(url, pauses_s[1:])


def describe(space: Space, evaluator: Evaluator) -> dict[str, object]:
    """What a study's trials depend on, in plain values: only searches of which this is the same may share one."""
    model, profile = evaluator.model, evaluator.profile
    return {
        "slidetune": __version__,
        "model": model.name,
        "parameters": model.params,
        "seq_len": space.base.seq_len,
        "clip_norm": space.base.clip_norm,
        "gpu_memory_gib": space.base.gpu_memory_gib,
        "kernels": profile.gpu.kernels,
        **{path: float(figure) for path, figure in profile.figures()},
        **{f"choices of {axis.name}": list(axis.values) for axis in space.axes},
    }


def join_study(study: optuna.Study, description: dict[str, object]) -> None:
    """Mark a new study as one of what is described. Raises `SlidetuneError` where it holds anything else."""
    # The mark is made before the first trial, so whoever sees a trial and then no mark sees a stranger's study.
    empty = not study.get_trials(deepcopy=False)
    held = study.user_attrs.get(_DESCRIPTION)
    if held == description:
        return
    if held is None and empty:
        study.set_user_attr(_DESCRIPTION, description)
        return
    differences = "it was not made by slidetune."
    if held is not None:
        names = [name for name in {**held, **description} if held.get(name) != description.get(name)]
        differences = "; ".join(f"{name}: {held.get(name)} there, {description.get(name)} here" for name in names[:4])
        differences += f"; and {len(names) - 4} more." if len(names) > 4 else "."
    raise SlidetuneError(
        f"study {study.study_name!r} in this storage is of something else: {differences}",
        "Give another --study name, or another --storage.",
    )


class _Search:
    def __init__(
        self,
        space: Space,
        evaluator: Evaluator,
        workers: Workers,
        trials: int,
        objective: Objective,
        seed: int,
        storage: str | None,
        study_name: str,
        progress: Callable[[int, int, float], None] | None,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.optuna = optuna
        self.space, self.evaluator, self.wanted = space, evaluator, trials
        self.objective, self.shared, self.progress = objective, storage is not None, progress
        self.workers = workers
        self.neighbours: dict[Point, list[Point]] = {}
        # Processes that share a study each go their own way: with one seed all would try the same plans.
        seed = seed if storage is None else None
        self.random = random.Random(seed)
        self.study = optuna.create_study(
            study_name=study_name,
            storage=open_storage(storage),
            load_if_exists=True,
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=20, n_ei_candidates=16),
        )
        if self.shared:
            join_study(self.study, describe(space, evaluator))
        # Axes of one value are no choice: the sampler needn't know of them.
        self.open_axes = [(i, a.name) for i, a in enumerate(space.axes) if len(a.values) > 1]
        self.distributions = {
            name: optuna.distributions.IntDistribution(0, len(space.axes[i].values) - 1) for i, name in self.open_axes
        }
        self.tried: dict[Plan, Trial] = {}
        self.numbers = itertools.count()

    def run(self) -> Found | None:
        experts = list(
            itertools.islice(starting_points(self.space, self.evaluator), max(1, int(self.wanted * _EXPERT_SHARE)))
        )
        if self.shared:
            self.random.shuffle(experts)
        for start in range(0, len(experts), _BATCH):
            if not self._spent():
                self._learn()
                self._try(list(filter(self._untried, experts[start : start + _BATCH])), "expert")
        to_sample = int((self.wanted - self.evaluator.simulated) * _SAMPLER_SHARE)
        fruitless = 0
        while not self._spent() and fruitless < _PATIENCE:
            self._learn()
            before = self.evaluator.simulated
            sampled = [self._ask() for _ in range(min(to_sample, _BATCH // 4))]
            to_sample -= len(sampled)
            room = max(0, min(_BATCH - len(sampled), self.wanted - before - len(sampled)))
            points = self._near_the_best(room) or self._anywhere(room)
            self._try(points, "neighbour", sampled)
            fruitless = 0 if self.evaluator.simulated > before else fruitless + 1
        self._polish()
        if not self.shared:
            self._refine()
        found = choose(self._all_trials(), self.objective, self.study)
        return found if found is None or self.shared or self.objective != "throughput" else self._steadied(found)

    def _learn(self) -> None:
        """Take over what others who share the study have tried meanwhile, so that no plan is tried twice."""
        if self.shared:
            for trial in self._all_trials():
                self.tried.setdefault(trial.plan, trial)

    def _polish(self) -> None:
        """Try every neighbour of the plan chosen, until none of them is better."""
        for _ in range(_POLISH_ROUNDS):
            found = choose(list(self.tried.values()), self.objective, None)
            if found is None:
                return
            near = [p for p in self._neighbours(found.best.point) if self._untried(p)]
            if not near:
                return
            self._try(near, "neighbour")

    def _refine(self) -> None:
        """Try numbers of layers between those that the axes have, around the plan chosen, until none is better.

        Whoever shares a study knows its plans by their points on the axes, and does without.
        """
        before: Plan | None = None
        for _ in self.evaluator.model.layers:
            found = choose(list(self.tried.values()), self.objective, None)
            if found is None or found.plan == before:
                return
            best = found.best
            before = best.plan
            self._try_around(best)

    def _try_around(self, trial: Trial) -> None:
        around = refined(trial.plan, self.space, self.evaluator.model)
        near = [p for p in around if p not in self.tried and self.evaluator.fits(p)]
        self.evaluator.worths(near, self.workers)
        for plan in near:
            self.tried[plan] = Trial(next(self.numbers), "refined", trial.point, plan, self.evaluator.worth(plan))

    def _steadied(self, found: Found) -> Found:
        """Of the plans about as fast as the one chosen, at its batch, the one that is fastest where the machine is now
        as profiled, now slower."""
        steadiness, best = Steadiness(self.evaluator), found.best
        for _ in range(_STEADY_ROUNDS):
            near = [
                trial
                for trial in self.tried.values()
                if trial.worth and trial.plan.batch == found.plan.batch
                if trial.worth.tokens_per_s >= (1.0 - _NEAR) * found.worth.tokens_per_s
            ]
            near = sorted(near, key=lambda trial: -trial.worth.tokens_per_s)[:_NEAREST]
            least = min(steadiness.mean_step_s(trial.plan) for trial in near)
            equals = [t for t in near if steadiness.mean_step_s(t.plan) <= (1.0 + _AS_STEADY) * least]
            steadiest = min(equals, key=lambda t: (t.worth.nvme_written_bytes_per_token, t.worth.ram_bytes))
            if steadiest.plan == best.plan:
                break
            best = steadiest
            self._try_around(best)
        return dataclasses.replace(found, best=best, trials=list(self.tried.values()))

    def _spent(self) -> bool:
        return self.evaluator.simulated >= self.wanted or self.evaluator.tasks >= _TASK_BUDGET

    # ---- proposals ----------------------------------------------------------------------------------------

    def _near_the_best(self, count: int) -> list[Point]:
        """Untried points that fit, a step or two from the plan the objective prefers or from the fastest."""
        tried = list(self.tried.values())
        best = [choose(tried, objective, None) for objective in (self.objective, "fastest")]
        centres = list(dict.fromkeys(found.best.point for found in best if found))
        near = (n for point in centres for n in self._neighbours(point))
        further = (q for point in centres for n in self._neighbours(point) for q in self._neighbours(n))
        untried = filter(self._untried, itertools.chain(near, further))
        if not self.shared:
            return list(dict.fromkeys(itertools.islice(untried, count)))
        # Others who share the study stand at the same best plans: the same neighbours in order would be theirs too.
        found = list(dict.fromkeys(itertools.islice(untried, 4 * count)))
        return self.random.sample(found, min(count, len(found)))

    def _neighbours(self, point: Point) -> list[Point]:
        if point not in self.neighbours:
            self.neighbours[point] = list(self.space.neighbours(point))
        return self.neighbours[point]

    def _anywhere(self, count: int) -> list[Point]:
        """Untried points that fit, at random."""
        found: list[Point] = []
        for _ in range(40 * count):
            point = tuple(self.random.randrange(len(axis.values)) for axis in self.space.axes)
            if len(found) < count and self._untried(point):
                found.append(point)
        return found

    def _untried(self, point: Point) -> bool:
        plan = self.space.plan(point)
        return plan not in self.tried and self.evaluator.fits(plan)

    # ---- trials -------------------------------------------------------------------------------------------

    def _ask(self) -> optuna.Trial:
        return self.study.ask(self.distributions)

    def _point(self, trial: optuna.Trial | optuna.trial.FrozenTrial) -> Point:
        params = trial.params  # A copy is made at each access.
        return tuple(params.get(axis.name, 0) for axis in self.space.axes)

    def _try(self, points: list[Point], origin: str, sampled: Sequence[optuna.Trial] = ()) -> None:
        """Reckon what points, and trials the sampler asked for, are worth; tell the study all of them."""
        proposals = [(self._point(trial), "sampler", trial) for trial in sampled]
        proposals += [(point, origin, None) for point in points]
        plans = [self.space.plan(point) for point, _, _ in proposals]
        self.evaluator.worths([plan for plan in plans if self.evaluator.fits(plan)], self.workers)
        for (point, whose, asked), plan in zip(proposals, plans, strict=True):
            worth = self.evaluator.worth(plan) if self.evaluator.fits(plan) else None
            self._tell(point, whose, asked, plan, worth)
            # Points may differ in what makes no difference: a knob that another one switches off.
            if plan not in self.tried:
                self.tried[plan] = Trial(next(self.numbers), whose, point, plan, worth)
        if self.progress:
            best = max((t.worth.tokens_per_s for t in self.tried.values() if t.worth), default=0.0)
            self.progress(min(self.evaluator.simulated, self.wanted), self.wanted, best)

    def _tell(self, point: Point, origin: str, asked: optuna.Trial | None, plan: Plan, worth: Worth | None) -> None:
        """Tell the study one trial: its worth, or by how much it doesn't fit."""
        state = self.optuna.trial.TrialState.COMPLETE if worth else self.optuna.trial.TrialState.PRUNED
        value = worth.tokens_per_s if worth else None
        constraints = {f"{tier} overflow": share for tier, share in self.evaluator.overflow(plan).items()}
        # For those who share the study: what the trial was, in full.
        about = {"origin": origin, "plan": knobs(plan), "worth": worth and dataclasses.asdict(worth)}
        attributes = about if self.shared else {}
        if asked is None:
            # Added whole. A queue of trials to ask for would be shared, and others could take what is ours.
            self.study.add_trial(
                self.optuna.trial.create_trial(
                    state=state,
                    value=value,
                    params={name: point[i] for i, name in self.open_axes},
                    distributions=self.distributions,
                    user_attrs=attributes,
                    constraints=constraints,
                )
            )
            return
        for name, overflow in constraints.items():
            asked.set_constraint(name, overflow)
        for name, attribute in attributes.items():
            asked.set_user_attr(name, attribute)
        self.study.tell(asked, value, state=state)

    def _all_trials(self) -> list[Trial]:
        """Every finished trial of the study, those of other processes included."""
        if not self.shared:
            return list(self.tried.values())
        found = []
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.is_finished() and "plan" in trial.user_attrs:
                point = self._point(trial)
                worth = trial.user_attrs.get("worth")
                found.append(
                    Trial(
                        trial.number,
                        trial.user_attrs["origin"],
                        point,
                        self.space.plan(point),
                        Worth(**worth) if worth else None,
                    )
                )
        return found
