"""Plans for hosts that drift: memory that others use too is now and then slower than it was when profiled.

Where CPU Adam only just keeps pace with the GPU, a plan loses as much as the host does; one with a little to spare
loses nothing. Of plans about as fast as each other, that one is better.
"""

from __future__ import annotations

import dataclasses

from slidetune.hardware import HardwareProfile
from slidetune.plans import Plan
from slidetune.tuner.evaluate import Evaluator

# How much slower: CPU Adam alone, timed after runs on five H200 hosts, was up to 9 % slower than profiled.
DRIFT = 0.08


def drifted(profile: HardwareProfile) -> HardwareProfile:
    """The machine at a moment when its CPU and RAM are 8 % slower."""
    host = profile.host
    slower = {
        name: dataclasses.replace(figure, value=figure.value * (1.0 - DRIFT))
        for name, figure in (
            ("adam_gparams_per_core", host.adam_gparams_per_core),
            ("dram_efficiency", host.dram_efficiency),
        )
    }
    return dataclasses.replace(profile, host=dataclasses.replace(host, **slower))


class Steadiness:
    """How fast plans are on a machine that is sometimes as profiled and sometimes slower."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.slower = Evaluator(evaluator.model, drifted(evaluator.profile))

    def mean_step_s(self, plan: Plan) -> float:
        """The mean of a plan's step with the machine as profiled and drifted."""
        return (self.evaluator.worth(plan).step_s + self.slower.worth(plan).step_s) / 2
