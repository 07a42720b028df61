"""Why did this step take so long? Which lane had more to do than it should, and how much.

A step is slow beside its prediction, and once several were measured also beside their median: where the prediction is
off for good, that is explained once. What the lanes did is taken from the trainer's trace, beside what the prediction
has them do or, without one, what they did in the steps before.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slidetune.runtime.training.callbacks import Note, Predicted, StepDone
from slidetune.schedule import LANE_NAMES
from slidetune.trace import TraceRow
from slidetune.units import format_seconds

if TYPE_CHECKING:
    from slidetune.runtime.trainer import SlidingTrainer

# So many times as long as expected, and at least so much longer: shorter ones are the system's own unrest.
FACTOR, LEAST_S = 1.5, 0.25
# Medians are of so many steps, and mean something after so many.
_REMEMBERED, _ENOUGH = 50, 5
# After a look, for which training paused, so many steps go unjudged.
_REST = 3
# A cause must make up this share of the time that was lost.
_CAUSE = 0.25
_PREDICTION = "the prediction"

Work = Mapping[tuple[str, str], float]
"""Busy seconds of a step by lane and operation."""


class SlowSteps:
    """Judges one step after the other."""

    def __init__(self, predicted: Predicted | None) -> None:
        self._predicted = predicted
        self._per_token: deque[float] = deque(maxlen=_REMEMBERED)
        self._rest = 1  # The first step finds everything cold.

    def expected_s(self, tokens: int) -> tuple[float, str] | None:
        """What a step of so many tokens should take, and beside what that is; None where nothing is known."""
        median = statistics.median(self._per_token) * tokens if len(self._per_token) >= _ENOUGH else 0.0
        predicted = 0.0 if self._predicted is None else self._predicted.step_s
        if not max(median, predicted):
            return None
        return (median, "the median of the steps before") if median > predicted else (predicted, _PREDICTION)

    def look(self, trainer: SlidingTrainer, done: StepDone, *, paused: bool, saving: bool) -> Note | None:
        """An explanation of the step, if it was slow.

        `paused`: training stood still before or after it, so that its length means little. `saving`: a checkpoint was
        being written beside it.
        """
        if paused:
            return None
        expected = self.expected_s(done.tokens)
        self._per_token.append(done.step_s / done.tokens)
        if self._rest:
            self._rest -= 1
            return None
        if expected is None or done.step_s < max(FACTOR * expected[0], expected[0] + LEAST_S):
            return None
        self._rest = _REST
        # A step's time, from loss to loss, is the end of the step before and the beginning of its own.
        steps = work_by_step(trainer.trace)
        last = [steps[number] for number in (trainer.steps - 1, trainer.steps) if number in steps]
        before = [work for number, work in steps.items() if number < trainer.steps - 1]
        usual = self._predicted.work_s if expected[1] == _PREDICTION else _mean(before)
        return explained(done, *expected, last, usual, saving=saving)


def work_by_step(rows: Sequence[TraceRow]) -> dict[int, dict[tuple[str, str], float]]:
    """What each lane did in each step of a trace."""
    found: dict[int, dict[tuple[str, str], float]] = {}
    for row in rows:
        work = found.setdefault(row.step, {})
        key = (row.lane, row.op)
        work[key] = work.get(key, 0.0) + row.end_s - row.start_s
    return found


@dataclass(frozen=True, slots=True)
class _Excess:
    """The lane that worked longer than usual by most."""

    lane: str
    op: str
    """What that is mostly due to."""
    busy_s: float
    usual_s: float

    @property
    def more_s(self) -> float:
        return self.busy_s - self.usual_s


def explained(
    done: StepDone, expected_s: float, beside: str, last: Sequence[Work], usual: Work, *, saving: bool
) -> Note:
    """The explanation of a slow step. `last`: what lanes did in it and in the step before; `usual`: what they should
    have done in one, empty if nobody knows."""
    lost_s = done.step_s - expected_s
    fields = {"step_s": done.step_s, "expected_s": expected_s, "beside": beside, "waited_for_data_s": done.waited_s}
    fields |= {"cause": "unknown", "saving": saving}
    excess = max((_excess(work, usual) for work in last if work and usual), key=lambda e: e.more_s, default=None)
    more_s = 0.0 if excess is None else excess.more_s
    why = "no lane had more to do, so they waited for each other or for the processor"
    if done.waited_s > max(more_s, _CAUSE * lost_s):
        why = f"{format_seconds(done.waited_s)} of it waiting for its batch"
        fields["cause"] = "data"
    elif excess is not None and more_s > _CAUSE * lost_s:
        why = (
            f"{LANE_NAMES.get(excess.lane, excess.lane)} worked for {format_seconds(excess.busy_s)} in place of "
            f"{format_seconds(excess.usual_s)}, most of the difference in {excess.op}"
        )
        fields |= {"cause": "lane", "lane": excess.lane, "operation": excess.op}
        fields |= {"lane_s": excess.busy_s, "lane_expected_s": excess.usual_s}
    text = (
        f"Step {done.step:,} took {format_seconds(done.step_s)}, {done.step_s / expected_s:.1f} times "
        f"{format_seconds(expected_s)}, {beside}: {why}{'; a checkpoint was being written beside it' * saving}."
    )
    return Note(step=done.step, kind="slow_step", text=text, fields=fields)


def _excess(work: Work, usual: Work) -> _Excess:
    mine, theirs = _lanes(work), _lanes(usual)
    lane = max(mine, key=lambda name: mine[name] - theirs.get(name, 0.0))
    op = max((key for key in work if key[0] == lane), key=lambda key: work[key] - usual.get(key, 0.0))[1]
    return _Excess(lane, op, mine[lane], theirs.get(lane, 0.0))


def _lanes(work: Work) -> dict[str, float]:
    found: dict[str, float] = {}
    for (lane, _), seconds in work.items():
        found[lane] = found.get(lane, 0.0) + seconds
    return found


def _mean(steps: Sequence[Work]) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for work in steps:
        for key, seconds in work.items():
            found[key] = found.get(key, 0.0) + seconds / len(steps)
    return found
